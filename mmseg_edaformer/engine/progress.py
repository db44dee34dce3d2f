"""What a run shows on the terminal: a progress bar, and little of the log."""
import atexit
import logging
import re
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

_PACKAGE = str(Path(__file__).resolve().parents[1])
# What mmengine warns of in every run of mmseg, though nobody can do anything about it.
_OF_NO_USE = re.compile('prefix is not set in metric|"FileClient" will be|"HardDiskBackend" is')


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows a bar with the loss, the mIoU so far, images per second and time left on a terminal.

    The log lines scroll above it. Where the output is no terminal, a training prints a line at
    every twentieth of its iterations, and at least every ten minutes. The figures of each
    validation and test are a line of the log.

    Args:
        interval: Number of iterations between readings of the loss, which wait for the GPU.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.progress: Progress | None = None
        self.tasks: list[TaskID] = []  # the training and, within it, a validation
        self.figures: dict[str, str] = {}

    def before_train(self, runner: Runner) -> None:
        self._start(runner, 'train', runner.max_iters, runner.iter)
        self.tick = self.printed = time.perf_counter()
        self.begun = runner.iter

    def after_train(self, runner: Runner) -> None:
        self._stop(runner)

    def before_val(self, runner: Runner) -> None:
        self._start(runner, 'validate', len(runner.val_dataloader))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._log_figures(runner, f'Validation at iteration {runner.iter}', metrics)
        self._stop(runner)
        self.tick = time.perf_counter()

    def before_test(self, runner: Runner) -> None:
        self._start(runner, 'test', len(runner.test_dataloader))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._stop(runner)
        self._log_figures(runner, 'Test', metrics)

    def _after_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                    outputs: Any = None, mode: str = 'train') -> None:
        if self.progress is None:
            if mode == 'train' and is_main_process():
                self._print_progress(runner, outputs)
            return
        images = len(data_batch['inputs']) * runner.world_size
        if mode == 'train':
            if self.every_n_train_iters(runner, self.interval):
                now = time.perf_counter()
                self.figures['images/s'] = f'{self.interval * images / (now - self.tick):.1f}'
                self.figures['loss'] = f'{outputs["loss"].item():.3f}'
                self.tick = now
        else:
            self.images += images
            seconds = time.perf_counter() - self.started
            self.figures['images/s'] = f'{self.images / seconds:.1f}'
            self._show_miou(getattr(runner, f'{mode}_loop').evaluator.metrics)
        self.progress.update(self.tasks[-1], advance=1, figures='  '.join(
            f'{name} {value}' for name, value in self.figures.items()))

    def _print_progress(self, runner: Runner, outputs: Any) -> None:
        now, done = time.perf_counter(), runner.iter + 1
        if done % max(runner.max_iters // 20, 1) and now - self.printed < 600:
            return
        left = (now - self.tick) / (done - self.begun) * (runner.max_iters - done)
        print(f'train {done}/{runner.max_iters}  loss {outputs["loss"].item():.3f}  '
              f'{timedelta(seconds=round(left))} left', flush=True)
        self.printed = now

    @staticmethod
    def _log_figures(runner: Runner, title: str, metrics: dict[str, float] | None) -> None:
        if metrics:
            runner.logger.info(f'{title}: ' + ', '.join(
                f'{name} {value:.4g}' for name, value in metrics.items()))

    def _start(self, runner: Runner, title: str, total: int, completed: int = 0) -> None:
        if not is_main_process() or not sys.stdout.isatty():
            return
        if self.progress is None:
            self.progress = Progress(
                TextColumn('{task.description}'), BarColumn(bar_width=12), MofNCompleteColumn(),
                TextColumn('{task.fields[figures]}'), TextColumn('left'), TimeRemainingColumn())
            self.progress.start()
            atexit.register(self.progress.stop)  # restores the cursor after an error
            self._redirect_log(runner)
        self.tasks.append(self.progress.add_task(title, total=total, completed=completed,
                                                 figures=''))
        self.areas: torch.Tensor | None = None
        self.seen = self.images = 0
        self.started = time.perf_counter()

    def _stop(self, runner: Runner) -> None:
        """Remove the current task, and the bar with the last one."""
        if self.progress is None:
            return
        task = self.tasks.pop()
        if self.tasks:
            self.progress.remove_task(task)
        else:
            self.progress.stop()
            self._redirect_log(runner)
            self.progress = None

    @staticmethod
    def _redirect_log(runner: Runner) -> None:
        """Send the log through rich's replacement for stdout, so that it scrolls above the bar."""
        for handler in runner.logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stdout)

    def _show_miou(self, metrics: Sequence[Any]) -> None:
        for metric in metrics:
            if isinstance(metric, IoUMetric) and len(metric.results) > self.seen:
                for areas in metric.results[self.seen:]:
                    areas = torch.stack([area.double().cpu() for area in areas[:2]])
                    self.areas = areas if self.areas is None else self.areas + areas
                self.seen = len(metric.results)
        if self.areas is not None:
            # A class that has not occurred yet is nan and does not count, as in the final mIoU.
            self.figures['mIoU'] = f'{100 * (self.areas[0] / self.areas[1]).nanmean():.2f}'


@RUNNERS.register_module()
class QuietRunner(Runner):
    """mmengine's Runner that writes its whole log to the file in the work dir alone.

    The terminal shows warnings and what this package itself has to say, such as the figures of a
    validation and where the report lies.
    """

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger: MMLogger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.addFilter(_matters)
        return logger


def _matters(record: logging.LogRecord) -> bool:
    if record.pathname.startswith(_PACKAGE):
        return True
    return record.levelno >= logging.WARNING and not _OF_NO_USE.search(record.getMessage())
