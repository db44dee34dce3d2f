"""Checkpoints on bad disks, in moved folders and among damaged files."""
import errno
import os
import re
import resource
import shutil
import time

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmseg_edaformer.engine import checkpoint_hook, find_checkpoint
from mmseg_edaformer.errors import CheckpointError, ConfigError
from tests.engine.training import differences, run_to_end, state, train
from tests.processes import finish, in_child


@pytest.fixture
def work(whole, tmp_path):
    """A copy of a finished run, to damage: iter_9.pth and iter_12.pth."""
    return shutil.copytree(whole, tmp_path / 'work')


def names(folder):
    return sorted(path.name for path in folder.glob('*.pth'))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def come_from_the_future(path):
    content = torch.load(path, weights_only=True)
    content['meta']['mmseg_edaformer'] = dict(format=99, version='7.1')
    torch.save(content, path)


@pytest.mark.parametrize(('damage', 'why'), [
    (lambda path: path.write_bytes(path.read_bytes()[:-5000]), 'damaged'),
    (flip_a_bit, 'damaged'), (come_from_the_future, '7.1'),
    (lambda path: path.write_text('<html>'), 'not a checkpoint'),
    (lambda path: torch.save(dict(state_dict={'w': torch.ones(2)}), path),
     'not the state of a training')])
def test_the_newest_that_loads(work, monkeypatch, damage, why):
    damage(work / 'iter_12.pth')
    messages = []
    monkeypatch.setattr(checkpoint_hook, 'print_log', lambda message, **_: messages.append(message))
    assert find_checkpoint(work) == str(work / 'iter_9.pth')
    assert len(messages) == 1
    assert re.search(rf'Not resumed: .*iter_12.pth.*{why}', messages[0])
    damage(work / 'iter_9.pth')
    with pytest.raises(CheckpointError, match=r'none of the 2 checkpoints in .* can be resumed'):
        find_checkpoint(work)


def test_checkpoints_elsewhere_are_found_by_the_pointer(work, tmp_path):
    assert (work / 'last_checkpoint').read_text() == 'iter_12.pth'
    (tmp_path / 'far').mkdir()
    for name in 'iter_9.pth', 'iter_12.pth':
        shutil.copy(work / name, tmp_path / 'far')
        (work / name).rename(work / f'.{name[:-4]}.1.partial.pth')
    assert find_checkpoint(work) is None  # neither the best one nor those half-written
    (work / 'last_checkpoint').write_text('../far/iter_12.pth')
    assert find_checkpoint(work).endswith('far/iter_12.pth')
    assert find_checkpoint(tmp_path / 'none') is None


def test_another_run_in_the_same_folder(work):
    """What counts is the last run, up to where it came, not the highest number."""
    now = time.time()
    for name, age in (('iter_9.pth', 9), ('iter_12.pth', 9), ('last_checkpoint', 5)):
        os.utime(work / name, (now - age, now - age))
    (work / 'iter_12.pth').rename(work / 'iter_400.pth')  # of an earlier run
    shutil.copy(work / 'iter_9.pth', work / 'iter_3.pth')
    (work / 'last_checkpoint').write_text('iter_3.pth')
    os.utime(work / 'last_checkpoint', (now - 5, now - 5))
    os.utime(work / 'iter_3.pth', (now - 6, now - 6))
    assert find_checkpoint(work) == str(work / 'iter_3.pth')
    # A kill between the checkpoint and the note of it.
    shutil.copy(work / 'iter_9.pth', work / 'iter_6.pth')
    assert find_checkpoint(work) == str(work / 'iter_6.pth')
    # One that started anew and was started again before its first checkpoint.
    assert find_checkpoint(work, since=now + 60) is None


POINTERS = [
    *(name.encode() for name in (
        'iter_15.pth', '/gone/iter_4.pth', '../iter_15.pth', 'iter_' + '9' * 5000 + '.pth',
        'a/' * 3000 + 'iter_15.pth', 'loop', 'folder_7.pth', 'dangling_99.pth',
        '/proc/1/root/iter_15.pth', '/dev/zero', '/etc/passwd', '..', '', '~root/iter_15.pth',
        's3://x/iter_15.pth', 'best_mIoU_iter_6.pth', 'iter_30.pth\niter_35.pth', '\x1b[31m')),
    b'iter_30.pth\0.pth', b'\xff\xfe']
"""What last_checkpoint may hold by accident or malice, beside sound checkpoints."""


@pytest.fixture
def sound(tmp_path):
    """A folder of checkpoints of steps 30, 35 and 40 that can be resumed."""
    for step in (30, 35, 40):
        torch.save(dict(state_dict={'w': torch.ones(2)}, meta=dict(iter=step), optimizer={}),
                   tmp_path / f'iter_{step}.pth')
    return tmp_path


@pytest.mark.parametrize('content', [*POINTERS, 'folder', 'loop', 'pipe'],
                         ids=lambda content: repr(content[:20]))
def test_a_pointer_to_no_checkpoint(sound, monkeypatch, content):
    """The newest sound one is taken, and one line says what is wrong."""
    messages = []
    monkeypatch.setattr(checkpoint_hook, 'print_log', lambda message, **_: messages.append(message))
    for name, target in (('loop', 'loop'), ('dangling_99.pth', 'none')):
        (sound / name).symlink_to(target)
    (sound / 'folder_7.pth').mkdir()
    pointer = sound / 'last_checkpoint'
    if isinstance(content, bytes):
        pointer.write_bytes(content)
    else:
        {'folder': pointer.mkdir, 'pipe': lambda: os.mkfifo(pointer),
         'loop': lambda: pointer.symlink_to(pointer)}[content]()
    assert find_checkpoint(sound) == str(sound / 'iter_40.pth')
    line, = (line for line in messages if not line.startswith('Not resumed: '))
    assert re.search(r'last_checkpoint (cannot be read|names .*, which is no checkpoint here): '
                     'looking for the newest one that loads', line, re.S)
    assert line.isprintable()
    assert len(line) < 1500


def test_a_sound_one_of_an_earlier_run_wins_over_none(sound):
    """As when a run that started anew left but a damaged one."""
    now = time.time()
    for path in sound.iterdir():
        os.utime(path, (now - 9, now - 9))
    (sound / 'iter_3.pth').write_text('<html>')
    (sound / 'last_checkpoint').write_text('iter_3.pth')
    assert find_checkpoint(sound) == str(sound / 'iter_40.pth')
    assert find_checkpoint(sound, since=now + 60) is None


@HOOKS.register_module()
class FullDiskHook(Hook):
    """No file may grow over 100 kB between two iterations."""

    def __init__(self, start, end):
        self.start, self.end = start, end

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        full = self.start <= runner.iter < self.end
        resource.setrlimit(resource.RLIMIT_FSIZE,
                           (100_000 if full else hard, hard))


def test_a_full_disk_costs_one_checkpoint(config, whole, tmp_path):
    work = tmp_path / 'work'
    work.mkdir()
    log = run_to_end(config, work, before=lambda cfg: cfg.custom_hooks.append(
        dict(type='FullDiskHook', start=4, end=8)))
    assert re.search(r'iter_6.pth could not be written to .*: File too large. .*iter_3.pth is '
                     'kept; the run continues', log)
    assert 'the best checkpoint could not be written' in log
    assert names(work) == ['best_mIoU_iter_12.pth', 'iter_12.pth', 'iter_9.pth']
    assert not list(work.glob('.*partial*'))
    assert differences(state(whole)['weights'], state(work)['weights']) == []


def read_only(cfg):
    """From the third checkpoint on, as after a network file system has gone read-only."""
    put, count = checkpoint_hook.SafeLocalBackend.put, 0

    def refuse(self, obj, filepath):
        nonlocal count
        count += 1
        if count > 2:
            raise OSError(errno.EROFS, 'Read-only file system', filepath)
        put(self, obj, filepath)

    checkpoint_hook.SafeLocalBackend.put = refuse


def test_a_folder_that_cannot_be_written_any_more(config, tmp_path):
    work, log = tmp_path / 'work', tmp_path / 'log'
    assert finish(in_child(train, config, work, log=log, before=read_only)) == 1
    assert re.search('iter_9.pth could not be written to .*: Read-only file system. .*iter_6.pth '
                     'is kept; the run continues', log.read_text())
    assert re.search('error: the last checkpoint of this training could not be written .*make '
                     'room.*--resume; .*iter_6.pth is kept', log.read_text())
    assert names(work) == ['iter_3.pth', 'iter_6.pth']


def test_figures_that_cannot_be_written(config, tmp_path):
    def full(cfg):
        checkpoint_hook.SafeLocalVisBackend._scalar_save_file = property(
            lambda self: '/dev/full', lambda self, path: None)

    log = run_to_end(config, tmp_path / 'work', before=full)
    assert log.count('Figures are lost, /dev/full cannot be written: No space left') >= 1
    assert 'iter_12.pth' in names(tmp_path / 'work')


def test_nothing_is_removed_before_the_next_is_safe(config, tmp_path):
    """Whenever a file is removed, what replaces it is there."""
    work = tmp_path / 'work'

    def watch(cfg):
        original = checkpoint_hook.SafeCheckpointHook._remove

        def remove(self, path):
            print('left when', path, 'goes:', *sorted(
                each.name for each in work.glob('*.pth')))
            original(self, path)

        checkpoint_hook.SafeCheckpointHook._remove = remove
    log = run_to_end(config, work, before=watch)
    assert re.search('left when .*iter_3.pth goes: best_mIoU_iter_6.pth iter_3.pth iter_6.pth '
                     'iter_9.pth', log)
    assert re.search('left when .*best_mIoU_iter_6.pth goes: best_mIoU_iter_12.pth '
                     'best_mIoU_iter_6.pth', log)


def test_the_best_of_several_figures(config, tmp_path):
    """Each has its file, and knows it again after a kill and a move."""
    several = {'default_hooks.checkpoint.save_best': ['mIoU', 'aAcc'],
               'default_hooks.checkpoint.rule': 'greater'}
    work = tmp_path / 'work'
    run_to_end(config, work, options={**several, 'train_cfg.max_iters': 6})
    assert [name for name in names(work) if 'best' in name] == [
        'best_aAcc_iter_6.pth', 'best_mIoU_iter_6.pth']
    work.rename(tmp_path / 'moved')
    run_to_end(config, tmp_path / 'moved', options=several)
    assert names(tmp_path / 'moved') == [
        'best_aAcc_iter_12.pth', 'best_mIoU_iter_12.pth', 'iter_12.pth', 'iter_9.pth']


def test_a_work_dir_that_cannot_be_written(config, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match=r'work dir .*file/work cannot be written to: Not a dir'):
        train(config, tmp_path / 'file' / 'work')


def test_resumed_with_other_batches(config, whole, tmp_path):
    """The data goes on after the images that the run has seen."""
    work = tmp_path / 'work'
    run_to_end(config, work, options={'train_cfg.max_iters': 6})
    log = run_to_end(config, work, options={'train_dataloader.batch_size': 4})
    assert '4 images per step now, 2 before: the data continues after image 12' in log
    meta = torch.load(work / 'iter_12.pth', weights_only=True)['meta']['mmseg_edaformer']
    assert meta['samples'] == 6 * 2 + 6 * 4
    whole_meta = torch.load(whole / 'iter_12.pth', weights_only=True)['meta']
    assert whole_meta['mmseg_edaformer']['samples'] == 24
