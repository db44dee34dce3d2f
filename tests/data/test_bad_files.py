"""Bad files that are skipped on request, listed and counted."""
import multiprocessing
import os
import shutil

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

from mmseg_edaformer.data import LoadSegImage
from mmseg_edaformer.data.bad_files import SkipList, SkippedFilesHook, skip_bad_files
from mmseg_edaformer.errors import ConfigError, DataError
from tests.conftest import write_config


def list_files(path, names, reason):
    bad = SkipList(str(path))
    for name in names:
        bad.add(name, DataError(reason))
        bad.in_a_row = 0


def test_several_processes_write_whole_lines(tmp_path):
    path, context = tmp_path / 'new' / 'skipped.txt', multiprocessing.get_context('fork')
    workers = [context.Process(target=list_files, args=(
        path, [f'{number}/{file}\n' for file in range(90)], 'x' * 500)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(path.read_text().splitlines()) == sorted(
        f'{worker}/{file}\t{"x" * 500}' for worker in range(3) for file in range(90))


def test_a_process_lists_a_file_once_and_ends_when_all_are_bad(tmp_path):
    path = tmp_path / 'skipped.txt'
    load = LoadSegImage(skip_list=str(path))
    for _ in range(98):
        assert load.transform(dict(img_path='/gone/a.png')) is None
    assert path.read_text() == '/gone/a.png\timage not found: /gone/a.png\n'
    good = tmp_path / 'good.png'
    Image.new('L', (4, 4)).save(good)
    assert load.transform(dict(img_path=str(good)))['ori_shape'] == (4, 4)
    for _ in range(99):
        load.transform(dict(img_path='/gone/a.png'))
    with pytest.raises(DataError, match=r'100 files in a row could not be read.*skipped'):
        load.transform(dict(img_path='/gone/a.png'))


@pytest.fixture
def planted(scenes, tmp_path):
    """A copy of the scenes with bad files, and their paths."""
    root = tmp_path / 'data'
    shutil.copytree(scenes, root)
    cut, empty = root / 'images/training/00001.png', root / 'images/validation/00002.png'
    cut.write_bytes(cut.read_bytes()[:2000])
    empty.write_bytes(b'')
    wrong = [root / f'annotations/{split}.png' for split in ('training/00004', 'validation/00000')]
    for mask in wrong:
        Image.fromarray(np.full((64, 96), 99, np.uint8)).save(mask)
    return root, [str(path) for path in (cut, wrong[0])], [str(path) for path in (empty, wrong[1])]


def runner_of(folder, data, name, run='train', skip=True, tta=False):
    """A runner of the mini config that skips bad files."""
    folder.mkdir(exist_ok=True)
    cfg = Config.fromfile(write_config(folder, data, iterations=7))
    if tta:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(cfg.tta_model, module=cfg.model)
    cfg.work_dir, cfg.experiment_name = str(folder / 'work'), f'{folder.name}_{name}'
    cfg.launcher = 'none'
    if skip:
        skip_bad_files(cfg, cfg.work_dir, run)
    return Runner.from_cfg(cfg)


def listed(path):
    """The files of a list."""
    return sorted({line.split('\t')[0] for line in path.read_text().splitlines()})


@pytest.mark.slow
def test_a_training_goes_on(planted, tmp_path, capfd):
    data, training, validation = planted
    (tmp_path / 'run' / 'work').mkdir(parents=True)
    skipped = tmp_path / 'run' / 'work' / 'skipped_train.txt'
    skipped.write_text('of an earlier run\t...\n')
    runner = runner_of(tmp_path / 'run', data, 'goes_on')
    runner.train()
    assert runner.iter == 7
    assert listed(skipped) == sorted(training + validation)
    output = capfd.readouterr()
    log = output.out + output.err
    for path in training + validation:
        assert log.count(f'skipped: image cannot be decoded: {path}') + log.count(
            f'skipped: mask {path} holds the label 99') == 1
    assert f'4 files were skipped, listed in {skipped}' in log


@pytest.mark.slow
def test_a_test_is_that_of_the_good_files(planted, tmp_path):
    data, _, validation = planted
    skipping = runner_of(tmp_path / 'skipping', data, 'test', 'test')
    figures = skipping.test()
    assert listed(tmp_path / 'skipping' / 'work' / 'skipped_test.txt') == validation[::-1]
    for folder in ('images', 'annotations'):
        for name in ('00002', '00000'):
            (data / folder / 'validation' / f'{name}.png').unlink()
    good = runner_of(tmp_path / 'good', data, 'test', skip=False)
    good.model.load_state_dict(skipping.model.state_dict())
    assert len(good.test_dataloader.dataset) == 2
    assert good.test() == figures
    assert figures['mIoU'] > 0
    assert not (tmp_path / 'skipping' / 'work' / 'skipped_train.txt').exists()


class Fake:
    """What the hook asks of a runner."""

    def __init__(self, **cfg):
        self.cfg, self.world_size, self.messages = Config(cfg), 2, []
        self.logger = self

    def warning(self, message):
        self.messages.append(message)


def test_the_hook_looks_every_50_iterations_and_stops_when_too_many_are_bad(tmp_path):
    path, batch = tmp_path / 'skipped.txt', dict(inputs=[None])
    hook, runner = SkippedFilesHook(str(path)), Fake()
    hook.before_run(runner)
    list_files(path, map(str, range(10)), 'is bad')
    for index in range(49):
        hook.after_train_iter(runner, index, batch)
    assert runner.messages == []
    hook.after_train_iter(runner, 49, dict(inputs=[[None], [None]]))  # two views of an image
    assert runner.messages == ['skipped: is bad'] * 10
    with path.open('a') as file:
        file.write('3\tby another process\nhalf a li')
    hook.after_train(runner)
    assert runner.messages[10:] == [f'10 files were skipped, listed in {path}']
    with path.open('a') as file:
        file.write('ne\tbad\n')
    with pytest.raises(DataError, match=r'11 files were skipped in 100 samples, more than 10%'):
        hook.after_train(runner)
    assert runner.messages[11:] == ['skipped: bad']
    list_files(path, map(str, range(10, 40)), 'is bad')
    runner.world_size = 100
    for index in range(50):  # the log is not flooded
        hook.after_train_iter(runner, index, batch)
    assert runner.messages[12:] == ['skipped: is bad'] * 10 + [f'skipped: 20 more, see {path}']


def test_a_new_run_starts_a_new_list_and_a_resumed_one_goes_on(tmp_path):
    path, resumed = tmp_path / 'skipped.txt', Fake(resume=True)
    list_files(path, '12', 'is bad')
    hook = SkippedFilesHook(str(path))
    hook.before_run(resumed)
    list_files(path, '23', 'is bad')
    hook.after_train(resumed)
    assert resumed.messages == ['skipped: is bad', f'3 files were skipped, listed in {path}']
    SkippedFilesHook(str(path)).before_run(Fake(resume=False))
    assert not path.exists()


def test_the_config_of_every_loader(tmp_path):
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadSegLabels')]
    val = dict(dataset=dict(type='ConcatDataset', datasets=[
        dict(pipeline=steps), dict(type='RepeatDataset', dataset=dict(pipeline=steps))]))
    cfg = Config(dict(
        train_dataloader=dict(dataset=dict(pipeline=steps)), val_dataloader=val,
        test_dataloader=val, test_pipeline=steps,
        tta_pipeline=[steps[0], dict(type='TestTimeAug', transforms=[[steps[1]]])],
        custom_hooks=[dict(type='SkippedFilesHook', skip_list='old'), dict(type='ISRHook')]))
    cfg.test_dataloader = cfg.val_dataloader
    skip_bad_files(cfg, 'work')
    path = os.path.join('work', 'skipped_train.txt')
    blank, another = dict(skip_list=path, blank=True), dict(skip_list=path, blank=False)
    able = [dict(type='LoadSegImage'), dict(type='LoadSegLabels')]
    assert cfg.train_dataloader.dataset.pipeline == [{**step, **another} for step in able]
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        first, second = loader.dataset.datasets
        assert first.pipeline == second.dataset.pipeline == [{**step, **blank} for step in able]
    assert cfg.tta_pipeline[0] == {**able[0], **blank}
    assert cfg.tta_pipeline[1].transforms == [[{**able[1], **blank}]]
    assert cfg.test_pipeline == steps  # for prediction
    assert cfg.custom_hooks == [dict(type='ISRHook'),
                                dict(type='SkippedFilesHook', skip_list=path)]


@pytest.mark.parametrize(('settings', 'flag'), [
    (dict(test_evaluator=dict(type='IoUMetric', output_dir='out')), '--out'),
    (dict(val_evaluator=[dict(type='IoUMetric'), dict(type='X', output_dir='out')]), '--out'),
    (dict(default_hooks=dict(visualization=dict(draw=True))), '--show-dir')])
def test_what_would_write_a_blank_image(settings, flag):
    with pytest.raises(ConfigError, match=f'--skip-bad-files and {flag}|or {flag}'):
        skip_bad_files(Config(settings), 'work')


@pytest.mark.slow
def test_a_test_with_augmentation(planted, tmp_path):
    data, _, validation = planted
    runner = runner_of(tmp_path / 'tta', data, 'tta', 'test', tta=True)
    assert runner.test()['mIoU'] >= 0
    assert listed(tmp_path / 'tta' / 'work' / 'skipped_test.txt') == validation[::-1]
    [hook] = [hook for hook in runner.hooks if isinstance(hook, SkippedFilesHook)]
    assert hook.samples == 4
