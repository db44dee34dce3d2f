"""A run that was killed and resumed ends as one that was not."""
import os
import shutil
import signal
import time

import pytest
import torch

from mmseg_edaformer.engine import saving
from tests.engine.training import (
    differences,
    finish,
    in_child,
    run_to_end,
    state,
    train,
    write_random_config,
)


@pytest.fixture(scope='module')
def config(scenes, tmp_path_factory):
    return write_random_config(tmp_path_factory.mktemp('resume'), scenes)


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
    """The work dir of a run that nothing interrupted."""
    work = tmp_path_factory.mktemp('whole') / 'work'
    run_to_end(config, work)
    return work


def stop_at(iteration):
    """Kill this process at the start of an iteration."""
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    @HOOKS.register_module(force=True)
    class KillHook(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == iteration:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda cfg: cfg.custom_hooks.append(dict(type='KillHook'))


@pytest.mark.parametrize('workers', [0, 2])
def test_killed_and_resumed(config, whole, tmp_path, workers):
    work = tmp_path / 'work'
    pid = in_child(train, config, work, before=stop_at(8), log=tmp_path / 'log')
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
