"""A small drawn classification set in ImageNet's layout, for first trainings and for tests."""
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..data.drawing import CLASSES as KINDS, draw_once, draw_scene
from ..errors import DataError

CROPS: tuple[str, ...] = ('bird', 'car', 'horizon', 'house', 'lamp', 'meadow', 'road', 'roadside',
                          'sky', 'tree')

# The least and the greatest share of a window.
_STUFF: dict[str, dict[str, tuple[float, float]]] = {
    'sky': {'sky': (0.97, 1)}, 'meadow': {'meadow': (0.95, 1)}, 'road': {'road': (0.85, 1)},
    'horizon': {'sky': (0.3, 0.7), 'meadow': (0.3, 0.7)},
    'roadside': {'road': (0.3, 0.7), 'meadow': (0.3, 0.7)}}
# The least height or width of an object, and how much of a window other objects may cover.
_OBJECTS = {'bird': (10, 0.05), 'car': (24, 0.2), 'house': (32, 0.2), 'lamp': (32, 0.2),
            'tree': (32, 0.2)}
_SCENE = (256, 352)
_SIZE = 64  # height and width of an image
_REVISION = 1  # raise it when the images change
_NAMES = re.compile(rf'crops\.json|(train|val)/(({"|".join(CROPS)})/(\d{{5,}}\.png)?)?')


def draw_crops(root: str | Path, *, train: int = 80, val: int = 20, seed: int = 0) -> Path:
    """Draw ten classes in ImageNet's layout, unless they are there already.

    The images are windows of drawn scenes: five kinds of objects, and five of ground and sky. Each
    image depends on the seed, its split, class and number alone.

    Args:
        root: Folder of the data set; it is made if missing, and may hold nothing else.
        train: Number of training images of each class.
        val: Number of validation images of each class.
        seed: Seed of the drawing.

    Raises:
        DataError: A number is too small, or see `draw_once`.
    """
    if min(train, val) < 1 or seed < 0:
        raise DataError(f'train={train}, val={val}, seed={seed}: ask for at least one image of '
                        'each class and a seed of 0 or more')

    def draw(root: Path) -> None:
        for split, (name, count) in enumerate((('train', train), ('val', val))):
            for label, kind in enumerate(CROPS):
                folder = root / name / kind
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    rng = np.random.default_rng((seed, split, label, number))
                    Image.fromarray(draw_crop(rng, kind)).save(
                        folder / f'{number:05d}.png', compress_level=1)

    return draw_once(Path(root), 'crops.json', dict(
        train=train, val=val, size=_SIZE, seed=seed, revision=_REVISION), _NAMES, draw)


def draw_crop(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Draw one image of a class of `CROPS`, 64 x 64 x 3 in RGB."""
    while True:
        image, label = draw_scene(rng, _SCENE)
        window = _stuff(rng, label, kind) if kind in _STUFF else _object(rng, label, kind)
        if window is not None:
            crop = image[window]
            filter_ = cv2.INTER_AREA if crop.shape[0] > _SIZE else cv2.INTER_LINEAR
            return cv2.resize(crop, (_SIZE, _SIZE), interpolation=filter_)


def _stuff(rng: np.random.Generator, label: np.ndarray, kind: str) -> tuple[slice, slice] | None:
    """Return a window with the class's shares of ground and sky, if chance finds one."""
    for _ in range(60):
        side = int(rng.integers(48, 129))
        window = _square(rng.uniform(0, label.shape[0]), rng.uniform(0, label.shape[1]), side,
                         label.shape)
        shares = _shares(label[window])
        ranges = _STUFF[kind]
        if all(low <= shares[name] <= high for name, (low, high) in ranges.items()) and (
                sum(shares[name] for name in ranges) > 0.9):
            return window
    return None


def _object(rng: np.random.Generator, label: np.ndarray, kind: str) -> tuple[slice, slice] | None:
    """Return a window around one object that others leave visible, if there is one."""
    least, others = _OBJECTS[kind]
    mask = (label == KINDS.index(kind)).astype(np.uint8)
    _, _, boxes, _ = cv2.connectedComponentsWithStats(mask)
    for left, top, width, height, _ in rng.permutation(boxes[1:]):
        extent = max(width, height)
        side = round(max(extent * rng.uniform(1.1, 1.6), 24))
        if extent < least or side > min(label.shape):
            continue
        y, x = (rng.uniform(-0.1, 0.1, 2) * side) + (top + height / 2, left + width / 2)
        window = _square(y, x, side, label.shape)
        shares = _shares(label[window])
        if sum(shares[name] for name in _OBJECTS if name != kind) <= others:
            return window
    return None


def _square(y: float, x: float, side: int, shape: Sequence[int]) -> tuple[slice, slice]:
    """Return the square around a point, moved into the image."""
    top, left = (int(np.clip(round(middle - side / 2), 0, whole - side))
                 for middle, whole in zip((y, x), shape))
    return slice(top, top + side), slice(left, left + side)


def _shares(label: np.ndarray) -> dict[str, float]:
    shares = np.bincount(label.ravel(), minlength=len(KINDS)) / label.size
    return dict(zip(KINDS, shares))
