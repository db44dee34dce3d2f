"""A run that was killed and resumed ends as one that was not."""
import os
import pickle
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.utils.data import BatchSampler

from mmseg_edaformer.engine.loop import CountedBatches, SeededIndices, seed_all
from mmseg_edaformer.engine.preemption import EXIT_PREEMPTED
from mmseg_edaformer.errors import DataError
from tests.engine.training import differences, run_to_end, state, train
from tests.processes import finish, in_child


@HOOKS.register_module()
class SignalHook(Hook):
    """Send this process a signal at an iteration of the training or of its validation."""

    def __init__(self, iteration, number, validating=False):
        self.iteration, self.number, self.validating = iteration, number, validating

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration and not self.validating:
            os.kill(os.getpid(), self.number)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration and self.validating and batch_idx == 1:
            os.kill(os.getpid(), self.number)


def sending(*arguments):
    return lambda cfg: cfg.custom_hooks.append(dict(
        type='SignalHook', **dict(zip(('iteration', 'number', 'validating'), arguments))))


@pytest.mark.parametrize('workers', [0, 2])
def test_killed_and_resumed(config, whole, tmp_path, workers):
    work = tmp_path / 'work'
    pid = in_child(train, config, work, before=sending(8, signal.SIGKILL), log=tmp_path / 'log')
    assert finish(pid) == -signal.SIGKILL
    assert sorted(path.name for path in work.glob('*.pth')) == [
        'best_mIoU_iter_6.pth', 'iter_3.pth', 'iter_6.pth']
    shutil.move(work, tmp_path / 'moved')
    log = run_to_end(config, tmp_path / 'moved', options={
        'train_dataloader.num_workers': workers,
        'train_dataloader.persistent_workers': workers > 0})
    assert 'Resuming from' in log
    assert 'iter: 6' in log
    assert 'Advance dataloader' not in log
    assert differences(state(whole), state(tmp_path / 'moved')) == []
    names = [sorted(path.name for path in folder.glob('*.pth'))
             for folder in (whole, tmp_path / 'moved')]
    assert names[0] == names[1]
    best = next(iter(whole.glob('best_*'))).name
    weights = [torch.load(folder / best, weights_only=True)['state_dict']
               for folder in (whole, tmp_path / 'moved')]
    assert differences(*weights) == []


@pytest.mark.parametrize(('number', 'iteration', 'validating'), [
    (signal.SIGTERM, 7, False), (signal.SIGUSR1, 6, True)])
def test_told_to_stop(config, whole, tmp_path, number, iteration, validating):
    """The step at hand is finished and saved; a validation that was cut short is made up for."""
    work, log = tmp_path / 'work', tmp_path / 'log'
    pid = in_child(train, config, work, before=sending(iteration, number, validating), log=log)
    assert finish(pid) == EXIT_PREEMPTED
    done = iteration + (not validating)
    assert f'stopped by {signal.Signals(number).name} after iteration {done}; its state is saved' \
        in log.read_text()
    assert (work / f'iter_{done}.pth').is_file()
    assert (work / 'best_mIoU_iter_6.pth').is_file() is not validating
    again = run_to_end(config, work)
    assert f'Resuming from {work}/iter_{done}.pth' in again
    assert ('Iter(val) [4/4]' in again.partition('Iter(train)')[0]) is validating
    assert differences(state(whole), state(work)) == []


def test_readers_outlive_sigterm(config, whole, tmp_path):
    """Slurm and torchrun send it to all processes of a run."""
    work = tmp_path / 'work'
    workers = {'train_dataloader.num_workers': 2, 'train_dataloader.persistent_workers': True}

    @HOOKS.register_module(force=True)
    class SignalAllHook(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 7:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                os.killpg(os.getpid(), signal.SIGTERM)

    def before(cfg):
        os.setpgid(0, 0)
        cfg.custom_hooks.append(dict(type='SignalAllHook'))

    assert finish(in_child(train, config, work, options=workers, before=before)) == EXIT_PREEMPTED
    run_to_end(config, work, options=workers)
    assert differences(state(whole), state(work)) == []


def test_batches_from_any_place_on():
    def batches(start, count):
        sampler = BatchSampler(DefaultSampler(range(5)), 2, drop_last=False)
        counted = CountedBatches(sampler, rank=1, world_size=2)
        counted.seed, counted.start = 4, start
        return [(list.copy(batch), batch.keys) for batch, _ in zip(counted, range(count))]

    everything = batches(0, 9)
    assert [len(indices) for indices, _ in everything] == [2, 2, 1] * 3
    assert len({key for _, keys in everything for key in keys}) == 15
    for start in range(8):
        assert batches(start, 9 - start) == everything[start:]


def test_a_sample_draws_the_same_wherever_it_is_read():
    batch = SeededIndices([5, 6, 7], [(1, 1, 0), (1, 1, 1), (1, 1, 2)])
    drawn = [(index, torch.rand(()).item(), np.random.rand(), random.random())
             for index in pickle.loads(pickle.dumps(batch))]
    seed_all(9, 9)
    later = SeededIndices([6, 7], [(1, 1, 1), (1, 1, 2)])
    assert [(index, torch.rand(()).item(), np.random.rand(), random.random())
            for index in later] == drawn[1:]
    assert len({value for sample in drawn for value in sample[1:]}) == 9


def test_two_ranks_read_what_one_would():
    """Samples keep their numbers, and so their augmentation, when the ranks change."""
    def keys(rank, world_size, batch_size):
        sampler = BatchSampler(range(rank, 12, world_size), batch_size, drop_last=True)
        return {index: key for batch, _ in zip(CountedBatches(sampler, rank, world_size),
                                               range(12 // world_size // batch_size))
                for index, key in zip(list.__iter__(batch), batch.keys)}

    assert keys(0, 2, 3) | keys(1, 2, 3) == keys(0, 1, 6)


def test_no_whole_batch():
    with pytest.raises(DataError, match='has fewer images than one batch'):
        next(iter(CountedBatches(BatchSampler(range(3), 4, drop_last=True), 0, 1)))
