"""One image predicted at the trained ISR ratio and at another: the labels, the cost, the time."""
import functools
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmseg.registry import TRANSFORMS

from ..cost import count_macs, windows
from ..data.transforms import with_checks
from ..errors import ConfigError, DataError, RatioError
from ..isr import ISRRatio, isr
from ..isr.registry import find_attention
from .inputs import scale_down
from .segmenter import Segmentation, Segmenter

MAX_SIDE = 1024
"""Pixels on the longer side that images are scaled down to by default."""

_TRAINED = ISRRatio.parse('none')
_MAX_PIXELS = 2 ** 26  # of a file that is decoded
_ROUNDS, _SECONDS = 5, 1.  # at most this many timed turns, and none begins later than that
_KEPT = 8  # comparisons


@dataclass(frozen=True, eq=False)
class Comparison:
    """One image at the trained ratio and at another, `ratio`; pairs are trained and chosen.

    ``milliseconds`` are medians of whole predictions, ``gmacs`` count what the network saw.
    """
    ratio: ISRRatio
    results: tuple[Segmentation, Segmentation]
    milliseconds: tuple[float, float]
    rounds: int
    gmacs: tuple[float, float]

    @property
    def changed(self) -> float:
        """The share of the pixels whose class changed."""
        trained, chosen = self.results
        return float((trained.labels != chosen.labels).mean())


class Comparer:
    """Predicts images at the trained ratio and at another, for one request at a time.

    ``stages`` holds the numbers of the stages whose keys can be reduced, by 'encoder' and
    'decoder'; without any, there is a RatioError.

    Args:
        segmenter: The model. Each comparison sets its ratio.
        max_side: Larger images are scaled down before, to this many pixels on the longer side.
    """

    def __init__(self, segmenter: Segmenter, max_side: int = MAX_SIDE) -> None:
        if max_side < 32:
            raise ConfigError(f'--max-side {max_side}: give 32 or more pixels')
        self.segmenter, self.max_side = segmenter, max_side
        with isr(segmenter.model, 1):
            pass
        self.stages: dict[str, tuple[int, ...]] = {}
        parts = find_attention(segmenter.model).parts
        for part in sorted(parts, key=lambda part: part.kind, reverse=True):  # the encoder first
            if len(part.stages) != len(self.stages.setdefault(part.kind, tuple(part.stages))):
                self.stages[part.kind] = (0,)  # one multiplier for all is what fits
        self._read: Any = TRANSFORMS.build(
            {**with_checks(segmenter.description.pipeline[0]), 'max_pixels': _MAX_PIXELS})
        self._lock = threading.Lock()
        self._macs = functools.lru_cache(4096)(
            lambda ratio, size: count_macs(segmenter.model, size))
        self.compare = functools.lru_cache(_KEPT)(self._compare)

    def ratio(self, multipliers: Sequence[int]) -> ISRRatio:
        """Return the ratio of multipliers, one for each of the `stages`, the encoder's first."""
        if {*multipliers} == {1}:
            return _TRAINED
        rest = iter(multipliers)
        parts = {kind: tuple(int(next(rest)) for _ in numbers)
                 for kind, numbers in self.stages.items()}
        return ISRRatio(parts.get('encoder', (1,)), parts.get('decoder', (1,)))

    def multipliers(self, ratio: ISRRatio | int | str) -> list[int] | None:
        """Return the multiplier of each stage for a ratio; None if the ratio does not fit."""
        ratio = ISRRatio.parse(ratio)
        try:
            return [multiplier for kind, numbers in self.stages.items()
                    for multiplier in ratio.for_stages(kind, len(numbers))]
        except RatioError:
            return None

    def _compare(self, path: str, ratio: ISRRatio) -> Comparison:
        """Predict an image at both ratios; ``compare`` keeps the last few comparisons."""
        try:
            image = self._read(dict(img_path=path))['img']
        except DataError as error:  # people know the file by the name that they gave it
            raise DataError(str(error).replace(path, Path(path).name).replace(
                ' (max_pixels of the transform)', '')) from error
        image = scale_down(image.astype(np.uint8, copy=False), self.max_side)
        data = self.segmenter.load(image)[1]
        model: Any = self.segmenter.model
        batch = dict(inputs=[data['inputs']], data_samples=[data['data_samples']])
        views = windows(model, model.data_preprocessor(batch, False)['inputs'].shape[2:])
        results: dict[ISRRatio, Segmentation] = {}
        gmacs: dict[ISRRatio, float] = {}
        seconds: dict[ISRRatio, list[float]] = {_TRAINED: [], ratio: []}
        with self._lock:
            for turn in seconds:  # the first prediction of a size may compile or allocate
                self.segmenter.isr_ratio = turn
                results[turn] = self.segmenter(image)
                gmacs[turn] = len(views) * self._macs(turn, views[0]) / 1e9
            start = time.perf_counter()
            while not seconds[ratio] or (len(seconds[ratio]) < _ROUNDS and
                                         time.perf_counter() - start < _SECONDS):
                for turn, own in seconds.items():
                    self.segmenter.isr_ratio = turn
                    begin = time.perf_counter()
                    self.segmenter(image)
                    own.append(time.perf_counter() - begin)
        return Comparison(ratio, (results[_TRAINED], results[ratio]),
                          (1e3 * statistics.median(seconds[_TRAINED]),
                           1e3 * statistics.median(seconds[ratio])),
                          len(seconds[ratio]), (gmacs[_TRAINED], gmacs[ratio]))
