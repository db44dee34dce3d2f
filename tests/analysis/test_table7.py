"""The paper's table 7 beside what its models cost here."""
import sys

from mmseg_edaformer.analysis import table7
from tests.conftest import ROOT
from tests.processes import done, run_tool


def test_table7():
    """The paper's figures and what was tried stand beside each other."""
    def rows(*names, **options):
        text = table7.table(names, ROOT / 'configs', ('2', '2211-1', '211-222'),
                            input_size=(1024, 1024), **options)
        return [[cell.strip() for cell in line.split('|')[1:-1]]
                for line in text.splitlines()[3:-1]]

    _, _, first, second = rows('SegFormer', 'EDAFormer', every=True)
    assert (first[2], first[4], first[8]) == ('4.91', '151.7', '94.9')
    assert (first[6], second[6]) == ('2', '2211-1')
    assert float(first[7]) < float(second[7]) < float(first[3])
    assert rows('EDAFormer') == [second]


def test_table7_on_the_command_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    told = done('tools/table7.py', 'MiT', 'DaViT', '--isr-ratio', '2', '1-2')
    assert '117.4' in told
    assert 'pip install timm' in told
    assert 'no such column: ViT' in run_tool('tools/table7.py', 'ViT')[1]
