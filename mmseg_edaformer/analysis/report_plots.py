"""The training log, the charts and the image panels of a run's report."""
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..files import replacing, write_file
from .counts import Example

NAMED = 40
"""Largest number of classes that are named at a matrix; more are numbered."""

_LINE, _PALE, _MARKED = '#33658a', '#a9c3d6', '#b5485d'
_MANY = 200  # points of a curve that are too many to see its course
_NUMBERED = 15  # classes whose shares fit into a matrix
_WRONG = (60, 60, 230)  # BGR


@dataclass
class Curves:
    """The log of a training, by step and then by name, and how often it was started.

    A step of a validation is an epoch if the validations were counted in epochs.
    """
    train: dict[int, dict[str, float]] = field(default_factory=dict)
    val: dict[int, dict[str, float]] = field(default_factory=dict)
    starts: int = 0

    def of(self, name: str, validated: bool = False) -> dict[int, float]:
        """Return one value by step."""
        lines = self.val if validated else self.train
        return {step: line[name] for step, line in sorted(lines.items()) if name in line}


def read_curves(work_dir: Path) -> Curves:
    """Join the logs of all starts of a run, each of which has a folder of its own.

    From its first step on, a start replaces what earlier ones logged. One that begins as early as
    those before it is another run, and replaces all of them.
    """
    curves = Curves()
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        train: dict[int, dict[str, float]] = {}
        val: dict[int, dict[str, float]] = {}
        for text in path.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut by a kill
                continue
            if isinstance(line, dict) and isinstance(line.get('step'), int):
                numbers = {name: value for name, value in line.items()
                           if isinstance(value, (int, float))}
                of_training = 'loss' in line or 'lr' in line
                (train if of_training else val).setdefault(line['step'], {}).update(numbers)
        if not train and not val:
            continue
        if train:
            first = min(train)
            if first <= min(curves.train, default=first):
                curves = Curves()
            curves.train = {step: line for step, line in curves.train.items() if step < first}
            curves.val = {step: line for step, line in curves.val.items() if step < first}
        curves.train |= train
        curves.val |= val
        curves.starts += 1
    return curves


def join_curves(curves: Curves) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of a table of all values; those of validations have a prefix."""
    lines: dict[int, dict[str, float]] = {}
    for prefix, part in (('', curves.train), ('val/', curves.val)):
        for step, line in part.items():
            lines.setdefault(step, {}).update(
                (prefix + name, value) for name, value in line.items() if name != 'step')
    names = sorted({name for line in lines.values() for name in line},
                   key=lambda name: (name.startswith('val/'), name))
    return ['step', *names], [[step, *(line.get(name, '') for name in names)]
                              for step, line in sorted(lines.items())]


def draw_curve(points: Mapping[int, float], path: Path, title: str, *, unit: str,
               measured: bool = False) -> None:
    """Draw a value by step of a training, as a PNG.

    ``measured`` shows each point and marks the highest, for values that are measured now and then.
    """
    steps, values = np.array(list(points)), np.array(list(points.values()), float)
    with _figure(path, (5, 3)) as (_, axis):
        many = not measured and len(values) > _MANY
        axis.plot(steps, values, color=_PALE if many else _LINE, linewidth=1 if many else 1.6,
                  marker='o' if measured or len(values) < 3 else None, markersize=4)
        if many:
            width = len(values) // 40
            padded = np.pad(values, width, mode='reflect')
            windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * width + 1)
            axis.plot(steps, np.nanmedian(windows, 1), color=_LINE, linewidth=1.8)
        if measured and np.isfinite(values).any():
            best = int(np.nanargmax(values))
            axis.plot(steps[best], values[best], 'o', color=_MARKED, markersize=7)
            axis.annotate(f'{values[best]:.2f}', (steps[best], values[best]), (0, 7),
                          textcoords='offset points', ha='center', color=_MARKED, fontsize=10)
            axis.margins(y=0.18)
        axis.set_title(_plain(title), loc='left', fontsize=11)
        axis.set_xlabel(unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(steps) == 1:
            axis.set_xticks(steps)
        axis.grid(color='#e5e5e5', linewidth=0.6)
        axis.set_axisbelow(True)


def draw_matrix(shares: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix of the shares of each class (row), with names where they fit in.

    The row of a class that does not occur is nan.
    """
    from matplotlib.colors import PowerNorm
    count = len(classes)
    named, numbered = count <= NAMED, count <= _NUMBERED
    side = min(max(3.2 + 0.42 * count, 4.5), 9.) if named else 7.5
    with _figure(path, (side + 0.8, side)) as (figure, axis):
        axis.set_facecolor('#cccccc')
        # Few pixels of a class are confused with any other: the root tells them from none.
        image = axis.imshow(np.ma.masked_invalid(shares), cmap='Blues', norm=PowerNorm(0.5, 0, 1),
                            interpolation='nearest' if named else 'none')
        if named:
            names = [_plain(name if len(name) <= 22 else f'{name[:20]}…') for name in classes]
            size = 9 if count <= 25 else 7
            axis.set_xticks(range(count), names, rotation=90, fontsize=size)
            axis.set_yticks(range(count), names, fontsize=size)
        for row, column in zip(*np.nonzero(shares >= 0.005)) if numbered else ():
            share = shares[row, column]
            axis.text(column, row, f'{100 * share:.0f}', ha='center', va='center', fontsize=8,
                      color='white' if share > 0.35 else '#222222')
        axis.set_xlabel('predicted' if named else 'predicted, number of the class')
        axis.set_ylabel('label' if named else 'label, number of the class')
        bar = figure.colorbar(image, ax=axis, shrink=0.7, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
        bar.ax.set_yticklabels(['0', '1', '10', '25', '50', '100 %'])
        bar.outline.set_visible(False)
        axis.spines[:].set_visible(False)


def panels(example: Example, palette: Sequence[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """Return image, labels, prediction and errors by their captions; h x w x 3, uint8, BGR."""
    colours = np.array([*palette, (0, 0, 0)], np.uint8)[:, ::-1]  # the last one for -1
    grey = cv2.cvtColor(example.image, cv2.COLOR_BGR2GRAY)[..., None].repeat(3, 2)
    errors = (0.45 * grey + 110).astype(np.uint8)
    counted = example.labels >= 0
    errors[counted & (example.labels != example.predicted)] = _WRONG
    errors[~counted] = 60
    return {'image': example.image, 'labels': colours[example.labels],
            'prediction': colours[example.predicted], 'errors': errors}


def encode(image: np.ndarray, photo: bool = False) -> bytes:
    """Encode a BGR image as a PNG, or a photo as a JPEG."""
    suffix, options = ('.jpg', [cv2.IMWRITE_JPEG_QUALITY, 88]) if photo else ('.png', [])
    return cv2.imencode(suffix, image, options)[1].tobytes()


def write_row(images: Sequence[np.ndarray], path: Path) -> None:
    """Write images of one size side by side, as a PNG."""
    gap = np.full((len(images[0]), 6, 3), 255, np.uint8)
    row: list[np.ndarray] = [part for image in images for part in (image, gap)][:-1]
    write_file(path, encode(np.hstack(row)))


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout='constrained')
    axis = figure.subplots()
    axis.spines[['top', 'right']].set_visible(False)
    yield figure, axis
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Glyph .* missing')  # in names of classes
        figure.savefig(partial, dpi=140, format='png')


def _plain(text: str) -> str:
    """Escape what matplotlib takes for mathematics."""
    return text.replace('$', r'\$')
