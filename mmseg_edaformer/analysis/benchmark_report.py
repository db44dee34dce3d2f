"""What a benchmark run shows: a table in the terminal, a CSV, a Markdown page and a chart."""
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from prettytable import PrettyTable, TableStyle

from ..files import write_file
from .benchmark import Figures
from .timing import number, render, size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NETWORK, _POST = '#33658a', '#f2a65a'
_MARKERS = 'osD^vPX*'
_COLUMNS = {
    'config': ('config', '{}'), 'ISR': ('isr_ratio', '{}'), 'params M': ('params_m', '{:.2f}'),
    'GMACs': ('gmacs', '{:.2f}'), 'pipeline': ('pipeline_ms', ''), 'network': ('network_ms', ''),
    'post': ('post_ms', ''), 'total': ('total_ms', ''), 'p95': ('total_p95_ms', ''),
    'images/s': ('images_per_s', ''), 'MiB': ('peak_mib', '{:.0f}'),
    'multiply-adds': ('compute_limit_ms', ''), 'bytes': ('memory_limit_ms', ''),
    'of network': ('network_share', '{:.0%}'), 'of total': ('total_share', '{:.0%}')}
"""Fields by the columns that show them, and their formats; without one, as `number` has it."""


def title(row: Figures) -> str:
    """Name what the variants of a cell share."""
    size = size_text((row.height, row.width))
    if row.status == 'costs':
        return size
    return f'{row.mode}, {row.dtype}, {size}, batch {row.batch_size}'


def speed(row: Figures) -> str:
    """Word the time against the cell's first row, with its direction."""
    if row.time_vs_first is None:
        return ''
    if row.time_vs_first <= 1:
        return f'{1 / row.time_vs_first:.2f}x as fast'
    return f'{row.time_vs_first:.2f}x as slow'


def notes(rows: Sequence[Figures]) -> list[str]:
    """List what a reader of the tables must know, for what is in them."""
    return render(
        'benchmark_notes.jinja', status=rows[0].status, modes={row.mode for row in rows},
        memory=any(row.peak_mib is not None for row in rows),
        slid={(row.config, size_text((row.height, row.width))): row.windows
              for row in rows if row.windows > 1},
        limits=any(row.compute_limit_ms is not None for row in rows)).splitlines()


def table(rows: Sequence[Figures]) -> str:
    """Format the times of one cell, and the limits where they were measured, in Markdown."""
    if rows[0].status == 'costs':
        return _table(rows, 'params M', 'GMACs', 'vs first')
    phases = ('network', 'post') if rows[0].mode == 'eval' else ()
    text = _table(rows, 'GMACs', 'pipeline', *phases, 'total', 'p95', 'images/s', 'MiB', 'speed')
    if all(row.compute_limit_ms is None for row in rows):
        return text
    return f'{text}\n\n{_table(rows, "multiply-adds", "bytes", "of network", "of total")}'


def _table(rows: Sequence[Figures], *columns: str) -> str:
    table = PrettyTable(['config', 'ISR', *columns], align='r')
    table.set_style(TableStyle.MARKDOWN)
    table.align['config'] = table.align['ISR'] = 'l'
    for row in rows:
        cells = {name: '' if getattr(row, field) is None else text.format(getattr(row, field))
                 if text else number(getattr(row, field))
                 for name, (field, text) in _COLUMNS.items()}
        if row.status == 'OOM':
            cells['total'] = 'OOM'
        cells['vs first'] = f'x {(row.gmacs or 0.) / (rows[0].gmacs or 1.):.2f}'
        cells['speed'] = '(first)' if row is rows[0] else speed(row)
        table.add_row([cells[name] for name in table.field_names])
    return table.get_string()


def markdown(cells: Sequence[Sequence[Figures]], environment: Mapping[str, str]) -> str:
    """Format the whole run as a Markdown page."""
    source = '; '.join(f'{name} {value}' for name, value in environment.items())
    return '\n'.join([
        f'# Benchmark\n\n{source}.',
        *(f'\n## {title(cell[0])}\n\n{table(cell)}' for cell in cells), '',
        *(f'- {note}' for note in notes([row for cell in cells for row in cell]))]) + '\n'


def write(folder: str | Path, cells: Sequence[Sequence[Figures]],
          environment: Mapping[str, str], *, chart: bool = True) -> list[Path]:
    """Write benchmark.csv, .md and .png; return their paths.

    ``cells`` are what `benchmark.run` has yielded so far; the CSV shows the ``environment`` too.
    """
    text = io.StringIO(newline='')
    rows = [{**asdict(row), **environment} for cell in cells for row in cell]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows({name: f'{value:.6g}' if isinstance(value, float) else value
                      for name, value in row.items()} for row in rows)
    contents: dict[str, bytes | str] = {'benchmark.csv': text.getvalue(),
                                        'benchmark.md': markdown(cells, environment)}
    if chart:
        contents['benchmark.png'] = draw(cells, environment)
    for name, content in contents.items():
        write_file(Path(folder) / name, content)
    return [Path(folder) / name for name in contents]


def draw(cells: Sequence[Sequence[Figures]], environment: Mapping[str, str]) -> bytes:
    """Draw the run as a PNG, with a panel for each mode, dtype and batch.

    A panel has a bar for each variant, or at several sizes a line over the pixels of the image.
    """
    from matplotlib.figure import Figure
    panels: dict[str, list[Figures]] = {}
    growth = len({_pixels(cell[0]) for cell in cells}) > 1
    for row in (row for cell in cells for row in cell):
        name = f'{row.mode}, {row.dtype}, batch {row.batch_size}' if row.mode else ''
        panels.setdefault(name if growth else title(row), []).append(row)
    height = 4. if growth else 1.2 + 0.36 * max(map(len, cells))
    figure = Figure(figsize=(9, 0.6 + height * len(panels)), layout='constrained')
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, (name, rows) in zip(axes, panels.items()):
        (_draw_growth if growth else _draw_bars)(axis, rows)
        axis.spines[['top', 'right']].set_visible(False)
        axis.set_title(name, fontsize=9)
    first = cells[0][0]
    figure.suptitle('Multiply-adds of one image' if first.status == 'costs' else (
        f'{environment["device"]}, threads: {environment["threads"]}, '
        f'torch {environment["torch"]}, {first.execution}'), fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=130)
    return buffer.getvalue()


def _draw_bars(axis: 'Axes', rows: Sequence[Figures]) -> None:
    """Draw one bar for each variant, the first on top, with its post-processing set apart."""
    values = [_value(row) or 0. for row in rows]
    posts = [max(row.post_ms or 0., 0.) for row in rows]
    bars = axis.barh(range(len(rows)), values, 0.66, color=_NETWORK)
    axis.barh(range(len(rows)), [-post for post in posts], 0.66, left=values, color=_POST)
    axis.bar_label(bars, [
        'out of memory' if _value(row) is None else number(_value(row)) if row is rows[0] else
        f'{number(_value(row))}  {speed(row)}' for row in rows], padding=4, fontsize=8)
    axis.set_yticks(range(len(rows)), [_variant(row) for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * (max(values) or 1.))
    axis.set_xlabel(_unit(rows[0]) + (' (orange: post-processing)' if any(posts) else ''))


def _draw_growth(axis: 'Axes', rows: Sequence[Figures]) -> None:
    """Draw one line for each variant over the pixels of the image, and linear growth."""
    from matplotlib.ticker import LogLocator
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=_pixels):
        if (value := _value(row)) is not None:
            lines.setdefault(_variant(row), []).append((_pixels(row), value))
    for i, (name, points) in enumerate(lines.items()):
        axis.loglog(*zip(*points), label=name, markersize=4, linewidth=1.4,
                    marker=_MARKERS[i % len(_MARKERS)])
    sizes = {_pixels(row): size_text((row.height, row.width)) for row in rows}
    low = min((value / x for points in lines.values() for x, value in points), default=1.)
    axis.loglog(sorted(sizes), [0.8 * low * x for x in sorted(sizes)], color='#bbbbbb', linewidth=3,
                zorder=0, label='linear in pixels')
    axis.set_xticks(list(sizes), list(sizes.values()), fontsize=7)
    axis.yaxis.set_major_locator(LogLocator(subs=(1., 2., 5.)))
    axis.yaxis.set_major_formatter('{x:g}')
    axis.minorticks_off()
    axis.grid(True, color='#e5e5e5', linewidth=0.6)
    axis.set_ylabel(_unit(rows[0]))
    axis.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))


def _pixels(row: Figures) -> float:
    return row.height * row.width / 1e6


def _variant(row: Figures) -> str:
    return row.config if row.isr_ratio == 'none' else f'{row.config}, ISR {row.isr_ratio}'


def _value(row: Figures) -> float | None:
    return row.gmacs if row.status == 'costs' else row.total_ms


def _unit(row: Figures) -> str:
    if row.status == 'costs':
        return 'GMACs'
    return 'ms per step' if row.mode == 'train' else 'ms'
