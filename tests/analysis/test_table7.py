"""The paper's table 7 beside what its models cost here."""
import sys

from mmseg_edaformer.analysis import table7
from tests.conftest import ROOT
from tests.processes import run_tool


def test_table7():
    """At a small size; the paper's figures and what was tried stand beside each other."""
    rows = [table7.measure(row, ROOT / 'configs', ('2', '2211-1', '211-222'), (256, 256))
            for row in table7.TABLE7 if row.name in ('SegFormer', 'EDAFormer')]
    edaformer = rows[1]
    assert edaformer.parameters == 4_913_015
    assert set(edaformer.reduced) == {'2', '2211-1'}
    assert edaformer.reduced['2'] < edaformer.reduced['2211-1'] < edaformer.gmacs
    assert edaformer.nearest == '2211-1'
    text = table7.table(rows)
    assert '94.9' in text
    assert '82.5' in text
    assert 'EDAFormer' in table7.tried_table(rows)


def test_table7_shows_what_it_cannot_measure(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    row, = (row for row in table7.TABLE7 if row.name == 'DaViT')
    found = table7.measure(row, ROOT / 'configs')
    assert 'pip install timm' in table7.table([found])
    assert table7.Measured(row, 1, 2., {'2': 2.}).note == 'ISR reduces nothing'
    assert table7.Measured(row, 1, 2., {'2': 1., '1-2': 1.}).note == 'the encoder is not reduced'


def test_table7_on_the_command_line():
    code, told = run_tool('tools/table7.py', 'MiT', '--isr-ratio', '2', '1-2', '--all')
    assert code == 0, told
    assert '117.4' in told
    assert 'paper with ISR' in told
    assert 'no such column: ViT' in run_tool('tools/table7.py', 'ViT')[1]
