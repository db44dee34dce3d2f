"""The figures of an audit: how frequent each class is, and a few images with their masks."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from PIL import Image, ImageOps

from ...files import replacing
from ..transforms import IGNORED
from .rules import CHECKS, Part, printable

_SPLIT_COLOURS = ('#33658a', '#f2a65a', '#5b8e7d', '#b5485d', '#7d5ba6', '#8a8d33')
_PER_ROW = 50
_NAMED = 300  # the names of more classes would fill a wall
_DPI = 110
_SAMPLES = 4  # images in a row; twice as many without masks
_WIDTH = 360  # width of an image in pixels; half as much without masks


def draw_figures(parts: Sequence[Part], out: Path) -> list[str]:
    """Draw classes.png and samples.png, where there is something to draw; returns their names."""
    parts = [part for part in parts if part.raw]
    counted = [part for part in parts if part.classes == parts[0].classes and part.counts.any()]
    figures = {'classes.png': _draw_classes(counted) if counted else None,
               'samples.png': _draw_samples(parts) if parts else None}
    for name, figure in figures.items():
        if figure is None:
            (out / name).unlink(missing_ok=True)  # of an earlier run
        else:
            with replacing(out / name) as path:
                figure.savefig(path, dpi=_DPI)
    return [name for name, figure in figures.items() if figure]


def _draw_classes(parts: Sequence[Part]) -> Figure:
    """Draw the share of the labelled pixels of each class, or its images, most frequent first."""
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
        drawn = order[row * per_row:(row + 1) * per_row]
        _draw_bars(axis, shares[:, drawn])
        axis.set_ylim(low / 2, 1.5 * shares.max() if of_images else 1)
        axis.yaxis.set_major_formatter(FuncFormatter(
            lambda value, _: f'{value:,g}' if of_images else f'{100 * value:g} %'))
        axis.set_xlim(-0.7, per_row - 0.3)
        if not named:
            axis.set_xticks([])
            axis.set_xlabel(f'{len(order):,} classes, those with most in {parts[0].name} first',
                            fontsize=9)
            continue
        axis.set_xticks(range(len(drawn)), [_short(parts[0].classes[i]) for i in drawn],
                        rotation=60, ha='right', rotation_mode='anchor', fontsize=8)
    _add_legend(figure, [*zip([part.name for part in parts], _SPLIT_COLOURS)])
    figure.suptitle('Images of each class' if of_images else
                    'Share of each class in the labelled pixels', fontsize=12)
    return figure


def _add_legend(figure: Figure, colours: Sequence[tuple[str, Any]]) -> None:
    figure.legend(handles=[Patch(color=colour, label=name) for name, colour in colours],
                  loc='outside lower center', ncols=min(len(colours), 8), frameon=False, fontsize=9)


def _draw_bars(axis: Axes, shares: np.ndarray) -> None:
    width = 0.8 / len(shares)
    for index, (values, colour) in enumerate(zip(shares, _SPLIT_COLOURS)):
        place, heights = np.arange(len(values)), np.where(values > 0, values, np.nan)
        if len(values) > _NAMED:  # bars narrower than a pixel
            axis.step(place, heights, where='mid', color=colour, linewidth=1)
        else:
            axis.bar(place + (index - (len(shares) - 1) / 2) * width, heights, width, color=colour,
                     bottom=0)
    axis.set_yscale('log')
    axis.tick_params(axis='x', length=0)
    axis.tick_params(axis='y', labelsize=8)
    axis.grid(axis='y', color='#e5e5e5', linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)


def _draw_samples(parts: Sequence[Part]) -> Figure | None:
    """Draw a few images of each data set with their masks painted over, or with their classes."""
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
    heights = [max(map(len, images)) / _DPI + 0.45 for images in painted]
    legend = rows[0][0].classes if len(rows[0][0].classes) <= 24 and not classify else ()
    figure = Figure(figsize=(columns * (width / _DPI + 0.1),
                             sum(heights) + 0.5 + 0.28 * -(-len(legend) // 8)),
                    layout='constrained')
    axes = figure.subplots(len(rows), columns, squeeze=False,
                           gridspec_kw=dict(height_ratios=heights))
    for (part, pairs), images, row in zip(rows, painted, axes):
        names = _class_names(part)
        for axis in row:
            axis.set_axis_off()
        for axis, image, (path, _) in zip(row, images, pairs):
            axis.imshow(image)
            file = f'{part.name}: {_short(Path(path).name, 18 if classify else 40)}'
            axis.text(0.5, -0.02, f'{_short(names[path])}\n{file}' if classify else file,
                      fontsize=9, transform=axis.transAxes, ha='center', va='top')
    if legend:
        colours = np.array(rows[0][0].dataset.metainfo['palette']) / 255
        _add_legend(figure, [*zip(map(_short, legend), colours)])
    figure.suptitle('Images and their classes' if classify else
                    'Masks over images; where there is no label the image is grey', fontsize=12)
    return figure


def _class_names(part: Part) -> dict[str, str]:
    """Return the class of each image of a classification data set, by its readable name."""
    names, known = part.classes, part.dataset.metainfo.get('classes') or ()
    if len(known) == len(names):
        names = tuple(known)
    return {image: names[number] for (image, _), number in zip(part.pairs, part.targets or ())
            if number in range(len(names))}


def _paint(part: Part, image: str, mask: str | None, width: int) -> np.ndarray:
    """Return a small image, H x W x 3, with the colours of its labels if there is a mask."""
    with Image.open(image) as opened:
        upright = ImageOps.exif_transpose(opened).convert('RGB')
    height = max(round(upright.height * width / upright.width), 1)
    size = (width, min(height, 2 * width))
    pixels = np.asarray(upright.resize(size, Image.Resampling.BILINEAR)).astype(np.float32)
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
    text = printable(text)
    text = text if len(text) <= length else f'{text[:length - 3]}...'
    return text.replace('$', r'\$')  # which would begin a formula
