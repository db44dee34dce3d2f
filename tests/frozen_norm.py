"""Hooks for tests of distributed runs."""
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.nn.modules.batchnorm import _BatchNorm


@HOOKS.register_module()
class FreezeNormHook(Hook):
    """Batch norms use their running statistics in training too."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for module in runner.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@HOOKS.register_module()
class NameNormHook(Hook):
    """Log how the processes talk to each other, and which batch norm the model has."""

    def before_train(self, runner):
        norms = {type(module).__name__ for module in runner.model.modules()
                 if isinstance(module, _BatchNorm)}
        backend = dist.get_backend() if dist.is_initialized() else 'alone'
        runner.logger.info(f'{backend} and {norms.pop()}')
