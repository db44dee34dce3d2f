"""Sheets that show what a network does at several ISR ratios: attention, features, predictions."""
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from prettytable import PrettyTable
from torch import Tensor

from ..errors import ConfigError, shown
from ..files import replacing
from ..isr import ISRRatio
from ..isr.pooling import Grid
from ..predict.inputs import find_images, name_targets
from ..predict.outputs import writing
from ..predict.segmenter import Segmenter
from . import sheets
from .attention import Attended, choose_layers, look
from .labelled import read_labels
from .loading import count_windows


def visualize(segmenter: Segmenter, images: Sequence[str | Path], out: str | Path, *,
              isr_ratio: Sequence[ISRRatio | int | str] = ('none', 'optimal'),
              others: Sequence[tuple[str, Segmenter]] = (), points: Sequence[str] = (),
              layers: Sequence[str] = (), labels: str | Path | None = None,
              reduce_zero_label: bool = False, say: Callable[[str], None] = print) -> list[Path]:
    """Draw sheets that show what ISR does to images: attention, features and predictions.

    Args:
        segmenter: The model.
        images: Files, folders and patterns, see `find_images`.
        out: Folder for ``NAME_attention.png``, ``NAME_features.png`` and ``NAME_predictions.png``
            of each image.
        isr_ratio: Ratios to compare; the others are compared with the first one.
        others: Names of further models and the models, whose predictions are shown beside.
        points: Queries whose attention is shown, see `parse_point`; by default in the largest
            classes.
        layers: Attention layers, see `choose_layers`.
        labels: The mask of a single image, or a folder of masks with the names of the images:
            class indices, 255 where there is no label.
        reduce_zero_label: Whether 0 in the masks means no label and 1 the first class.
        say: Function that receives a text for each image.

    Returns the files that were written.

    Raises:
        DataError: An image or a mask cannot be read, or two images have one name.
        ConfigError: A point, a layer or another model does not fit, or the folder cannot be
            written to.
        RatioError: A ratio cannot be parsed, or the model has nothing to reduce.
    """
    out = Path(out)
    ratios = list(dict.fromkeys(map(ISRRatio.parse, isr_ratio)))
    files = name_targets([file for source in images for file in find_images(source)])
    chosen = choose_layers(segmenter.model, layers)
    for title, other in others:
        if other.classes != segmenter.classes:
            raise ConfigError(f'{title} predicts {len(other.classes)} classes that are not the '
                              f'{len(segmenter.classes)} of {segmenter.source}: to be shown side '
                              'by side they must be the same')
    if labels is not None and len(files) > 1 and not Path(labels).is_dir():
        raise ConfigError(f'labels {labels}: for several images, give the folder of their masks')
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    written = []
    before = segmenter.isr_ratio
    try:
        for path, name in files.items():
            segmenter.isr_ratio = ratios[0]
            subject = find_subject(segmenter, path, points)
            truth = None if labels is None else read_labels(
                Path(labels), path, subject.image.shape[:2], len(segmenter.classes),
                reduce_zero_label)
            shots, reasons = _observe(segmenter, subject, ratios, chosen)
            not_drawn = [f'not drawn: {layer}: {reason}' for layer, reason in reasons.items()]
            if layers and not_drawn:
                raise ConfigError('; '.join(not_drawn))
            beside = [_predict(other, path, title) for title, other in others]
            sources = '. '.join(f'{title}: {one.source}' for title, one in (
                ('ISR', segmenter), *others))
            texts = {layer: text for layer, text in chosen.items() if layer not in reasons}
            drawn = dict(attention=sheets.draw_attention(subject, shots, texts),
                         features=sheets.draw_features(subject, shots, texts)) if texts else {}
            drawn['predictions'] = sheets.draw_predictions(subject, shots, beside, truth, sources)
            say('\n'.join([_tables(subject, shots, beside, texts), *not_drawn]))
            for kind, sheet in drawn.items():
                written.append(out / f'{name}_{kind}.png')
                with writing(out), replacing(written[-1]) as partial:
                    sheet.save(partial)
    finally:
        segmenter.isr_ratio = before
    say('Written: ' + ', '.join(map(shown, written)))
    return written


def find_subject(segmenter: Segmenter, path: Path, points: Sequence[str]) -> sheets.Subject:
    """Load an image, with the given points, or those that its prediction suggests."""
    image, inputs, (rows, columns) = _load(segmenter, path)
    height, width = image.shape[:2]
    labels = segmenter(path).labels
    chosen = [parse_point(point, (height, width), path) for point in points] or (
        choose_points(labels))
    names = [f'point {i} at {x},{y}: {segmenter.classes[labels[y, x]]}'
             for i, (x, y) in enumerate(chosen, 1)]
    return sheets.Subject(path, image, inputs, chosen, names, (rows / height, columns / width))


def parse_point(text: str, size: Grid, path: Path | str = 'the image') -> tuple[int, int]:
    """Return column and row of a pixel, from ``120,80`` or from fractions, ``0.5,0.3``.

    Numbers with a decimal point are fractions of width and height; 1.0 is the last pixel.

    Raises:
        ConfigError: The text is no point, or the point lies outside of the image.
    """
    try:
        x, y = (math.floor(float(word) * side) - (float(word) == 1) if '.' in word else int(word)
                for word, side in zip(text.split(','), size[::-1], strict=True))
    except (ValueError, OverflowError):
        raise ConfigError(f"cannot parse point '{text}': give column and row in pixels, 120,80, "
                          'or fractions of width and height, 0.5,0.3') from None
    if not (0 <= x < size[1] and 0 <= y < size[0]):
        raise ConfigError(f'point {text} lies outside of {path}, which has columns 0 to '
                          f'{size[1] - 1} and rows 0 to {size[0] - 1}')
    return x, y


def choose_points(labels: np.ndarray, count: int = 3) -> list[tuple[int, int]]:
    """Return the innermost points, column and row, of the largest classes of a label map."""
    shares = np.bincount(labels.ravel())
    points = []
    for label in np.argsort(-shares, kind='stable')[:count]:
        region = np.pad((labels == label).astype(np.uint8), 1)
        depth = cv2.distanceTransform(region, cv2.DIST_L2, 5)[1:-1, 1:-1]
        y, x = divmod(int(depth.argmax()), depth.shape[1])
        if shares[label]:
            points.append((x, y))
    return points


def _load(segmenter: Segmenter, path: Path) -> tuple[np.ndarray, Tensor, Grid]:
    """Return an image (BGR), the network's inputs, and their size without padding."""
    image, data = segmenter.load(path)
    model: Any = segmenter.model
    batch = model.data_preprocessor(
        dict(inputs=[data['inputs']], data_samples=[data['data_samples']]), False)
    return image, batch['inputs'], data['inputs'].shape[1:]


def _observe(segmenter: Segmenter, subject: sheets.Subject, ratios: Sequence[ISRRatio],
             layers: Iterable[str]) -> tuple[list[sheets.Shot], dict[str, str]]:
    """Return the image at each ratio, and the reasons why layers cannot be drawn."""
    shots = []
    reasons: dict[str, str] = {}
    points = [subject.to_inputs(point) for point in subject.points]
    for ratio in ratios:
        segmenter.isr_ratio = ratio
        seen, why = look(segmenter.model, subject.inputs, layers, points)
        shots.append(_predict(segmenter, subject.path, f'ISR {ratio!s}', seen))
        reasons |= why
    return shots, reasons


def _predict(segmenter: Segmenter, path: Path, title: str,
             seen: dict[str, Attended] | None = None) -> sheets.Shot:
    height, width = _load(segmenter, path)[1].shape[2:]
    gmacs = count_windows(segmenter.model, (height, width)) / 1e9
    return sheets.Shot(title, segmenter(path), gmacs, seen or {})


def _tables(subject: sheets.Subject, shots: Sequence[sheets.Shot],
            others: Sequence[sheets.Shot], layers: Collection[str]) -> str:
    first = shots[0]
    table = PrettyTable([subject.path.name, 'GMACs', 'other labels'], align='r')
    table.align[subject.path.name] = 'l'
    for shot in (*shots, *others):
        table.add_row([shot.title, f'{shot.gmacs:.2f}',
                       '' if shot is first else f'{shot.changed(first):.1%}'])
    lines = [*subject.names, str(table)]
    if layers:
        table = PrettyTable(['layer', *(shot.title for shot in shots)], align='r')
        table.align['layer'] = 'l'
        for name in layers:
            before, *others_seen = (shot.seen[name] for shot in shots)
            table.add_row([name, f'{before.keys} keys', *(
                f'{after.keys} keys, {sheets.relative_error(after.features, before.features):.1%}'
                for after in others_seen)])
        if len(shots) > 1:
            lines.append(f'Percentages: how far the output features are from {first.title}')
        lines.append(str(table))
    return '\n'.join(lines)
