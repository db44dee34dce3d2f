"""Losses and gradients that are nan or infinite: skipped, or the end of the run."""
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import Tensor

from ..errors import ConfigError, DataError
from .checkpoint_hook import SafeCheckpointHook


class FiniteSteps(OptimWrapper):
    """Mixed into an optim wrapper: skips a step whose gradient is not finite, and logs its norm.

    The gradient is the mean over all ranks, so all of them skip the same steps. mmengine reads the
    loss of every step, so reading one more number adds no extra synchronisation.

    With mixed precision and a dynamic loss scale, infinite gradients belong to the search for the
    scale, and mmengine's wrapper skips such steps itself.
    """

    finite = True  # the gradient of the last step
    stepped = True  # in the last call of update_params, which else accumulated gradients

    @property
    def judges(self) -> bool:
        """Whether it looks at gradients, which a dynamic loss scale makes infinite on purpose."""
        return not isinstance(self, AmpOptimWrapper) or self._scale_update_param is not None

    def update_params(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.judges:
            self.stepped = False
            # An infinite loss can have a finite gradient: make it one that all ranks see.
            loss = loss * torch.where(loss.detach().isfinite(), 1., torch.nan)
        super().update_params(loss, *args, **kwargs)

    def step(self, **kwargs: Any) -> None:
        if self.judges:
            self.stepped = True
            norm = float(torch.stack(torch._foreach_norm([
                parameter.grad for group in self.param_groups for parameter in group['params']
                if parameter.grad is not None])).norm())
            if isinstance(self, AmpOptimWrapper):
                norm /= self.loss_scaler.get_scale()
            self.finite = math.isfinite(norm)
            if not self.clip_grad_kwargs:  # else mmengine logs it
                self.message_hub.update_scalar('train/grad_norm', norm)
        if self.finite:
            super().step(**kwargs)


@OPTIM_WRAPPERS.register_module(name='FiniteOptimWrapper')
def finite_optim_wrapper(wrapped: str | type = 'OptimWrapper', **kwargs: Any) -> OptimWrapper:
    """Build an optim wrapper that skips steps which are not finite, of a subclass or its name."""
    base = _find_wrapper(wrapped)
    cls = type(f'Finite{base.__name__}', (FiniteSteps, base), {})
    wrapper: OptimWrapper = cls(**kwargs)
    return wrapper


def skip_nonfinite_steps(cfg: Config) -> None:
    """Have the optim wrapper of a config be a `finite_optim_wrapper` around its own type.

    One that is no OptimWrapper, such as DeepSpeed's, and a wrapper of several optimizers stay as
    they are: `FiniteLossHook` then judges the loss alone, after the step.
    """
    settings = cfg.optim_wrapper
    if settings.get('optimizer') is not None:
        wrapped = settings.get('type', 'OptimWrapper')
        cls = _find_wrapper(wrapped)
        if inspect.isclass(cls) and issubclass(cls, OptimWrapper):
            settings.update(type='FiniteOptimWrapper', wrapped=wrapped)


def _find_wrapper(name: str | type) -> Any:
    if not isinstance(name, str):
        return name
    with OPTIM_WRAPPERS.switch_scope_and_registry(None) as registry:
        return registry.get(name)


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """End the run, or report a skipped step, when a loss or gradient is nan or infinite.

    `FiniteSteps` keeps such a step from the weights. Without it the run ends after the step and
    before the next checkpoint.

    Args:
        skip: Number of such steps to skip before the run ends. A skipped step changes no weight, no
            moment of the optimizer and no buffer.
    """

    def __init__(self, skip: int = 0) -> None:
        self.skip = skip
        self.batches: list[tuple[float, list[str]]] = []  # since the last step of the optimizer

    def before_train(self, runner: Runner) -> None:
        if self.skip and not isinstance(runner.optim_wrapper, FiniteSteps):
            raise ConfigError(
                'FiniteLossHook.skip: the steps of optim_wrapper.type='
                f'{type(runner.optim_wrapper).__name__} cannot be skipped. Set '
                "optim_wrapper.type='FiniteOptimWrapper', as tools/train.py does for types derived "
                'from OptimWrapper, or train without --skip-nonfinite')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keep what a forward pass changes, if steps may be skipped."""
        if self.skip and not self.batches:
            self.buffers = [(buffer, buffer.clone()) for buffer in runner.model.buffers()]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: Mapping[str, Tensor] | None = None) -> None:
        loss = outputs['loss'].item() if outputs and 'loss' in outputs else 0.
        self.batches.append((loss, _files(data_batch)))
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, FiniteSteps) and wrapper.judges:
            finite = wrapper.finite
            if not wrapper.stepped:  # gradients are being accumulated
                return
        else:
            finite = all(all_gather_object(math.isfinite(loss)))
        batches, self.batches = self.batches, []
        if finite:
            return
        every = [batch for of_rank in all_gather_object(batches) for batch in of_rank]
        bad = [batch for batch in every if not math.isfinite(batch[0])]
        files = ', '.join(path for _, paths in bad or every for path in paths)
        message = (f'{"the loss" if bad else "the gradient of the loss"} is not a finite number at '
                   f'iteration {runner.iter + 1}, images: {files}')
        skipped = runner.message_hub.runtime_info.get('skipped_steps', 0)
        if skipped < self.skip:
            runner.message_hub.update_info('skipped_steps', skipped + 1)
            with torch.no_grad():
                for buffer, before in self.buffers:
                    buffer.copy_(before)
            runner.logger.warning(f'Step skipped ({skipped + 1} of {self.skip}): {message}')
            return
        last = next((hook.last_ckpt for hook in runner.hooks
                     if isinstance(hook, SafeCheckpointHook)), None)
        raise DataError(
            f'{message}. ' + (f'The last good checkpoint is {last}. ' if last
                              else 'No checkpoint was written yet. ') +
            'Look at these images and masks with tools/check_data.py; try a lower learning rate or '
            'a longer warm-up (optim_wrapper.optimizer.lr, param_scheduler), '
            'optim_wrapper.clip_grad.max_norm=1, training without --amp, or --skip-nonfinite N, '
            'which skips up to N such steps; then resume with --resume')


def _files(data_batch: Any) -> list[str]:
    samples = data_batch.get('data_samples') if isinstance(data_batch, Mapping) else None
    return [str(getattr(sample, 'img_path', None) or sample.metainfo.get('img_path', 'unknown'))
            for sample in samples or []]
