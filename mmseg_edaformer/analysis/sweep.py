"""Many ISR ratios of one checkpoint on the same images: what each gives and costs, which to take.

All ratios of a pass take turns on each image, so that they see the same images and whatever else
the machine does falls on all of them alike. What was measured is kept in a file and used again.
"""
import hashlib
import json
import math
import os
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.evaluation import IoUMetric
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ..cost import count_macs, windows
from ..engine import launch
from ..engine.allocator import keep_freed_memory
from ..engine.run_config import load_config
from ..errors import ConfigError, DataError, RatioError
from ..files import replacing, write_file
from ..isr import ISRRatio, isr
from ..isr.adapters import find_attention
from ..pretraining.folders import is_classifier
from .compare import load_model
from .memory import peak_bytes
from .sweep_report import (
    FEWEST,
    Goal,
    Row,
    advice,
    draw,
    notes,
    option_words,
    shape,
    table,
    write,
)

GREEDY = 'greedy'
"""Stands for the ratios that the greedy search tries, in a list of ratios."""
DEFAULT: tuple[str, ...] = ('none', 'optimal', '2', '3', '4', GREEDY)

_MOST = 4  # the largest multiplier that the search tries
_WORTH = 0.005  # of the trained GMACs: a step that saves less is tried for a budget alone
_LEAST_LOSS = 0.01  # mIoU: less counts as this much, so that noise does not make a saving endless
_RESAMPLES = 1000
_CACHE = 2**30  # bytes of loaded images that are kept for the next pass
_SAVE_SECONDS = 60.


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
            with isr(self.model, ratio):
                self.macs[name] = len(views) * count_macs(self.model, views[0]) / 1e9
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
                              f'{bench.gmacs(cheapest):.3f} GMACs for {shape(bench)} pixels. Give '
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
        low, high = (None, None) if bench.images < FEWEST else change_interval(
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
    cfg = load_config(config, cfg_options=cfg_options)
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
    command = [config, checkpoint, *option_words(cfg_options or {})]

    def report(tried: Sequence[ISRRatio], *, memory: bool = True) -> list[Row]:
        rows = make_rows(bench, tried, memory=memory)
        best = recommend(rows, goal)
        write(folder, bench, rows, goal, best, command)
        named = {'none', *map(ratio_name, wanted)} | ({best.isr_ratio} if best else set())
        draw(rows, folder / 'sweep.png', best.isr_ratio if best else None, named)
        say('\n'.join([table(rows, named), *notes(bench, rows), f'Written: {folder}/sweep.csv, '
                       '.json, .png, and .npz for a later sweep', *(
                           advice(rows, goal, best, command) if goal.given else
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
