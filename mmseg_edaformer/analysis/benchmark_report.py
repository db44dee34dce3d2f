"""What a benchmark run shows: a table in the terminal, a CSV, a Markdown page and a chart."""
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from prettytable import PrettyTable, TableStyle

from ..files import write_file
from .benchmark import Figures
from .timing import number, render, size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NETWORK, _POST = '#33658a', '#f2a65a'
_MARKERS, _STYLES = 'osD^vPX*', ('-', '--', ':', '-.')


def title(row: Figures) -> str:
    """Name what the variants of a cell share."""
    if row.status == 'costs':
        return _size(row)
    return f'{row.mode}, {row.dtype}, {_size(row)}, batch {row.batch_size}'


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
        slid={(row.config, _size(row)): row.windows for row in rows if row.windows > 1},
        limits=any(row.compute_limit_ms is not None for row in rows)).splitlines()


def table(rows: Sequence[Figures]) -> str:
    """Format one cell for a terminal."""
    return '\n'.join([title(rows[0]), *map(str, _tables(rows))])


def _tables(rows: Sequence[Figures]) -> list[PrettyTable]:
    """Make the tables of a cell: times, and limits where they were measured."""
    names: list[tuple[str, Callable[[Figures], str]]] = [
        ('config', lambda row: row.config), ('ISR', lambda row: row.isr_ratio)]
    if rows[0].status == 'costs':
        return [_table(rows, [
            *names, ('params M', lambda row: f'{row.params_m:.2f}'),
            ('GMACs', lambda row: f'{row.gmacs:.2f}'),
            ('vs first', lambda row: f'x {(row.gmacs or 0.) / (rows[0].gmacs or 1.):.2f}')])]
    columns = [
        *names, ('GMACs', lambda row: '' if row.gmacs is None else f'{row.gmacs:.2f}'),
        ('pipeline', lambda row: number(row.pipeline_ms)),
        ('network', lambda row: number(row.network_ms)), ('post', lambda row: number(row.post_ms)),
        ('total', lambda row: 'OOM' if row.status == 'OOM' else number(row.total_ms)),
        ('p95', lambda row: number(row.total_p95_ms)),
        ('images/s', lambda row: number(row.images_per_s)),
        ('MiB', lambda row: '' if row.peak_mib is None else f'{row.peak_mib:.0f}'),
        ('speed', lambda row: '(first)' if row is rows[0] else speed(row))]
    if rows[0].mode == 'train':
        columns = [column for column in columns if column[0] not in ('network', 'post')]
    tables = [_table(rows, columns)]
    if any(row.compute_limit_ms is not None for row in rows):
        tables.append(_table(rows, [
            *names, ('multiply-adds', lambda row: number(row.compute_limit_ms)),
            ('bytes', lambda row: number(row.memory_limit_ms)),
            ('of network', lambda row: f'{row.network_share:.0%}' if row.network_share else ''),
            ('of total', lambda row: f'{row.total_share:.0%}' if row.total_share else '')]))
    return tables


def _table(rows: Sequence[Figures],
           columns: Sequence[tuple[str, Callable[[Figures], str]]]) -> PrettyTable:
    pretty = PrettyTable([name for name, _ in columns], align='r')
    pretty.align['config'] = pretty.align['ISR'] = 'l'
    pretty.add_rows([[show(row) for _, show in columns] for row in rows])
    return pretty


def markdown(cells: Sequence[Sequence[Figures]], environment: Mapping[str, str]) -> str:
    """Format the whole run as a Markdown page."""
    lines = ['# Benchmark', '',
             '; '.join(f'{name} {value}' for name, value in environment.items()) + '.', '']
    for cell in cells:
        lines += [f'## {title(cell[0])}', '']
        for pretty in _tables(cell):
            pretty.set_style(TableStyle.MARKDOWN)
            lines += [str(pretty), '']
    lines += [f'- {note}' for note in notes([row for cell in cells for row in cell])]
    return '\n'.join(lines) + '\n'


def write(folder: str | Path, cells: Sequence[Sequence[Figures]],
          environment: Mapping[str, str], *, chart: bool = True) -> list[Path]:
    """Write benchmark.csv, .md and .png; return their paths.

    ``cells`` are what `benchmark.run` has yielded so far; the CSV shows the ``environment`` too.
    """
    text = io.StringIO(newline='')
    names = [field.name for field in fields(Figures)]
    writer = csv.DictWriter(text, [*names, *environment], lineterminator='\n')
    writer.writeheader()
    for row in (row for cell in cells for row in cell):
        writer.writerow({name: f'{value:.6g}' if isinstance(value, float) else value
                         for name, value in asdict(row).items()} | dict(environment))
    contents: dict[str, bytes | str] = {'benchmark.csv': text.getvalue(),
                                        'benchmark.md': markdown(cells, environment)}
    if chart:
        contents['benchmark.png'] = draw(cells, environment)
    for name, content in contents.items():
        write_file(Path(folder) / name, content)
    return [Path(folder) / name for name in contents]


def draw(cells: Sequence[Sequence[Figures]], environment: Mapping[str, str]) -> bytes:
    """Draw the run as a PNG.

    A row of panels for each mode, dtype and batch: bars for each size, then, for several sizes,
    growth with the number of pixels.
    """
    from matplotlib.figure import Figure
    settings: dict[tuple[str, str, int], list[Sequence[Figures]]] = {}
    for cell in cells:
        settings.setdefault((cell[0].mode, cell[0].dtype, cell[0].batch_size), []).append(cell)
    columns = max(map(len, settings.values()))
    growth = columns > 1
    longest = max(map(len, cells))
    label = max(len(_variant(row.config, row.isr_ratio)) for cell in cells for row in cell)
    figure = Figure(figsize=(0.075 * label * (1 + growth) + 3.1 * columns + 3.9 * growth,
                             0.9 + len(settings) * max(0.8 + 0.36 * longest, 2.8 * growth)),
                    layout='constrained')
    axes = figure.subplots(len(settings), columns + growth, squeeze=False,
                           gridspec_kw=dict(width_ratios=[1.] * columns + [1.15] * growth))
    for row_axes, same in zip(axes, settings.values()):
        for axis in row_axes[len(same):columns]:
            axis.set_axis_off()
        for axis, cell in zip(row_axes, same):
            _draw_bars(axis, cell, named=axis is row_axes[0])
        if growth:
            _draw_growth(row_axes[-1], same)
    first = cells[0][0]
    figure.suptitle('Multiply-adds of one image' if first.status == 'costs' else (
        f'{environment["device"]}, threads: {environment["threads"]}, '
        f'torch {environment["torch"]}, {first.execution}'), fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=130)
    return buffer.getvalue()


def _draw_bars(axis: 'Axes', cell: Sequence[Figures], named: bool) -> None:
    """Draw one bar for each variant, the first on top, with its post-processing set apart."""
    values = [_value(row) for row in cell]
    largest = max([value for value in values if value is not None], default=1.)
    for y, (row, value) in enumerate(zip(cell, values)):
        if value is None:
            axis.text(0, y, ' out of memory', va='center', color='#b5485d')
            continue
        post = max(row.post_ms or 0., 0.)
        axis.barh(y, value - post, 0.66, color=_NETWORK)
        axis.barh(y, post, 0.66, left=value - post, color=_POST)
        times = value / values[0] if row.status == 'costs' and values[0] else row.time_vs_first
        relative = '' if y == 0 or times is None else f'  ({times:.2f}x)'
        axis.text(value + 0.02 * largest, y, f'{number(value)}{relative}', va='center', fontsize=8)
    axis.set_xlim(0, 1.42 * largest)
    axis.set_ylim(len(cell) - 0.4, -0.6)
    axis.set_yticks(range(len(cell)), [_variant(row.config, row.isr_ratio) for row in cell]
                    if named else [])
    axis.tick_params(axis='y', length=0)
    axis.locator_params('x', nbins=4)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_title(title(cell[0]), fontsize=9)
    axis.set_xlabel(_unit(cell[0]) + (' (orange: post-processing)' if cell[0].post_ms else ''))


def _draw_growth(axis: 'Axes', cells: Sequence[Sequence[Figures]]) -> None:
    """Draw one line for each variant over the pixels of the image, and linear growth."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    sizes = {}
    for row in (row for cell in cells for row in cell):
        megapixels = row.height * row.width / 1e6
        sizes[megapixels] = _size(row)
        if (value := _value(row)) is not None:
            lines.setdefault((row.config, row.isr_ratio), []).append((megapixels, value))
    configs, ratios = ([*dict.fromkeys(key[i] for key in lines)] for i in range(2))
    for (config, ratio), points in lines.items():
        i, j = configs.index(config), ratios.index(ratio)
        axis.plot(*zip(*sorted(points)), label=_variant(config, ratio), markersize=4,
                  linewidth=1.4, color=f'C{i % 10}', marker=_MARKERS[j % len(_MARKERS)],
                  linestyle=_STYLES[j % len(_STYLES)])
    pixels = sorted(sizes)
    if lines:
        low = min(value / x for points in lines.values() for x, value in points)
        axis.plot(pixels, [0.8 * low * x for x in pixels], color='#bbbbbb', linewidth=3, zorder=0,
                  label='linear in pixels')
    axis.set_xscale('log')
    axis.set_yscale('log')
    axis.set_xticks(pixels, [sizes[x] for x in pixels], fontsize=7)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1., 2., 5.)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which='major', color='#e5e5e5', linewidth=0.6)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_title('growth with the pixels of the image', fontsize=9)
    axis.set_ylabel(_unit(cells[0][0]))
    axis.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))


def _variant(config: str, ratio: str) -> str:
    return config if ratio == 'none' else f'{config}, ISR {ratio}'


def _value(row: Figures) -> float | None:
    return row.gmacs if row.status == 'costs' else row.total_ms


def _unit(row: Figures) -> str:
    if row.status == 'costs':
        return 'GMACs'
    return 'ms per step' if row.mode == 'train' else 'ms'


def _size(row: Figures) -> str:
    return size_text((row.height, row.width))
