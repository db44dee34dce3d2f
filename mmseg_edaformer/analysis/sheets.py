"""Sheets that show what ISR does to an image: attention, its output features, predictions.

A sheet consists of images beside and below each other, so that nothing overlaps.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..data.transforms import IGNORED
from ..isr.pooling import Grid
from ..predict.outputs import draw_legend
from ..predict.segmenter import Segmentation
from .attention import Attended

_PANEL = 300  # pixels of the longer side of a panel
_WIDEST = 2400  # pixels of all panels of a row
_LABEL, _BAR, _GAP = 210, 64, 10
_HEAT, _FEATURE = 'inferno', 'viridis'
_DARK, _CYAN = '#222222', '#00e5ff'


@dataclass(frozen=True, eq=False)
class Subject:
    """An image, and the points in it whose attention is shown."""
    path: Path
    image: np.ndarray  # H x W x 3, BGR
    inputs: Tensor  # the image as the network sees it, 1 x 3 x h x w
    points: Sequence[tuple[int, int]]  # column and row of pixels of the image
    names: Sequence[str]  # of the points
    step: tuple[float, float]  # rows and columns of pixels of the inputs per pixel of the image

    def to_inputs(self, point: tuple[int, int]) -> tuple[float, float]:
        """Return column and row of the centre of a pixel in the inputs."""
        return (point[0] + 0.5) * self.step[1], (point[1] + 0.5) * self.step[0]


@dataclass(frozen=True, eq=False)
class Shot:
    """The prediction of an image by one model at one ratio, with what its attention layers did."""
    title: str
    result: Segmentation
    gmacs: float
    seen: dict[str, Attended]

    def changed(self, other: 'Shot') -> float:
        """Return the share of pixels whose class differs from another prediction."""
        return float((self.result.labels != other.result.labels).mean())


def project(features: Sequence[Tensor]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return a view H x W of each of several features C x H x W, and the differences to the first.

    The view is along the first principal component of the first features, whose largest entry is
    made positive, so that its sign is always the same. The differences are norms over the channels,
    relative to the root mean square norm of the first tokens.
    """
    grid = features[0].shape[1:]
    tokens = [own.flatten(1).double() for own in features]
    mean = tokens[0].mean(1, keepdim=True)
    centred = tokens[0] - mean
    axis = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
    axis = axis * axis[axis.abs().argmax()].sign()
    size = float(tokens[0].square().sum(0).mean().sqrt()) or 1.
    views = [(axis @ (own - mean)).reshape(grid).numpy() for own in tokens]
    differences = [((own - tokens[0]).norm(dim=0) / size).reshape(grid).numpy()
                   for own in tokens[1:]]
    return views, differences


def relative_error(features: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference of all features, relative to that of the reference."""
    size = float(reference.double().norm())
    return float((features.double() - reference.double()).norm()) / (size or 1.)


def draw_attention(subject: Subject, shots: Sequence[Shot], texts: dict[str, str]
                   ) -> Image.Image:
    """Draw the attention of each layer (rows) for each point and ratio (columns)."""
    size = _panel_size(subject, len(subject.points) * len(shots))
    width = len(shots) * (size[0] + _GAP) + _BAR
    rows = [beside([_blank(_LABEL, 1), *(
        _text(name, width, 17) for name in subject.names)])]
    for name, text in texts.items():
        row = [_layer_label(name, text)]
        for i, point in enumerate(subject.points):
            high = max(float(shot.seen[name].density()[i].max()) for shot in shots)
            for shot in shots:
                seen = shot.seen[name]
                values = seen.density()[i]
                panel = draw_cells(subject, size, values, seen.cells, _HEAT, 0., high, photo=True)
                draw_cross(panel, subject, point)
                caption = f'{shot.title}: {seen.keys} keys, up to {values.max():.1f}'
                if seen.single:
                    caption += f', {seen.weights[i].mean(0)[:seen.single].sum():.0%} elsewhere'
                row.append(captioned(panel, caption))
            row.append(_bar(_HEAT, '0', f'{high:.1f}', size[1]))
        rows.append(beside(row))
    return _sheet(
        f'Attention, {subject.path.name}',
        'Where the query at the cross looks: mean of the heads, per area, as a multiple of even '
        'attention, which is 1. The cells are those of the keys. The ratios of a point in a layer '
        'share one scale. Grey: no key.', rows)


def draw_features(subject: Subject, shots: Sequence[Shot], texts: dict[str, str]) -> Image.Image:
    """Draw the output features of each layer (rows) at each ratio, and their differences."""
    size = _panel_size(subject, 2 * len(shots) - 1)
    rows = []
    for name, text in texts.items():
        features = [shot.seen[name].features for shot in shots]
        tokens = shots[0].seen[name].tokens
        views, differences = project(features)
        low, high = (float(value) for value in np.percentile(np.stack(views), (1, 99)))
        row = [_layer_label(name, text)]
        row += [captioned(draw_cells(subject, size, view, tokens, _FEATURE, low, high), shot.title)
                for shot, view in zip(shots, views)]
        row.append(_bar(_FEATURE, f'{low:.2g}', f'{high:.2g}', size[1]))
        if differences:
            most = max(float(values.max()) for values in differences)
            row += [captioned(draw_cells(subject, size, values, tokens, _HEAT, 0., most),
                               f'{shot.title}: differs by {relative_error(own, features[0]):.1%}')
                    for shot, own, values in zip(shots[1:], features[1:], differences)]
            row.append(_bar(_HEAT, '0', f'{most:.2g}', size[1]))
        rows.append(beside(row))
    return _sheet(
        f'Output features of the attention, {subject.path.name}',
        f'Left: along the first principal component at {shots[0].title}, the same for all ratios. '
        f'Right: norm of the difference to {shots[0].title} at each token, where 1 is the mean '
        'norm of its features. Percentages: norm of the whole difference relative to that of the '
        'features.', rows)


def draw_predictions(subject: Subject, shots: Sequence[Shot], others: Sequence[Shot] = (),
                     truth: np.ndarray | None = None, note: str = '') -> Image.Image:
    """Draw the image, its labels if there are any, the predictions, and a legend."""
    first, everything = shots[0], [*shots, *others]
    size = _panel_size(subject, 4, 440)
    panel = resized(subject.image, size)
    for i, point in enumerate(subject.points, 1):
        draw_cross(panel, subject, point, str(i))
    blocks = [captioned(panel, '\n'.join([subject.path.name, *subject.names]), 4)]
    counted = [shot.result.labels for shot in everything]
    if truth is not None:
        void = truth == IGNORED
        drawn = Segmentation(np.where(void, 0, truth), first.result.image, first.result.classes,
                             first.result.palette).draw()
        drawn[void] = 0
        blocks.append(captioned(resized(drawn, size), 'ground truth; black: none', 4))
        counted.append(truth[~void])
    for shot in everything:
        lines = [shot.title, f'{shot.gmacs:.2f} GMACs']
        if shot in shots[1:]:
            lines[-1] += f' ({shot.gmacs / first.gmacs - 1:+.0%})'
        if shot is not first:
            lines.append(f'{shot.changed(first):.1%} of the pixels differ from {first.title}')
        if truth is not None:
            right = (shot.result.labels == truth)[~void].sum() / max(1, (~void).sum())
            lines.append(f'{right:.1%} of the labelled pixels right')
        blocks.append(captioned(resized(shot.result.draw(), size), '\n'.join(lines), 4))
    rows = [beside(blocks[start:start + 4]) for start in range(0, len(blocks), 4)]
    rows.append(draw_legend([(first.result.classes[i], first.result.palette[i])
                             for i in np.unique(np.concatenate(counted, None))],
                            max(row.width for row in rows)))
    return _sheet(f'Predictions, {subject.path.name}', note, rows)


def paint(values: np.ndarray, edges: tuple[np.ndarray, np.ndarray], size: Grid,
          step: tuple[float, float]) -> np.ndarray:
    """Give each pixel the value of the cell around its centre, or NaN behind the last cell.

    The edges begin at 0 and are in pixels of the inputs, of which ``step`` make a pixel of the
    result.
    """
    rows, columns = (np.diff(np.append(np.ceil(edge / pixel - 0.5).clip(0, side), side)).astype(int)
                     for edge, side, pixel in zip(edges, size, step))
    padded = np.pad(values.astype(float), (0, 1), constant_values=np.nan)
    return padded.repeat(rows, 0).repeat(columns, 1)


def draw_cells(subject: Subject, size: Grid, values: np.ndarray,
               edges: tuple[np.ndarray, np.ndarray], colours: str, low: float, high: float, *,
               photo: bool = False) -> Image.Image:
    """Draw a panel of cells in the colours of a colour map, or over the image in grey."""
    height, width = subject.image.shape[:2]
    step = subject.step[0] * height / size[1], subject.step[1] * width / size[0]
    painted = paint(values, edges, (size[1], size[0]), step)
    drawn = _coloured(painted, colours, low, high)
    if photo:
        grey = np.array(resized(subject.image, size).convert('L').convert('RGB'))
        mixed = (0.4 * grey + 0.6 * drawn).round().astype(np.uint8)
        drawn = np.where(np.isnan(painted)[..., None], grey, mixed)
    return Image.fromarray(drawn)


def draw_cross(panel: Image.Image, subject: Subject, point: tuple[int, int],
               name: str = '') -> None:
    """Mark a point of the image on a panel."""
    height, width = subject.image.shape[:2]
    x, y = (point[0] + 0.5) * panel.width / width, (point[1] + 0.5) * panel.height / height
    pen = ImageDraw.Draw(panel)
    for reach, thickness, colour in ((9, 5, 'black'), (8, 2, _CYAN)):
        pen.line((x - reach, y, x + reach, y), colour, thickness)
        pen.line((x, y - reach, x, y + reach), colour, thickness)
    if name:
        left, up = x < panel.width - 24, y < panel.height - 24
        pen.text((x + (6 if left else -6), y + (5 if up else -5)), name, _CYAN,
                 ImageFont.load_default(16), ('l' if left else 'r') + ('a' if up else 'd'),
                 stroke_width=2, stroke_fill='black')


def _panel_size(subject: Subject, columns: int, longest: int = _PANEL) -> Grid:
    height, width = subject.image.shape[:2]
    scale = min(longest, max(160, _WIDEST // columns)) / max(height, width)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _coloured(values: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    import matplotlib
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    colours: np.ndarray = matplotlib.colormaps[name](np.clip(share, 0, 1), bytes=True)[..., :3]
    return colours


def resized(image: np.ndarray, size: Grid) -> Image.Image:
    """Make a panel of this width and height from a BGR image."""
    way = cv2.INTER_AREA if size[0] < image.shape[1] else cv2.INTER_LINEAR
    return Image.fromarray(np.ascontiguousarray(
        cv2.resize(image, size, interpolation=way)[..., ::-1]))


def _text(text: str, width: int, size: int = 14, colour: str = _DARK) -> Image.Image:
    letters = max(int(width / (0.56 * size)), 1)  # of average width
    lines = [line for paragraph in text.split('\n') for line in wrap(paragraph, letters) or ['']]
    step = round(1.35 * size)
    image = _blank(width, step * len(lines) + 2)
    pen = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        pen.text((0, i * step), line, colour, ImageFont.load_default(size))
    return image


def captioned(panel: Image.Image, caption: str, gap: int = 2) -> Image.Image:
    """Put a text below a panel."""
    return below([panel, _text(caption, panel.width)], gap=gap)


def _layer_label(name: str, text: str) -> Image.Image:
    return below([_text(text, _LABEL, 15), _text(name, _LABEL, 12, '#777777')], gap=2)


def _bar(name: str, low: str, high: str, height: int) -> Image.Image:
    image = _blank(_BAR, height)
    shades = _coloured(np.linspace(1, 0, height)[:, None].repeat(12, 1), name, 0., 1.)
    image.paste(Image.fromarray(shades), (0, 0))
    pen = ImageDraw.Draw(image)
    pen.text((16, 0), high, _DARK, ImageFont.load_default(12))
    pen.text((16, height - 1), low, _DARK, ImageFont.load_default(12), 'ld')
    return image


def _blank(width: int, height: int) -> Image.Image:
    return Image.new('RGB', (width, height), 'white')


def _join(images: Sequence[Image.Image], gap: int, *, across: bool) -> Image.Image:
    places = np.cumsum([0, *(image.size[not across] + gap for image in images)]).tolist()
    total, side = places[-1] - gap, max(image.size[across] for image in images)
    joined = _blank(total, side) if across else _blank(side, total)
    for image, place in zip(images, places):
        joined.paste(image, (place, 0) if across else (0, place))
    return joined


beside, below = partial(_join, gap=_GAP, across=True), partial(_join, across=False)


def _sheet(title: str, note: str, rows: Sequence[Image.Image]) -> Image.Image:
    width = max(row.width for row in rows)
    head = [_text(title, width, 24), *([_text(note, width, 15, '#555555')] if note else [])]
    return ImageOps.expand(below([*head, *rows], gap=14), 20, 'white')
