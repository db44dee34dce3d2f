"""Counts of a validation or test by class and by image, and the hook that reports them."""
import json
import logging
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.dist import all_gather_object, get_dist_info, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from torch import Tensor

from ..errors import UserError
from ..files import replacing

EXAMPLES = 4
"""Number of best and of worst images that are kept."""
FOLDER = 'report'
"""Folder in a work dir that holds the images and tables of a report."""

_SIDE = 400  # pixels of an example's longer side
_SAVED = 'validation.npz'


@dataclass(frozen=True)
class ImageScore:
    """The mean IoU of the classes that are labelled in one image and its pixel accuracy.

    Both are percentages, and nan where no pixel is labelled.
    """
    name: str
    miou: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Example:
    """A small copy of an image (h x w x 3, uint8, BGR), its labels and its prediction.

    Labels and prediction are h x w, int16; -1 marks pixels that do not count.
    """
    score: ImageScore
    image: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray


@dataclass
class Evaluation:
    """The counts of one validation or test, by the rules of mmseg's IoUMetric.

    Args:
        classes: Names of the classes.
        palette: RGB colours of the classes.
        ignore_index: The label that does not count.
        nan_to_num: The IoU of a class that does not occur, for the mIoU, as in IoUMetric.
        images: Scores of all counted images, in their order.
        best: The `EXAMPLES` images with the highest mIoU, the best first.
        worst: The `EXAMPLES` images with the lowest mIoU, the worst first.
        unlabelled: Number of images without labels.
        metrics: The metrics that the evaluator returned.
        iteration: Iteration of the training; None in a test.
        seconds: Duration of the validation or test.
        size: Number of images of the data set.

    Attributes:
        matrix: Pixels by label and prediction, (C + 1) x (C + 1); the last row and column count
            values that are no class.
        occurs: Number of images in which each class is labelled.
    """
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = 255
    nan_to_num: float | None = None
    images: list[ImageScore] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    unlabelled: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    iteration: int | None = None
    seconds: float = 0.
    size: int = 0

    def __post_init__(self) -> None:
        count = len(self.classes)
        self.matrix = np.zeros((count + 1, count + 1), np.int64)
        self.occurs = np.zeros(count, np.int64)

    @property
    def correct(self) -> np.ndarray:
        """Correctly predicted pixels of each class."""
        return self.matrix[:-1, :-1].diagonal()

    @property
    def labelled(self) -> np.ndarray:
        """Pixels of each class in the labels."""
        return self.matrix[:-1].sum(1)

    @property
    def predicted(self) -> np.ndarray:
        """Pixels of each class in the predictions."""
        return self.matrix[:, :-1].sum(0)

    @property
    def iou(self) -> np.ndarray:
        """IoU of each class, 0 to 1; nan where it is neither labelled nor predicted."""
        with np.errstate(invalid='ignore'):
            return self.correct / (self.labelled + self.predicted - self.correct)

    @property
    def accuracy(self) -> np.ndarray:
        """Share of each class's pixels that are predicted correctly; nan where there are none."""
        with np.errstate(invalid='ignore'):
            return self.correct / self.labelled

    def add(self, name: str, labels: Tensor, predicted: Tensor,
            load: Callable[[], np.ndarray | None]) -> None:
        """Count one image.

        Args:
            name: Name of the image.
            labels: H x W.
            predicted: H x W.
            load: Returns the image (H x W x 3, BGR, of any size), or None if it cannot be read.
                Called only for an image that is among the best or the worst so far.
        """
        count = len(self.classes)
        matrix = _confusion(labels, predicted, count, self.ignore_index)
        self.matrix += matrix
        correct, labelled = matrix.diagonal()[:-1], matrix[:-1].sum(1)
        present = labelled > 0
        self.occurs += present
        union = labelled + matrix[:, :-1].sum(0) - correct
        total = labelled.sum()
        score = ImageScore(
            name, float(100 * (correct[present] / union[present]).mean()) if total else np.nan,
            float(100 * correct.sum() / total) if total else np.nan)
        self.images.append(score)
        if not total:
            return
        example = None
        for kept, key in ((self.best, _best_first), (self.worst, _worst_first)):
            if len(kept) < EXAMPLES or key(score) < key(kept[-1].score):
                if example is None:
                    example = _shrink(score, labels, predicted, load(), count, self.ignore_index)
                kept[:] = _first([*kept, example], key)

    def merge(self, others: Sequence['Evaluation']) -> None:
        """Add the counts of other processes, which took turns with the images."""
        parts = [self, *others]
        self.matrix = np.sum([part.matrix for part in parts], 0)
        self.occurs = np.sum([part.occurs for part in parts], 0)
        self.unlabelled = sum(part.unlabelled for part in parts)
        longest = max(len(part.images) for part in parts)
        self.images = [part.images[i] for i in range(longest) for part in parts
                       if i < len(part.images)]
        self.best = _first([example for part in parts for example in part.best], _best_first)
        self.worst = _first([example for part in parts for example in part.worst], _worst_first)

    def save(self, path: Path) -> None:
        """Write everything to a .npz file.

        Raises:
            OSError: The file cannot be written.
        """
        examples = [*self.best, *self.worst]
        plain = dict(
            classes=self.classes, palette=self.palette, ignore_index=self.ignore_index,
            nan_to_num=self.nan_to_num, unlabelled=self.unlabelled, iteration=self.iteration,
            seconds=self.seconds, size=self.size,
            metrics={name: float(value) for name, value in self.metrics.items()
                     if isinstance(value, (int, float, np.number))},
            images=[astuple(score) for score in self.images],
            examples=[astuple(example.score) for example in examples], best=len(self.best))
        arrays = {f'{name} {i}': getattr(example, name) for i, example in enumerate(examples)
                  for name in ('image', 'labels', 'predicted')}
        with replacing(path) as place:
            np.savez_compressed(place, plain=np.array(json.dumps(plain)), matrix=self.matrix,
                                occurs=self.occurs, **arrays)

    @classmethod
    def load(cls, path: Path) -> 'Evaluation | None':
        """Read a file of `save`; returns None if it is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as file:
                content = dict(file)
            plain = json.loads(str(content['plain']))
            best, scores = plain.pop('best'), plain.pop('examples')
            examples = [Example(ImageScore(*score), content[f'image {i}'], content[f'labels {i}'],
                                content[f'predicted {i}']) for i, score in enumerate(scores)]
            plain.update(classes=tuple(plain['classes']),
                         palette=tuple((r, g, b) for r, g, b in plain['palette']),
                         images=[ImageScore(*score) for score in plain['images']],
                         best=examples[:best], worst=examples[best:])
            evaluation = cls(**plain)
            evaluation.matrix, evaluation.occurs = content['matrix'], content['occurs']
            return evaluation
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None


def _confusion(labels: Tensor, predicted: Tensor, count: int, ignore_index: int) -> np.ndarray:
    """Count pixels by label and prediction; values outside of 0 to ``count`` - 1 share one row."""
    valid = labels != ignore_index
    pixels = (values[valid].to(torch.int32) for values in (labels, predicted))
    rows, columns = (torch.where((values < 0) | (values >= count), count, values)
                     for values in pixels)
    pairs = torch.bincount(rows * (count + 1) + columns, minlength=(count + 1) ** 2)
    return pairs.view(count + 1, count + 1).cpu().numpy()


def _best_first(score: ImageScore) -> tuple[float, str]:
    return -score.miou, score.name


def _worst_first(score: ImageScore) -> tuple[float, str]:
    return score.miou, score.name


def _first(examples: Sequence[Example], key: Callable[[ImageScore], Any]) -> list[Example]:
    return sorted(examples, key=lambda example: key(example.score))[:EXAMPLES]


def _shrink(score: ImageScore, labels: Tensor, predicted: Tensor, image: np.ndarray | None,
            count: int, ignore_index: int) -> Example:
    scale = min(1, _SIDE / max(labels.shape))
    height, width = (max(1, round(side * scale)) for side in labels.shape)
    rows, columns = (((torch.arange(small, device=labels.device) + 0.5) * side / small).long()
                     for small, side in zip((height, width), labels.shape))
    maps = []
    for values in (labels, predicted):
        values = values[rows[:, None], columns]
        outside = (values < 0) | (values >= count) | (values == ignore_index)
        maps.append(torch.where(outside, -1, values).to(torch.int16).cpu().numpy())
    if image is None:
        image = np.full((1, 1, 3), 128, np.uint8)
    small: Any = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return Example(score, small, *maps)


@HOOKS.register_module()
class EvaluationHook(Hook):
    """Count each validation and test, and write the report after each validation and at the end.

    On several processes the counts are summed without the images that were given out twice to make
    the shares equal, as mmseg's IoUMetric does. Those of a training are kept in its work dir, for a
    run that is killed after the validation and resumed.

    Args:
        compiled: Whether the network is compiled; each further ratio would be compiled anew.

    Attributes:
        evaluation: The last evaluation; None before the first one.
        kind: 'training' or 'test'.
    """

    # Before the checkpoint that notes that this validation is done.
    priority = 'LOW'

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self.evaluation: Evaluation | None = None
        self.kind = 'test'
        self.start = time.perf_counter()

    def before_run(self, runner: Runner) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def before_train(self, runner: Runner) -> None:
        """Load the last validation of a resumed run; remove that of another run."""
        self.kind = 'training'
        path = Path(runner.work_dir, FOLDER, _SAVED)
        if not is_main_process():
            return
        if runner.iter:
            self.evaluation = Evaluation.load(path)
        else:
            with suppress(OSError):  # if it cannot be replaced either, the log will say so
                path.unlink()

    def before_val_epoch(self, runner: Runner) -> None:
        """Start counting."""
        self._begin(runner.val_loop)

    def before_test_epoch(self, runner: Runner) -> None:
        """Start counting."""
        self.kind = 'test'
        self._begin(runner.test_loop)

    def _after_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                    outputs: Any = None, mode: str = 'train') -> None:
        """Count the images of a batch."""
        if mode != 'train':
            self._count(data_batch, outputs or ())

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Sum the counts of all processes, and save them."""
        self._end(metrics)
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
        self._end(metrics)

    def after_val(self, runner: Runner) -> None:
        """Write the report of an unfinished training, once its best checkpoint is saved."""
        if self.kind == 'training' and runner.iter < runner.max_iters:
            self._report(runner, final=False)

    def after_success(self, runner: Runner) -> None:
        """Write the report of a run that ended well, once all of its results are saved.

        mmengine calls no hook that late, so `launch.train` and `launch.evaluate` call this one: the
        report takes a while, in which a signal must end the process.
        """
        self._report(runner, final=True)

    def _begin(self, loop: Any) -> None:
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
                break
        self.seen = 0
        self.begun = time.perf_counter()

    def _count(self, data_batch: Any, outputs: Sequence[Any]) -> None:
        evaluation = self.evaluation
        rank, processes = get_dist_info()
        for i, sample in enumerate(outputs):
            number = self.seen * processes + rank
            self.seen += 1
            if evaluation is None or number >= evaluation.size or 'pred_sem_seg' not in sample:
                continue
            if 'gt_sem_seg' not in sample:
                evaluation.unlabelled += 1
                continue
            predicted = sample.pred_sem_seg.data.squeeze()
            labels = sample.gt_sem_seg.data.squeeze().to(predicted.device)
            name = str(sample.get('img_path', '') or f'image {number}')
            evaluation.add(name, labels, predicted,
                           partial(_load_image, data_batch['inputs'], i, name))

    def _end(self, metrics: dict[str, float] | None) -> None:
        if self.evaluation is None:
            return
        own, *others = all_gather_object(self.evaluation)
        if is_main_process():
            own.merge(others)
            own.metrics, own.seconds = dict(metrics or {}), time.perf_counter() - self.begun
            self.evaluation = own

    def _report(self, runner: Runner, final: bool) -> None:
        """Write the report; whatever happens, the run and its exit code stay as they are."""
        if not is_main_process():
            return
        try:
            from .report import write_report  # needs matplotlib and jinja2, which no run needs
            path = write_report(runner, self.evaluation, self.kind,
                                time.perf_counter() - self.start, compiled=self.compiled,
                                final=final)
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
