"""The paper's table 7 beside what its models cost here."""
import sys

from mmseg_edaformer.analysis import table7
from tests.conftest import ROOT
from tests.processes import run_tool


def test_table7():
    """At a small size, and with a model that cannot be built here."""
    ratios = ('2', '2211-1', '211-222')
    lines = table7.table(['SegFormer', 'EDAFormer'], ROOT / 'configs', ratios, every=True,
                         input_size=(256, 256)).splitlines()
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[3:-1]]
    assert [(row[0], row[6]) for row in cells] == [
        ('SegFormer', '2'), ('EDAFormer', '2'), ('EDAFormer', '2211-1')]
    assert cells[1][2] == '4.91'
    assert (cells[0][8], cells[1][4], cells[1][8]) == ('82.5', '151.7', '94.9')
    assert float(cells[1][7]) < float(cells[2][7]) < float(cells[1][3])
    [nearest] = table7.table(['EDAFormer'], ROOT / 'configs', ratios,
                             input_size=(256, 256)).splitlines()[3:-1]
    assert '| 2211-1 |' in nearest.replace('  ', '')


def test_table7_on_the_command_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    code, told = run_tool('tools/table7.py', 'MiT', 'DaViT', '--isr-ratio', '2', '1-2')
    assert code == 0, told
    assert '117.4' in told
    assert 'pip install timm' in told
    assert 'no such column: ViT' in run_tool('tools/table7.py', 'ViT')[1]
