"""Many ISR ratios of one checkpoint on the same images: what each gives and costs, which to take.

All ratios of a pass take turns on each image, so that they see the same images and whatever else
the machine does falls on all of them alike. What was measured is kept in a file and used again.
"""
import csv
import hashlib
import io
import json
import math
import os
import shlex
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.evaluation import IoUMetric
from prettytable import PrettyTable
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ..engine import launch
from ..engine.allocator import keep_freed_memory
from ..errors import ConfigError, DataError, RatioError
from ..files import replacing, write_file
from ..isr import ISRRatio, isr
from ..isr.adapters import find_attention
from ..pretrain import is_classifier
from .benchmark import Plan, environment, load_config, windows
from .compare import load_model
from .cost import count_macs
from .memory import peak_bytes

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

GREEDY = 'greedy'
"""Stands for the ratios that the greedy search tries, in a list of ratios."""
DEFAULT: tuple[str, ...] = ('none', 'optimal', '2', '3', '4', GREEDY)

_MOST = 4  # the largest multiplier that the search tries
_WORTH = 0.005  # of the trained GMACs: a step that saves less is tried for a budget alone
_LEAST_LOSS = 0.01  # mIoU: less counts as this much, so that noise does not make a saving endless
_RESAMPLES = 1000
_FEWEST = 10  # images that an interval needs
_CACHE = 2**30  # bytes of loaded images that are kept for the next pass
_SAVE_SECONDS = 60.
_LINE, _RECOMMENDED, _TRIED = '#33658a', '#b5485d', '#b0b7bf'


@dataclass(frozen=True)
class Goal:
    """What a ratio is to be recommended for; one of the three, or none.

    Args:
        max_drop: The cheapest ratio that loses at most so much mIoU, in points.
        budget_ms: The best mIoU within so many milliseconds per image, on this machine.
        budget_gmacs: The best mIoU within so many GMACs per image.

    Raises:
        ConfigError: More than one is given, or one is no such number.
    """
    max_drop: float | None = None
    budget_ms: float | None = None
    budget_gmacs: float | None = None

    def __post_init__(self) -> None:
        if len(self.given) > 1:
            raise ConfigError(f'{" and ".join(self.given)} contradict each other: each asks for '
                              'a ratio of its own. Give one')
        for flag, value in self.given.items():
            if not 0 <= value < math.inf or (value == 0 and self.max_drop is None):
                raise ConfigError(f'{flag} {value:g}: give a number above 0')

    @property
    def given(self) -> dict[str, float]:
        """What is given, by the name of its flag."""
        return {'--' + field.name.replace('_', '-'): getattr(self, field.name)
                for field in fields(self) if getattr(self, field.name) is not None}

    def __str__(self) -> str:
        return ' '.join(f'{flag} {value:g}' for flag, value in self.given.items())


@dataclass(frozen=True)
class Row:
    """One ratio.

    Attributes:
        isr_ratio: As `tools/test.py --isr-ratio` takes it.
        images: How many it was measured on.
        miou: In percent, of these images.
        change: mIoU above that of the trained ratio, in points; below 0 is a loss.
        change_low: Lower end of the 95 % interval of ``change``, see `change_interval`; None for
            fewer than 10 images.
        change_high: Its upper end.
        gmacs: Billions of multiply-adds of one image, of the size that the report names.
        ms: Milliseconds of a whole prediction, from the decoded image to its labels: the median of
            the trained ratio times ``time_vs_none``.
        time_vs_none: Median ratio of its time to that of the trained ratio in the same turn.
        peak_mib: Most memory at once for that image, see `memory.peak_bytes`.
        pareto_gmacs: Whether no other ratio has both more mIoU and fewer GMACs.
        pareto_ms: The same of time.
    """
    isr_ratio: str
    images: int
    miou: float
    change: float
    change_low: float | None
    change_high: float | None
    gmacs: float
    ms: float
    time_vs_none: float
    peak_mib: float | None = None
    pareto_gmacs: bool = False
    pareto_ms: bool = False


class Measurements:
    """Areas and times of each ratio on the first images of an order, kept in a file.

    Args:
        path: The .npz file.
        subject: What is measured, in a few characters; a file of another subject is not used.

    Attributes:
        areas: Intersection and union of each class (2 x C), for each image, by ratio.
        seconds: Of the prediction, and of that at the trained ratio in the same turn.
    """

    def __init__(self, path: Path, subject: str) -> None:
        self.path, self.subject = path, subject
        self.areas: dict[str, list[np.ndarray]] = {}
        self.seconds: dict[str, list[tuple[float, float]]] = {}
        self.saved = time.monotonic()
        try:
            with np.load(path, allow_pickle=False) as file:
                content = dict(file)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):  # none, or damaged
            return
        if str(content.pop('subject', '')) == subject:
            for name, areas in content.items():
                ratio, _, kind = name.partition(' ')
                if kind == 'areas':
                    self.areas[ratio] = list(areas)
                    self.seconds[ratio] = [(own, base) for own, base in
                                           content[f'{ratio} seconds'].tolist()]

    def count(self, ratio: str) -> int:
        """How many images a ratio has been measured on."""
        return len(self.areas.get(ratio, ()))

    def add(self, ratio: str, areas: np.ndarray, seconds: tuple[float, float]) -> None:
        """Note a prediction for the next image of a ratio."""
        self.seconds.setdefault(ratio, []).append(seconds)
        self.areas.setdefault(ratio, []).append(areas)

    def save(self, interval: float = 0.) -> None:
        """Write the file, unless it was written less than ``interval`` seconds ago."""
        if not self.areas or time.monotonic() - self.saved < interval:
            return
        arrays: dict[str, Any] = dict(subject=np.array(self.subject))
        for ratio, areas in self.areas.items():
            arrays[f'{ratio} areas'] = np.stack(areas)
            arrays[f'{ratio} seconds'] = np.array(self.seconds[ratio][:len(areas)])
        with replacing(self.path) as partial:
            np.savez_compressed(partial, **arrays)
        self.saved = time.monotonic()


class Bench:
    """A segmentor with its weights, the images, and what was measured of them.

    Args:
        cfg: A config that `launch.prepare_test` has seen.
        checkpoint: Its weights.
        folder: Where the measurements are kept.
        samples: So many images, drawn at random but always the same ones; by default all.

    Raises:
        ConfigError: The config has no IoUMetric, or ``samples`` is below 1.
        CheckpointError: The checkpoint does not fit.
        RatioError: The model holds no attention that ISR can reduce.
    """

    def __init__(self, cfg: Config, checkpoint: str, folder: Path,
                 samples: int | None = None) -> None:
        if samples is not None and samples < 1:
            raise ConfigError(f'--samples {samples}: give 1 or more')
        self.metric = _iou_metric(cfg)
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        if self.device.type == 'cpu':
            keep_freed_memory()
        torch.backends.cudnn.benchmark = bool((cfg.get('env_cfg') or {}).get('cudnn_benchmark'))
        model, self.dataset = load_model(cfg, checkpoint)
        self.model: Any = model.to(self.device)
        with isr(self.model, 1):
            pass  # that it can be reduced is told before anything is measured
        self.stages = {part.kind: len(part.stages) for part in find_attention(self.model).parts}
        # The first images of one order: a larger sample holds a smaller one.
        order = np.random.default_rng(0).permutation(len(self.dataset))
        self.order = [int(index) for index in order[:samples]]
        self.found = Measurements(folder / 'sweep.npz', self._subject(cfg, checkpoint))
        self.cache: dict[int, Any] = {}
        self.cached = 0
        self.passes = 0
        self.warm: set[str] = set()
        self.macs: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self.example, self.size = self._middle_image()

    def ratio(self, value: ISRRatio | int | str) -> ISRRatio:
        """Read a ratio for this model; ratios that do the same are the same.

        Raises:
            RatioError: It means nothing, or does not fit.
        """
        ratio = ISRRatio.parse(value)
        with isr(self.model, ratio):
            pass
        if ratio.auto:
            return ratio
        own = {kind: ratio.for_stages(kind, count) for kind, count in self.stages.items()}
        multipliers = {each for part in own.values() for each in part}
        if len(multipliers) == 1:
            return ISRRatio.parse(multipliers.pop())
        return ISRRatio(own.get('encoder', (1,)), own.get('decoder', (1,)))

    def raised(self, ratio: ISRRatio) -> dict[tuple[str, int], ISRRatio]:
        """The ratios with one stage higher by 1, by the stage, up to what the search tries."""
        own = {kind: ratio.for_stages(kind, count) for kind, count in self.stages.items()}
        found = {}
        for kind, multipliers in own.items():
            for i, multiplier in enumerate(multipliers):
                if multiplier < _MOST:
                    more = own | {kind: (*multipliers[:i], multiplier + 1, *multipliers[i + 1:])}
                    found[kind, i] = self.ratio(ISRRatio(more.get('encoder', (1,)),
                                                         more.get('decoder', (1,))))
        return found

    def gmacs(self, ratio: ISRRatio) -> float:
        """Billions of multiply-adds of one image of `size`, all of its windows counted."""
        name = ratio_name(ratio)
        if name not in self.macs:
            views = windows(self.model, self.size)
            view = (len(range(self.size[0])[views[0][0]]), len(range(self.size[1])[views[0][1]]))
            with isr(self.model, ratio):
                self.macs[name] = len(views) * count_macs(self.model, view) / 1e9
        return self.macs[name]

    def miou(self, ratio: ISRRatio) -> float:
        """mIoU of the images that all have been measured on, in percent."""
        return float(mean_iou(self.areas(ratio).sum(0), self.metric['nan_to_num']))

    def areas(self, ratio: ISRRatio) -> np.ndarray:
        """Intersections and unions of the images that all have been measured on, N x 2 x C."""
        return np.stack(self.found.areas[ratio_name(ratio)][:self.images]).astype(np.float64)

    def relative(self, ratio: ISRRatio) -> float:
        """Median ratio of the time to that of the trained ratio in the same turn."""
        seconds = self.found.seconds[ratio_name(ratio)][:self.images]
        return statistics.median(own / base for own, base in seconds)

    def milliseconds(self, ratio: ISRRatio) -> float:
        """Of one prediction; see `Row.ms`."""
        trained = self.found.seconds['none'][:self.images]
        return 1e3 * self.relative(ratio) * statistics.median(own for own, _ in trained)

    @property
    def images(self) -> int:
        """How many images are measured: all, or so far in the first pass."""
        if self.found.count('none') >= len(self.order):
            return len(self.order)
        return min((len(areas) for areas in self.found.areas.values()), default=0)

    @torch.no_grad()
    def measure(self, ratios: Sequence[ISRRatio]) -> None:
        """Predict each image at every ratio in turn, the trained one among them for the times.

        What has been measured before is not measured again.
        """
        names = {ratio_name(ratio): ratio for ratio in ratios
                 if self.found.count(ratio_name(ratio)) < len(self.order)}
        if not names:
            return
        self.passes += 1
        try:
            with _progress(f'pass {self.passes}', len(names), len(self.order)) as advance:
                for position in range(len(self.order)):
                    todo = [name for name in names if self.found.count(name) == position]
                    if todo:
                        self._take_turns(position, names, todo)
                        self.found.save(_SAVE_SECONDS)
                    advance()
        finally:
            self.found.save()

    def _take_turns(self, position: int, ratios: Mapping[str, ISRRatio],
                    todo: Sequence[str]) -> None:
        data = self._load(position)
        turn = list(dict.fromkeys(('none', *todo)))
        first = position % len(turn)  # none of them is always the one after loading
        done = {name: self._predict(data, name, ratios.get(name, ISRRatio.parse('none')))
                for name in (*turn[first:], *turn[:first])}
        for name in todo:
            areas, seconds = done[name]
            self.found.add(name, areas, (seconds, done['none'][1]))

    def _predict(self, data: Any, name: str, ratio: ISRRatio) -> tuple[np.ndarray, float]:
        """Intersections and unions of a prediction (2 x C), and the seconds it took."""
        with isr(self.model, ratio):
            if name not in self.warm:
                self.model.test_step(data)
                self.warm.add(name)
            self._synchronize()
            start = time.perf_counter()
            sample = self.model.test_step(data)[0]
            self._synchronize()
            seconds = time.perf_counter() - start
        if 'gt_sem_seg' not in sample:
            raise DataError(f'{sample.get("img_path", "an image of the test set")} has no labels '
                            'to compare with: its pipeline needs LoadAnnotations, and '
                            'test_dataloader.dataset.data_prefix a seg_map_path')
        predicted = sample.pred_sem_seg.data.squeeze()
        areas = IoUMetric.intersect_and_union(
            predicted, sample.gt_sem_seg.data.squeeze().to(predicted), self.metric['classes'],
            self.metric['ignore_index'])
        return torch.stack(areas[:2]).round().to(torch.int32).numpy(), seconds

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def _load(self, position: int) -> Any:
        """A batch of one image; kept for the next pass while there is room."""
        if position in self.cache:
            return self.cache[position]
        data = pseudo_collate([self.dataset[self.order[position]]])
        # Beside three bytes a pixel are eight of its label.
        self.cached += 4 * data['inputs'][0].nbytes
        if self.cached <= _CACHE:
            self.cache[position] = data
        return data

    def _middle_image(self) -> tuple[Any, tuple[int, int]]:
        """Of the first images the middle one by size, with its height and width in the network."""
        sized = []
        for position in range(min(len(self.order), 25)):
            data = self._load(position)
            inputs = self.model.data_preprocessor(data, False)['inputs']
            sized.append((math.prod(inputs.shape[-2:]), position, tuple(inputs.shape[-2:])))
        _, position, size = sorted(sized)[len(sized) // 2]
        return self._load(position), size

    @torch.no_grad()
    def peak_mib(self, ratio: ISRRatio) -> float:
        """Most memory at once in a prediction of an image of `size`, with the weights."""
        name = ratio_name(ratio)
        if name not in self.peaks:
            with isr(self.model, ratio):
                self.peaks[name] = peak_bytes(
                    lambda: self.model.test_step(self.example),
                    [*self.model.parameters(), *self.model.buffers()], self.device) / 2**20
        return self.peaks[name]

    def _subject(self, cfg: Config, checkpoint: str) -> str:
        """A digest of all that the measurements depend on."""
        loader = cfg.test_dataloader.dataset
        files = [os.path.abspath(self.dataset.get_data_info(i)['img_path'])
                 for i in range(len(self.dataset))]
        weights = os.stat(checkpoint) if os.path.exists(checkpoint) else None
        text = json.dumps([
            cfg.model, loader, self.metric, files, os.path.realpath(checkpoint),
            weights and (weights.st_size, weights.st_mtime_ns), torch.__version__,
            torch.get_num_threads(), str(self.device)], default=str, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _iou_metric(cfg: Config) -> dict[str, Any]:
    """Settings of the config's IoUMetric, and the number of classes."""
    evaluators = cfg.get('test_evaluator') or []
    for each in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        if each.get('type') in ('IoUMetric', IoUMetric):
            head = cfg.model.get('decode_head') or {}
            head = head[-1] if isinstance(head, (list, tuple)) else head
            return dict(classes=head.get('num_classes'),
                        ignore_index=each.get('ignore_index', 255),
                        nan_to_num=each.get('nan_to_num'))
    raise ConfigError(f'{cfg.filename} has no IoUMetric as test_evaluator: the sweep measures '
                      'its mIoU')


def mean_iou(areas: np.ndarray, nan_to_num: float | None = None) -> np.ndarray:
    """mIoU in percent as mmseg's IoUMetric has it: without classes that do not occur.

    Args:
        areas: Intersection and union of each class in pixels, ... x 2 x C.
        nan_to_num: What a class that does not occur counts as instead.
    """
    with np.errstate(invalid='ignore', divide='ignore'):
        iou = areas[..., 0, :] / areas[..., 1, :]
    if nan_to_num is not None:
        iou = np.nan_to_num(iou, nan=nan_to_num)
    return 100 * np.nanmean(iou, -1)


def change_interval(areas: np.ndarray, trained: np.ndarray,
                    nan_to_num: float | None = None) -> tuple[float, float]:
    """95 % interval of the difference of two mIoU, by bootstrap over the images.

    Each resample draws as many images with replacement, the same for both, and its mIoU is that of
    all their pixels together. It tells how far another sample of such images may differ.

    Args:
        areas: Intersections and unions of each image, N x 2 x C.
        trained: Those that it is compared with, of the same images.
        nan_to_num: As for `mean_iou`.
    """
    count = len(areas)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _RESAMPLES)

    def resampled(each: np.ndarray) -> np.ndarray:
        sums = drawn.astype(np.float64) @ each.reshape(count, -1).astype(np.float64)
        return mean_iou(sums.reshape(_RESAMPLES, *each.shape[1:]), nan_to_num)

    low, high = np.percentile(resampled(areas) - resampled(trained), (2.5, 97.5))
    return float(low), float(high)


def ratio_name(ratio: ISRRatio) -> str:
    """A ratio as the tables show it and the command lines take it."""
    if ratio == ISRRatio.parse('none'):
        return 'none'
    # A lone multiplier is followed by a comma, which matters from 10 up.
    return str(ratio).removesuffix(',') if max(ratio.decoder) < 10 else str(ratio)


def search(bench: Bench, ratios: Sequence[ISRRatio], goal: Goal, greedy: bool) -> list[ISRRatio]:
    """Measure the ratios and, from the trained one on, those of the greedy search.

    Each step measures what raising each stage by 1 gives, and takes the one that saves the most
    per lost mIoU: milliseconds for ``budget_ms``, else GMACs. The path ends within the budget, or
    where every step would lose more than ``max_drop`` or save little, or without a goal at the
    GMACs of ratio 2.

    Returns:
        All ratios that were to be measured.

    Raises:
        ConfigError: No ratio meets ``budget_gmacs``, which is known before any is measured.
    """
    trained = bench.ratio('none')
    tried = list(dict.fromkeys([trained, *ratios]))
    most = bench.ratio(_MOST)
    if greedy and goal.budget_ms is not None and most not in tried:
        tried.append(most)
    if goal.budget_gmacs is not None:
        cheapest = min([*tried, *[most] * greedy], key=bench.gmacs)
        if bench.gmacs(cheapest) > goal.budget_gmacs:
            raise ConfigError(f'{goal}: the cheapest ratio here, {ratio_name(cheapest)}, costs '
                              f'{bench.gmacs(cheapest):.3f} GMACs for {_shape(bench)} pixels. Give '
                              'at least that, or take a smaller model')
    budget = goal.budget_gmacs or goal.budget_ms
    closed: set[tuple[str, int]] = set()
    current, steps = trained, _steps(bench, trained, closed, budget) if greedy else {}
    tried += [ratio for ratio in steps.values() if ratio not in tried]
    bench.measure(tried)
    if not greedy or (goal.budget_ms is not None and
                      min(map(bench.milliseconds, tried)) > goal.budget_ms):
        return tried
    cost = bench.gmacs if goal.budget_ms is None else bench.milliseconds
    end = budget or (0. if goal.max_drop is not None else bench.gmacs(bench.ratio(2)))
    while cost(current) > end and (steps := _steps(bench, current, closed, budget)):
        tried += [ratio for ratio in steps.values() if ratio not in tried]
        bench.measure(list(steps.values()))
        if goal.max_drop is not None:
            least = bench.miou(trained) - goal.max_drop
            over = {stage for stage, ratio in steps.items() if bench.miou(ratio) < least}
            closed |= over  # it would not lose less later on
            steps = {stage: ratio for stage, ratio in steps.items() if stage not in over}
            if not steps:
                break
        current = max(steps.values(), key=lambda ratio: (
            _gain(bench, current, ratio, cost), _gain(bench, current, ratio, bench.gmacs)))
    return tried


def _steps(bench: Bench, ratio: ISRRatio, closed: set[tuple[str, int]],
           budget: float | None) -> dict[tuple[str, int], ISRRatio]:
    """Ratios with one stage higher that save much; for a budget, else, those that save at all."""
    saved = {stage: (more, bench.gmacs(ratio) - bench.gmacs(more))
             for stage, more in bench.raised(ratio).items() if stage not in closed}
    much = _WORTH * bench.gmacs(bench.ratio('none'))
    little = budget is not None and not any(each > much for _, each in saved.values())
    return {stage: more for stage, (more, each) in saved.items()
            if each > (0. if little else much)}


def _gain(bench: Bench, before: ISRRatio, after: ISRRatio,
          cost: Callable[[ISRRatio], float]) -> float:
    """What a step saves for each lost point of mIoU."""
    loss = max(bench.miou(before) - bench.miou(after), _LEAST_LOSS)
    return max(cost(before) - cost(after), 0.) / loss


def recommend(rows: Sequence[Row], goal: Goal) -> Row | None:
    """The row that meets a goal best; None where none does, or nothing is asked for."""
    if goal.max_drop is not None:
        fit = [row for row in rows if -row.change <= goal.max_drop]
        return min(fit, key=lambda row: (row.gmacs, -row.miou), default=None)
    if goal.budget_ms is not None:
        fit = [row for row in rows if row.ms <= goal.budget_ms]
    elif goal.budget_gmacs is not None:
        fit = [row for row in rows if row.gmacs <= goal.budget_gmacs]
    else:
        return None
    return max(fit, key=lambda row: (row.miou, -row.gmacs), default=None)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, mIoU) no other beats in one without being worse in the other."""
    return [not any(cost <= own[0] and miou >= own[1] and (cost, miou) != own
                    for cost, miou in points) for own in points]


def make_rows(bench: Bench, ratios: Sequence[ISRRatio], *, memory: bool = True) -> list[Row]:
    """The figures of those ratios that were measured on all images, the cheapest last.

    Args:
        bench: The measurements.
        ratios: What to show.
        memory: Measure it, which takes one more prediction of each.
    """
    done = [ratio for ratio in ratios if bench.found.count(ratio_name(ratio)) >= bench.images]
    done.sort(key=lambda ratio: -bench.gmacs(ratio))
    trained = bench.ratio('none')
    nan = bench.metric['nan_to_num']
    rows = []
    for ratio in done:
        low, high = (None, None) if bench.images < _FEWEST else change_interval(
            bench.areas(ratio), bench.areas(trained), nan)
        rows.append(Row(ratio_name(ratio), bench.images, bench.miou(ratio),
                        bench.miou(ratio) - bench.miou(trained), low, high, bench.gmacs(ratio),
                        bench.milliseconds(ratio), bench.relative(ratio),
                        bench.peak_mib(ratio) if memory else None))
    return [replace(row, pareto_gmacs=by_gmacs, pareto_ms=by_ms) for row, by_gmacs, by_ms in zip(
        rows, pareto([(row.gmacs, row.miou) for row in rows]),
        pareto([(row.ms, row.miou) for row in rows]))]


def sweep(config: str, checkpoint: str, *, ratios: Sequence[str] = DEFAULT,
          goal: Goal | None = None, samples: int | None = None, out: str | Path | None = None,
          cfg_options: Mapping[str, Any] | None = None,
          say: Callable[[str], Any] = print) -> list[Row]:
    """Measure a checkpoint at many ratios, write the figures and recommend one.

    Args:
        config: Of any segmentor whose attention ISR knows.
        checkpoint: Its weights.
        ratios: What `ISRRatio.parse` reads, and `GREEDY` for the greedy search.
        goal: What to recommend a ratio for.
        samples: So many images of the test set, drawn at random; by default all.
        out: Where sweep.csv, .json, .png and, of use to a later sweep, .npz go; by default a folder
            of the checkpoint in the config's work dir.
        cfg_options: Settings of the config to replace.
        say: What takes the report.

    Returns:
        The figures. On a KeyboardInterrupt those of what is done are reported, then it goes on.

    Raises:
        ConfigError: The config cannot be used, or no ratio meets the goal.
        UserError: The checkpoint, the data or a ratio cannot be used.
    """
    goal = goal or Goal()
    cfg = load_config(config, dict(cfg_options or {}))
    if is_classifier(cfg):
        raise ConfigError(f'{config} trains a classifier, and the sweep measures the mIoU of a '
                          'segmentor: take tools/compare_isr.py')
    launch.prepare_test(cfg, checkpoint)
    folder = Path(out or Path(cfg.work_dir) / f'isr_sweep_{Path(checkpoint).stem}')
    bench = Bench(cfg, checkpoint, folder, samples)
    wanted = []
    for value in ratios:
        try:
            wanted += [] if value == GREEDY else [bench.ratio(value)]
        except RatioError:
            if ratios is not DEFAULT:  # a model may have other stages than the paper's
                raise
    write_file(folder / '.writable', '')  # that it can be is known before the hours that follow
    (folder / '.writable').unlink()
    reused = min(bench.found.count('none'), len(bench.order))
    if reused:
        say(f'Going on with what {bench.found.path} holds of {reused} images')
    command = [config, checkpoint, *_option_words(cfg_options or {})]

    def report(tried: Sequence[ISRRatio], *, memory: bool = True) -> list[Row]:
        rows = make_rows(bench, tried, memory=memory)
        best = recommend(rows, goal)
        _write(folder, bench, rows, goal, best, command)
        named = {'none', *map(ratio_name, wanted)} | ({best.isr_ratio} if best else set())
        draw(rows, folder / 'sweep.png', best.isr_ratio if best else None, named)
        say('\n'.join([table(rows, named), *_notes(bench, rows), f'Written: {folder}/sweep.csv, '
                       '.json, .png, and .npz for a later sweep', *(
                           _advice(rows, goal, best, command) if goal.given else
                           ['--max-drop, --budget-ms or --budget-gmacs recommends one of them'])]))
        return rows

    try:
        tried = search(bench, wanted, goal, GREEDY in ratios)
    except KeyboardInterrupt:
        if bench.images:
            known = [ISRRatio.parse(name) for name in bench.found.areas]
            report(known, memory=False)
            say('Interrupted: the same command goes on from here')
        raise
    rows = report(tried)
    if goal.given and recommend(rows, goal) is None:
        fastest = min(rows, key=lambda row: row.ms)
        raise ConfigError(f'{goal}: the fastest ratio here, {fastest.isr_ratio}, takes '
                          f'{fastest.ms:.1f} ms. Give at least that, or take a smaller model')
    return rows


def table(rows: Sequence[Row], named: set[str]) -> str:
    """The figures of the named ratios and of those that nothing beats, for a terminal."""
    hidden = {name for name, value in (('95 % interval', rows[0].change_low),
                                       ('MiB', rows[0].peak_mib)) if value is None}
    columns = ('isr_ratio', 'mIoU', 'change', '95 % interval', 'GMACs', 'ms', 'time', 'MiB', 'best')
    pretty = PrettyTable(columns, align='r')
    pretty.align['isr_ratio'] = 'l'
    shown = [row for row in rows if row.isr_ratio in named or row.pareto_gmacs or row.pareto_ms]
    for row in shown:
        best = [name for name, is_best in (('GMACs', row.pareto_gmacs), ('ms', row.pareto_ms))
                if is_best]
        pretty.add_row([
            row.isr_ratio, f'{row.miou:.2f}',
            *(('', '') if row.isr_ratio == 'none' else (f'{row.change:+.2f}', _interval(row))),
            f'{row.gmacs:.3f}', f'{row.ms:.1f}', f'x {row.time_vs_none:.2f}',
            '' if row.peak_mib is None else f'{row.peak_mib:.0f}', ', '.join(best)])
    rest = len(rows) - len(shown)
    return pretty.get_string(fields=[name for name in columns if name not in hidden]) + (
        f'\n{rest} more ratio{"s were" if rest > 1 else " was"} tried: others '
                          'give more for less' if rest else '')


def _interval(row: Row) -> str:
    return '' if row.change_low is None else f'{row.change_low:+.2f} to {row.change_high:+.2f}'


def _notes(bench: Bench, rows: Sequence[Row]) -> list[str]:
    """What a reader of the table must know."""
    some = '' if bench.images == len(bench.dataset) else f' of {len(bench.dataset)}'
    threads = torch.get_num_threads()
    lines = [
        f'{bench.images}{some} images, batch 1, '
        f'{torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"}, '
        f'{threads} thread{"s" if threads > 1 else ""}, torch {torch.__version__}.',
        'best: no other ratio gives more mIoU for fewer GMACs, or for less time.',
        'time: median ratio to none, turn by turn; ms: that times the median of none, image to '
        'labels.']
    if rows[0].change_low is None:
        lines.append(f'Too few images for an interval, which needs {_FEWEST}.')
    else:
        lines.append('95 % interval: of the change, by resampling the images, the same for both.')
    where = ('what torch allocates' if bench.device.type == 'cuda' else
             "live tensors, without the kernels' scratch")
    lines.append(f'GMACs: for {_shape(bench)} pixels.' if rows[0].peak_mib is None else
                 f'GMACs, MiB: for {_shape(bench)} pixels; MiB: {where}, with the weights.')
    return lines


def _advice(rows: Sequence[Row], goal: Goal, best: Row | None,
            command: Sequence[str]) -> list[str]:
    """The recommended ratio in words, and the line that tests it."""
    if best is None:
        return []
    trained = next(row for row in rows if row.isr_ratio == 'none')
    line = shlex.join(['python', 'tools/test.py', *command[:2], *(
        [] if best is trained else ['--isr-ratio', best.isr_ratio]), *command[2:]])
    if best is trained:
        return [f'{goal}: the trained ratio, none; what is cheaper does not give more within it',
                line]
    lines = [f'{goal}: take {best.isr_ratio}: mIoU {best.miou:.2f} ({best.change:+.2f}), '
             f'{best.gmacs:.3f} GMACs ({best.gmacs / trained.gmacs - 1:+.1%}), {best.ms:.1f} ms '
             f'(x {best.time_vs_none:.2f})']
    if goal.max_drop is not None and best.change_low is not None and (
            -best.change_low > goal.max_drop):
        lines.append(f'On other images the drop may be as large as {-best.change_low:.2f} (95 % '
                     'interval): more --samples narrow that')
    return [*lines, line]


def _option_words(options: Mapping[str, Any]) -> list[str]:
    """--cfg-options as a command line has them."""
    words = [f'{key}={value if isinstance(value, str) else _plain(value)}'
             for key, value in options.items()]
    return ['--cfg-options', *words] if words else []


def _plain(value: Any) -> str:
    return str(value).replace("'", '').replace(' ', '')


def _shape(bench: Bench) -> str:
    return f'{bench.size[0]}x{bench.size[1]}'


def _write(folder: Path, bench: Bench, rows: Sequence[Row], goal: Goal, best: Row | None,
           command: Sequence[str]) -> None:
    """Write sweep.csv and sweep.json."""
    figures = [{name: round(value, 6) if isinstance(value, float) else value
                for name, value in asdict(row).items()} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator='\n')
    writer.writeheader()
    writer.writerows(figures)
    write_file(folder / 'sweep.csv', text.getvalue())
    plan = Plan(device=bench.device.type, keep_memory=True)
    write_file(folder / 'sweep.json', json.dumps(dict(
        config=command[0], checkpoint=command[1], cfg_options=command[3:],
        images=bench.images, images_of_test_set=len(bench.dataset), input_size=bench.size,
        goal={flag.removeprefix('--'): value for flag, value in goal.given.items()},
        recommended=best and best.isr_ratio, rows=figures, environment=environment(plan),
    ), indent=2) + '\n')


@contextmanager
def _progress(title: str, ratios: int, images: int) -> Iterator[Callable[[], None]]:
    """A bar with the time left of a pass on a terminal, elsewhere a line at its end."""
    text = f'{title}: {ratios} ratio{"s" if ratios > 1 else ""}'
    start = time.monotonic()
    if sys.stdout.isatty():
        with Progress(TextColumn('{task.description}'), BarColumn(bar_width=20),
                      MofNCompleteColumn(), TextColumn('images, left in this pass'),
                      TimeRemainingColumn()) as progress:
            task = progress.add_task(text, total=images)
            yield lambda: progress.advance(task)
    else:
        yield lambda: None
        print(f'{text} on {images} images in {time.monotonic() - start:.0f} s', flush=True)


def draw(rows: Sequence[Row], path: str | Path, recommended: str | None = None,
         named: Collection[str] = ('none',)) -> None:
    """Draw mIoU over GMACs and over time, with what nothing beats as a line, as a PNG.

    Args:
        rows: The figures.
        path: Where to.
        recommended: The ratio to mark.
        named: Ratios to label beside those on the line.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, dpi=120,
                                layout='constrained')
    for axis, cost, front, title in (
            (axes[0], 'gmacs', 'pareto_gmacs', 'GMACs per image'),
            (axes[1], 'ms', 'pareto_ms', 'ms per image')):
        points = {row.isr_ratio: (getattr(row, cost), row.miou) for row in rows}
        best = sorted(points[row.isr_ratio] for row in rows if getattr(row, front))
        marked = [row.isr_ratio for row in rows if getattr(row, front) or row.isr_ratio in named]
        others = [point for name, point in points.items() if name not in marked]
        if others:
            axis.scatter(*zip(*others), s=14, color=_TRIED, label='tried', zorder=2)
        axis.plot(*zip(*best), color=_LINE, linewidth=1.4, zorder=3, marker='o', markersize=5,
                  label='best for its cost')
        off = [points[name] for name in marked if points[name] not in best]
        if off:
            axis.scatter(*zip(*off), s=26, facecolor='white', edgecolor=_LINE, zorder=4,
                         label='named, but others give more for less')
        if recommended is not None:
            axis.scatter(*points[recommended], s=150, marker='*', color=_RECOMMENDED, zorder=5,
                         label='recommended')
        axis.set_xlabel(title)
        axis.grid(color='#e5e5e5', linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[['top', 'right']].set_visible(False)
        axis.margins(0.12)
    axes[0].set_ylabel('mIoU')
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncols=4, frameon=False, fontsize=9)
    figure.canvas.draw()  # settles the layout, which the labels must not change
    figure.set_layout_engine('none')
    for axis, cost, front in ((axes[0], 'gmacs', 'pareto_gmacs'), (axes[1], 'ms', 'pareto_ms')):
        points = {row.isr_ratio: (getattr(row, cost), row.miou) for row in rows}
        leaders = [row.isr_ratio for row in rows if getattr(row, front)]
        _label(axis, points, sorted(points[name] for name in leaders), recommended, named, leaders)
    with replacing(path) as partial:
        figure.savefig(partial)
    plt.close(figure)


def _label(axis: Axes, points: Mapping[str, tuple[float, float]],
           line: Sequence[tuple[float, float]], recommended: str | None, named: Collection[str],
           leaders: Sequence[str]) -> None:
    """Label points where there is room: the named ones first, and the others only close by."""
    figure: Any = axis.figure
    scale = figure.dpi / 72
    along = [(1 - t) * np.array(a) + t * np.array(b)
             for a, b in pairwise(line) for t in np.linspace(0, 1, 40)]
    taken = [Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half)
             for half, kind in ((3.5 * scale, points.values()), (scale, along),
                                (7 * scale, [points[recommended]] if recommended else []))
             for x, y in (axis.transData.transform(point) for point in kind)]
    around = [(0, 1), (1, 1), (-1, 1), (0, -1), (1, -1), (-1, -1), (1, 0), (-1, 0)]
    wanted = [name for name in points if name in named or name in leaders]
    for name in sorted(wanted, key=lambda name: (name != recommended, name not in named)):
        far = (7, 12, 20, 30, 42) if name in named else (7, 12)
        for distance, (right, up) in product(far, around):
            note = axis.annotate(
                name, points[name], (right * distance, up * distance), fontsize=8,
                textcoords='offset points', annotation_clip=False,
                ha={0: 'center', 1: 'left', -1: 'right'}[right],
                va={0: 'center', 1: 'bottom', -1: 'top'}[up],
                color=_RECOMMENDED if name == recommended else '#222222',
                fontweight='bold' if name == recommended else 'normal',
                arrowprops=None if distance < 12 else dict(
                    arrowstyle='-', color='#999999', linewidth=0.6, shrinkA=0, shrinkB=4))
            note.update_positions(figure.canvas.get_renderer())
            box = Text.get_window_extent(note)  # without its line
            inside = (box.x0 >= axis.bbox.x0 and box.x1 <= figure.bbox.x1 and
                      box.y0 >= axis.bbox.y0 and box.y1 <= figure.bbox.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()
