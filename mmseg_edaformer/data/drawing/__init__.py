"""A small data set of drawn outdoor scenes, for first trainings and for tests.

Every scene is drawn from random numbers alone: nothing is downloaded. The eight classes range from
a third of the image (sky, meadow) down to a few pixels (lamp, bird), and light, season, haze and
paint vary so much that colour alone does not give a class away.
"""
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ...errors import DataError
from ...files import write_file
from .canvas import BIRD, CLASSES, LAMP, PALETTE, ROAD, Scene, pick
from .ground import Place, draw_ground, draw_hills, plan_road
from .objects import draw_birds, draw_car, draw_house, draw_lamp, draw_tree

__all__ = ['BIRD', 'CLASSES', 'LAMP', 'PALETTE', 'draw_dataset', 'draw_once', 'draw_scene']

_POSTS = ((58, 62, 70), (150, 154, 158), (56, 84, 74), (214, 210, 200))
# Raise it when the images change, so that folders drawn before are drawn again.
_REVISION = 1
_NAMES = re.compile(r'synthetic\.json|(images|annotations)/((training|validation)/(\d{5,}\.png)?)?')


def _place_objects(scene: Scene, place: Place, leading_away: bool) -> list[tuple]:
    """Choose what stands where: (row, column, half width in metres, function, its arguments)."""
    rng = scene.rng
    things: list[tuple] = []

    def add(draw: Callable, half: float, gap: float, x: float, y: float, *rest) -> None:
        apart = gap * scene.metre(y)
        alike = ((x - thing[1], 3 * (y - thing[0])) for thing in things if thing[3] is draw)
        if all(math.hypot(*offset) > apart for offset in alike):
            things.append((y, x, half, draw, rest))

    for draw, half, gap, count, low, high in (
        (draw_house, 6, 11, rng.integers(1, 7), 0.1, 0.45),
        (draw_tree, 2.2, 1, rng.integers(5, 35), 0.02, 0.09),
        (draw_tree, 2.2, 1, rng.integers(4, 14), 0.1, 0.5),
        (draw_tree, 2.2, 1, rng.integers(0, 3), 0.5, 0.95),
    ):
        for right, depth in rng.uniform((0, low), (1, high), (scene.many(int(count)), 2)).tolist():
            x, y = right * scene.width, scene.horizon + depth * scene.ground
            reach = half * scene.metre(y)
            if ROAD not in scene.label[int(y), max(int(x - reach), 0) : int(x + reach) + 1]:
                add(draw, half, gap, x, y)
    cars = int(rng.integers(0, 6) / scene.scale)  # they stand along a line
    ways = rng.uniform(0.12 * leading_away, 1 - 0.3 * leading_away, cars)
    for spot in place(ways, rng.choice((-0.5, 0.5), ways.size)):
        add(draw_car, 1.3 if leading_away else 2.5, 5, *spot, leading_away)
    if rng.random() < 0.75:
        style, paint = int(rng.integers(3)), pick(rng, _POSTS)
        posts = rng.uniform(0.16, 0.4) * scene.scale * (
            rng.random() + np.arange(round(6 / scene.scale)))
        side = rng.choice((-1.2, 1.2))
        for spot in place(0.8 / (1 + 3 * posts) if leading_away else posts, side):
            add(draw_lamp, 0.4, 1, *spot, style, paint)
    return sorted(things, key=lambda thing: thing[0])


def draw_scene(rng: np.random.Generator, size: tuple[int, int],
               scale: float = 1.) -> tuple[np.ndarray, np.ndarray]:
    """Draw one outdoor scene and its label.

    Args:
        rng: Source of everything that varies; the same state draws the same scene.
        size: Height and width in pixels, each at least 32. Objects scale with it.
        scale: Size of the objects relative to those of an ordinary scene of this size: with 0.25 a
            scene of 1024x1024 is a larger world, whose objects are as large as at 256x256.

    Returns:
        The image, (H, W, 3) in RGB, and the label, (H, W) with indices into `CLASSES`.

    Raises:
        DataError: The size is not two numbers of at least 32.
    """
    _check_size(size)
    height, width = size
    # Twice as large, so that edges come out smooth; the label takes every second pixel.
    scene = Scene(rng, 2 * height, 2 * width, scale)
    draw_hills(scene)
    place, stations, leading_away = plan_road(scene)
    draw_ground(scene, place, stations)
    things = _place_objects(scene, place, leading_away)
    shade = np.full(size, 255, np.uint8)
    for y, x, half, *_ in things:
        reach = half * scene.metre(y) / 2
        middle, axes = (x / 2 - scene.side * reach * 0.6, y / 2), (reach * 2.8, reach * 0.44 + 1)
        cv2.ellipse(shade, (middle, axes, 0), 145, -1)
    soft = cv2.GaussianBlur(shade, (0, 0), 0.5 + height * scale / 300)
    soft = cv2.resize(soft, (2 * width, 2 * height))
    cv2.multiply(scene.image, cv2.cvtColor(soft, cv2.COLOR_GRAY2RGB), scene.image, 1 / 255)
    for y, x, _, draw, rest in things:
        draw(scene, x, y, *rest)
    for _ in range(scene.many(rng.random() < 0.55)):
        draw_birds(scene)
    image = cv2.resize(scene.image, (width, height), interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.6))
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(0.8, 2.8)
    return np.clip(image + noise, 0, 255).astype(np.uint8), scene.label[::2, ::2].copy()


def draw_dataset(root: str | Path, *, train: int = 400, val: int = 80,
                 size: tuple[int, int] = (192, 256), seed: int = 0,
                 scale: float = 1.) -> Path:
    """Draw a data set into a folder laid out like ADE20K, unless it is there already.

    Each image depends on seed, split and number alone, so a larger data set begins with the images
    of a smaller one.

    Args:
        root: Folder of the data set; it is made if missing, and may hold nothing else.
        train: Number of training images.
        val: Number of validation images.
        size: Height and width of each image in pixels, each at least 32.
        seed: Seed of the drawing.
        scale: See `draw_scene`.

    Returns:
        The folder.

    Raises:
        DataError: A number is too small, or see `draw_once`.
    """
    if min(train, val) < 1 or seed < 0:
        raise DataError(f'train={train}, val={val}, seed={seed}: ask for at least one image of '
                        'each and a seed of 0 or more')
    _check_size(size)

    def draw(root: Path) -> None:
        for split, (name, count) in enumerate((('training', train), ('validation', val))):
            folders = [root / kind / name for kind in ('images', 'annotations')]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                drawn = draw_scene(np.random.default_rng((seed, split, index)), size, scale)
                for folder, pixels in zip(folders, drawn):
                    Image.fromarray(pixels).save(folder / f'{index:05d}.png', compress_level=1)

    asked = dict(train=train, val=val, size=list(size), seed=seed, revision=_REVISION,
                 **(dict(scale=scale) if scale != 1 else {}))
    return draw_once(Path(root), 'synthetic.json', asked, _NAMES, draw)


def draw_once(root: Path, marker: str, asked: dict[str, Any], names: re.Pattern[str],
              draw: Callable[[Path], None]) -> Path:
    """Draw into a folder, unless its marker says that the same was drawn there.

    Args:
        root: The folder, which is returned; what was drawn there from other settings is removed.
        marker: Name of the file that records the settings; it is written last.
        asked: The settings.
        names: Paths that the drawing writes, below the root; those of folders end in a slash.
        draw: Writes all but the marker.

    Raises:
        DataError: The folder holds another file; it is left as it is.
    """
    record = json.dumps(asked, indent=2) + '\n'
    path = root / marker
    if path.is_file() and path.read_text(encoding='utf-8') == record:
        return root
    if root.exists() and not root.is_dir():
        raise DataError(f'{root} is a file: choose a folder')
    own: list[Path] = []
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder).relative_to(root)
        inside = [(here / name).as_posix() for name in files]
        inside += [f'{(here / name).as_posix()}/' for name in folders]
        foreign = sorted(name for name in inside if not names.fullmatch(name))
        if foreign:
            raise DataError(
                f'{root} holds {", ".join(foreign[:3])}{", ..." if foreign[3:] else ""}, which '
                'does not belong to what is drawn: choose a new folder, or move these files away')
        own += [Path(folder) / name for name in files]
    # The marker comes first, so that an interruption from here on is seen by the next run.
    for old in own:
        old.unlink()
    draw(root)
    write_file(path, record)
    return root


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 32:
        raise DataError(f'size={size}: give a height and a width of at least 32 pixels')
