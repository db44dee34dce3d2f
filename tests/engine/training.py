"""Small trainings in processes of their own, to be killed, and what is left of them."""
import sys
from pathlib import Path

import torch
from mmengine.utils import ManagerMixin

from mmseg_edaformer import compat, registered  # noqa: F401 (what torch.load may read)
from mmseg_edaformer.engine import launch
from mmseg_edaformer.engine.run_config import load_config
from tests.conftest import write_config
from tests.processes import finish, forget, in_child

OPTIONS = {
    'train_cfg.max_iters': 12, 'train_cfg.val_interval': 6,
    'default_hooks.checkpoint.interval': 3, 'default_hooks.checkpoint.max_keep_ckpts': 2}


def write_random_config(folder, scenes):
    """The small config with all that draws random numbers; returns its path."""
    write_config(folder, scenes)
    path = folder / 'random.py'
    path.write_text('''
_base_ = ['./mini.py']
model = dict(backbone=dict(drop_path_rate=0.2, depths=(1, 1, 1, 1)),
             decode_head=dict(drop_path_rate=0.2, dropout_ratio=0.2),
             train_cfg=dict(isr_range=dict(isr_ratios=('2211-222', '2+q2'))))
train_dataloader = dict(collate_fn=dict(type='stack_collate', photometric=dict()), dataset=dict(
    pipeline=[
        dict(type='LoadSegImage'), dict(type='LoadSegLabels', num_classes=8),
        dict(type='RandomResize', scale=(96, 64), ratio_range=(0.8, 1.5), keep_ratio=True),
        dict(type='RandomSegCrop', crop_size=(64, 64), cat_max_ratio=0.75),
        dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]))
custom_hooks = [dict(type='CheckWeightsHook')]
''')
    return path


def train(config, work, **keywords):
    """What tools/train.py does, in a process of its own; arguments as for `train_here`."""
    code = train_here(config, work, **keywords)
    compat.leave_distributed(code)
    sys.exit(code)


def train_here(config, work, *, resume=True, options=None, before=None, **flags):
    """What tools/train.py does, in this process, as on a GPU, with which no process may fork.

    ``before`` is called with the config before the runner is built. Returns the exit code.
    """
    forget(ManagerMixin)
    torch.set_num_threads(1)
    cfg = load_config(config, cfg_options={**OPTIONS, **(options or {})}, work_dir=work,
                      verbose=True)
    launch.prepare_train(cfg, resume=resume, **flags)
    if before is not None:
        before(cfg)
    return launch.train(cfg)


def run_to_end(config, work, **keywords):
    """Train in a child to the end; returns the log."""
    log = Path(f'{work}.log')
    code = finish(in_child(train, config, work, log=log, **keywords))
    assert code == 0, log.read_text()[-4000:]
    return log.read_text()


def state(work, name='iter_12.pth'):
    """All of a checkpoint that later steps depend on, as plain tensors and numbers."""
    content = torch.load(Path(work) / name, weights_only=True)
    info = content['message_hub']['runtime_info']
    return dict(weights=content['state_dict'], optimizer=content['optimizer'],
                schedulers=content['param_schedulers'], iter=content['meta']['iter'],
                best=info.get('best_score'))


def differences(first, second, path=''):
    """The places at which two nested structures are not equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [path]
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        return [each for key in first
                for each in differences(first[key], second[key], f'{path}.{key}')]
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        return [each for key, pair in enumerate(zip(first, second))
                for each in differences(*pair, f'{path}.{key}')]
    return [] if first == second else [path]
