"""The notebook docs/tour.ipynb runs from its first cell to its last."""
import matplotlib
from matplotlib import pyplot as plt

from tests.conftest import ROOT


def test_the_tour_runs(monkeypatch, capsys):
    import jupytext
    monkeypatch.setattr(plt, 'show', lambda: None)
    matplotlib.use('agg')
    code = jupytext.writes(jupytext.read(ROOT / 'docs' / 'tour.ipynb'), 'py')
    exec(compile(code, 'docs/tour.ipynb', 'exec'), {})
    printed = capsys.readouterr().out
    assert 'ISR 2 on 768x768 pixels' in printed
    assert 'ratio 4: ' in printed
    assert plt.gca().get_xlabel() == 'height and width in pixels'
    plt.close('all')
