"""What an audit found, for people: on the terminal, as JSON and as pictures."""
import json
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from mmengine.config import Config
from PIL import Image, ImageOps
from prettytable import PrettyTable
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...errors import ConfigError, shown
from ...files import replacing, write_file
from ...pretraining.folders import is_classifier
from ..transforms import IGNORED
from . import Audit, audit
from .fix import Fixed, check_output, fix
from .rules import CHECKS, Finding, Part, zero_share

SHOWN = 3
"""So many files of each finding are named on the terminal."""
_SPLIT_COLOURS = ('#33658a', '#f2a65a', '#5b8e7d', '#b5485d', '#7d5ba6', '#8a8d33')
_PER_ROW = 50
_NAMED = 300  # of more classes the names would fill a wall
_SAMPLES = 4  # in a row of the sheet, without masks twice as many
_WIDTH = 360  # of a picture on the sheet, in pixels; of those half as many


def check(cfg: Config, out: str | Path, splits: Sequence[str] | None = None, *,
          workers: int | None = None, fresh: bool = False, mend: bool = False) -> int:
    """Audit the data of a config, print what was found and write it to a folder.

    Args:
        cfg: Any config of mmsegmentation, or of a classifier of mmpretrain.
        out: Gets report.json, classes.png, samples.png and what was remembered of each file.
        splits: Of 'train', 'val', 'test'; by default those that the config has.
        workers: Processes; by default one for each core.
        fresh: Read files again that have not changed since the last time.
        mend: Write mended copies to ``fixed`` in the folder.

    Returns:
        Number of errors, those of the data and not of the files.

    Raises:
        ConfigError: A split is not in the config, the folder lies within the data, or images of a
            classifier are to be mended.
        DataError: A process was killed.
    """
    if mend and is_classifier(cfg):
        raise ConfigError('--fix mends masks, and this config trains a classifier: replace or '
                          'remove the files that report.json names')
    out = Path(out)
    known = [name for name in ('train', 'val', 'test') if cfg.get(f'{name}_dataloader')]
    lacking = [name for name in splits or () if name not in known]
    if lacking or not known:
        raise ConfigError(f'the config has no {lacking[0] if lacking else "train"}_dataloader: it '
                          f'has {", ".join(known) or "none"}')
    start = time.perf_counter()
    with Progress(TextColumn('reading'), BarColumn(), MofNCompleteColumn(), TextColumn('left'),
                  TimeRemainingColumn(), transient=True,
                  disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task('', total=None)
        done = audit(cfg, splits or known, workers=workers, cache=out / 'files.cache', fresh=fresh,
                     guard=lambda found: check_output(found, out),
                     advance=lambda n, total: progress.update(bar, completed=n, total=total))
    seconds = time.perf_counter() - start
    fixed = fix(done, out) if mend else []
    write_file(out / 'report.json', json.dumps(_as_json(cfg, done, fixed), indent=1) + '\n')
    written = ['report.json', *_draw(done, out)]
    _print(cfg, done, fixed, mend, seconds, out, written)
    return done.count('error')


def _print(cfg: Config, done: Audit, fixed: Sequence[Fixed], mend: bool, seconds: float, out: Path,
           written: Sequence[str]) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.print(f'{cfg.filename}: {len(done.facts):,} files, {done.files_read:,} of them read now'
                  f', in {seconds:.1f} s\n')
    table = PrettyTable(['split', 'data set', 'images', *(
        ['classes', 'fewest in a class', 'median', 'most'] if is_classifier(cfg) else
        ['masks', 'classes seen', 'no label', 'label 0', 'reduce_zero_label'])], align='r')
    for name in ('split', 'data set'):
        table.align[name] = 'l'
    for part in done.parts:
        table.add_row(_row(part, len(table.field_names)))
    console.print(str(table))
    zero = [f'{part.name}: {_zero_line(part)}' for part in done.parts
            if part.raw and part.same_as is None and part.targets is None]
    if zero:
        console.print('\n' + '\n'.join(zero))
    for finding in done.findings:
        style = 'bold red' if finding.level == 'error' else 'yellow'
        console.print(f'\n{finding.level}: {finding.split}: {finding.check} '
                      f'({len(finding.items):,})', style=style)
        console.print(f'  {CHECKS[finding.check][1]}')
        _print_items(console, finding.items)
    for one in fixed:
        console.print(f'\nmended: {one.part}: {len(one.mended):,} files' + (
            f', in {shown(one.folder)}' if one.mended else ''), style='bold green')
        _print_items(console, one.mended)
        if one.left_out:
            console.print(f'  left out, for they cannot be mended: {len(one.left_out):,}')
            _print_items(console, one.left_out)
        if one.mended:
            console.print(f'  {_usage(one)}')
    if mend and not fixed:
        console.print('\nnothing to mend: no finding is one that --fix can')
    errors, warnings = done.count('error'), done.count('warning')
    console.print(f'\n{errors} error{"s" * (errors != 1)}, {warnings} warning'
                  f'{"s" * (warnings != 1)}. All of it: '
                  f'{", ".join(shown(out / name) for name in written)}',
                  style='bold red' if errors else 'yellow' if warnings else 'bold green')


def _usage(one: Fixed) -> str:
    options = ' '.join(map(shlex.quote, one.options))
    if set(str(one.folder.resolve())) & set(' ,()[]\'"'):  # mmengine drops and splits at them
        return f'use it with these in the config, for --cfg-options cannot carry them: {options}'
    return f'use it with: --cfg-options {options}'


def _print_items(console: Console, items: Sequence[tuple[str, str]]) -> None:
    for name, note in items[:SHOWN]:
        console.print(f'    {_plain(name)}{": " if note else ""}{_plain(note)}')
    if len(items) > SHOWN:
        console.print(f'    ... and {len(items) - SHOWN:,} more')


def _row(part: Part, length: int) -> list[str]:
    name = f'the same as {part.same_as}' if part.same_as else type(part.dataset).__name__
    row = [part.name, name, f'{len(part.pairs):,}']
    if part.targets is None:
        row.append(f'{sum(mask is not None for _, mask in part.pairs):,}')
    if part.same_as or not part.raw or not part.counts.size:
        return [*row, *[''] * (length - len(row))]
    if part.targets is not None:
        return [*row, f'{len(part.classes):,}', *(
            f'{of(part.counts):,.0f}' for of in (np.min, np.median, np.max))]
    pixels = sum(part.raw.values())
    return [*row, f'{np.count_nonzero(part.counts)} of {len(part.classes)}',
            f'{part.unlabelled / pixels:.1%}', f'{zero_share(part):.1%}',
            str(part.zero_is_no_label)]


def _zero_line(part: Part) -> str:
    share, table = zero_share(part), part.table()
    if part.zero_is_no_label:
        return (f'0 means no label, {share:.1%} of the pixels; with reduce_zero_label=False it '
                'would be a class, and every label one higher')
    name = part.classes[table[0]] if table[0] < len(part.classes) else 'no label'
    return (f'0 is {_plain(name)}, {share:.1%} of the pixels; with reduce_zero_label=True they '
            'would be lost, and every label one lower')


def _plain(text: str) -> str:
    """Without what would steer a terminal."""
    return ''.join(ch if ch.isprintable() else '?' for ch in shown(text))


def _as_json(cfg: Config, done: Audit, fixed: Sequence[Fixed]) -> dict[str, Any]:
    def items(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        return [{'name': shown(name), 'note': shown(note)} for name, note in pairs]

    def finding(one: Finding) -> dict[str, Any]:
        return dict(level=one.level, split=one.split, check=one.check,
                    remedy=CHECKS[one.check][1], items=items(one.items))

    def part(one: Part) -> dict[str, Any]:
        common = dict(data_set=type(one.dataset).__name__, same_as=one.same_as,
                      folders=dict(one.dataset.data_prefix), images=len(one.pairs))
        if one.targets is not None:
            return dict(common, images_of_class=dict(zip(one.classes, one.counts.tolist())))
        return dict(common, reduce_zero_label=one.zero_is_no_label,
                    share_of_label_0=zero_share(one), pixels_without_label=one.unlabelled,
                    pixels=dict(zip(one.classes, one.counts.tolist())),
                    pixels_as_stored={str(label): n for label, n in sorted(one.raw.items())})

    return dict(config=str(cfg.filename), errors=done.count('error'),
                warnings=done.count('warning'),
                splits={one.name: part(one) for one in done.parts},
                findings=[finding(one) for one in done.findings],
                fixed=[dict(split=one.part, folder=str(one.folder), mended=items(one.mended),
                            left_out=items(one.left_out), cfg_options=one.options)
                       for one in fixed])


def _draw(done: Audit, out: Path) -> list[str]:
    """Draw what there is to draw; the names of the pictures."""
    parts = [part for part in done.parts if part.raw and part.same_as is None]
    counted = [part for part in parts if part.classes == parts[0].classes and part.counts.any()]
    written = []
    for name, drawn, draw in (('classes.png', counted, _draw_classes),
                              ('samples.png', parts, _draw_samples)):
        figure = draw(drawn) if drawn else None
        if figure is None:
            (out / name).unlink(missing_ok=True)  # of an earlier run
            continue
        with replacing(out / name) as path:
            figure.savefig(path, dpi=110)
        written.append(name)
    return written


def _draw_classes(parts: Sequence[Part]) -> Figure:
    """Share of the labelled pixels of each class, or its images, the most frequent first."""
    of_images = parts[0].targets is not None
    shares = np.array([part.counts / (1 if of_images else max(part.counts.sum(), 1))
                       for part in parts])
    order = np.argsort(-shares[0], kind='stable')
    named = len(order) <= _NAMED
    rows = -(-len(order) // _PER_ROW) if named else 1
    per_row = -(-len(order) // rows)
    longest = min(max(map(len, parts[0].classes)), 24)
    figure = Figure(figsize=(max(7, 1.5 + per_row * (0.16 + 0.1 * len(parts))),
                             0.9 + rows * (2.1 + 0.075 * longest)) if named else (9, 4),
                    layout='constrained')
    low = 10 ** np.floor(np.log10(shares[shares > 0].min()))
    for row, axis in enumerate(figure.subplots(rows, squeeze=False)[:, 0]):
        shown = order[row * per_row:(row + 1) * per_row]
        _draw_bars(axis, shares[:, shown], low / 2, 1.5 * shares.max() if of_images else 1)
        axis.yaxis.set_major_formatter(FuncFormatter(
            lambda value, _: f'{value:,g}' if of_images else f'{100 * value:g} %'))
        axis.set_xlim(-0.7, per_row - 0.3)
        if not named:
            axis.set_xticks([])
            axis.set_xlabel(f'{len(order):,} classes, those with most in {parts[0].name} first',
                            fontsize=9)
            continue
        for label, index in zip(axis.set_xticks(
                range(len(shown)), [_short(parts[0].classes[i]) for i in shown], rotation=60,
                ha='right', rotation_mode='anchor', fontsize=8), shown):
            label.label1.set_parse_math(False)
            label.label1.set_color('#222222' if shares[:, index].all() else '#c62828')
    handles = [Patch(color=colour, label=part.name)
               for part, colour in zip(parts, _SPLIT_COLOURS)]
    if named and not shares.all():
        handles.append(Patch(color='#c62828', label='name in red: never occurs in one of them'))
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles), frameon=False,
                  fontsize=9)
    figure.suptitle('Images of each class' if of_images else
                    'Share of each class in the labelled pixels', fontsize=12)
    return figure


def _draw_bars(axis: Axes, shares: np.ndarray, floor: float, top: float) -> None:
    width = 0.8 / len(shares)
    for index, (values, colour) in enumerate(zip(shares, _SPLIT_COLOURS)):
        place, shown = np.arange(len(values)), np.where(values > 0, values, np.nan)
        if len(values) > _NAMED:  # bars narrower than a pixel
            axis.step(place, shown, where='mid', color=colour, linewidth=1)
        else:
            axis.bar(place + (index - (len(shares) - 1) / 2) * width, shown, width, color=colour,
                     bottom=0)
    axis.set_yscale('log')
    axis.set_ylim(floor, top)
    axis.tick_params(axis='x', length=0)
    axis.tick_params(axis='y', labelsize=8)
    axis.grid(axis='y', color='#e5e5e5', linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)


def _draw_samples(parts: Sequence[Part]) -> Figure | None:
    """A few images of each data set with their masks painted over, or with their classes."""
    classify = parts[0].targets is not None
    columns, width = (2 * _SAMPLES, _WIDTH // 2) if classify else (_SAMPLES, _WIDTH)
    rows = []
    for part in parts:
        sound = [pair for pair, checks in part.verdicts.items()
                 if (pair[1] or classify)
                 and not any(CHECKS[check][0] == 'error' for check in checks)]
        if sound:
            chosen = sorted({*np.linspace(0, len(sound) - 1, columns).astype(int)})
            rows.append((part, [sound[i] for i in chosen]))
    if not rows:
        return None
    painted = [[_paint(part, image, mask, width) for image, mask in pairs] for part, pairs in rows]
    heights = [max(len(picture) for picture in row) / 110 + 0.45 for row in painted]
    legend = rows[0][0].classes if len(rows[0][0].classes) <= 24 and not classify else ()
    lines = -(-len(legend) // 8)
    figure = Figure(figsize=(columns * (width / 110 + 0.1),
                             sum(heights) + 0.5 + 0.28 * lines), layout='constrained')
    axes = figure.subplots(len(rows), columns, squeeze=False,
                           gridspec_kw=dict(height_ratios=heights))
    for (part, pairs), pictures, row in zip(rows, painted, axes):
        names = _class_names(part)
        for axis in row:
            axis.set_axis_off()
        for axis, picture, (image, _) in zip(row, pictures, pairs):
            axis.imshow(picture)
            file = f'{part.name}: {_short(Path(image).name, 18 if classify else 40)}'
            name = f'{_short(names[image])}\n{file}' if classify else file
            axis.text(0.5, -0.02, name, fontsize=9, transform=axis.transAxes, ha='center',
                      va='top', parse_math=False)
    if legend:
        colours = np.array(rows[0][0].dataset.metainfo['palette']) / 255
        legend_box = figure.legend(
            handles=[Patch(color=colour, label=_short(name))
                     for name, colour in zip(legend, colours)],
            loc='outside lower center', ncols=min(len(legend), 8), frameon=False, fontsize=9)
        for text in legend_box.get_texts():
            text.set_parse_math(False)
    figure.suptitle('Images and their classes' if classify else
                    'Masks over images; where there is no label the image is grey', fontsize=12)
    return figure


def _class_names(part: Part) -> dict[str, str]:
    """The class of each image of a classification data set, as people know it."""
    names, known = part.classes, part.dataset.metainfo.get('classes') or ()
    if len(known) == len(names):
        names = tuple(known)
    return {image: names[number] for (image, _), number in zip(part.pairs, part.targets or ())
            if number in range(len(names))}


def _paint(part: Part, image: str, mask: str | None, width: int) -> np.ndarray:
    """A small picture, with the colours of its labels if there is a mask, H x W x 3."""
    with Image.open(image) as opened:
        picture = ImageOps.exif_transpose(opened).convert('RGB')
    height = max(round(picture.height * width / picture.width), 1)
    size = (width, min(height, 2 * width))
    pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR)).astype(np.float32)
    if mask is None:
        return pixels.astype(np.uint8)
    with Image.open(mask) as opened:
        stored = Image.fromarray(np.asarray(opened).astype(np.uint8))
    labels = part.table()[np.asarray(stored.resize(size, Image.Resampling.NEAREST))]
    colours = np.zeros((256, 3), np.float32)
    palette = np.array(part.dataset.metainfo['palette'], np.float32).reshape(-1, 3)[:255]
    colours[:len(palette)] = palette
    grey = pixels.mean(-1, keepdims=True).repeat(3, -1)
    painted = np.where((labels == IGNORED)[..., None], grey,
                       0.4 * pixels + 0.6 * colours[labels])
    return painted.clip(0, 255).astype(np.uint8)


def _short(text: str, length: int = 24) -> str:
    text = _plain(text)
    return text if len(text) <= length else f'{text[:length - 3]}...'
