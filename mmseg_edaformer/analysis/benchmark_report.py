"""What `benchmark.run` measured: tables for a terminal and for Markdown, CSV, a chart."""
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import matplotlib
from prettytable import PrettyTable

from .benchmark import Row

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

_NETWORK, _POST, _STEP, _COST = '#33658a', '#f2a65a', '#5b8e7d', '#6c7a89'
_COLOURS = ('#33658a', '#e08a2e', '#5b8e7d', '#b5485d', '#7d5ba6', '#8a8d33', '#444444', '#4db6c6')
_MARKERS, _STYLES = 'osD^vPX*', ('-', '--', ':', '-.')


def title(row: Row) -> str:
    """What the variants of a cell share."""
    if row.status == 'costs':
        return _size(row)
    return f'{row.mode}, {row.dtype}, {_size(row)}, batch {row.batch_size}'


def variant(row: Row) -> str:
    """Config and ratio."""
    return row.config if row.isr_ratio == 'none' else f'{row.config}, ISR {row.isr_ratio}'


def speed(row: Row, first: bool) -> str:
    """Time against the cell's first row, in words that give the direction."""
    if first or row.time_vs_first is None:
        return '(first)' if first else ''
    if row.time_vs_first <= 1:
        return f'{1 / row.time_vs_first:.2f}x as fast'
    return f'{row.time_vs_first:.2f}x as slow'


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the tables must know, for what is in them."""
    if all(row.status == 'costs' for row in rows):
        return ['GMACs: billions of multiply-adds of one image; "vs first": relative to the first '
                'row.', *_window_notes(rows)]
    lines = ['Times are medians in ms: pipeline for one image, in one thread; network, post and '
             'total for the batch, in turn with all other rows of the table. Speed: total against '
             'the first row, round by round; "2.00x as fast" is half its time, "2.00x as slow" '
             'twice. GMACs: billions of multiply-adds of one image, forward.']
    modes = {row.mode for row in rows}
    if 'eval' in modes:
        lines.append('eval: network is images to logits, total is images to label maps, post is '
                     'total - network.')
    if 'train' in modes:
        lines.append('train: total is one optimizer step (forward, loss, backward, update), at '
                     'the trained pools.')
    if any(row.peak_mib is not None for row in rows):
        lines.append('MiB: most memory at once, weights included (bytes that torch allocates on '
                     'the GPU; bytes of live tensors, without the kernels\' own scratch, on the '
                     'CPU).')
    return [*lines, *_window_notes(rows)]


def _window_notes(rows: Sequence[Row]) -> list[str]:
    found = {(row.config, _size(row)): row.windows for row in rows if row.windows > 1}
    return [f'{config} slides its window: {count} windows on {size}, all counted. With '
            '--cfg-options model.test_cfg.mode=whole the first config takes the image at once.'
            for (config, size), count in found.items()]


def limit_note() -> str:
    """What the limits count."""
    return ('Limits: multiply-adds (in training three times those of the forward pass) at the '
            'rate of a large matrix product in the same dtype, and bytes at the rate of a large '
            'copy. The bytes are weights and images read once, and the outputs of all innermost '
            'modules written once and read once; attention, pooling, resizing and other functions '
            'that no module wraps are left out. Shares: multiply-add limit over network and total.')


def table(rows: Sequence[Row]) -> str:
    """One cell for a terminal."""
    parts = []
    for head, body in _tables(rows):
        pretty = PrettyTable(head)
        pretty.align = 'r'
        for name in head[:2]:
            pretty.align[name] = 'l'
        pretty.add_rows(body)
        parts.append(str(pretty))
    return '\n'.join([title(rows[0]), *parts])


def _tables(rows: Sequence[Row]) -> list[tuple[list[str], list[list[str]]]]:
    """Heads and bodies of what a cell shows: times, and limits where they were measured."""
    if rows[0].status == 'costs':
        return [(['config', 'ISR', 'params M', 'GMACs', 'vs first'],
                 [[row.config, row.isr_ratio, f'{row.params_m:.2f}', f'{row.gmacs or 0.:.2f}',
                   f'x {(row.gmacs or 0.) / (rows[0].gmacs or 1.):.2f}'] for row in rows])]
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ('config', lambda row: row.config), ('ISR', lambda row: row.isr_ratio),
        ('GMACs', lambda row: '' if row.gmacs is None else f'{row.gmacs:.2f}'),
        ('pipeline', lambda row: _ms(row.pipeline_ms)),
        ('network', lambda row: _ms(row.network_ms)), ('post', lambda row: _ms(row.post_ms)),
        ('total', lambda row: 'OOM' if row.status == 'OOM' else _ms(row.total_ms)),
        ('p95', lambda row: _ms(row.total_p95_ms)), ('images/s', lambda row: _ms(row.images_per_s)),
        ('MiB', lambda row: '' if row.peak_mib is None else f'{row.peak_mib:.0f}'),
        ('speed', lambda row: speed(row, row is rows[0]))]
    if rows[0].mode == 'train':
        columns = [column for column in columns if column[0] not in ('network', 'post')]
    found = [([name for name, _ in columns], [[show(row) for _, show in columns] for row in rows])]
    if any(row.compute_limit_ms is not None for row in rows):
        found.append((
            ['config', 'ISR', 'multiply-adds', 'bytes', 'of network', 'of total'],
            [[row.config, row.isr_ratio, _ms(row.compute_limit_ms), _ms(row.memory_limit_ms),
              _share(row.network_share), _share(row.total_share)] for row in rows]))
    return found


def markdown(cells: Sequence[Sequence[Row]], environment: Mapping[str, str]) -> str:
    """The whole run as a Markdown page."""
    rows = [row for cell in cells for row in cell]
    lines = ['# Benchmark', '',
             '; '.join(f'{name} {value}' for name, value in environment.items()) + '.', '']
    for cell in cells:
        lines += [f'## {title(cell[0])}', '']
        for head, body in _tables(cell):
            rule = [':--', ':--', *('--:' for _ in head[2:])]
            lines += ['| ' + ' | '.join(line) + ' |' for line in (head, rule, *body)] + ['']
    lines += [f'- {note}' for note in notes(rows)]
    if any(row.compute_limit_ms is not None for row in rows):
        lines.append(f'- {limit_note()}')
    return '\n'.join(lines) + '\n'


def write(folder: str | Path, cells: Sequence[Sequence[Row]], environment: Mapping[str, str], *,
          chart: bool = True) -> list[Path]:
    """Write benchmark.csv, .md and .png; each file appears whole or not at all.

    Args:
        folder: Made if it is not there.
        cells: What `benchmark.run` has yielded so far.
        environment: What `benchmark.environment` returns; more columns of the CSV.
        chart: Draw the PNG too.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline='')
    names = [field.name for field in fields(Row)]
    writer = csv.DictWriter(text, [*names, *environment], lineterminator='\n')
    writer.writeheader()
    for cell in cells:
        writer.writerows({**_plain(row), **environment} for row in cell)
    contents = {'benchmark.csv': text.getvalue().encode(),
                'benchmark.md': markdown(cells, environment).encode()}
    if chart:
        contents['benchmark.png'] = draw(cells, environment)
    paths = []
    for name, content in contents.items():
        path, partial = folder / name, folder / f'.{name}.partial'
        partial.write_bytes(content)
        partial.replace(path)
        paths.append(path)
    return paths


def _plain(row: Row) -> dict[str, object]:
    return {name: f'{value:.6g}' if isinstance(value, float) else value
            for name, value in asdict(row).items()}


def draw(cells: Sequence[Sequence[Row]], environment: Mapping[str, str]) -> bytes:
    """Draw the run as a PNG.

    A row of panels for each mode, dtype and batch: bars for each size, then, for several sizes,
    growth with the number of pixels.
    """
    settings: dict[tuple[str, str, int], list[Sequence[Row]]] = {}
    for cell in cells:
        first = cell[0]
        settings.setdefault((first.mode, first.dtype, first.batch_size), []).append(cell)
    columns = max(map(len, settings.values()))
    growth = columns > 1
    longest = max(len(cell) for cell in cells)
    label = max(len(variant(row)) for cell in cells for row in cell)
    plt.rcParams.update({'font.size': 9, 'axes.titlesize': 10})
    figure, axes = plt.subplots(
        len(settings), columns + growth, squeeze=False, layout='constrained',
        figsize=(0.075 * label * (1 + growth) + 3.1 * columns + 3.9 * growth,
                 0.9 + len(settings) * max(0.8 + 0.36 * longest, 2.8 * growth)),
        gridspec_kw=dict(width_ratios=[1.] * columns + [1.15] * growth))
    for row_axes, same in zip(axes, settings.values()):
        for axis in row_axes[len(same):columns]:
            axis.set_axis_off()
        for axis, cell in zip(row_axes, same):
            _draw_bars(axis, cell, named=axis is row_axes[0])
        if growth:
            _draw_growth(row_axes[-1], same)
    rows = [row for cell in cells for row in cell]
    shown = [(_NETWORK, 'network', any(row.post_ms is not None for row in rows)),
             (_POST, 'post-processing', any(row.post_ms is not None for row in rows)),
             (_STEP, 'training step', any(row.mode == 'train' for row in rows))]
    handles = [Patch(color=colour, label=name) for colour, name, there in shown if there]
    if handles:
        figure.legend(handles=handles, loc='outside lower center', ncols=len(handles),
                      frameon=False)
    figure.suptitle(_chart_title(rows, environment), fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=130)
    plt.close(figure)
    return buffer.getvalue()


def _chart_title(rows: Sequence[Row], environment: Mapping[str, str]) -> str:
    if rows[0].status == 'costs':
        return 'Multiply-adds of one image'
    settings = dict.fromkeys([*(row.dtype for row in rows),
                              *(row.execution for row in rows if row.execution != 'eager')])
    count = environment['threads']
    threads = ('' if 'cudnn_benchmark' in environment else
               f', {count} thread{"s" if count != "1" else ""}')
    return f'{environment["device"]}{threads}, {", ".join(settings)}, torch {environment["torch"]}'


def _draw_bars(axis: Axes, cell: Sequence[Row], named: bool) -> None:
    """One bar for each variant, the first on top."""
    values = [_value(row) for row in cell]
    largest = max([value for value in values if value is not None], default=1.)
    for y, (row, value) in enumerate(zip(cell, values)):
        if value is None:
            axis.text(0, y, ' out of memory', va='center', color='#b5485d')
            continue
        post = max(row.post_ms or 0., 0.)
        colour = (_COST if row.status == 'costs' else _STEP if row.mode == 'train' else _NETWORK)
        axis.barh(y, value - post, 0.66, color=colour)
        axis.barh(y, post, 0.66, left=value - post, color=_POST)
        times = value / values[0] if row.status == 'costs' and values[0] else row.time_vs_first
        relative = '' if y == 0 or times is None else f'  ({times:.2f}x)'
        axis.text(value + 0.02 * largest, y, f'{_ms(value)}{relative}', va='center', fontsize=8)
    axis.set_xlim(0, 1.42 * largest)
    axis.set_ylim(len(cell) - 0.4, -0.6)
    axis.set_yticks(range(len(cell)), [variant(row) for row in cell] if named else [])
    axis.tick_params(axis='y', length=0)
    axis.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_title(_size(cell[0]) if cell[0].status == 'costs' else
                   f'{cell[0].mode}, {_size(cell[0])}, batch {cell[0].batch_size}, '
                   f'{cell[0].dtype}', fontsize=9)
    axis.set_xlabel(f'{_unit(cell[0])} (in brackets: relative to the first)')


def _draw_growth(axis: Axes, cells: Sequence[Sequence[Row]]) -> None:
    """One line for each variant over the pixels of the image, and what linear growth would be."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in (row for cell in cells for row in cell if _value(row) is not None):
        lines.setdefault((row.config, row.isr_ratio), []).append(row)
    configs = list(dict.fromkeys(config for config, _ in lines))
    ratios = list(dict.fromkeys(ratio for _, ratio in lines))
    points = {key: sorted((row.height * row.width / 1e6, _value(row) or 0.) for row in line)
              for key, line in lines.items()}
    for (config, ratio), line in points.items():
        i, j = configs.index(config), ratios.index(ratio)
        axis.plot(*zip(*line), label=variant(lines[config, ratio][0]), markersize=4,
                  linewidth=1.4, color=_COLOURS[i % len(_COLOURS)],
                  marker=_MARKERS[j % len(_MARKERS)], linestyle=_STYLES[j % len(_STYLES)])
    sizes = {row.height * row.width / 1e6: _size(row) for cell in cells for row in cell}
    pixels = sorted(sizes)
    if points:
        low = min(value / x for line in points.values() for x, value in line)
        axis.plot(pixels, [0.8 * low * x for x in pixels], color='#bbbbbb', linewidth=3, zorder=0,
                  label='linear in pixels')
    axis.set_xscale('log')
    axis.set_yscale('log')
    axis.set_xticks(pixels, [sizes[x] for x in pixels], fontsize=8 if len(pixels) < 4 else 7)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1., 2., 5.)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which='major', color='#e5e5e5', linewidth=0.6)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_title('growth with the pixels of the image', fontsize=9)
    axis.set_ylabel(_unit(cells[0][0]))
    axis.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))


def _value(row: Row) -> float | None:
    return row.gmacs if row.status == 'costs' else row.total_ms


def _unit(row: Row) -> str:
    if row.status == 'costs':
        return 'GMACs'
    return 'ms per step' if row.mode == 'train' else 'ms'


def _size(row: Row) -> str:
    return f'{row.height}x{row.width}'


def _ms(value: float | None) -> str:
    """Three digits that matter."""
    if value is None:
        return ''
    return f'{value:.0f}' if abs(value) >= 100 else f'{value:.1f}' if abs(value) >= 10 else (
        f'{value:.2f}')


def _share(value: float | None) -> str:
    return '' if value is None else f'{value:.0%}'
