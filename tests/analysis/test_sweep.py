"""Many ratios on the same images: the mIoU of tools/test.py, and what is recommended."""
import csv
import json
import os
import re
import shlex
import signal
from itertools import product

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.evaluation import IoUMetric
from mmseg.registry import MODELS
from PIL import Image

from mmseg_edaformer.analysis import bench as bench_module, sweep
from mmseg_edaformer.analysis.bench import Bench, mean_iou
from mmseg_edaformer.analysis.sweep import Goal, Row, advice
from mmseg_edaformer.cost import count_macs
from mmseg_edaformer.errors import ConfigError, DataError, RatioError
from mmseg_edaformer.isr import ISRRatio, isr
from tests.processes import done, finish, in_child, run_tool


@pytest.fixture(autouse=True)
def no_scales(monkeypatch):
    """Without the input scales, which have a test of their own."""
    monkeypatch.setattr(sweep, 'SCALES', ())


def miou_of_test(model, folder, ratio):
    """The mIoU that tools/test.py prints, of two decimals."""
    done('tools/test.py', *model, '--isr-ratio', ratio, '--work-dir', folder, '--json',
         folder / 'figures.json')
    return round(json.loads((folder / 'figures.json').read_text())['metrics']['mIoU'], 3)


def silent(*model, **options):
    return sweep.sweep(*model, **{'say': lambda text: None, **options})


def test_figures_are_those_of_the_test_tool(edaformer, tmp_path):
    rows = silent(*edaformer, isr_ratios=['4', '2221-441', 'none'], out=tmp_path / 'out')
    assert [row.isr_ratio for row in rows] == ['none', '2221-441', '4']  # by their cost
    assert len({round(row.miou, 2) for row in rows}) == 3
    assert round(rows[1].miou, 2) == miou_of_test(edaformer, tmp_path, '2221-441')
    model = MODELS.build(Config.fromfile(edaformer[0]).model)
    for row in rows:
        with isr(model, row.isr_ratio):
            assert row.gmacs == count_macs(model, (64, 96)) / 1e9
        assert row.change == row.miou - rows[0].miou
        assert row.ms == pytest.approx(rows[0].ms * row.time_vs_none)
        assert row.peak_mib > sum(p.numel() for p in model.parameters()) * 4 / 2**20
        assert row.change_low is None  # of 4 images
    assert rows[0].time_vs_none == 1
    figures = json.loads((tmp_path / 'out/sweep.json').read_text())
    assert figures['images'] == figures['images_of_test_set'] == 4
    assert figures['input_size'] == [64, 96]
    assert figures['rows'][2]['gmacs'] == pytest.approx(rows[2].gmacs, abs=1e-6)
    assert Image.open(tmp_path / 'out/sweep.png').size == (1320, 624)


def test_segformer(segformer, tmp_path, monkeypatch):
    """An encoder alone: ratios that differ in the decoder are one."""
    monkeypatch.setattr(sweep, '_MOST', 2)
    monkeypatch.setattr(sweep, '_WORTH', 0.)  # on small images no stage costs much
    rows = silent(*segformer, isr_ratios=['2211-222', '2211-333', 'greedy'], out=tmp_path,
                  samples=1, goal=Goal(max_drop=100))
    names = [row.isr_ratio for row in rows]
    assert {'none', '2211-1', 'none+q2111-1', 'none+q1121-1'} < set(names)
    assert {dial.partition('-')[2] for name in names for dial in name.split('+')} == {'', '1'}
    assert len(names) == len(set(names)) > 5
    best = min(rows, key=lambda row: row.gmacs).isr_ratio
    assert json.loads((tmp_path / 'sweep.json').read_text())['recommended'] == best


def test_queries_and_smaller_inputs(edaformer, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, 'SCALES', (0.5,))
    rows = {row.isr_ratio: row for row in silent(
        *edaformer, isr_ratios=['none', '2+q2', 'none+q2222-222'], out=tmp_path)}
    assert list(rows) == ['none', 'none+q2', '2+q2', 'scale 0.5']
    model = MODELS.build(Config.fromfile(edaformer[0]).model)
    assert rows['scale 0.5'].gmacs == pytest.approx(count_macs(model, (32, 64)) / 1e9, rel=0.05)
    with isr(model, 2, query_ratio=2):
        assert rows['2+q2'].gmacs == count_macs(model, (64, 96)) / 1e9
    assert len({row.miou for row in rows.values()}) > 1
    assert 'scale 0.5' in (tmp_path / 'sweep.csv').read_text()
    _, line = advice([*rows.values()], Goal(max_drop=100), rows['scale 0.5'], edaformer)
    assert 'images smaller by 0.5' in line
    assert 'tools/test.py' not in line
    assert not model.backbone._forward_pre_hooks


@pytest.mark.parametrize('nan_to_num', [None, 0])
def test_mean_iou_is_mmsegs(nan_to_num):
    rng = np.random.default_rng(0)
    metric = IoUMetric(nan_to_num=nan_to_num)
    metric.dataset_meta = dict(classes='abcdef')
    areas = []
    for _ in range(5):
        label, predicted = (torch.from_numpy(rng.integers(0, 5, (9, 9))) for _ in range(2))
        label[0] = 255
        found = IoUMetric.intersect_and_union(predicted, label, 6, 255)
        metric.results.append(found)
        areas.append(torch.stack(found[:2]).numpy())
    wanted = metric.compute_metrics(metric.results)['mIoU']  # the sixth class does not occur
    assert round(float(mean_iou(np.sum(areas, 0), nan_to_num)), 2) == wanted


def test_interval_is_paired_and_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(0)
    union = rng.integers(50, 1000, (30, 4))
    trained = np.stack([(union * rng.uniform(0.2, 0.9, (30, 4))).astype(int), union], 1)
    worse = trained.copy()
    worse[:, 0] -= (trained[:, 0] * rng.uniform(0, 0.1, (30, 4))).astype(int)
    assert sweep.change_interval(trained, trained) == (0, 0)
    plain = []
    for drawn in rng.integers(0, 30, (2000, 30)):
        own, other = (mean_iou(areas[drawn].sum(0)) for areas in (worse, trained))
        plain.append(own - other)
    low, high = sweep.change_interval(worse, trained)
    assert (low, high) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.12)
    assert low < mean_iou(worse.sum(0)) - mean_iou(trained.sum(0)) < high < 0


def test_pareto():
    points = [(3, 40.), (2, 40.), (2, 39.), (1, 30.), (5, 41.), (1, 30.)]
    assert sweep.pareto(points) == [False, True, False, True, True, True]


class Known(Bench):
    """A bench whose GMACs and losses are known: each stage adds its own, by its multiplier."""

    def __init__(self, saves, loses, stages):
        self.saves, self.loses, self.stages, self.passes = saves, loses, stages, []
        self.has_queries = False

    def ratio(self, value):
        ratio = ISRRatio.parse(value)
        parts = [ratio.for_stages(kind, count) for kind, count in self.stages.items()]
        return ISRRatio.parse(parts[0][0]) if len(set(sum(parts, ()))) == 1 else ISRRatio(*parts)

    def _sum(self, ratio, values):
        own = sum((ratio.for_stages(*stage) for stage in self.stages.items()), ())
        return sum(value * (1 - 1 / multiplier) for value, multiplier in zip(values, own))

    def gmacs(self, ratio):
        return 10 - self._sum(ratio, self.saves)

    def milliseconds(self, ratio):
        return 5 * self.gmacs(ratio)

    def miou(self, ratio):
        return 50 - self._sum(ratio, self.loses)

    def measure(self, ratios, title=''):
        self.passes.append([str(ratio) for ratio in ratios])


def rows_of(bench, ratios):
    return [Row(str(ratio), 1, bench.miou(ratio), bench.miou(ratio) - 50, None, None,
                bench.gmacs(ratio), bench.milliseconds(ratio), 1.) for ratio in ratios]


def all_ratios(bench):
    encoder, decoder = (list(product(range(1, 5), repeat=bench.stages[kind]))
                        for kind in ('encoder', 'decoder'))
    return [bench.ratio(ISRRatio(e, d)) for e in encoder for d in decoder]


@pytest.fixture
def known():
    # The second stage saves most for its loss; the last one costs much and saves nothing.
    return Known((2., 4., 1., 0.), (2., 1., 0.5, 3.), dict(encoder=2, decoder=2))


def test_greedy_search_for_a_drop(known):
    goal = Goal(max_drop=1.2)
    tried = sweep.search(known, [known.ratio(2)], goal, greedy=True)
    best = sweep.recommend(rows_of(known, tried), goal)
    assert known.passes[0] == ['none', '2', '21-11', '12-11', '11-21']  # the last saves nothing
    assert known.passes[2] == ['22-11', '13-11', '12-21']  # 12-11 was the best step
    optimum = min((ratio for ratio in all_ratios(known) if 50 - known.miou(ratio) <= 1.2),
                  key=known.gmacs)
    assert best.isr_ratio == str(optimum)


@pytest.mark.parametrize('goal', [Goal(budget_gmacs=5.5), Goal(budget_ms=27.5)])
def test_greedy_search_for_a_budget(known, goal):
    tried = sweep.search(known, [], goal, greedy=True)
    rows = rows_of(known, tried)
    best = sweep.recommend(rows, goal)
    assert best.gmacs <= 5.5
    optimum = max(known.miou(ratio) for ratio in all_ratios(known) if known.gmacs(ratio) <= 5.5)
    assert best.miou == pytest.approx(optimum, abs=0.3)


def test_search_ends(known):
    tried = sweep.search(known, [], Goal(), greedy=True)
    assert min(map(known.gmacs, tried)) <= known.gmacs(known.ratio(2))
    assert len(tried) < 25
    known.passes.clear()
    assert len(sweep.search(known, [known.ratio(3)], Goal(), greedy=False)) == 2
    assert known.passes == [['none', '3']]
    known.passes.clear()  # a time that cannot be met ends it at once
    goal = Goal(budget_ms=20)
    tried = sweep.search(known, [], goal, greedy=True)
    assert len(known.passes) == 1
    assert sweep.recommend(rows_of(known, tried), goal) is None
    for drop, best in ((50, '44-41'), (0, 'none')):  # one that nothing exceeds: 4 where it saves
        goal = Goal(max_drop=drop)
        rows = rows_of(known, sweep.search(known, [], goal, greedy=True))
        assert sweep.recommend(rows, goal).isr_ratio == best


def test_an_impossible_time_names_the_fastest(edaformer, tmp_path):
    with pytest.raises(ConfigError, match=r'--budget-ms 0\.001: the fastest ratio here, \S+, '
                                          r'takes [\d.]+ ms'):
        silent(*edaformer, isr_ratios=['2'], out=tmp_path, samples=1, goal=Goal(budget_ms=0.001))
    assert (tmp_path / 'sweep.csv').is_file()  # the figures are there all the same


def test_goals_that_mean_nothing():
    with pytest.raises(ConfigError, match='--max-drop and --budget-ms exclude each other'):
        Goal(max_drop=1, budget_ms=3)
    with pytest.raises(ConfigError, match='--max-drop -1: give a number above 0'):
        Goal(max_drop=-1)


@pytest.mark.parametrize(('options', 'error', 'told'), [
    (dict(isr_ratios=['22-222']), RatioError, 'has 2 multipliers for the encoder, which has 4'),
    (dict(samples=0), ConfigError, '--samples 0: give 1 or more'),
    (dict(cfg_options={'test_dataloader.dataset.data_root': 'gone'}), DataError,
     'test set is not where the config says: gone'),
    (dict(cfg_options={'test_evaluator.type': 'DepthMetric'}), ConfigError, 'has no IoUMetric'),
    (dict(goal=Goal(budget_gmacs=1e-6)), ConfigError, r'the cheapest ratio here, 4\+q4, costs'),
    (dict(isr_ratios=['2'], cfg_options={'test_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]}), DataError,
     'has no labels to compare with'),
])
def test_clear_errors(options, error, told, edaformer, tmp_path):
    with pytest.raises(error, match=told):
        silent(*edaformer, out=tmp_path, **options)
    assert not list(tmp_path.glob('*'))


def predictions(monkeypatch, until=None, end=None):
    """Count predictions, and end after so many."""
    done = []
    predict = Bench._predict

    def counted(self, data, name, ratio):
        if len(done) == until:
            end()
        done.append(name)
        return predict(self, data, name, ratio)

    monkeypatch.setattr(Bench, '_predict', counted)
    return done


def interrupt():
    raise KeyboardInterrupt


def test_an_interrupted_sweep_reports_and_resumes(edaformer, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, 'draw', lambda *drawn: None)
    options = dict(isr_ratios=['2', '3'], out=tmp_path / 'out')
    wanted = silent(*edaformer, isr_ratios=['2', '3'], out=tmp_path / 'whole')
    said = []
    with monkeypatch.context() as patch:
        predictions(patch, 8, interrupt)
        with pytest.raises(KeyboardInterrupt):
            silent(*edaformer, **options, say=said.append)
    assert '2 of 4 images, batch 1' in said[0]
    assert said[-1] == 'Interrupted: the same command resumes from here'
    with open(tmp_path / 'out/sweep.csv', newline='') as file:
        assert [(line['isr_ratio'], line['images']) for line in csv.DictReader(file)] == [
            ('none', '2'), ('2', '2'), ('3', '2')]
    done = predictions(monkeypatch)
    rows = silent(*edaformer, **options)
    assert len(done) == 6  # of the other two images
    assert [row.miou for row in rows] == [row.miou for row in wanted]
    # More ratios, another goal: what is there is not predicted again, but none for the times.
    done.clear()
    silent(*edaformer, isr_ratios=['2', '4'], goal=Goal(max_drop=99), out=tmp_path / 'out')
    assert sorted(done) == ['4'] * 4 + ['none'] * 4
    done.clear()
    silent(*edaformer, isr_ratios=['2'], out=tmp_path / 'out', samples=1,
           cfg_options={'model.backbone.drop_path_rate': 0.2})
    assert sorted(done) == ['2', 'none']  # another model: anew


def test_a_killed_sweep_resumes(edaformer, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, '_SAVE_SECONDS', 0.)
    monkeypatch.setattr(sweep, 'draw', lambda *drawn: None)

    def killed():
        predictions(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGKILL))
        silent(*edaformer, isr_ratios=['2'], out=tmp_path)

    assert finish(in_child(killed)) == -signal.SIGKILL
    done = predictions(monkeypatch)
    rows = silent(*edaformer, isr_ratios=['2'], out=tmp_path)
    assert len(done) == 2
    (tmp_path / 'sweep.npz').write_bytes(b'PK\x03\x04 damaged')
    assert [row.miou for row in silent(*edaformer, isr_ratios=['2'], out=tmp_path)] == [
        row.miou for row in rows]
    assert len(done) == 10


def test_command_line(edaformer, tmp_path):
    told = done('tools/isr_sweep.py', *edaformer, '--max-drop', 100, '--samples', 2,
                '--isr-ratio', 'none', '4', '--out', tmp_path, '--cfg-options',
                'model.test_cfg.memory_mib=64')
    assert re.search(r'^--max-drop 100: take 4: mIoU [\d.]+ \([+-][\d.]+\), [\d.]+ GMACs '
                     r'\(-[\d.]+%\)', told, re.M)
    assert told.splitlines()[-1] == shlex.join([
        'python', 'tools/test.py', *edaformer, '--isr-ratio', '4', '--cfg-options',
        'model.test_cfg.memory_mib=64'])
    output = run_tool('tools/isr_sweep.py', *edaformer, '--ratios', 'none', '4')[1]
    assert 'error: --ratios is now --isr-ratio' in output
