"""Many ISR ratios of one checkpoint on the same images: what each gives and costs, which to take.

Ratios reduce keys, queries or both; beside them stand smaller inputs, the plainest way to save. All
ratios of a pass take turns on each image, so that they see the same images and other load on
the machine falls on all of them alike.
"""
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.run_config import load_config
from ..errors import ConfigError, RatioError
from ..files import write_file
from ..isr import ISRRatio
from .bench import Bench, InputScale, Way, mean_iou, open_bench
from .loading import NONE
from .sweep_report import Goal, Row, advice, draw, note, table, write
from .timing import size_text

GREEDY = 'greedy'
"""Stands for the ratios that the greedy search tries, in a list of ratios."""
DEFAULT: tuple[str, ...] = ('none', 'optimal', '2', '3', '4', 'none+q2', '2+q2', GREEDY)

SCALES = (0.5, 0.75, 0.9)
"""Input scales that are always measured too."""
_MOST = 4  # the largest multiplier that the search tries
_WORTH = 0.005  # of the trained GMACs: a step that saves less is tried for a budget only
_LEAST_LOSS = 0.01  # mIoU: less counts as this much, so that noise does not make a saving endless
_RESAMPLES = 1000
_FEWEST = 10  # images that a confidence interval needs

Move = tuple[str, str, int]
"""A dial, a part and a stage in it."""


def change_interval(areas: np.ndarray, trained: np.ndarray,
                    nan_to_num: float | None = None) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two mIoU, by bootstrap over the images.

    Both, as intersections and unions N x 2 x C, are of the same images. Each resample draws as many
    with replacement, the same for both, and its mIoU is that of all their pixels together.
    """
    count = len(areas)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _RESAMPLES)

    def resampled(values: np.ndarray) -> np.ndarray:
        sums = drawn.astype(np.float64) @ values.reshape(count, -1).astype(np.float64)
        return mean_iou(sums.reshape(_RESAMPLES, *values.shape[1:]), nan_to_num)

    low, high = np.percentile(resampled(areas) - resampled(trained), (2.5, 97.5))
    return float(low), float(high)


def search(bench: Bench, ratios: Sequence[ISRRatio], goal: Goal, greedy: bool) -> list[Way]:
    """Measure the ratios, `SCALES` and, from the trained ratio on, those of the greedy search.

    Each step measures what raising each stage by 1 gives, for its keys and for its queries, and
    takes the one that saves the most per lost mIoU: milliseconds for ``budget_ms``, else GMACs. The
    path ends within the budget, or where every step would lose more than ``max_drop`` or save
    little, or without a goal at the GMACs of ratio 2.

    Returns all that was to be measured. That no ratio meets ``budget_gmacs`` is known
    before any is measured, and raises a ConfigError.
    """
    trained = bench.ratio('none')
    tried: list[Way] = [*dict.fromkeys([trained, *ratios]), *filter(
        bench.takes, map(InputScale, SCALES))]
    most = bench.ratio(f'{_MOST}+q{_MOST}' if bench.has_queries else _MOST)
    if greedy and goal.budget_ms is not None and most not in tried:
        tried.append(most)
    if goal.budget_gmacs is not None:
        cheapest = min([*tried, *[most] * greedy], key=bench.gmacs)
        if bench.gmacs(cheapest) > goal.budget_gmacs:
            raise ConfigError(f'{goal}: the cheapest ratio here, {cheapest!s}, costs '
                              f'{bench.gmacs(cheapest):.3f} GMACs for {size_text(bench.size)} '
                              'pixels. Give at least that, or take a smaller model')
        greedy = greedy and bench.gmacs(most) <= goal.budget_gmacs  # else only a scale meets it
    budget = goal.budget_gmacs or goal.budget_ms
    closed: set[Move] = set()
    current, steps = trained, _steps(bench, trained, closed, budget) if greedy else {}
    tried += [ratio for ratio in steps.values() if ratio not in tried]
    bench.measure(tried, title='measuring')
    if not greedy or (goal.budget_ms is not None and
                      min(bench.milliseconds(way) for way in tried
                          if not isinstance(way, InputScale)) > goal.budget_ms):
        return tried
    cost = bench.gmacs if goal.budget_ms is None else bench.milliseconds
    end = budget or (0. if goal.max_drop is not None else bench.gmacs(bench.ratio(2)))
    while cost(current) > end and (steps := _steps(bench, current, closed, budget)):
        tried += [ratio for ratio in steps.values() if ratio not in tried]
        bench.measure(list(steps.values()), title='measuring')
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


def _steps(bench: Bench, ratio: ISRRatio, closed: set[Move],
           budget: float | None) -> dict[Move, ISRRatio]:
    """Return ratios with one stage higher that save much, or for a budget some that save at all."""
    saved = {}
    for dial in (ratio, ratio.queries) if bench.has_queries else (ratio,):
        parts = {kind: dial.for_stages(kind, count) for kind, count in bench.stages.items()}
        for kind, multipliers in parts.items():
            for i, multiplier in enumerate(multipliers):
                move = dial.knob, kind, i
                if multiplier == _MOST or move in closed:
                    continue
                more = parts | {kind: (*multipliers[:i], multiplier + 1, *multipliers[i + 1:])}
                higher = type(dial)(more.get('encoder', (1,)), more.get('decoder', (1,)))
                raised = bench.ratio(
                    higher.with_queries(ratio.queries) if isinstance(higher, ISRRatio) else
                    ratio.with_queries(higher))
                saved[move] = raised, bench.gmacs(ratio) - bench.gmacs(raised)
    much = _WORTH * bench.gmacs(bench.ratio('none'))
    little = budget is not None and not any(saving > much for _, saving in saved.values())
    return {stage: more for stage, (more, saving) in saved.items()
            if saving > (0. if little else much)}


def _gain(bench: Bench, before: ISRRatio, after: ISRRatio,
          cost: Callable[[Way], float]) -> float:
    """Return what a step saves for each lost point of mIoU."""
    loss = max(bench.miou(before) - bench.miou(after), _LEAST_LOSS)
    return max(cost(before) - cost(after), 0.) / loss


def recommend(rows: Sequence[Row], goal: Goal) -> Row | None:
    """Return the row that meets a goal best; None where none does, or there is no goal."""
    if goal.max_drop is not None:
        fit = [row for row in rows if -row.change <= goal.max_drop]
        return min(fit, key=lambda row: (row.gmacs, -row.miou), default=None)
    cost, budget = ('ms', goal.budget_ms) if goal.budget_ms is not None else (
        'gmacs', goal.budget_gmacs)
    fit = [row for row in rows if budget is not None and getattr(row, cost) <= budget]
    return max(fit, key=lambda row: (row.miou, -row.gmacs), default=None)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell which points (cost, mIoU) no other beats in one without being worse in the other."""
    return [not any(cost <= own[0] and miou >= own[1] and (cost, miou) != own
                    for cost, miou in points) for own in points]


def make_rows(bench: Bench, ratios: Sequence[Way], *, memory: bool = True) -> list[Row]:
    """Return the figures of those ratios that were measured on all images, the cheapest last.

    ``memory`` takes one more prediction of each.
    """
    done = [ratio for ratio in ratios if bench.count(ratio) >= bench.images]
    trained = bench.ratio('none')
    rows = []
    for ratio in sorted(done, key=bench.gmacs, reverse=True):
        low, high = (None, None) if bench.images < _FEWEST else change_interval(
            bench.areas(ratio), bench.areas(trained), bench.metric['nan_to_num'])
        rows.append(Row(str(ratio), bench.images, bench.miou(ratio),
                        bench.miou(ratio) - bench.miou(trained), low, high, bench.gmacs(ratio),
                        bench.milliseconds(ratio), bench.relative(ratio),
                        bench.peak_mib(ratio) if memory else None))
    return [replace(row, pareto_gmacs=by_gmacs, pareto_ms=by_ms) for row, by_gmacs, by_ms in zip(
        rows, pareto([(row.gmacs, row.miou) for row in rows]),
        pareto([(row.ms, row.miou) for row in rows]))]


def sweep(config: str, checkpoint: str, *, isr_ratios: Sequence[str] | None = None,
          query_ratio: str | None = None,
          goal: Goal | None = None, samples: int | None = None, out: str | Path | None = None,
          cfg_options: Mapping[str, Any] | Sequence[str] | None = None,
          say: Callable[[str], Any] = print) -> list[Row]:
    """Measure a checkpoint at many ratios, write the figures and recommend one.

    A KeyboardInterrupt reports the figures of what is done, and is raised again.

    Args:
        config: Config of any segmentor whose attention ISR knows.
        checkpoint: Its weights.
        isr_ratios: What `ISRRatio.parse` reads, and `GREEDY` for the greedy search; by default
            `DEFAULT`, as far as the model has its stages.
        query_ratio: A query ratio for those that name none.
        goal: What to recommend a ratio for.
        samples: Number of images of the test set, drawn at random; by default all.
        out: Folder for sweep.csv, .json, .png and, for a later sweep, .npz; by default a folder of
            the checkpoint in the config's work dir.
        cfg_options: Settings of the config to override.
        say: Function that takes the report.

    Raises:
        UserError: The config, the checkpoint, the data or a ratio cannot be used, or no ratio
            meets the goal.
    """
    cfg = load_config(config, cfg_options=cfg_options)
    folder = Path(out or Path(cfg.work_dir) / f'isr_sweep_{Path(checkpoint).stem}')
    options = [f'{key}={value}' for key, value in cfg_options.items()] if isinstance(
        cfg_options, Mapping) else list(cfg_options or ())
    command = [config, checkpoint, *(['--cfg-options', *options] if options else [])]
    return sweep_bench(open_bench(cfg, checkpoint, folder, samples), folder, command,
                       isr_ratios=isr_ratios, query_ratio=query_ratio, goal=goal, say=say)


def sweep_bench(bench: Bench, folder: Path, command: Sequence[str], *,
                isr_ratios: Sequence[str] | None = None, query_ratio: str | None = None,
                goal: Goal | None = None, say: Callable[[str], Any] = print) -> list[Row]:
    """`sweep` of a model and images that are loaded.

    ``command`` is what `sweep_report.advice` takes.
    """
    goal = goal or Goal()
    wanted = []
    for value in isr_ratios or DEFAULT:
        if value == GREEDY:
            continue
        with suppress(RatioError) if isr_ratios is None else nullcontext():
            ratio = bench.ratio(value)
            named = query_ratio if ratio.queries == NONE.queries else None
            wanted.append(bench.ratio(ratio.with_queries(named)))
    write_file(folder / '.writable', '')  # fail before the hours that follow
    (folder / '.writable').unlink()
    if reused := min(bench.count('none'), len(bench.order)):
        say(f'Reusing {folder / "sweep.npz"}, which holds {reused} images')

    def report(tried: Sequence[Way], *, memory: bool = True) -> list[Row]:
        rows = make_rows(bench, tried, memory=memory)
        best = recommend(rows, goal)
        name = None if best is None else best.isr_ratio
        write(folder, bench, rows, goal, name, command)
        named = {'none', *map(str, [*wanted, *map(InputScale, SCALES)])} | (
            {name} if name else set())
        draw(rows, folder / 'sweep.png', name, named)
        tail = (['--max-drop, --budget-ms or --budget-gmacs recommends one of them']
                if not goal.given else [] if best is None else advice(rows, goal, best, command))
        say('\n'.join([table(rows, named), note(bench), f'Written: {folder}/sweep.csv, '
                       '.json, .png, and .npz for a later sweep', *tail]))
        return rows

    try:
        tried = search(bench, wanted, goal, GREEDY in (isr_ratios or DEFAULT))
    except KeyboardInterrupt:
        if bench.images:
            report(list(map(bench.way, bench.measured)), memory=False)
            say('Interrupted: the same command resumes from here')
        raise
    rows = report(tried)
    if goal.given and recommend(rows, goal) is None:
        fastest = min(rows, key=lambda row: row.ms)
        raise ConfigError(f'{goal}: the fastest ratio here, {fastest.isr_ratio}, takes '
                          f'{fastest.ms:.1f} ms. Give at least that, or take a smaller model')
    return rows
