"""Losses and gradients that are numbers."""
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from ..errors import DataError
from .checkpoint_hook import SafeCheckpointHook


class NotFinite(DataError):
    """A loss or its gradient is nan or infinite."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop before a loss or gradient that is nan or infinite reaches the weights; log its norm.

    The gradient is the mean over all ranks, so they find it together. mmengine reads the loss of
    every step, so that this reads one more number costs no wait that was not there.

    With mixed precision and a dynamic loss scale infinite gradients belong to the search for the
    scale, which leaves such steps out by itself; then the loss alone decides.

    Args:
        skip: How many such steps to leave out before stopping: these change no weight, no moment of
            the optimizer and no buffer.

    Raises:
        NotFinite: It names the files of the batch, the last good checkpoint and what to try.
    """

    def __init__(self, skip: int = 0) -> None:
        self.skip = skip
        self.finite = self.stepped = True
        self.guarded = False
        self.batches: list[tuple[float, list[str]]] = []  # since the last step of the optimizer

    def before_train(self, runner: Runner) -> None:
        """Stand between the gradients and the optimizer."""
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper) or (
                isinstance(wrapper, AmpOptimWrapper) and wrapper._scale_update_param is None):
            return
        self.guarded = True
        update, step = wrapper.update_params, wrapper.step

        def update_params(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            # An infinite loss can have a finite gradient: make it one that all ranks see.
            self.stepped = False
            update(loss * torch.where(loss.detach().isfinite(), 1., torch.nan), *args, **kwargs)

        @functools.wraps(step)  # mmengine's schedulers have marked it
        def guarded_step(**kwargs: Any) -> None:
            self.stepped = True
            norm = float(_gradient_norm(wrapper))
            self.finite = math.isfinite(norm)
            if not wrapper.clip_grad_kwargs:  # else mmengine logs it
                runner.message_hub.update_scalar('train/grad_norm', norm)
            if self.finite:
                step(**kwargs)

        wrapper.update_params, wrapper.step = update_params, guarded_step

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keep what a forward pass changes, where steps may be left out."""
        if self.skip and not self.batches:
            self.buffers = [(buffer, buffer.clone()) for buffer in runner.model.buffers()]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: Mapping[str, Tensor] | None = None) -> None:
        """Judge the step."""
        loss = outputs['loss'].item() if outputs and 'loss' in outputs else 0.
        self.batches.append((loss, _files(data_batch)))
        if not self.guarded:
            self.finite = all(all_gather_object(math.isfinite(loss)))
        if not self.stepped:  # gradients are being accumulated
            return
        batches, self.batches = self.batches, []
        if self.finite:
            return
        found = [pair for pairs in all_gather_object(batches) for pair in pairs]
        bad = [pair for pair in found if not math.isfinite(pair[0])]
        what = 'the loss' if bad else 'the gradient of the loss'
        files = ', '.join(path for _, paths in bad or found for path in paths)
        message = f'{what} is not a finite number at iteration {runner.iter + 1}, images: {files}'
        skipped = runner.message_hub.runtime_info.get('skipped_steps', 0)
        if skipped < self.skip:
            runner.message_hub.update_info('skipped_steps', skipped + 1)
            with torch.no_grad():
                for buffer, before in self.buffers:
                    buffer.copy_(before)
            runner.logger.warning(f'Step left out ({skipped + 1} of {self.skip}): {message}')
            return
        last = next((hook.last_ckpt for hook in runner.hooks
                     if isinstance(hook, SafeCheckpointHook)), None)
        raise NotFinite(
            f'{message}. ' + (f'The last good checkpoint is {last}. ' if last
                              else 'No checkpoint was written yet. ') +
            'Look at these images and masks with tools/check_data.py; try a lower learning rate or '
            'a longer warm-up (optim_wrapper.optimizer.lr, param_scheduler), '
            'optim_wrapper.clip_grad.max_norm=1, training without --amp, or --skip-nonfinite N, '
            'which leaves up to N such steps out; then go on with --resume')


def _gradient_norm(wrapper: OptimWrapper) -> Tensor:
    """The norm of all gradients, without the scale of mixed precision."""
    gradients = [parameter.grad for group in wrapper.param_groups
                 for parameter in group['params'] if parameter.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if isinstance(wrapper, AmpOptimWrapper):
        norm = norm / wrapper.loss_scaler.get_scale()
    return norm


def _files(data_batch: Any) -> list[str]:
    samples = data_batch.get('data_samples') if isinstance(data_batch, Mapping) else None
    return [str(getattr(sample, 'img_path', None) or sample.metainfo.get('img_path', 'unknown'))
            for sample in samples or []]
