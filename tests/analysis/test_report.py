"""The report of a run: counts against mmseg's metric, curves, the page, its files."""
import csv
import json
import logging
import os
import re
import signal
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample

from mmseg_edaformer.analysis import evaluation, report, report_plots, sweep_report
from mmseg_edaformer.analysis.counts import EXAMPLES, Evaluation
from mmseg_edaformer.analysis.evaluation import EvaluationHook
from tests.conftest import write_config
from tests.engine.test_resume import sending
from tests.engine.training import train
from tests.processes import done, finish, in_child

CLASSES = ('<b>&"', 'road $x^$', 'absent', 'tree', 'lamp')
PALETTE = tuple((40 * i, 255 - 40 * i, 90) for i in range(len(CLASSES)))


def draw_maps(count=12, classes=5, ignore=255):
    """Labels and predictions of some images; class 2 does not occur, 254 is no class."""
    draws = np.random.default_rng(3)
    for _ in range(count):
        labels = draws.integers(classes, size=(20, 30))
        labels[labels == 2] = 3
        predicted = np.where(draws.random(labels.shape) < draws.random(), labels,
                             draws.integers(classes, size=labels.shape))
        predicted[predicted == 2] = 0
        labels[0, :9], labels[1, :5] = ignore, 254
        yield torch.from_numpy(labels), torch.from_numpy(predicted)


def count(maps, classes=CLASSES, **settings):
    counts = Evaluation(classes, PALETTE[:1] * len(classes), size=len(maps), **settings)
    for i, (labels, predicted) in enumerate(maps):
        counts.add(f'{i}<i>.png', labels, predicted,
                   lambda i=i: np.full((40, 60, 3), 20 * i, np.uint8))
    return counts


def areas_of(labels, predicted, ignore=255):
    return IoUMetric.intersect_and_union(predicted, labels, len(CLASSES), ignore)


@pytest.mark.parametrize('ignore', [255, 0])
def test_counts_are_those_of_mmseg(ignore):
    maps = list(draw_maps(ignore=ignore))
    counts = count(maps, ignore_index=ignore)
    areas = [sum(parts) for parts in zip(*(areas_of(*pair, ignore) for pair in maps))]
    for own, area in zip((counts.correct, counts.labelled + counts.predicted - counts.correct,
                          counts.predicted, counts.labelled), areas):
        assert own.tolist() == area.tolist()
    figures = IoUMetric.total_area_to_metrics(*areas)
    np.testing.assert_allclose(counts.iou, figures['IoU'], rtol=1e-6)
    np.testing.assert_allclose(counts.accuracy, figures['Acc'], rtol=1e-6)
    assert np.isnan(counts.iou[2])
    assert counts.occurs.tolist() == [sum(bool(((labels == i) & (labels != ignore)).any())
                                          for labels, _ in maps) for i in range(len(CLASSES))]


def test_scores_and_examples():
    maps = list(draw_maps())
    counts = count([*maps, (torch.full((4, 4), 255), torch.zeros(4, 4, dtype=torch.long))])
    assert np.isnan(counts.images.pop().miou)
    for pair, image in zip(maps, counts.images, strict=True):
        areas = areas_of(*pair)
        present = areas[3] > 0
        assert image.miou == pytest.approx(
            100 * (areas[0][present] / areas[1][present]).mean().item(), rel=1e-5)
        assert image.accuracy == pytest.approx(100 * (areas[0].sum() / areas[3].sum()).item())
    scores = sorted(image.miou for image in counts.images)
    assert [example.score.miou for example in counts.worst] == scores[:EXAMPLES]
    assert [example.score.miou for example in counts.best] == scores[::-1][:EXAMPLES]
    example = counts.best[0]
    number = int(example.score.name.partition('<')[0])
    assert example.image.shape == (20, 30, 3)
    assert (example.image == 20 * number).all()
    labels, predicted = maps[number]
    assert (example.labels == torch.where(labels < 5, labels, -1).numpy()).all()
    assert (example.predicted == predicted.numpy()).all()


def test_processes_are_summed_without_what_is_given_twice(monkeypatch):
    images = 11
    maps = list(draw_maps(images))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(evaluation, 'get_dist_info', lambda rank=rank: (rank, 2))
        hook = EvaluationHook()
        hook.evaluation, hook.seen = Evaluation(CLASSES, PALETTE, size=images), 0
        for i in range(rank, rank + 2 * 6, 2):  # as mmengine's sampler deals them out
            labels, predicted = maps[i % images]
            sample = SegDataSample(metainfo=dict(img_path=f'{i % images}<i>.png'))
            sample.gt_sem_seg = PixelData(data=labels[None])
            sample.pred_sem_seg = PixelData(data=predicted[None])
            inputs = [torch.full((3, 40, 60), 20 * (i % images), dtype=torch.uint8)]
            hook.after_val_iter(None, 0, dict(inputs=inputs), [sample])
        parts.append(hook.evaluation)
    parts[0].merge(parts[1:])
    whole = count(maps)
    assert parts[0].matrix.tolist() == whole.matrix.tolist()
    assert parts[0].images == whole.images
    assert [own.score for own in parts[0].worst] == [example.score for example in whole.worst]
    assert parts[0].occurs.tolist() == whole.occurs.tolist()
    assert (parts[0].best[0].image == whole.best[0].image).all()


def test_images_without_labels(runner, tmp_path):
    hook = EvaluationHook()
    hook.evaluation, hook.seen = Evaluation(CLASSES, PALETTE, size=4), 0
    sample = SegDataSample(pred_sem_seg=PixelData(data=torch.zeros(1, 4, 4)))
    hook.after_test_iter(runner, 0, {}, [sample] * 4)
    hook.after_success(runner)
    page = check_page(tmp_path / 'report.html')
    assert 'Not evaluated: the 4 images have no labels' in page.says


def test_damaged_counts_are_not_loaded(tmp_path):
    path = tmp_path / 'counts.npz'
    count(list(draw_maps())).save(path)
    path.write_bytes(path.read_bytes()[:200])
    assert Evaluation.load(path) is None


def write_scalars(work, start, lines, cut=''):
    path = work / start / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines) + cut)


def train_lines(steps, loss):
    return [dict(loss=loss, lr=0.1, time=2., data_time=0.5, iter=step, step=step)
            for step in steps]


def test_curves_over_a_resume(tmp_path):
    # Killed after 50 while it wrote a line, with a checkpoint of 30; then once more at the end.
    write_scalars(tmp_path, '20260101_000000', [
        *train_lines((10, 20, 30), 3.), dict(mIoU=5., time=1., step=30),
        *train_lines((40, 50), 3.), dict(mIoU=float('nan'), time=1., step=50)], '{"loss": 2')
    write_scalars(tmp_path, '20260101_010000', train_lines((40,), 2.))
    write_scalars(tmp_path, '20260101_020000', [dict(mIoU=7., time=1., step=40)])
    (tmp_path / '20260101_030000' / 'vis_data').mkdir(parents=True)  # a test logs none
    curves = report_plots.read_curves(tmp_path)
    assert curves.of('loss') == {10: 3., 20: 3., 30: 3., 40: 2.}
    assert curves.of('val/mIoU') == {30: 5., 40: 7.}
    assert curves.starts == 3
    assert curves.lines[30] == {'data_time': 0.5, 'iter': 30, 'loss': 3., 'lr': 0.1, 'time': 2.,
                                'val/mIoU': 5., 'val/time': 1.}
    # Another training in the same folder.
    write_scalars(tmp_path, '20260102_000000', train_lines((10,), 9.))
    curves = report_plots.read_curves(tmp_path)
    assert (curves.of('loss'), curves.of('val/mIoU'), curves.starts) == ({10: 9.}, {}, 1)


class Page(HTMLParser):
    """Checks that every tag is closed, and collects what the page loads and its text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.loads, self.text, self.tags = [], [], [], []
        self.feed(path.read_text(encoding='utf-8'))
        assert not self.open
        self.says = ' '.join(' '.join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ('src', 'href', 'srcset', 'data')]
        if tag not in {'meta', 'link', 'img', 'br'}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'style' not in self.open:
            self.text.append(data)


def check_page(path):
    """A page that parses and loads nothing."""
    page = Page(path)
    assert page.loads
    assert all(address.startswith('data:') for address in page.loads)
    assert 'script' not in page.tags
    assert not re.search(r'url\(|@import', path.read_text(encoding='utf-8').partition('<body')[0])
    return page


def read_csv(path):
    with path.open(encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture
def runner(segmentor, tmp_path):
    """The attributes that a report reads of a runner that has tested."""
    return SimpleNamespace(
        model=segmentor, hooks=[], work_dir=str(tmp_path), cfg=Config(dict(note='</pre><script>')),
        test_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=[])), iter=0, max_iters=0,
        world_size=1, _load_from='a<b>.pth', logger=logging.getLogger('report'),
        message_hub=SimpleNamespace(runtime_info={}), log_processor=SimpleNamespace(by_epoch=False))


def test_names_are_escaped_and_those_of_an_earlier_report_go(runner, tmp_path):
    counts = count(list(draw_maps()))
    counts.metrics = {'mIoU': 50.}
    folder = tmp_path / 'report'
    folder.mkdir()
    (folder / 'isr.png').touch()
    page = check_page(report.Report(runner, counts, 'test', 70., compiled=True).write())
    assert 'b' not in page.tags[page.tags.index('section'):]
    for text in ('<b>&"', 'road $x^$', '<i>.png', 'a<b>.pth', '</pre><script>', '0:01:10',
                 'compiled anew'):
        assert text in page.says
    assert not (folder / 'isr.png').exists()
    rows = read_csv(folder / 'classes.csv')
    assert [row['class'] for row in rows] == list(CLASSES)
    assert rows[2]['IoU'] == ''
    matrix = np.loadtxt(folder / 'confusion.csv', int, delimiter=',', skiprows=1,
                        usecols=range(1, 6))
    assert (matrix == counts.matrix[:-1, :-1]).all()
    assert len(read_csv(folder / 'images.csv')) == 12


def test_many_classes(runner, tmp_path):
    names = tuple(f'class {i}' for i in range(171))
    counts = count(list(draw_maps(classes=171)), names)
    page = check_page(report.Report(runner, counts, 'test', 1.).write())
    assert all(f'{i} {name}' in page.says for i, name in enumerate(names))
    assert 'It could not be measured' in page.says  # the data set has no images
    assert (tmp_path / 'report.html').stat().st_size < 2 ** 20


def test_nothing_of_a_report_ends_a_run(runner, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(report_plots, 'read_curves', lambda folder: 1 / 0)
        EvaluationHook().after_success(runner)
    assert 'ZeroDivisionError' in caplog.text
    assert caplog.records[-1].levelname == 'ERROR'
    (tmp_path / 'report').write_text('a file where the folder belongs')
    EvaluationHook().after_success(runner)
    assert caplog.records[-1].levelname == 'WARNING'
    assert re.search(r'the run itself is complete: .*exists', caplog.text)


@pytest.fixture(scope='module')
def trained(scenes, tmp_path_factory):
    """A config and the work dir of two steps and, resumed, of three more, with the logs."""
    folder = tmp_path_factory.mktemp('report')
    config = write_config(folder, scenes)
    with config.open('a') as file:
        file.write('report = True\n')
    logs = [done('tools/train.py', config, '--work-dir', folder / 'work', *flags, '--verbose',
                 '--cfg-options', f'train_cfg.max_iters={steps}', f'train_cfg.val_interval={steps}',
                 f'default_hooks.checkpoint.interval={steps}', f'report={steps > 2}')
            for steps, flags in ((2, []), (5, ['--resume']))]
    return config, folder / 'work', logs


def test_a_training(trained):
    _, work, logs = trained
    assert 'Report: ' not in logs[0]
    assert f'Report: {work}/report.html' in logs[1]
    page = check_page(work / 'report.html')
    steps = read_csv(work / 'report' / 'curves.csv')
    assert [row['step'] for row in steps] == ['1', '2', '3', '4', '5']
    assert [bool(row['val/mIoU']) for row in steps] == [False, True, False, False, True]
    assert 'The run was started 2 times' in page.says
    # The figures of the page are those of the log.
    classes = read_csv(work / 'report' / 'classes.csv')
    table = re.findall(r'\|\s+(\w+)\s+\|\s+([\d.]+|nan)\s+\|\s+([\d.]+|nan)\s+\|', logs[1])
    assert len(table) == 8
    for row, (name, iou, accuracy) in zip(classes, table):
        assert row['class'] == name
        for own, logged in ((row['IoU'], iou), (row['Acc'], accuracy)):
            assert float(own or 'nan') == pytest.approx(float(logged), abs=0.006, nan_ok=True)
    miou = re.search(r'mIoU: ([\d.]+)', logs[1])[1][:-2]
    assert f'mIoU {miou}' in page.says
    ratios = {row['isr_ratio']: row for row in read_csv(work / 'report' / 'isr.csv')}
    assert ratios.keys() == {'none', '2211-222', '2', '3', '4', 'none+q2', '2+q2'}
    assert float(ratios['none']['miou']) == pytest.approx(float(miou), abs=0.006)
    assert {path.name for path in (work / 'report').iterdir()} >= {
        'loss.png', 'lr.png', 'metric.png', 'confusion.csv', 'images.csv', 'isr.png'}
    for text in ('data_preprocessor', 'parameters', 'ISR ratio none', 'iter_5.pth', 'waiting for'):
        assert text in page.says


def test_a_training_that_goes_on(scenes, tmp_path):
    """Each validation leaves a report, which that of the end replaces."""
    options = {'train_cfg.max_iters': 4, 'train_cfg.val_interval': 2, 'report': True,
               'default_hooks.checkpoint.interval': 2}
    pid = in_child(train, write_config(tmp_path, scenes), tmp_path / 'work', options=options,
                   before=sending(3, signal.SIGKILL), log=tmp_path / 'log')
    assert finish(pid) == -signal.SIGKILL
    report = tmp_path / 'work' / 'report.html'
    assert f'Report: {report}' in (tmp_path / 'log').read_text()
    page = check_page(report)
    for text in ('The run has not ended.', 'iterations 2 of 4', 'best: best_mIoU_iter_2.pth',
                 'From the last validation, after iteration 2', 'Not measured before the run ends'):
        assert text in page.says
    steps = read_csv(tmp_path / 'work' / 'report' / 'curves.csv')
    assert [bool(row['val/mIoU']) for row in steps] == [False, True]


def test_the_report_of_a_run_killed_before_it(trained, tmp_path):
    """The last validation is done, so a resumed run does none: its counts are kept."""
    config, work, _ = trained
    (work / 'report.html').rename(tmp_path / 'first.html')
    done('tools/train.py', config, '--work-dir', work, '--resume', '--cfg-options',
         'train_cfg.max_iters=5', 'train_cfg.val_interval=5')
    first, again = Page(tmp_path / 'first.html').says, check_page(work / 'report.html').says
    section = re.compile(r'Classes From the last validation.*Best 2')
    assert section.search(again)[0] == section.search(first)[0]


def test_a_test_with_a_ratio(trained, tmp_path):
    config, work, _ = trained
    done('tools/test.py', config, work / 'iter_5.pth', '--work-dir', tmp_path, '--isr-ratio', '3')
    page = check_page(tmp_path / 'report.html')
    row = next(row for row in read_csv(tmp_path / 'report' / 'isr.csv')
               if row['isr_ratio'] == '3')
    miou = float(re.search(r'mIoU (\d+\.\d+)', page.says)[1])
    assert float(row['miou']) == pytest.approx(miou, abs=0.006)
    for text in ('Test of mini', 'ISR ratio 3'):
        assert text in page.says
    assert 'Curves' not in page.says


def test_a_sweep_of_the_checkpoint_is_shown(tmp_path):
    (tmp_path / 'x.pth').touch()
    row = dict(zip(('isr_ratio', 'images', 'miou', 'change', 'change_low', 'change_high', 'gmacs',
                    'ms', 'time_vs_none'), ('2', 3, 40., -1., None, None, 1., 2., 0.5)))
    sweep = tmp_path / 'isr_sweep_5' / 'sweep.json'
    sweep.parent.mkdir()
    sweep.write_text(json.dumps(dict(checkpoint=str(tmp_path / 'x.pth'), rows=[row], images=3,
                                     images_of_test_set=4, input_size=[64, 96])))
    os.utime(tmp_path / 'x.pth', (1, 1))
    rows, note = sweep_report.find_sweep(tmp_path / 'x.pth', tmp_path)
    assert note == f'From {sweep}: 3 of 4 images, GMACs for 64x96 pixels.'
    assert [row.isr_ratio for row in rows] == ['2']
    os.utime(sweep, (0, 0))  # of an earlier checkpoint of this name
    assert sweep_report.find_sweep(tmp_path / 'x.pth', tmp_path) is None


@pytest.mark.slow
def test_a_classifier(classifier, tmp_path):
    done('tools/train.py', classifier, '--work-dir', tmp_path, '--cfg-options',
         'train_cfg.max_iters=3', 'train_cfg.val_interval=3', 'default_hooks.logger.interval=1',
         'report=True')
    page = check_page(tmp_path / 'report.html')
    for text in ('accuracy/top1', 'tools/test.py at each', 'Configuration', 'Environment', 'GMACs'):
        assert text in page.says
    assert {path.name for path in (tmp_path / 'report').iterdir()} == {
        'curves.csv', 'loss.png', 'lr.png', 'metric.png', 'validation.npz'}
    assert (tmp_path / 'report.html').stat().st_size < 2 ** 19
