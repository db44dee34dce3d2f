"""ISR in mmengine's runner."""
import functools
from collections.abc import Callable
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from ..cost import unwrap
from ..errors import ConfigError, ExampleError
from ..isr.apply import isr, report_isr, training_size
from ..isr.pooling import check_method
from ..isr.ratio import ISRRatio


@HOOKS.register_module()
class ISRHook(Hook):
    """Reduce keys and queries of the model during validation and test, never during training.

    The trained pools are back after each of them, also when it ends in an error: the loops' runs
    are wrapped, because mmengine calls no hook then. The arguments are those of `apply_isr`.
    """

    def __init__(self, isr_ratio: int | str = 1, crop_size: tuple[int, int] | None = None,
                 method: str = 'average', query_ratio: int | str | None = None,
                 **old: int | str) -> None:
        if 'ratio' in old:
            raise ConfigError("ISRHook: 'ratio' is now called isr_ratio")
        if old:
            raise TypeError(f'ISRHook got an unexpected keyword argument {next(iter(old))!r}')
        self.isr_ratio = ISRRatio.parse(isr_ratio).with_queries(query_ratio)
        self.crop_size = crop_size
        self.method = check_method(method)
        self.wrapped: list[BaseLoop] = []

    def before_run(self, runner: Runner) -> None:
        size = self._input_size(runner.model)
        try:
            report = report_isr(runner.model, self.isr_ratio, size, method=self.method,
                                crop_size=self.crop_size)
            runner.logger.info(str(report))
        except ExampleError as error:
            # A network may want other inputs than an image of this size: the run will have them.
            runner.logger.warning(f'ISR {self.isr_ratio}: cannot count ahead what it reduces: '
                                  f'{error}')
        for loop in (runner._val_loop, runner._test_loop):
            # before_run comes again when a runner that has trained is asked to test.
            if isinstance(loop, BaseLoop) and loop not in self.wrapped:
                self.wrapped.append(loop)
                loop.run = functools.partial(self._run_reduced, runner, loop.run)

    def _run_reduced(self, runner: Runner, run: Callable[[], Any]) -> Any:
        with isr(runner.model, self.isr_ratio, method=self.method, crop_size=self.crop_size):
            return run()

    def _input_size(self, model: nn.Module) -> tuple[int, int]:
        """The size that a segmentor sees: its sliding window, else its training crop.

        For whole images auto is shown at twice the crop: at the crop it changes nothing.
        """
        test_cfg = getattr(unwrap(model), 'test_cfg', None) or {}
        if test_cfg.get('crop_size'):
            return tuple(test_cfg['crop_size'])
        height, width = self.crop_size or training_size(model)
        return (2 * height, 2 * width) if self.isr_ratio.follows_size else (height, width)
