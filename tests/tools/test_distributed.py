"""Two processes and two nodes with torchrun on the CPU, over gloo."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from mmseg_edaformer.engine import checks, find_checkpoint
from mmseg_edaformer.engine.preemption import EXIT_PREEMPTED
from tests.conftest import ROOT, write_config
from tests.engine.training import train_here
from tests.processes import done, free_port

pytestmark = pytest.mark.slow


def script(name, *arguments, code=0, **env):
    """Run one of the shell scripts, which must end with a code; returns its output."""
    done = subprocess.run(
        ['bash', f'tools/{name}', *map(str, arguments)], cwd=ROOT, text=True, timeout=600,
        capture_output=True, env={**os.environ, 'PYTHON': sys.executable, 'PORT': str(free_port()),
                                  'OMP_NUM_THREADS': '1', **env})
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _import_tests(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT), prepend=os.pathsep)  # for tests.frozen_norm


@pytest.fixture(scope='module')
def config(scenes, tmp_path_factory):
    """Nothing random within a step and no batch statistics, so that only the averaging counts."""
    folder = tmp_path_factory.mktemp('distributed')
    write_config(folder, scenes)
    path = folder / 'fixed.py'
    path.write_text('''
_base_ = ['./mini.py']
custom_imports = dict(imports=['mmseg_edaformer', 'tests.frozen_norm'])
custom_hooks = [dict(type='CheckWeightsHook'), dict(type='FreezeNormHook')]
model = dict(backbone=dict(drop_path_rate=0.),
             decode_head=dict(drop_path_rate=0., dropout_ratio=0.),
             train_cfg=dict(isr_range=dict(isr_ratios=['2+q2'])))
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=[
    dict(type='LoadSegImage'), dict(type='LoadSegLabels', num_classes=8),
    dict(type='Resize', scale=(64, 64), keep_ratio=False), dict(type='PackSegInputs')]))
auto_scale_lr = dict(base_batch_size=4)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.02, momentum=0.9, weight_decay=0.),
    clip_grad=None)
''')
    return path


@pytest.fixture(scope='module')
def one(config, tmp_path_factory):
    """The work dir of a run of one process."""
    work = tmp_path_factory.mktemp('one')
    done('tools/train.py', config, '--work-dir', work, '--cfg-options',
         'default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=4')
    return work


HALF = ('--cfg-options', 'train_dataloader.batch_size=2')


def weights(path):
    return torch.load(path, weights_only=True)['state_dict']


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


def test_two_processes_test_like_one(config, one, tmp_path):
    """They see every image once."""
    arguments = (one / 'iter_4.pth', '--work-dir', tmp_path, '--isr-ratio', '2')
    single = done('tools/test.py', config, *arguments)
    double = script('dist_test.sh', config, arguments[0], 2, *arguments[1:])
    figures = re.compile(r'mIoU [\d.]+, .*')
    assert figures.search(double)[0] == figures.search(single)[0]
    assert double.count('GMACs') == 1  # only one process reports


def with_hook(config, hook, iteration):
    """The config with a hook of tests/signals.py and no checkpoint before the last."""
    path = config.parent / f'{hook}.py'
    path.write_text(f"""
_base_ = ['./fixed.py']
custom_imports = dict(imports=['mmseg_edaformer', 'tests.frozen_norm', 'tests.signals'])
custom_hooks = [dict(type='CheckWeightsHook'), dict(type='FreezeNormHook'),
                dict(type='{hook}', iteration={iteration})]
default_hooks = dict(checkpoint=dict(interval=10))
""")
    return path


def test_two_processes_stop_at_a_signal(config, one, tmp_path):
    log = script('dist_train.sh', with_hook(config, 'StopHook', 1), 2, '--work-dir', tmp_path,
                 *HALF, code=EXIT_PREEMPTED)
    stop = re.search(r'stopped by SIG\w+ after iteration (2|3); its state is saved', log)[1]
    assert_close(weights(find_checkpoint(tmp_path)), weights(one / f'iter_{stop}.pth'))


def test_two_processes_survive_a_kill(config, one, tmp_path):
    """They resume from a run of one process, are killed, and resume again."""
    shutil.copy(one / 'iter_2.pth', tmp_path)
    log = script('dist_train.sh', with_hook(config, 'KillHook', 3), 2, '--work-dir', tmp_path,
                 '--resume', *HALF)
    assert re.search(r'rank 0 ends because another process of this run ended', log)
    assert re.search(r'Resuming from .*/iter_2.pth \(start 2 of this run\)', log)
    halfway, *ends = (weights(path) for path in (
        one / 'iter_2.pth', one / 'iter_4.pth', tmp_path / 'iter_4.pth'))
    assert max((ends[0][name] - halfway[name]).abs().max() for name in halfway) > 1e-3  # it moves
    assert_close(*ends)


@pytest.mark.gpu
@pytest.mark.parametrize('processes', [1, 2])
def test_batch_norm_of_all_processes(config, device, tmp_path, processes):
    """On GPUs, over NCCL with SyncBatchNorm: the weights of a run without a launcher."""
    gpus = torch.cuda.device_count()
    if processes > max(gpus, 1):
        pytest.skip(f'needs {processes} GPUs; there are {gpus}')
    path = config.parent / 'norms.py'
    path.write_text("""
_base_ = ['./fixed.py']
custom_hooks = [dict(type='CheckWeightsHook'), dict(type='NameNormHook')]
env_cfg = dict(cudnn_benchmark=False)
default_hooks = dict(checkpoint=dict(interval=1))
""")
    # cuDNN and cuBLAS take no TF32 then; in this process the fixture sees to that.
    log = script('dist_train.sh', path, processes, '--work-dir', tmp_path / 'ranks', '--verbose',
                 '--cfg-options', f'train_dataloader.batch_size={4 // processes}',
                 NVIDIA_TF32_OVERRIDE='0')
    has_gpu = gpus and 'passes for a GPU' not in torch.cuda.get_device_name()
    assert ('nccl and SyncBatchNorm' if has_gpu else 'gloo and BatchNorm2d') in log
    assert train_here(path, tmp_path / 'one', options={
        'train_cfg.max_iters': 4, 'default_hooks.checkpoint.interval': 1,
        'default_hooks.checkpoint.max_keep_ckpts': 4}) == 0
    first, one, ranks = (weights(tmp_path / work / f'iter_{number}.pth') for work, number in (
        ('one', 1), ('one', 4), ('ranks', 4)))
    assert ranks.keys() == one.keys()

    def distance(some, others):
        return sum((some[name] - others[name]).double().square().sum() for name in one).sqrt()
    assert distance(ranks, one) < 0.02 * distance(first, one)


def test_two_nodes(config, one, tmp_path):
    """Two launchers on loopback, as two machines would run them."""
    port = str(free_port())
    logs = [tmp_path / f'node{rank}.log' for rank in range(2)]
    nodes = [subprocess.Popen(
        ['bash', 'tools/dist_train.sh', str(config), '1', '--work-dir', str(tmp_path / 'nodes'),
         *HALF], cwd=ROOT,
        stdout=logs[rank].open('w'), stderr=subprocess.STDOUT,
        env={**os.environ, 'PYTHON': sys.executable, 'NNODES': '2', 'NODE_RANK': str(rank),
             'MASTER_ADDR': '127.0.0.1', 'PORT': port, 'OMP_NUM_THREADS': '1'})
        for rank in range(2)]
    codes = [node.wait(timeout=400) for node in nodes]
    logs = [log.read_text() for log in logs]
    assert codes == [0, 0], logs
    assert 'learning rate of this config' not in logs[0]  # 2 x 2 images are the recipe's 4
    assert_close(weights(tmp_path / 'nodes' / 'iter_4.pth'), weights(one / 'iter_4.pth'))


def test_another_number_of_gpus_warns_and_scales(config, monkeypatch):
    told, cfg = [], Config.fromfile(config)
    monkeypatch.setattr(checks, '_warn', told.append)
    checks.check_batch_size(cfg, 2)
    cfg.auto_scale_lr.enable = True
    checks.check_batch_size(cfg, 2)
    assert told == ['2 x 4 = 8 images per step, but the learning rate of this config is for 4: '
                    'pass --auto-scale-lr to scale it by 2, or keep the recipe with --cfg-options '
                    'train_dataloader.batch_size=2',
                    '2 x 4 = 8 images per step instead of 4: the learning rate is scaled by 2']


def test_an_error_on_a_rank_ends_all(config, tmp_path):
    """An error that would come again is shown once, and nothing is started again."""
    log = script('dist_train.sh', config, 2, '--work-dir', tmp_path / 'x', '--cfg-options',
                 'model.decode_head.chanels=2', code=1)
    assert log.count("an argument 'chanels' that it does not have") == 1
    assert 'start 2 of this run' not in log
    assert not (tmp_path / 'x' / 'iter_4.pth').exists()
