"""The hook that counts validations and tests, and has the report of a run written."""
import logging
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.dist import all_gather_object, get_dist_info, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from torch import Tensor

from ..errors import UserError
from .counts import FOLDER, Evaluation

_SAVED = 'validation.npz'


@HOOKS.register_module()
class EvaluationHook(Hook):
    """Count each validation and test, and write the report after each validation and at the end.

    On several processes the counts are summed without the images that were given out twice to make
    the shares equal, as mmseg's IoUMetric does. Those of a training are kept in its work dir, for a
    run that is killed after the validation and resumed.

    Args:
        compiled: Whether the network is compiled; each further ratio would be compiled anew.
    """

    # Before the checkpoint that notes that this validation is done.
    priority = 'LOW'

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self.evaluation: Evaluation | None = None
        self.kind = 'test'
        self.start = time.perf_counter()

    def before_train(self, runner: Runner) -> None:
        """Load the last validation of a resumed run; remove that of another run."""
        self.kind = 'training'
        path = Path(runner.work_dir, FOLDER, _SAVED)
        if runner.iter and is_main_process():
            self.evaluation = Evaluation.load(path)
        elif is_main_process():
            with suppress(OSError):  # if it cannot be replaced either, the log will say so
                path.unlink()

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        """Start counting a validation or a test."""
        if mode == 'train':
            return
        self.kind = 'test' if mode == 'test' else self.kind
        loop: Any = runner.test_loop if mode == 'test' else runner.val_loop
        dataset = loop.dataloader.dataset
        meta = getattr(dataset, 'metainfo', {})
        classes = tuple(map(str, meta.get('classes') or ()))
        palette = np.asarray(meta.get('palette') or np.random.default_rng(0).integers(
            256, size=(len(classes), 3))).tolist()
        self.evaluation = Evaluation(classes, tuple(map(tuple, palette)), size=len(dataset))
        for metric in loop.evaluator.metrics:
            if isinstance(metric, IoUMetric):
                self.evaluation.ignore_index = metric.ignore_index
                self.evaluation.nan_to_num = metric.nan_to_num
        self.seen, self.begun = 0, time.perf_counter()

    def _after_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                    outputs: Any = None, mode: str = 'train') -> None:
        """Count the images of a batch, each of them once on all processes."""
        evaluation = self.evaluation
        if mode == 'train' or evaluation is None:
            return
        rank, processes = get_dist_info()
        for i, sample in enumerate(outputs or ()):
            number = self.seen * processes + rank
            self.seen += 1
            if number >= evaluation.size or 'pred_sem_seg' not in sample:
                continue
            if 'gt_sem_seg' not in sample:
                evaluation.unlabelled += 1
                continue
            predicted = sample.pred_sem_seg.data.squeeze()
            labels = sample.gt_sem_seg.data.squeeze().to(predicted.device)
            name = str(sample.get('img_path', '') or f'image {number}')
            evaluation.add(name, labels, predicted,
                           partial(_load_image, data_batch['inputs'], i, name))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Sum the counts of all processes, and save them."""
        self.after_test_epoch(runner, metrics)
        if self.evaluation is None or not is_main_process():
            return
        self.evaluation.iteration = runner.iter
        try:
            self.evaluation.save(Path(runner.work_dir, FOLDER, _SAVED))
        except OSError as error:
            runner.logger.warning('cannot save the counts of this validation, so a report after '
                                  f'a resume would lack them: {error}')

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Sum the counts of all processes."""
        if self.evaluation is None:
            return
        own, *others = all_gather_object(self.evaluation)
        if is_main_process():
            own.merge(others)
            own.metrics, own.seconds = dict(metrics or {}), time.perf_counter() - self.begun
            self.evaluation = own

    def after_val(self, runner: Runner) -> None:
        """Write the report of an unfinished training, once its best checkpoint is saved."""
        if self.kind == 'training' and runner.iter < runner.max_iters:
            self._report(runner, final=False)

    def after_success(self, runner: Runner) -> None:
        """Write the report of a finished run; called by the tools, as mmengine has no such hook.

        All results are saved by then: a signal may end the process while the report is made.
        """
        self._report(runner, final=True)

    def _report(self, runner: Runner, final: bool) -> None:
        """Write the report; whatever happens, the run and its exit code stay as they are."""
        if not is_main_process():
            return
        try:
            from .report import Report  # needs matplotlib and jinja2, which no run needs
            path = Report(runner, self.evaluation, self.kind, time.perf_counter() - self.start,
                          compiled=self.compiled, final=final).write()
            runner.logger.info(f'Report: {path}')
        except (UserError, OSError, ImportError) as error:
            runner.logger.warning(f'cannot write the report, the run itself is complete: {error}')
        except Exception:
            runner.logger.log(logging.ERROR, 'cannot write the report, the run itself is complete. '
                              'This is a defect of the report:', exc_info=True)


def _load_image(inputs: Any, index: int, path: str) -> np.ndarray | None:
    """Return an image of a batch (H x W x 3, BGR), or of its file with test-time augmentation."""
    image = inputs[index]
    if not isinstance(image, Tensor):
        return cv2.imread(path)
    array = image.detach().float().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return np.repeat(array, 3, 2) if array.shape[2] == 1 else np.ascontiguousarray(array[..., :3])
