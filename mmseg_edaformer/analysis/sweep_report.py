"""What a sweep over ISR ratios reports: rows, a table, advice, files and a chart."""
import json
import math
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from prettytable import PrettyTable, TableStyle

from ..errors import ConfigError, first_line
from ..files import write_file
from .bench import SCALE, Bench
from .report_plots import LINE, MARKED, figure_of, write_csv
from .timing import environment, size_text, thread_text

_TRIED = '#b0b7bf'


@dataclass(frozen=True)
class Goal:
    """The goal of a recommendation: one of the three, or none.

    With ``max_drop``, in points of mIoU, the cheapest ratio is recommended; with ``budget_ms`` or
    ``budget_gmacs``, per image, the one of the best mIoU.

    Raises:
        ConfigError: More than one is given, or one is not a positive number.
    """
    max_drop: float | None = None
    budget_ms: float | None = None
    budget_gmacs: float | None = None

    def __post_init__(self) -> None:
        if len(self.given) > 1:
            raise ConfigError(f'{" and ".join(self.given)} exclude each other: give one')
        for flag, value in self.given.items():
            if not 0 <= value < math.inf or (value == 0 and self.max_drop is None):
                raise ConfigError(f'{flag} {value:g}: give a number above 0')

    @property
    def given(self) -> dict[str, float]:
        """The given value by the name of its flag."""
        return {f'--{name.replace("_", "-")}': value for name, value in asdict(self).items()
                if value is not None}

    def __str__(self) -> str:
        return ' '.join(f'{flag} {value:g}' for flag, value in self.given.items())


@dataclass(frozen=True)
class Row:
    """One ratio.

    Attributes:
        isr_ratio: As `tools/test.py --isr-ratio` takes it; or ``scale 0.75``, a smaller input.
        miou: In percent, of the ``images`` images.
        change: mIoU above that of the trained ratio, in points; below 0 is a loss.
        change_low, change_high: Its 95 % interval; None for fewer than 10 images.
        gmacs: Billions of multiply-adds of one image, of the size that the report names.
        ms: Milliseconds of a whole prediction, from the decoded image to its labels: the median of
            the trained ratio times ``time_vs_none``.
        time_vs_none: Median ratio of its time to that of the trained ratio in the same turn.
        peak_mib: Most memory at once for that image, see `timing.peak_bytes`.
        pareto_gmacs, pareto_ms: Whether no other ratio has more mIoU for fewer GMACs, or less time.
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


def table(rows: Sequence[Row], named: set[str], *, markdown: bool = False) -> str:
    """Format the named ratios and those that nothing beats, for a terminal or as Markdown."""
    hidden = {name for name, value in (('95 % interval', rows[0].change_low),
                                       ('MiB', rows[0].peak_mib)) if value is None}
    columns = ('isr_ratio', 'mIoU', 'change', '95 % interval', 'GMACs', 'ms', 'time', 'MiB', 'best')
    pretty = PrettyTable(columns, align='r')
    pretty.align['isr_ratio'] = 'l'
    if markdown:
        pretty.set_style(TableStyle.MARKDOWN)
    shown = [row for row in rows if row.isr_ratio in named or row.pareto_gmacs or row.pareto_ms]
    for row in shown:
        best = [name for name, is_best in (('GMACs', row.pareto_gmacs), ('ms', row.pareto_ms))
                if is_best]
        pretty.add_row([
            row.isr_ratio, f'{row.miou:.2f}',
            *(('', '') if row.isr_ratio == 'none' else (
                f'{row.change:+.2f}', '' if row.change_low is None else
                f'{row.change_low:+.2f} to {row.change_high:+.2f}')),
            f'{row.gmacs:.3f}', f'{row.ms:.1f}', f'x {row.time_vs_none:.2f}',
            '' if row.peak_mib is None else f'{row.peak_mib:.0f}', ', '.join(best)])
    rest = len(rows) - len(shown)
    return pretty.get_string(fields=[name for name in columns if name not in hidden]) + (
        f'\n{rest} more ratio{"s were" if rest > 1 else " was"} tried and beaten by those shown'
        if rest else '')


def note(bench: Bench) -> str:
    """Say what was measured where."""
    some = '' if bench.images == len(bench.dataset) else f' of {len(bench.dataset)}'
    device = torch.cuda.get_device_name() if bench.device.type == 'cuda' else 'CPU'
    return (f'{bench.images}{some} images, batch 1, {device}, {thread_text()}, torch '
            f'{torch.__version__}; GMACs and MiB for {size_text(bench.size)} pixels. '
            'docs/choosing.md explains the columns.')


def advice(rows: Sequence[Row], goal: Goal, best: Row, command: Sequence[str]) -> list[str]:
    """Say which ratio to take, and the command that tests it.

    ``command`` is config, checkpoint and options; or a model, '' and options of tools/predict.py.
    """
    trained = next(row for row in rows if row.isr_ratio == 'none')
    flag = [] if best is trained else ['--isr-ratio', best.isr_ratio]
    own = ['test.py', *command[:2]] if command[1] else ['predict.py', 'IMAGES', '--model',
                                                        command[0], '--out', 'RESULTS']
    line = shlex.join(['python', f'tools/{own[0]}', *own[1:], *flag, *command[2:]])
    if best.isr_ratio.startswith(SCALE):
        where = 'the scale of Resize in the test_pipeline' if command[1] else '--max-side'
        line = (f'No ratio is as good as images smaller by {best.isr_ratio.removeprefix(SCALE)}, '
                f'measured where the backbone takes them: lower {where} by it, and test that')
    if best is trained:
        return [f'{goal}: take none, the trained ratio; no cheaper ratio meets it as well', line]
    lines = [f'{goal}: take {best.isr_ratio}: mIoU {best.miou:.2f} ({best.change:+.2f}), '
             f'{best.gmacs:.3f} GMACs ({best.gmacs / trained.gmacs - 1:+.1%}), {best.ms:.1f} ms '
             f'(x {best.time_vs_none:.2f})']
    if goal.max_drop is not None and best.change_low is not None and (
            -best.change_low > goal.max_drop):
        lines.append(f'On other images the drop may reach {-best.change_low:.2f} (95 % interval): '
                     'more --samples narrow it')
    return [*lines, line]


def write(folder: Path, bench: Bench, rows: Sequence[Row], goal: Goal, best: str | None,
          command: Sequence[str]) -> None:
    """Write sweep.csv and sweep.json."""
    figures = [{name: round(value, 6) if isinstance(value, float) else value
                for name, value in asdict(row).items()} for row in rows]
    write_csv(folder / 'sweep.csv', list(figures[0]), [astuple(row) for row in rows])
    write_file(folder / 'sweep.json', json.dumps(dict(
        config=command[0], checkpoint=command[1], cfg_options=command[3:],
        images=bench.images, images_of_test_set=len(bench.dataset), input_size=bench.size,
        goal={flag.removeprefix('--'): value for flag, value in goal.given.items()},
        recommended=best, rows=figures, environment=environment(bench.device.type),
    ), indent=2) + '\n')


def find_sweep(checkpoint: Path, work_dir: Path) -> tuple[list[Row], str] | None:
    """Return the rows of the newest sweep of a checkpoint, if it is newer, and what it is.

    The sweep lies in the work dir or beside the checkpoint.
    """
    paths = [path for folder in {work_dir.resolve(), checkpoint.resolve().parent}
             for pattern in ('sweep.json', 'isr_sweep_*/sweep.json')
             for path in folder.glob(pattern)]
    for path in sorted(paths, key=lambda path: -path.stat().st_mtime):
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            if (os.path.realpath(content['checkpoint']) == os.path.realpath(checkpoint) and
                    path.stat().st_mtime > checkpoint.stat().st_mtime):
                return [Row(**row) for row in content['rows']], (
                    f'From {path}: {content["images"]} of {content["images_of_test_set"]} images, '
                    f'GMACs for {size_text(content["input_size"])} pixels.')
        except (OSError, ValueError, KeyError, TypeError):  # no sweep
            continue
    return None


def read_ratios(path: str | Path, max_drop: float | None = None) -> dict[str, float]:
    """Return the mIoU of the ratios of a sweep.json that are worth having, the slowest first.

    No other ratio beats them in both mIoU and time, and they lose at most ``max_drop``.
    """
    try:
        rows = [Row(**row) for row in json.loads(Path(path).read_text(encoding='utf-8'))['rows']]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path} is no sweep.json of tools/isr_sweep.py ({first_line(error)})'
                          ) from error
    kept = {row.isr_ratio: row.miou for row in sorted(rows, key=lambda row: -row.ms)
            if row.pareto_ms and not row.isr_ratio.startswith(SCALE) and
            (max_drop is None or row.change >= -max_drop)}
    if not kept:
        raise ConfigError(f'{path}: no ratio loses at most {max_drop} mIoU: allow more')
    return kept


def draw(rows: Sequence[Row], path: Path, recommended: str | None = None,
         named: Collection[str] = ('none',), groups: Mapping[str, str] | None = None) -> None:
    """Draw mIoU over GMACs and over time, with what nothing beats as a line, as a PNG.

    The ``named`` ratios are labelled beside those on the line. With the ``groups`` that ratios
    belong to, each group has a colour, and bars show the intervals of their change.
    """
    with figure_of(path, (11, 5.2), 2) as (figure, axes):
        labels = []
        for axis, cost in zip(axes, ('gmacs', 'ms')):
            points = {row.isr_ratio: (getattr(row, cost), row.miou) for row in rows}
            best = {row.isr_ratio for row in rows if getattr(row, f'pareto_{cost}')}
            labels.append({name: points[name] for name in points if name in best or name in named})
            beaten = [points[name] for name in points if name not in best]
            if groups:
                _draw_groups(axis, rows, points, groups)
            elif beaten:
                axis.scatter(*zip(*beaten), s=22, color=_TRIED, label='others give more for less',
                             zorder=2)
            axis.plot(*zip(*sorted(points[name] for name in best)), color=LINE, linewidth=1.4,
                      zorder=3, marker='o', markersize=5, label='best for its cost')
            if recommended is not None:
                axis.scatter(*points[recommended], s=150, marker='*', color=MARKED, zorder=5,
                             label='recommended')
            axis.margins(0.12)
        axes[0].set(xlabel='GMACs per image', ylabel='mIoU')
        axes[1].set_xlabel('ms per image')
        handles, texts = axes[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc='outside lower center', ncols=4, frameon=False,
                      fontsize=9)
        figure.canvas.draw()  # settles the layout, which the labels must not change
        figure.set_layout_engine('none')
        for axis, points in zip(axes, labels):
            _label(axis, points, recommended, named)


def _draw_groups(axis: Any, rows: Sequence[Row], points: Mapping[str, tuple[float, float]],
                 groups: Mapping[str, str]) -> None:
    """Draw the points of each group in its colour, with their intervals."""
    for number, group in enumerate(dict.fromkeys(groups.values())):
        members = [row for row in rows if groups.get(row.isr_ratio) == group]
        cost, miou = zip(*(points[row.isr_ratio] for row in members))
        low, high = zip(*((0., 0.) if row.change_low is None or row.change_high is None else
                          (max(row.change - row.change_low, 0.),
                           max(row.change_high - row.change, 0.)) for row in members))
        axis.errorbar(cost, miou, (low, high), fmt='o', color=f'C{number}', ecolor=_TRIED,
                      elinewidth=0.8, markersize=5, label=group, zorder=4)


def _label(axis: Any, points: Mapping[str, tuple[float, float]], recommended: str | None,
           named: Collection[str]) -> None:
    """Label points where there is room: the named ones first, and the others only close by."""
    from matplotlib.text import Text
    taken: list[Any] = []
    for name in sorted(points, key=lambda name: (name != recommended, name not in named)):
        for distance in (9, -9, 22, -22, 35, -35) if name in named else (9, -9):
            note = axis.annotate(
                name, points[name], (0, distance), fontsize=8, textcoords='offset points',
                annotation_clip=False, ha='center', va='center',
                color=MARKED if name == recommended else '#222222',
                arrowprops=dict(arrowstyle='-', color='#999999', linewidth=0.6))
            note.update_positions(axis.figure.canvas.get_renderer())
            box = Text.get_window_extent(note)  # without its line
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()
