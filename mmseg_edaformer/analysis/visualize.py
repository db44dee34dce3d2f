"""Pictures of what a network does: attention, its features and labels at several ISR ratios."""
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmseg.registry import TRANSFORMS
from prettytable import PrettyTable
from torch import Tensor

from ..errors import ConfigError, DataError, shown
from ..files import replacing
from ..isr import ISRRatio
from ..isr.pooling import Grid
from ..predict.inputs import find_images, name_targets
from ..predict.outputs import writing
from ..predict.segmenter import Segmenter
from .attention import Attended, choose_layers, layer_names, look
from .loading import count_windows, ratio_name
from .sheets import (
    Shot,
    Subject,
    draw_attention,
    draw_features,
    draw_predictions,
    relative_error,
)

_POINTS = 3


def visualize(segmenter: Segmenter, pictures: Sequence[str | Path], out: str | Path, *,
              ratios: Sequence[ISRRatio | int | str] = ('none', 'optimal'),
              others: Sequence[tuple[str, Segmenter]] = (), points: Sequence[str] = (),
              layers: Sequence[str] = (), labels: str | Path | None = None,
              reduce_zero_label: bool = False, say: Callable[[str], None] = print) -> list[Path]:
    """Draw sheets of what ISR does to pictures: attention, features and predictions.

    Args:
        segmenter: The model.
        pictures: Files, folders and patterns, see `find_images`.
        out: A folder, which gets ``NAME_attention.png``, ``NAME_features.png`` and
            ``NAME_predictions.png`` for each picture.
        ratios: What to compare; the first is what the others are compared with.
        others: Names of other models and the models, whose predictions are put beside.
        points: Of the queries, see `parse_point`; by default in the largest classes.
        layers: See `choose_layers`.
        labels: The mask of a single picture, or a folder of masks called as the pictures are:
            class indices, 255 where there is no label.
        reduce_zero_label: Whether in them 0 means no label and 1 the first class.
        say: Gets a text for each picture.

    Returns:
        The files that were written.

    Raises:
        DataError: A picture or a mask cannot be read, or two pictures have one name.
        ConfigError: A point, a layer or another model does not fit, or the folder cannot be
            written to.
        RatioError: A ratio means nothing, or there is nothing to reduce.
    """
    out = Path(out)
    wanted = list(dict.fromkeys(map(ISRRatio.parse, ratios)))
    files = name_targets([each for source in pictures for each in find_images(source)])
    named = choose_layers(segmenter.model, layers)
    for title, other in others:
        if other.classes != segmenter.classes:
            raise ConfigError(f'{title} predicts {len(other.classes)} classes that are not the '
                              f'{len(segmenter.classes)} of {segmenter.source}: side by side they '
                              'must be the same')
    if labels is not None and len(files) > 1 and not Path(labels).is_dir():
        raise ConfigError(f'labels {labels}: of several pictures, give the folder of their masks')
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    written = []
    for path, name in files.items():
        subject = _subject(segmenter, path, points, wanted[0])
        truth = None if labels is None else _read_labels(
            Path(labels), path, subject.picture.shape[:2], len(segmenter.classes),
            reduce_zero_label)
        shots, reasons = _take(segmenter, subject, wanted, named, bool(layers))
        beside = [_predict(other, path, title) for title, other in others]
        sources = f'ISR: {segmenter.source}' + ''.join(
            f'. {title}: {other.source}' for title, other in others)
        sheets = dict(predictions=draw_predictions(subject, shots, beside, truth, sources))
        if shots[0].seen:
            texts = {layer: text for layer, text in layer_names(segmenter.model).items()
                     if layer in shots[0].seen}
            sheets = dict(attention=draw_attention(subject, shots, texts),
                          features=draw_features(subject, shots, texts)) | sheets
        say(_tables(subject, shots, beside))
        for reason in reasons.items():
            say('not drawn: {}: {}'.format(*reason))
        for kind, sheet in sheets.items():
            written.append(out / f'{name}_{kind}.png')
            with writing(out), replacing(written[-1]) as partial:
                sheet.save(partial)
    say('Written: ' + ', '.join(map(shown, written)))
    return written


def _subject(segmenter: Segmenter, path: Path, points: Sequence[str], ratio: ISRRatio) -> Subject:
    """A picture with the points that are given, or chosen by what is predicted at a ratio."""
    picture, inputs, sides = _network_inputs(segmenter, path)
    height, width = picture.shape[:2]
    with _ratio(segmenter, ratio):
        labels = segmenter(path).labels
    chosen = [parse_point(point, (height, width), path) for point in points] or (
        choose_points(labels))
    names = [f'point {i} at {x},{y}: {segmenter.classes[labels[y, x]]}'
             for i, (x, y) in enumerate(chosen, 1)]
    return Subject(path, picture, inputs, chosen, names, (sides[0] / height, sides[1] / width))


def parse_point(text: str, size: Grid, path: Path | str = 'the picture') -> tuple[int, int]:
    """A pixel, column and row, from ``120,80``, or from fractions of width and height, ``0.5,0.3``.

    Numbers with a decimal point are fractions.

    Args:
        text: The point.
        size: Height and width of the picture.
        path: What to call it.

    Raises:
        ConfigError: It is no point, or outside.
    """
    words = text.split(',')
    try:
        found = [float(word) * side if '.' in word else int(word)
                 for word, side in zip(words, size[::-1])]
    except ValueError:
        found = []
    if len(words) != 2 or len(found) != 2 or not all(map(math.isfinite, found)):
        raise ConfigError(f"point '{text}' is none: give column and row in pixels, 120,80, or as "
                          'fractions of width and height, 0.5,0.3')
    # The far edge, 1.0, is the last pixel.
    x, y = (side - 1 if '.' in word and at == side else math.floor(at)
            for word, at, side in zip(words, found, size[::-1]))
    if not (0 <= x < size[1] and 0 <= y < size[0]):
        raise ConfigError(f'point {text} lies outside of {path}, which has columns 0 to '
                          f'{size[1] - 1} and rows 0 to {size[0] - 1}')
    return x, y


def choose_points(labels: np.ndarray, count: int = _POINTS) -> list[tuple[int, int]]:
    """Points of a label map, column and row: the innermost of the largest classes.

    Where there are too few classes, those farthest from the others and from the border.
    """
    shares = np.bincount(labels.ravel())
    classes = [int(label) for label in np.argsort(-shares, kind='stable') if shares[label]]
    points: list[tuple[int, int]] = []
    for i in range(count):
        inside = labels == classes[i] if i < len(classes) else np.ones(labels.shape, bool)
        region = np.pad(inside.astype(np.uint8), 1)
        if i >= len(classes):
            for x, y in points:
                region[y + 1, x + 1] = 0
        depth = cv2.distanceTransform(region, cv2.DIST_L2, 5)[1:-1, 1:-1]
        y, x = divmod(int(depth.argmax()), depth.shape[1])
        points.append((x, y))
    return points


def _network_inputs(segmenter: Segmenter, path: Path) -> tuple[np.ndarray, Tensor, Grid]:
    """A picture, BGR; what the network sees of it; and its size there, without padding."""
    picture, data = segmenter.load(path)
    model: Any = segmenter.model
    batch = model.data_preprocessor(
        dict(inputs=[data['inputs']], data_samples=[data['data_samples']]), False)
    height, width = data['inputs'].shape[1:]
    return picture, batch['inputs'], (height, width)


def _take(segmenter: Segmenter, subject: Subject, ratios: Sequence[ISRRatio],
          layers: Sequence[str], strict: bool) -> tuple[list[Shot], dict[str, str]]:
    """The picture at each ratio; and why, of layers that cannot be drawn."""
    shots = []
    reasons: dict[str, str] = {}
    at = [subject.to_inputs(point) for point in subject.points]
    for ratio in ratios:
        with _ratio(segmenter, ratio):
            seen, why = look(segmenter.model, subject.inputs, layers, at)
            shots.append(_predict(segmenter, subject.path, f'ISR {ratio_name(ratio)}', seen))
        reasons |= why
    if strict and reasons:
        raise ConfigError('this attention cannot be drawn: ' + '; '.join(
            f'{name}: {why}' for name, why in reasons.items()))
    for shot in shots:
        for name in reasons:
            shot.seen.pop(name, None)
    return shots, reasons


def _predict(segmenter: Segmenter, path: Path, title: str,
             seen: dict[str, Attended] | None = None) -> Shot:
    """A picture at the ratio that a segmenter is set to."""
    height, width = _network_inputs(segmenter, path)[1].shape[2:]
    gmacs = count_windows(segmenter.model, (height, width)) / 1e9
    return Shot(title, segmenter(path), gmacs, seen or {})


def _read_labels(labels: Path, path: Path, size: Grid, classes: int,
                 reduce_zero_label: bool) -> np.ndarray:
    """The labels of a picture, H x W.

    Raises:
        DataError: There are none, or they do not fit.
    """
    mask = labels
    if labels.is_dir():
        found = sorted(labels.glob(f'{path.stem}.*'))
        if len(found) != 1:
            raise DataError(f'{labels} holds {len(found)} masks called {path.stem}.*, not one')
        mask = found[0]
    step = TRANSFORMS.build(dict(type='LoadSegLabels', num_classes=classes))
    results = step(dict(img_path=str(path), seg_map_path=str(mask), ori_shape=size, seg_fields=[],
                        reduce_zero_label=reduce_zero_label))
    read: np.ndarray = results['gt_seg_map']
    return read


@contextmanager
def _ratio(segmenter: Segmenter, ratio: ISRRatio) -> Iterator[None]:
    """Set a segmenter to a ratio within the block."""
    before = segmenter.isr_ratio
    segmenter.isr_ratio = ratio
    try:
        yield
    finally:
        segmenter.isr_ratio = before


def _tables(subject: Subject, shots: Sequence[Shot], beside: Sequence[Shot]) -> str:
    """The figures of the sheets for a terminal."""
    first = shots[0]
    table = PrettyTable([f'{subject.path.name}', 'GMACs', 'other labels'], align='r')
    table.align[subject.path.name] = 'l'
    for shot in (*shots, *beside):
        table.add_row([shot.title, f'{shot.gmacs:.2f}',
                       '' if shot is first else f'{shot.changed(first):.1%}'])
    lines = [*subject.names, str(table)]
    if first.seen:
        table = PrettyTable(['layer', *(shot.title for shot in shots)], align='r')
        table.align['layer'] = 'l'
        for name, before in first.seen.items():
            table.add_row([name, f'{before.keys} keys', *(
                f'{after.keys} keys, {relative_error(after.features, before.features):.1%}'
                for after in (shot.seen[name] for shot in shots[1:]))])
        if len(shots) > 1:
            lines.append(f'In percent: how far the output features are from {first.title}')
        lines.append(str(table))
    return '\n'.join(lines)
