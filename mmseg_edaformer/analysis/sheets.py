"""Sheets of what ISR does to a picture: attention, its output features, labels, as pictures.

A sheet is made of pictures beside and below each other, so that nothing overlaps.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.transforms import IGNORED
from ..isr.pooling import Grid
from ..predict.segmenter import Segmentation, count_pixels
from .attention import Attended

_PANEL = 300  # pixels: the longer side of a panel
_WIDEST = 2400  # pixels of all panels of a row
_LABEL, _BAR, _GAP = 210, 64, 10
_HEAT, _FEATURE = 'inferno', 'viridis'


@dataclass(frozen=True, eq=False)
class Subject:
    """A picture, and the points of it that are looked at.

    Attributes:
        path: Where it is.
        picture: H x W x 3, BGR.
        inputs: What the network sees of it, 1 x 3 x h x w.
        points: Column and row of pixels of the picture.
        names: What the points are called.
        step: Rows and columns of pixels of the inputs to one of the picture.
    """
    path: Path
    picture: np.ndarray
    inputs: Tensor
    points: Sequence[tuple[int, int]]
    names: Sequence[str]
    step: tuple[float, float]

    def to_inputs(self, point: tuple[int, int]) -> tuple[float, float]:
        """Column and row of a pixel's middle in the inputs."""
        return (point[0] + 0.5) * self.step[1], (point[1] + 0.5) * self.step[0]


@dataclass(frozen=True, eq=False)
class Shot:
    """A picture at one ratio of a model.

    Attributes:
        title: The ratio, or the name of another model.
        found: What is predicted.
        gmacs: Billions of multiply-adds of that prediction.
        seen: By name of the layer, what its attention does.
    """
    title: str
    found: Segmentation
    gmacs: float
    seen: dict[str, Attended]

    def changed(self, other: 'Shot') -> float:
        """The share of the pixels whose class is another one."""
        return float((self.found.labels != other.found.labels).mean())

    def right(self, truth: np.ndarray) -> float:
        """The share of the labelled pixels whose class is found."""
        known = truth != IGNORED
        return float((self.found.labels == truth)[known].mean()) if known.any() else math.nan


@dataclass(frozen=True, eq=False)
class Projection:
    """A view of features that several passes share: the first principal component of one of them.

    Attributes:
        mean: C, subtracted first.
        axis: C, the direction in which that pass varies most over its tokens; its largest entry is
            positive, so that the sign is always the same.
        size: Root mean square of the norm of its tokens, which differences are related to.
    """
    mean: Tensor
    axis: Tensor
    size: float

    @classmethod
    def of(cls, features: Tensor) -> 'Projection':
        """That of features C x H x W."""
        x = features.flatten(1).double()
        mean = x.mean(1)
        centred = x - mean[:, None]
        axis = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
        axis = axis * axis[axis.abs().argmax()].sign()
        return cls(mean, axis, float(x.square().sum(0).mean().sqrt()))

    def view(self, features: Tensor) -> np.ndarray:
        """Features C x H x W along the axis, H x W."""
        return torch.tensordot(self.axis, features.double() - self.mean[:, None, None],
                               1).numpy()

    def difference(self, features: Tensor, others: Tensor) -> np.ndarray:
        """Norm over the channels of the difference at each token, in ``size``, H x W."""
        return ((features.double() - others.double()).norm(dim=0) / (self.size or 1.)).numpy()


def relative_error(features: Tensor, reference: Tensor) -> float:
    """Norm of the difference of all features, relative to that of the reference."""
    size = float(reference.double().norm())
    return float((features.double() - reference.double()).norm()) / (size or 1.)


def draw_attention(subject: Subject, shots: Sequence[Shot], texts: dict[str, str]
                   ) -> Image.Image:
    """Attention of each layer (rows) for each point and ratio (columns)."""
    size = _panel_size(subject, len(subject.points) * len(shots))
    width = len(shots) * (size[0] + _GAP) + _BAR
    rows = [_beside([_blank(_LABEL, 1), *(
        _text(name, width, 17) for name in subject.names)])]
    for name, text in texts.items():
        row = [_label(name, text)]
        for i, point in enumerate(subject.points):
            maps = [shot.seen[name].density()[i] for shot in shots]
            high = max(float(each.max()) for each in maps)
            group = []
            for shot, values in zip(shots, maps):
                seen = shot.seen[name]
                panel = _heat(subject, values, seen.cells, size, high)
                _cross(panel, subject, point)
                caption = f'{shot.title}: {seen.keys} keys, up to {values.max():.1f}'
                if seen.single:
                    caption += f', {seen.weights[i].mean(0)[:seen.single].sum():.0%} elsewhere'
                group.append(_below([panel, _text(caption, size[0])], 2))
            row.append(_beside([*group, _bar(_HEAT, '0', f'{high:.1f}', size[1])]))
        rows.append(_beside(row))
    return _sheet(
        f'Attention, {subject.path.name}',
        'Where the query at the cross looks: mean of the heads, for each area as a multiple of '
        'even attention, which is 1. The cells are those of the keys. One scale for the ratios of '
        'a point in a layer. Grey: no key.', rows)


def draw_features(subject: Subject, shots: Sequence[Shot], texts: dict[str, str]) -> Image.Image:
    """What the attention of each layer (rows) gives at each ratio, and the difference."""
    columns = 2 * len(shots) - 1
    size = _panel_size(subject, columns)
    rows = []
    for name, text in texts.items():
        first = shots[0].seen[name]
        shared = Projection.of(first.features)
        views = [shared.view(shot.seen[name].features) for shot in shots]
        low, high = (float(at) for at in np.percentile(np.stack(views), (1, 99)))
        differences = [shared.difference(shot.seen[name].features, first.features)
                       for shot in shots[1:]]
        row = [_label(name, text)]
        for shot, values in zip(shots, views):
            panel = _plain(values, first.tokens, subject, size, _FEATURE, low, high)
            row.append(_below([panel, _text(shot.title, size[0])], 2))
        row.append(_bar(_FEATURE, f'{low:.2g}', f'{high:.2g}', size[1]))
        most = max((float(each.max()) for each in differences), default=0.)
        for shot, values in zip(shots[1:], differences):
            panel = _plain(values, first.tokens, subject, size, _HEAT, 0., most)
            error = relative_error(shot.seen[name].features, first.features)
            row.append(_below([panel, _text(f'{shot.title}: differs by {error:.1%}', size[0])], 2))
        if differences:
            row.append(_bar(_HEAT, '0', f'{most:.2g}', size[1]))
        rows.append(_beside(row))
    return _sheet(
        f'Output features of the attention, {subject.path.name}',
        f'Left: along the first principal component at {shots[0].title}, the same for all ratios. '
        f'Right: norm of the difference to {shots[0].title} at each token, 1 is the mean norm of '
        'its features. In percent: norm of the whole difference to that of the features.', rows)


def draw_predictions(subject: Subject, shots: Sequence[Shot], beside: Sequence[Shot] = (),
                     truth: np.ndarray | None = None, note: str = '') -> Image.Image:
    """The picture, its labels if they are given, and what is predicted, with the classes."""
    first = shots[0]
    size = _panel_size(subject, 4, 440)
    panel = _photo(subject, size)
    for i, point in enumerate(subject.points, 1):
        _cross(panel, subject, point, str(i))
    blocks = [_below([panel, _text('\n'.join([subject.path.name, *subject.names]), size[0])], 4)]
    if truth is not None:
        labelled = Segmentation(np.where(truth == IGNORED, 0, truth), first.found.image,
                                first.found.classes, first.found.palette)
        drawn = labelled.draw()
        drawn[truth == IGNORED] = 0
        blocks.append(_below([_resized(drawn, size), _text('ground truth; black: none', size[0])],
                             4))
    for shot in (*shots, *beside):
        lines = [shot.title, f'{shot.gmacs:.2f} GMACs']
        if shot in shots[1:]:
            lines[-1] += f' ({shot.gmacs / first.gmacs - 1:+.0%})'
        if shot is not first:
            lines.append(f'{shot.changed(first):.1%} of the pixels differ from {first.title}')
        if truth is not None:
            lines.append(f'{shot.right(truth):.1%} of the labelled pixels right')
        blocks.append(_below([_resized(shot.found.draw(), size), _text('\n'.join(lines), size[0])],
                             4))
    rows = [_beside(blocks[start:start + 4]) for start in range(0, len(blocks), 4)]
    counts = np.zeros(len(first.found.classes), int)
    for labels in (*(shot.found.labels for shot in (*shots, *beside)), *(
            [] if truth is None else [truth[truth != IGNORED][None]])):
        counts += count_pixels(labels, len(counts))
    rows.append(_legend([(first.found.classes[i], first.found.palette[i])
                         for i in np.argsort(-counts, kind='stable') if counts[i]],
                        max(row.width for row in rows)))
    return _sheet(f'Predictions, {subject.path.name}', note, rows)


def paint(values: np.ndarray, edges: tuple[np.ndarray, np.ndarray], size: Grid,
          step: tuple[float, float]) -> np.ndarray:
    """Cells as pixels: each has the value of the cell that its middle lies in, NaN outside of all.

    Args:
        values: Rows x columns of cells.
        edges: Where the rows and columns of cells begin, and the last ends, in pixels of the
            inputs.
        size: Height and width of the result.
        step: Pixels of the inputs to one of it, down and across.
    """
    where = [np.searchsorted(edge, (np.arange(side) + 0.5) * each, 'right') - 1
             for edge, side, each in zip(edges, size, step)]
    inside = [(at >= 0) & (at < count) for at, count in zip(where, values.shape)]
    rows, columns = (np.where(good, at, 0) for good, at in zip(inside, where))
    found: np.ndarray = np.where(inside[0][:, None] & inside[1],
                                 values[rows[:, None], columns].astype(float), np.nan)
    return found


def _panel_size(subject: Subject, columns: int, longest: int = _PANEL) -> Grid:
    """Width and height of a panel."""
    height, width = subject.picture.shape[:2]
    scale = min(longest, max(160, _WIDEST // columns)) / max(height, width)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _step(subject: Subject, size: Grid) -> tuple[float, float]:
    """Pixels of the inputs to one of a panel, down and across."""
    height, width = subject.picture.shape[:2]
    return subject.step[0] * height / size[1], subject.step[1] * width / size[0]


def _colours(values: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    """Values in the colours of a colour map, H x W x 3, uint8."""
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    colours: np.ndarray = matplotlib.colormaps[name](np.clip(share, 0, 1), bytes=True)[..., :3]
    return colours


def _heat(subject: Subject, values: np.ndarray, edges: tuple[np.ndarray, np.ndarray], size: Grid,
          high: float) -> Image.Image:
    """Attention over the picture."""
    grey = np.array(_photo(subject, size).convert('L').convert('RGB'))
    painted = paint(values, edges, (size[1], size[0]), _step(subject, size))
    colours = _colours(painted, _HEAT, 0., high)
    mixed = (0.4 * grey + 0.6 * colours).round().astype(np.uint8)
    return Image.fromarray(np.where(np.isnan(painted)[..., None], grey, mixed))


def _plain(values: np.ndarray, edges: tuple[np.ndarray, np.ndarray], subject: Subject, size: Grid,
           name: str, low: float, high: float) -> Image.Image:
    painted = paint(values, edges, (size[1], size[0]), _step(subject, size))
    return Image.fromarray(_colours(painted, name, low, high))


def _photo(subject: Subject, size: Grid) -> Image.Image:
    return _resized(subject.picture, size)


def _resized(picture: np.ndarray, size: Grid) -> Image.Image:
    smaller = size[0] < picture.shape[1]
    way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return Image.fromarray(np.ascontiguousarray(cv2.resize(picture, size, interpolation=way)
                                                [..., ::-1]))


def _cross(panel: Image.Image, subject: Subject, point: tuple[int, int], name: str = '') -> None:
    """Mark a point of the picture on a panel."""
    height, width = subject.picture.shape[:2]
    x, y = (point[0] + 0.5) * panel.width / width, (point[1] + 0.5) * panel.height / height
    pen = ImageDraw.Draw(panel)
    for line, colour in ((5, 'black'), (2, '#00e5ff')):
        reach = 8 + (line == 5)
        pen.line((x - reach, y, x + reach, y), colour, line)
        pen.line((x, y - reach, x, y + reach), colour, line)
    if name:
        left, up = x < panel.width - 24, y < panel.height - 24
        pen.text((x + (6 if left else -6), y + (5 if up else -5)), name, '#00e5ff', _font(16),
                 ('l' if left else 'r') + ('a' if up else 'd'), stroke_width=2,
                 stroke_fill='black')


def _font(size: float) -> Any:
    return ImageFont.load_default(size)


def _text(text: str, width: int, size: int = 14, colour: str = '#222222') -> Image.Image:
    """Lines of text, broken so that they fit the width."""
    font = _font(size)
    lines: list[str] = []
    for paragraph in text.split('\n'):
        lines.append('')
        for word in paragraph.split():
            joined = f'{lines[-1]} {word}'.strip()
            if lines[-1] and font.getlength(joined) > width:
                lines.append('')
                joined = word
            while font.getlength(joined) > width and len(joined) > 1:  # a word that is too long
                fits = next(n for n in range(len(joined) - 1, 0, -1)
                            if n == 1 or font.getlength(joined[:n]) <= width)
                lines[-1], joined = joined[:fits], joined[fits:]
                lines.append('')
            lines[-1] = joined
    step = round(1.35 * size)
    image = _blank(width, step * len(lines) + 2)
    pen = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        pen.text((0, i * step), line, colour, font)
    return image


def _label(name: str, text: str) -> Image.Image:
    """What a row of a layer is called."""
    return _below([_text(text, _LABEL, 15), _text(name, _LABEL, 12, '#777777')], 2)


def _bar(name: str, low: str, high: str, height: int) -> Image.Image:
    """A colour map with the values of its ends."""
    image = _blank(_BAR, height)
    shades = _colours(np.linspace(1, 0, height)[:, None].repeat(12, 1), name, 0., 1.)
    image.paste(Image.fromarray(shades), (0, 0))
    pen = ImageDraw.Draw(image)
    pen.text((16, 0), high, '#222222', _font(12))
    pen.text((16, height - 1), low, '#222222', _font(12), 'ld')
    return image


def _legend(classes: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> Image.Image:
    """Names of classes beside their colours, in columns."""
    font = _font(15)
    column = min(width, 50 + max(int(font.getlength(name)) for name, _ in classes))
    across = max(1, width // column)
    legend = _blank(width, -(-len(classes) // across) * 28)
    pen = ImageDraw.Draw(legend)
    for i, (name, colour) in enumerate(classes):
        x, y = i % across * column, i // across * 28
        pen.rectangle((x, y + 2, x + 26, y + 20), colour, (90, 90, 90))
        pen.text((x + 34, y + 11), name, '#222222', font, 'lm')
    return legend


def _blank(width: int, height: int) -> Image.Image:
    return Image.new('RGB', (width, height), 'white')


def _beside(images: Sequence[Image.Image], gap: int = _GAP) -> Image.Image:
    found = _blank(sum(image.width for image in images) + gap * (len(images) - 1),
                   max(image.height for image in images))
    x = 0
    for image in images:
        found.paste(image, (x, 0))
        x += image.width + gap
    return found


def _below(images: Sequence[Image.Image], gap: int = _GAP) -> Image.Image:
    found = _blank(max(image.width for image in images),
                   sum(image.height for image in images) + gap * (len(images) - 1))
    y = 0
    for image in images:
        found.paste(image, (0, y))
        y += image.height + gap
    return found


def _sheet(title: str, note: str, rows: Sequence[Image.Image]) -> Image.Image:
    width = max(row.width for row in rows)
    head = [_text(title, width, 24)] + ([_text(note, width, 15, '#555555')] if note else [])
    content = _below([*head, *rows], 14)
    found = _blank(content.width + 40, content.height + 40)
    found.paste(content, (20, 20))
    return found
