"""The training log, the charts and the image panels of a run's report."""
import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..files import replacing, write_file
from .counts import Example

LINE, MARKED, _PALE = '#33658a', '#b5485d', '#a9c3d6'
_MANY = 200  # points of a curve that are too many to see its course
_WRONG = (60, 60, 230)  # BGR


@dataclass
class Curves:
    """The log of a training, by step and then by name, and how often it was started.

    Names of validations begin with val/. Their step is an epoch if they were counted in epochs.
    """
    lines: dict[int, dict[str, float]] = field(default_factory=dict)
    starts: int = 0

    def of(self, name: str) -> dict[int, float]:
        """Return one value by step."""
        return {step: line[name] for step, line in sorted(self.lines.items()) if name in line}


def read_curves(work_dir: Path) -> Curves:
    """Join the logs of all starts of a run, each of which has a folder of its own.

    From its first step on, a start replaces what earlier ones logged. One that begins as early as
    those before it is another run, and replaces all of them.
    """
    curves = Curves()
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        start = Curves()
        for text in path.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut by a kill
                continue
            if isinstance(line, dict) and isinstance(line.get('step'), int):
                prefix = '' if 'loss' in line or 'lr' in line else 'val/'
                start.lines.setdefault(line['step'], {}).update(
                    (prefix + name, value) for name, value in line.items()
                    if isinstance(value, (int, float)) and name != 'step')
        trained = start.of('lr') or start.of('loss')
        if trained:
            first = min(trained)
            if first <= min(curves.of('lr') or curves.of('loss'), default=first):
                curves = Curves()
            curves.lines = {step: line for step, line in curves.lines.items() if step < first}
        for step, values in start.lines.items():
            curves.lines.setdefault(step, {}).update(values)
        curves.starts += bool(start.lines)
    return curves


def draw_curve(points: Mapping[int, float], path: Path, title: str, *, unit: str,
               measured: bool = False) -> None:
    """Draw a value by step of a training, as a PNG.

    ``measured`` shows each point and marks the highest, for values that are measured now and then.
    """
    steps, values = np.array(list(points)), np.array(list(points.values()), float)
    with figure_of(path, (5, 3)) as (_, (axis,)):
        many = not measured and len(values) > _MANY
        axis.plot(steps, values, color=_PALE if many else LINE, linewidth=1 if many else 1.6,
                  marker='o' if measured or len(values) < 3 else None, markersize=4)
        if many:
            width = len(values) // 40
            padded = np.pad(values, width, mode='reflect')
            windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * width + 1)
            axis.plot(steps, np.nanmedian(windows, 1), color=LINE, linewidth=1.8)
        if measured and np.isfinite(values).any():
            best = int(np.nanargmax(values))
            axis.plot(steps[best], values[best], 'o', color=MARKED, markersize=7)
            axis.annotate(f'{values[best]:.2f}', (steps[best], values[best]), (0, 7),
                          textcoords='offset points', ha='center', color=MARKED, fontsize=10)
            axis.margins(y=0.18)
        axis.set_title(title, loc='left', fontsize=11)
        axis.set_xlabel(unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(steps) == 1:
            axis.set_xticks(steps)


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


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table, floats rounded, and nothing where there is no number."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *(
        [('' if math.isnan(cell) else round(float(cell), 6)) if isinstance(cell, float) else
         cell for cell in row] for row in rows)])
    write_file(path, text.getvalue())


@contextmanager
def figure_of(path: Path, size: tuple[float, float],
              columns: int = 1) -> Iterator[tuple[Any, np.ndarray]]:
    """Give a figure and its axes beside each other, and write it as a PNG in the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.spines[['top', 'right']].set_visible(False)
        axis.grid(color='#e5e5e5', linewidth=0.6)
        axis.set_axisbelow(True)
    yield figure, axes
    with replacing(path) as partial:
        figure.savefig(partial, format='png')
