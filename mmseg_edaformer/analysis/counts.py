"""The counts of a validation or test, by class and by image."""
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from ..files import replacing

EXAMPLES = 4
"""Number of best and of worst images that are kept."""
FOLDER = 'report'
"""Folder in a work dir that holds the images and tables of a report."""

_SIDE = 400  # pixels of an example's longer side


class ImageScore(NamedTuple):
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
        iteration: Iteration of the training; None in a test.
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
        """Count one image, of labels and prediction H x W.

        ``load`` returns the image (H x W x 3, BGR, of any size), or None if it cannot be read. It
        is called only for an image that is among the best or the worst so far.
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
        ranks = [(kept, sign) for kept, sign in ((self.best, -1), (self.worst, 1))
                 if len(kept) < EXAMPLES or _rank(score, sign) < _rank(kept[-1].score, sign)]
        if ranks:
            example = _shrink(score, labels, predicted, load(), count, self.ignore_index)
        for kept, sign in ranks:
            kept[:] = _first([*kept, example], sign)

    def merge(self, others: Sequence['Evaluation']) -> None:
        """Add the counts of other processes, which took turns with the images."""
        parts = [self, *others]
        self.matrix = np.sum([part.matrix for part in parts], 0)
        self.occurs = np.sum([part.occurs for part in parts], 0)
        self.unlabelled = sum(part.unlabelled for part in parts)
        longest = max(len(part.images) for part in parts)
        self.images = [part.images[i] for i in range(longest) for part in parts
                       if i < len(part.images)]
        self.best = _first([example for part in parts for example in part.best], -1)
        self.worst = _first([example for part in parts for example in part.worst], 1)

    def save(self, path: Path) -> None:
        """Write everything to a .npz file."""
        examples = [*self.best, *self.worst]
        plain = vars(self) | dict(
            metrics={name: float(value) for name, value in self.metrics.items()
                     if isinstance(value, (int, float, np.number))},
            examples=[example.score for example in examples], best=len(self.best))
        for name in ('matrix', 'occurs', 'worst'):
            del plain[name]
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


def _rank(score: ImageScore, sign: int) -> tuple[float, str]:
    return sign * score.miou, score.name


def _first(examples: Sequence[Example], sign: int) -> list[Example]:
    """Return the worst examples, or the best for the sign -1."""
    return sorted(examples, key=lambda example: _rank(example.score, sign))[:EXAMPLES]


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
