"""What a validation or a test gave, class by class and image by image: the report is made of it."""
import json
import logging
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
"""So many of the best and of the worst images are kept."""
FOLDER = 'report'
"""Where, in a work dir, the pictures and tables of a report lie."""

_SIDE = 400  # pixels of an example's longer side
_SAVED = 'validation.npz'


@dataclass(frozen=True)
class ImageScore:
    """One image: its name, and in percent the mean IoU of the classes in its labels (nan where it
    has none) and its share of right pixels."""
    name: str
    miou: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Example:
    """A small copy of an image (h x w x 3, uint8, BGR), its labels and what was predicted.

    Both are h x w, int16; -1 is what does not count.
    """
    score: ImageScore
    picture: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray


@dataclass
class Evaluation:
    """What was counted in one validation or test, as mmseg's IoUMetric counts.

    Args:
        classes: Their names.
        palette: Their colours, RGB.
        ignore_index: The label that does not count.
        nan_to_num: What a class that does not occur counts as in the mIoU, as in IoUMetric.

    Attributes:
        matrix: Pixels by label and prediction, (C + 1) x (C + 1): the last row and column are what
            is no class. None as long as there was no image with labels.
        occurs: In how many images each class is labelled.
        images: All that were counted, in their order.
        best: The `EXAMPLES` with the highest mIoU, the best first.
        worst: Those with the lowest, the worst first.
        unlabelled: Images without labels.
        metrics: What the evaluator said.
        iteration: Of the training; None in a test.
        seconds: How long it took.
        size: Images of the data set.
    """
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = 255
    nan_to_num: float | None = None
    matrix: np.ndarray | None = None
    occurs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    images: list[ImageScore] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    unlabelled: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    iteration: int | None = None
    seconds: float = 0.
    size: int = 0

    @property
    def right(self) -> np.ndarray:
        """Pixels of each class that are predicted as such."""
        return self._counts[:-1, :-1].diagonal()

    @property
    def labelled(self) -> np.ndarray:
        """Pixels of each class in the labels."""
        return self._counts[:-1].sum(1)

    @property
    def predicted(self) -> np.ndarray:
        """Pixels of each class in the predictions."""
        return self._counts[:, :-1].sum(0)

    @property
    def iou(self) -> np.ndarray:
        """Of each class, 0 to 1; nan where it neither occurs nor is predicted."""
        with np.errstate(invalid='ignore'):
            return self.right / (self.labelled + self.predicted - self.right)

    @property
    def accuracy(self) -> np.ndarray:
        """Share of each class's pixels that are predicted as such; nan where it does not occur."""
        with np.errstate(invalid='ignore'):
            return self.right / self.labelled

    @property
    def _counts(self) -> np.ndarray:
        count = len(self.classes) + 1
        return np.zeros((count, count), np.int64) if self.matrix is None else self.matrix

    def add(self, name: str, labels: Tensor, predicted: Tensor,
            picture: Callable[[], np.ndarray | None]) -> None:
        """Count one image.

        Args:
            name: What it is called.
            labels: H x W.
            predicted: H x W.
            picture: Gives the image, H x W x 3, BGR, of any size; asked only where it is among the
                best or the worst so far. None where there is none.
        """
        count = len(self.classes)
        found = _confusion(labels, predicted, count, self.ignore_index)
        if self.matrix is None:
            self.matrix, self.occurs = np.zeros_like(found), np.zeros(count, np.int64)
        self.matrix += found
        right, of_class = found.diagonal()[:-1], found[:-1].sum(1)
        present = of_class > 0
        self.occurs += present
        union = of_class + found[:, :-1].sum(0) - right
        total = of_class.sum()
        score = ImageScore(
            name, float(100 * (right[present] / union[present]).mean()) if total else np.nan,
            float(100 * right.sum() / total) if total else np.nan)
        self.images.append(score)
        if not total:
            return
        wanted = [(kept, key)
                  for kept, key in ((self.best, _best_first), (self.worst, _worst_first))
                  if len(kept) < EXAMPLES or key(score) < key(kept[-1].score)]
        if wanted:
            example = _shrink(score, labels, predicted, picture(), count, self.ignore_index)
            for kept, key in wanted:
                kept.append(example)
                kept.sort(key=lambda each, key=key: key(each.score))  # type: ignore[misc]
                del kept[EXAMPLES:]

    def merge(self, others: Sequence['Evaluation']) -> None:
        """Take in what other processes counted of the same data."""
        everything = [self, *others]
        for other in others:
            if other.matrix is not None:
                self.matrix = self._counts + other.matrix
                self.occurs = other.occurs + (self.occurs if len(self.occurs) else 0)
        self.unlabelled = sum(each.unlabelled for each in everything)
        # Processes take turns with the images.
        most = max(len(each.images) for each in everything)
        self.images = [each.images[i] for i in range(most) for each in everything
                       if i < len(each.images)]
        self.best = sorted((example for each in everything for example in each.best),
                           key=lambda each: _best_first(each.score))[:EXAMPLES]
        self.worst = sorted((example for each in everything for example in each.worst),
                            key=lambda each: _worst_first(each.score))[:EXAMPLES]

    def save(self, path: Path) -> None:
        """Write all of it to a .npz file.

        Raises:
            OSError: It cannot be written.
        """
        examples = [*self.best, *self.worst]
        plain = dict(
            classes=self.classes, palette=self.palette, ignore_index=self.ignore_index,
            nan_to_num=self.nan_to_num, unlabelled=self.unlabelled, best=len(self.best),
            metrics={name: float(value) for name, value in self.metrics.items()
                     if isinstance(value, (int, float, np.number))},
            iteration=self.iteration, seconds=self.seconds, size=self.size,
            names=[each.name for each in self.images],
            examples=[each.score.name for each in examples])
        arrays: dict[str, Any] = dict(
            plain=np.array(json.dumps(plain)), occurs=self.occurs,
            scores=_scores(self.images), example_scores=_scores([each.score for each in examples]),
            **({} if self.matrix is None else dict(matrix=self.matrix)))
        for i, example in enumerate(examples):
            arrays |= {f'{name} {i}': getattr(example, name)
                       for name in ('picture', 'truth', 'predicted')}
        with replacing(path) as place:
            np.savez_compressed(place, **arrays)

    @classmethod
    def load(cls, path: Path) -> 'Evaluation | None':
        """Read what `save` wrote; None where there is none, or it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as file:
                content = dict(file)
            plain = json.loads(str(content['plain']))
            best = plain.pop('best')
            scores = [ImageScore(name, *pair) for name, pair in zip(
                plain.pop('names'), content['scores'].tolist())]
            examples = [
                Example(ImageScore(name, *pair), content[f'picture {i}'], content[f'truth {i}'],
                        content[f'predicted {i}'])
                for i, (name, pair) in enumerate(zip(
                    plain.pop('examples'), content['example_scores'].tolist()))]
            plain.update(classes=tuple(plain['classes']),
                         palette=tuple((r, g, b) for r, g, b in plain['palette']))
            return cls(**plain, matrix=content.get('matrix'), occurs=content['occurs'],
                       images=scores, best=examples[:best], worst=examples[best:])
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None


def _confusion(labels: Tensor, predicted: Tensor, count: int, ignore_index: int) -> np.ndarray:
    """Pixels by label and prediction; what lies outside of 0 to ``count`` - 1 is put together."""
    valid = labels != ignore_index
    rows, columns = (torch.where((each < 0) | (each >= count), count, each.to(torch.int32))
                     for each in (labels[valid].to(torch.int32), predicted[valid]))
    pairs = torch.bincount(rows * (count + 1) + columns, minlength=(count + 1) ** 2)
    return pairs.view(count + 1, count + 1).cpu().numpy()


def _best_first(score: ImageScore) -> tuple[float, str]:
    return -score.miou, score.name


def _worst_first(score: ImageScore) -> tuple[float, str]:
    return score.miou, score.name


def _scores(images: Sequence[ImageScore]) -> np.ndarray:
    return np.array([(each.miou, each.accuracy) for each in images]).reshape(-1, 2)


def _shrink(score: ImageScore, labels: Tensor, predicted: Tensor, picture: np.ndarray | None,
            count: int, ignore_index: int) -> Example:
    scale = min(1, _SIDE / max(labels.shape))
    height, width = (max(1, round(side * scale)) for side in labels.shape)
    rows, columns = (((torch.arange(small, device=labels.device) + 0.5) * side / small).long()
                     for small, side in zip((height, width), labels.shape))
    maps = []
    for each in (labels, predicted):
        each = each[rows[:, None], columns]
        outside = (each < 0) | (each >= count) | (each == ignore_index)
        maps.append(torch.where(outside, -1, each).to(torch.int16).cpu().numpy())
    if picture is None:
        picture = np.full((1, 1, 3), 128, np.uint8)
    shown: Any = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return Example(score, shown, *maps)


@HOOKS.register_module()
class EvaluationHook(Hook):
    """Count what each validation and test gives, and write the report after each validation.

    On several processes the counts are summed, without the images that were given twice to make
    their shares equal, as mmseg's IoUMetric does. That of a training is kept in its work dir, for a
    run that is killed after it and resumed.

    Args:
        compiled: Its network is compiled, and each other ratio would be compiled anew.

    Attributes:
        evaluation: The last one; None before.
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
        """Take up the last validation of a resumed run; remove that of another one."""
        self.kind = 'training'
        path = Path(runner.work_dir, FOLDER, _SAVED)
        if not is_main_process():
            return
        if runner.iter:
            self.evaluation = Evaluation.load(path)
        else:
            with suppress(OSError):  # where it cannot be replaced either, the log will say so
                path.unlink()

    def before_val_epoch(self, runner: Runner) -> None:
        """Count anew."""
        self._begin(runner.val_loop)

    def before_test_epoch(self, runner: Runner) -> None:
        """Count anew."""
        self.kind = 'test'
        self._begin(runner.test_loop)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                       outputs: Sequence[Any] | None = None) -> None:
        """Count the images of a batch."""
        self._count(data_batch, outputs or ())

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                        outputs: Sequence[Any] | None = None) -> None:
        """Count the images of a batch."""
        self._count(data_batch, outputs or ())

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Sum the counts of all processes, and keep them."""
        self._end(metrics)
        if self.evaluation is None or not is_main_process():
            return
        self.evaluation.iteration = runner.iter
        try:
            self.evaluation.save(Path(runner.work_dir, FOLDER, _SAVED))
        except OSError as error:
            runner.logger.warning('The counts of this validation cannot be kept, which a report '
                                  f'after a resume would lack: {error}')

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Sum the counts of all processes."""
        self._end(metrics)

    def after_val(self, runner: Runner) -> None:
        """Write the report of a training that goes on, once its best checkpoint is saved."""
        if self.kind == 'training' and runner.iter < runner.max_iters:
            explain(runner, final=False)

    def _begin(self, loop: Any) -> None:
        dataset = loop.dataloader.dataset
        metric = next((each for each in loop.evaluator.metrics
                       if isinstance(each, IoUMetric)), None)
        meta = getattr(dataset, 'metainfo', {})
        classes = tuple(map(str, meta.get('classes') or ()))
        palette = np.asarray(meta.get('palette') or np.random.default_rng(0).integers(
            256, size=(len(classes), 3))).tolist()
        self.evaluation = Evaluation(classes, tuple(map(tuple, palette)), size=len(dataset))
        if metric is not None:
            self.evaluation.ignore_index = metric.ignore_index
            self.evaluation.nan_to_num = metric.nan_to_num
        self.seen = 0
        self.begun = time.perf_counter()

    def _count(self, data_batch: Any, outputs: Sequence[Any]) -> None:
        evaluation = self.evaluation
        rank, processes = get_dist_info()
        for i, sample in enumerate(outputs):
            again = self.seen * processes + rank >= evaluation.size if evaluation else True
            self.seen += 1
            if evaluation is None or again or 'pred_sem_seg' not in sample:
                continue
            if 'gt_sem_seg' not in sample:
                evaluation.unlabelled += 1
                continue
            predicted = sample.pred_sem_seg.data.squeeze()
            labels = sample.gt_sem_seg.data.squeeze().to(predicted.device)
            name = str(sample.get('img_path', '') or f'image {self.seen * processes + rank}')
            evaluation.add(name, labels, predicted,
                           partial(_picture, data_batch['inputs'], i, name))

    def _end(self, metrics: dict[str, float] | None) -> None:
        if self.evaluation is None:
            return
        own, *others = all_gather_object(self.evaluation)
        if is_main_process():
            own.merge(others)
            own.metrics, own.seconds = dict(metrics or {}), time.perf_counter() - self.begun
            self.evaluation = own


def _picture(inputs: Any, index: int, name: str) -> np.ndarray | None:
    """An image of a batch, H x W x 3, BGR; test-time augmentation has none as it was read."""
    image = inputs[index]
    if not isinstance(image, Tensor):
        return cv2.imread(name)
    array = image.detach().float().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return np.repeat(array, 3, 2) if array.shape[2] == 1 else np.ascontiguousarray(array[..., :3])


def explain(runner: Runner, *, final: bool = True) -> None:
    """Write the report of a run; whatever happens, the run is as before.

    Call it on all processes: the first one writes, and none waits here.

    Args:
        runner: It trains, has trained or has tested.
        final: Whether it has ended well.
    """
    hook = next((hook for hook in runner.hooks if isinstance(hook, EvaluationHook)), None)
    if hook is None or not is_main_process():
        return
    try:
        from .report import write_report  # needs matplotlib, which nothing before does
        path = write_report(runner, hook.evaluation, hook.kind, time.perf_counter() - hook.start,
                            compiled=hook.compiled, final=final)
        runner.logger.info(f'Report: {path}')
    except (UserError, OSError) as error:
        runner.logger.warning(f'There is no report, but the run is as it should be: {error}')
    except Exception:
        # The exit code tells whether the run may be followed by the next one: it may.
        runner.logger.log(logging.ERROR, 'There is no report, but the run is as it should be. What '
                          'follows is a defect of the report:', exc_info=True)
