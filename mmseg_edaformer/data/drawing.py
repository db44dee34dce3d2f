"""A small data set of drawn outdoor scenes, for first trainings and for tests.

Every scene is drawn from random numbers alone: nothing is downloaded. The eight classes range from
a third of the picture (sky, meadow) down to a few pixels (lamp, bird), and light, season, haze and
paint vary so much that colour alone does not give a class away.
"""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from ..errors import DataError

CLASSES: tuple[str, ...] = ('sky', 'meadow', 'road', 'house', 'tree', 'car', 'lamp', 'bird')
PALETTE: list[list[int]] = [
    [108, 180, 238], [168, 208, 92], [128, 112, 140], [238, 128, 88],
    [30, 128, 96], [222, 52, 100], [255, 214, 64], [72, 44, 160],
]  # fmt: skip
MEADOW, ROAD, HOUSE, TREE, CAR, LAMP, BIRD = range(1, len(CLASSES))

# Raise it when the pictures change, so that folders drawn before are drawn again.
_REVISION = 1
_NAMES = re.compile(r'synthetic\.json|(images|annotations)/((training|validation)/(\d{5,}\.png)?)?')

# How often, sky at the zenith and at the horizon, light on everything below, haze, night.
_LIGHTS = (
    (0.36, (78, 148, 222), (206, 230, 242), (1.00, 1.00, 0.98), 0.5, False),
    (0.16, (116, 168, 218), (255, 222, 190), (1.02, 0.93, 0.84), 0.6, False),
    (0.14, (94, 124, 186), (255, 194, 112), (1.08, 0.84, 0.62), 0.6, False),
    (0.12, (166, 178, 188), (216, 222, 224), (0.82, 0.86, 0.88), 0.8, False),
    (0.11, (70, 62, 122), (246, 146, 118), (0.76, 0.58, 0.66), 0.6, True),
    (0.11, (12, 20, 50), (56, 76, 126), (0.40, 0.48, 0.68), 0.5, True),
)
# Two colours of grass, and the leaves that go with them; the last season has snow.
_SEASONS = (
    (((120, 178, 72), (168, 196, 88)), ((116, 180, 70), (240, 172, 196), (156, 202, 110))),
    (((92, 146, 62), (142, 168, 78)), ((58, 120, 56), (88, 144, 60), (46, 102, 74))),
    (((206, 184, 112), (172, 160, 88)), ((98, 128, 62), (146, 152, 80), (70, 110, 70))),
    (((166, 152, 84), (128, 138, 70)), ((216, 122, 44), (190, 68, 46), (228, 180, 60))),
    (((234, 240, 248), (204, 218, 236)), ((66, 92, 84), (196, 210, 222), (124, 104, 92))),
)
_PAINTS = np.array((
    (240, 232, 216), (232, 204, 140), (198, 82, 66), (104, 144, 178), (238, 178, 84),
    (148, 186, 158), (222, 150, 140), (122, 92, 78), (92, 104, 118), (214, 222, 228),
))  # fmt: skip
_ROOFS = ((188, 84, 58), (146, 62, 52), (92, 98, 112), (118, 86, 66), (70, 92, 88))
_ASPHALTS = ((104, 106, 114), (136, 132, 132), (84, 86, 98))
_DIRTS = ((186, 150, 108), (164, 124, 88), (206, 186, 152))
_POSTS = ((58, 62, 70), (150, 154, 158), (56, 84, 74), (214, 210, 200))
_SNOW = np.array((240, 244, 250))

# From ways along the road, 0..1, and across it, -1..1 from edge to edge, to (x, y) in pixels.
_Place = Callable[[np.ndarray, np.ndarray | float], np.ndarray]


class _Scene:
    """A canvas of image and label, with the light and the perspective that all objects share."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, scale: float) -> None:
        self.rng, self.height, self.width, self.scale = rng, height, width, scale
        self.label = np.zeros((height, width), np.uint8)
        self.horizon = height * rng.uniform(0.34, 0.5)
        self.ground = height - self.horizon
        self.camera = rng.uniform(3.6, 6.5) / scale
        self.sun = rng.uniform(0.05, 0.95)
        self.side = 1 if self.sun > 0.5 else -1
        odds = [light[0] for light in _LIGHTS]
        _, zenith, low, light, haze, self.night = _LIGHTS[rng.choice(len(_LIGHTS), p=odds)]
        self.zenith, self.low = _vary(rng, zenith), _vary(rng, low)
        self.light = np.array(light) * rng.uniform(0.88, 1.08) * rng.normal(1, 0.03, 3)
        self.haze = haze * rng.uniform(0.5, 1)
        season = rng.integers(len(_SEASONS))
        self.grass, self.leaves = _SEASONS[season]
        self.snow = season == len(_SEASONS) - 1
        self.image = self._sky()

    def metre(self, y: float | np.ndarray) -> np.ndarray:
        """Pixels per metre for what stands on the ground at row `y`."""
        return np.maximum(y - self.horizon, 1) / self.camera * min(1, self.width / self.height)

    def many(self, count: int) -> int:
        """How many small objects stand as densely as ``count`` that fill the image."""
        return int(count / self.scale ** 2)

    def tint(self, y: float) -> tuple[np.ndarray, np.ndarray]:
        """What light and haze at row `y` do to a colour: by what to multiply it, what to add."""
        fog = self.haze * math.exp(-6 * (y - self.horizon) / self.ground)
        return self.light * (1 - fog), self.low * fog

    def tone(self, colours: ArrayLike) -> np.ndarray:
        """Colours as they look close by."""
        gain, veil = self.tint(self.height)
        return np.minimum(colours * gain + veil, 255)

    def fill(self, points: ArrayLike, colour: np.ndarray, label: int) -> None:
        """Fill a polygon of (x, y) pixels in the image and in the label alike."""
        corners = _corners(points)
        cv2.fillPoly(self.image, corners, colour.tolist(), shift=4)
        cv2.fillPoly(self.label, corners, label, shift=4)

    def _sky(self) -> np.ndarray:
        # At half the size: a sky has no edges that would need the other half.
        rng, height, width = self.rng, self.height // 2, self.width // 2
        horizon = self.horizon / 2
        ramp = np.clip(np.arange(height) / horizon, 0, 1)[:, None, None] ** 1.2
        sky = np.repeat(self.zenith + (self.low - self.zenith) * ramp, width, 1).astype(np.uint8)
        if self.night:
            sky[tuple(rng.integers((int(horizon), width), size=(50, 2)).T)] = (240, 236, 214)
        x, y = self.sun * width, horizon * rng.uniform(0.1, 0.8)
        radius = horizon * rng.uniform(0.07, 0.13) * self.scale
        orb = self.low * 0.3 + (178, 172, 150)
        if self.haze < 0.6:
            _glow(sky, x, y, radius * 5, orb)
            cv2.circle(sky, (int(x), int(y)), int(radius), orb.tolist(), -1)
        cover = np.zeros((height, width), np.float32)
        for _ in range(self.many(int(rng.integers(0, 6)))):
            size = rng.uniform(0.03, 0.09) * min(height, width) * self.scale
            x, y = rng.uniform(0, width), rng.uniform(0, 0.9) * horizon
            for shift in rng.uniform(-3, 3, 9):
                puff = (1.6 - abs(shift) / 3) * size
                cv2.circle(cover, (int(x + shift * size), int(y - puff / 2)), int(puff), 1, -1)
            cover[int(y) + 1 : int(y + 3 * size)] *= 0.6
        cloud = np.minimum(self.low * 0.5 + 128 * self.light, 255).astype(np.float32)
        soft = cv2.GaussianBlur(cover, (0, 0), 1 + width * self.scale / 100)[..., None]
        sky = (sky + (cloud - sky) * soft * np.float32(rng.uniform(0.5, 0.95))).astype(np.uint8)
        return cv2.resize(sky, (self.width, self.height))


class _Pen:
    """Draws an object in metres from its foot, into the same pixels of image and label."""

    def __init__(self, scene: _Scene, label: int, x: float, y: float, flip: int = 1) -> None:
        self.scene, self.label, self.foot, self.flip = scene, label, (x, y), flip
        self.scale = float(scene.metre(y))
        self.gain, self.veil = scene.tint(y)

    def spot(self, points: ArrayLike) -> np.ndarray:
        """Turn metres into pixels."""
        return np.multiply(points, (self.flip * self.scale, -self.scale)) + self.foot

    def tone(self, colours: ArrayLike) -> np.ndarray:
        """Colours as they look at the distance of the object."""
        return np.minimum(colours * self.gain + self.veil, 255)

    def shape(self, points: ArrayLike, colour: ArrayLike, shines: bool = False) -> None:
        """Fill a polygon; what shines is seen in its own colour whatever the light."""
        ink = np.asarray(colour) if shines else self.tone(colour)
        self.scene.fill([self.spot(points)], ink, self.label)

    def box(self, x: float, y: float, w: float, h: float, colour: ArrayLike, shines=False) -> None:
        self.shape([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], colour, shines)

    def line(self, points: ArrayLike, width: float, colour: ArrayLike) -> None:
        spots = [np.rint(self.spot(points)).astype(np.int32)]
        # Two pixels are the least that the label, at half the size, cannot miss.
        wide = max(round(width * self.scale), 2 if self.label == LAMP else 1)
        ink = self.tone(colour).tolist()
        cv2.polylines(self.scene.image, spots, False, ink, wide)
        cv2.polylines(self.scene.label, spots, False, self.label, wide)

    def discs(self, points: ArrayLike, radii: ArrayLike, colours: ArrayLike) -> None:
        rings = np.column_stack([self.spot(points), np.multiply(radii, self.scale)]) * 16
        inks = self.tone(colours).tolist()
        for (x, y, radius), ink in zip(np.rint(rings).astype(int).tolist(), inks, strict=True):
            cv2.circle(self.scene.image, (x, y), radius, ink, -1, shift=4)
            cv2.circle(self.scene.label, (x, y), radius, self.label, -1, shift=4)


def _vary(rng: np.random.Generator, colour: ArrayLike) -> np.ndarray:
    return np.clip(np.asarray(colour) + rng.normal(0, 9) + rng.normal(0, 5, 3), 0, 255)


def _pick(rng: np.random.Generator, colours: Sequence | np.ndarray) -> np.ndarray:
    return _vary(rng, colours[int(rng.integers(len(colours)))])


def _corners(polygons: ArrayLike) -> list[np.ndarray]:
    """Pixels as OpenCV takes them with `shift=4`: in sixteenths."""
    return list(np.rint(np.multiply(polygons, 16)).astype(np.int32))


def _glow(image: np.ndarray, x: float, y: float, radius: float, colour: ArrayLike) -> None:
    left, top = max(int(x - radius), 0), max(int(y - radius), 0)
    part = image[top : max(int(y + radius), 0), left : max(int(x + radius), 0)]
    rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
    near = np.clip(1 - np.hypot(rows + top - y, columns + left - x) / radius, 0, 1) ** 2
    part[:] = part + np.maximum(colour - part.astype(float), 0) * near[..., None]


def _draw_hills(scene: _Scene) -> None:
    rng, x = scene.rng, np.linspace(0, 1, 65)
    for layer in range(rng.integers(1, 4), 0, -1):
        turns = np.outer((1, 2, 5), x) * rng.uniform(0.5, 1.1) + rng.random((3, 1))
        waves = (np.sin(2 * np.pi * turns) / ((1,), (2,), (5,))).sum(0)
        rise = layer * scene.height * rng.uniform(0.02, 0.05) * (1 + 0.55 * waves)
        ridge = np.stack([x * scene.width, scene.horizon - rise], 1)
        grass = scene.tone(_pick(rng, scene.grass) * (1 - 0.12 * layer))
        colour = grass + (scene.low - grass) * min(layer * (0.12 + 0.3 * scene.haze), 0.85)
        foot = [(scene.width, scene.horizon + 1), (0, scene.horizon + 1)]
        scene.fill([np.vstack([ridge, foot])], colour, MEADOW)


def _plan_road(scene: _Scene) -> tuple[_Place, np.ndarray, bool]:
    """Choose a road: where it runs, its stations, and whether it leads away from the viewer."""
    rng = scene.rng
    phase, bend = rng.uniform(0, 7), rng.normal(0, 0.12)
    if rng.random() < 0.5:
        near, far, half = rng.uniform(0.1, 0.9), rng.uniform(0.2, 0.8), rng.uniform(2.6, 4)

        def lead_away(along: np.ndarray, across: np.ndarray | float) -> np.ndarray:
            y = scene.horizon + scene.ground * 1.02 * along
            x = far + (near - far) * along + bend * (1 - along) * np.sin(7 * along**0.6 + phase)
            return np.stack([x * scene.width + across * half * scene.metre(y), y], -1)

        return lead_away, 1 / (1 + 0.16 * np.arange(120)), True
    side = max(scene.width, scene.height)
    level, slope, half = rng.uniform(0.3, 0.7), rng.normal(0, 0.08), rng.uniform(4, 5.5)

    def pass_by(along: np.ndarray, across: np.ndarray | float) -> np.ndarray:
        depth = level + slope * (along - 0.5) + bend / 4 * np.sin(5 * along + phase)
        depth = depth + across * half * depth**2 * scene.ground / scene.camera / side
        return np.stack([along * scene.width, scene.horizon + scene.ground * depth], -1)

    return pass_by, np.linspace(-0.02, 1.02, 42), False


def _draw_ground(scene: _Scene, place: _Place, stations: np.ndarray) -> None:
    rng, top, width = scene.rng, int(scene.horizon) & ~1, scene.width // 2

    def band(left: float, right: float) -> list[np.ndarray]:
        return _corners([np.vstack([place(stations, left), place(stations[::-1], right)])])

    scene.label[top:] = MEADOW
    cv2.fillPoly(scene.label, band(-1, 1), ROAD, shift=4)

    # Half the size will do, as for the sky: the edge of the road comes from the label.
    rows = np.arange(top + 1, scene.height, 2, dtype=np.float32)[:, None] - scene.horizon + 1
    depth = (rows / scene.ground).astype(np.float32)
    # Where each pixel lies on the ground, in twentieths of a metre, so that texture recedes.
    across = (np.arange(width, dtype=np.float32) * 2 - width) / rows * (20 * scene.camera)
    along = 40 * scene.camera * width / rows + rng.uniform(0, 5000)
    grain = rng.standard_normal((128, 128), dtype=np.float32)
    grain = grain[along.astype(int) & 127, across.astype(int) & 127] * np.sqrt(depth)
    patches = np.sin(across / 97 + 2 * np.sin(along / 151)) + np.sin(along / 173 + across / 211)
    mix = 0.5 + 0.22 * patches + 0.15 * grain
    if rng.random() < 0.3:
        mix += 0.5 * np.sin(across / rng.uniform(6, 12)) * (patches > 0) * np.sqrt(depth)
    haze, veil = (scene.haze * np.exp(-6 * depth))[..., None], scene.low.astype(np.float32)

    def finish(colour: np.ndarray) -> np.ndarray:
        colour = np.clip(colour + (veil - colour) * haze, 0, 255).astype(np.uint8)
        return cv2.resize(colour, (scene.width, scene.height - top))

    low, high = (scene.tone(_vary(rng, grass)).astype(np.float32) for grass in scene.grass)
    shade = (0.88 + 0.12 * depth + 0.07 * grain)[..., None]
    scene.image[top:] = finish((low + (high - low) * np.clip(mix, 0, 1)[..., None]) * shade)
    dirt = rng.random() < 0.3
    paint = scene.tone(_pick(rng, _DIRTS if dirt else _ASPHALTS)).astype(np.float32)
    road = finish(paint * (1 + 0.05 * grain + 0.02 * patches)[..., None])
    cv2.copyTo(road, (scene.label[top:] == ROAD).view(np.uint8), scene.image[top:])
    if dirt:
        for track in (band(-0.62, -0.36), band(0.36, 0.62)):
            cv2.fillPoly(scene.image, track, (paint * 0.88).tolist(), shift=4)
        return
    white = scene.tone((232, 228, 214) if rng.random() < 0.7 else (240, 200, 90)).tolist()
    left, right = place(stations, -0.035), place(stations, 0.035)
    dashes = np.stack([left[::2], left[1::2], right[1::2], right[::2]], 1)
    cv2.fillPoly(scene.image, _corners(dashes), white, shift=4)
    for line in (band(-0.93, -0.86), band(0.86, 0.93)) if rng.random() < 0.6 else ():
        cv2.fillPoly(scene.image, line, white, shift=4)


def _draw_tree(scene: _Scene, x: float, y: float) -> None:
    rng, pen = scene.rng, _Pen(scene, TREE, x, y, scene.side)
    leaf, bark = _pick(rng, scene.leaves), _pick(rng, ((104, 80, 62), (132, 118, 106)))
    tall = rng.uniform(4, 10)
    kind = rng.choice(('broad', 'fir', 'poplar', 'bush'), p=(0.5, 0.28, 0.12, 0.1))
    if kind == 'fir':
        half, leaf = tall * rng.uniform(0.2, 0.28), leaf * 0.4 + (40, 66, 50)
        pen.box(-0.15, 0, 0.3, tall * 0.3, bark)
        spread, teeth = np.linspace(-1, 1, 9), 0.05 * (np.arange(9) % 2)
        for step in (0, 0.25, 0.5, 0.75):
            foot, tip = tall * (0.14 + 0.72 * step), tall * (0.5 + 0.64 * step)
            hem = foot + tall * (teeth - 0.04 * abs(spread))
            fringe = np.stack([spread * half * (1 - 0.75 * step), hem], 1)
            pen.shape([*fringe, (0, tip)], leaf * (0.72 + 0.1 * step))
            pen.shape([*fringe[5:], (0, tip)], leaf * (0.95 + 0.1 * step))
            if scene.snow:
                left, right = (fringe[[1, 7]] + (0, tip)) / 2
                pen.shape([left, (0, tip), right, (0, foot * 0.6 + tip * 0.4)], _SNOW)
        return
    rise, *reach = tall * np.array({
        'broad': (0.64, rng.uniform(0.26, 0.4), 0.32),
        'poplar': (0.56, 0.13, 0.43),
        'bush': (0.12, 0.24, 0.15),
    }[kind])  # fmt: skip
    pen.shape([(-0.28, 0), (0.28, 0), (0.12, rise), (-0.12, rise)], bark)
    count = int(np.clip(tall * pen.scale / 3, 8, 70))
    angle, away = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.random((count, 1)))
    tuft = np.stack([np.cos(angle), np.sin(angle)], 1) * away
    tuft = tuft[np.argsort(tuft @ (0.5, 0.6) + rng.normal(0, 0.25, count))]
    bright = 0.86 + 0.24 * tuft @ (0.55, 0.7) + rng.normal(0, 0.06, count)
    radii = min(reach) * np.linspace(0.62, 0.2, count)
    room = reach * (1 - 0.6 * radii[:, None] / max(reach))
    pen.discs(tuft * room + (0, rise), radii, leaf * bright[:, None])


def _draw_house(scene: _Scene, x: float, y: float) -> None:
    """Draw a gable in front and a wing beside it, seen at a slant."""
    rng, flip = scene.rng, int(scene.rng.choice((-1, 1)))
    front, wing, rise = rng.uniform((4, 4.5, 1.8), (6.5, 10, 3.6))
    pen = _Pen(scene, HOUSE, x - flip * (front + wing) / 2 * scene.metre(y), y, flip)
    wall, tiles, shutter = _pick(rng, _PAINTS), _pick(rng, _ROOFS), _pick(rng, _PAINTS) * 0.8
    trim = np.array((244, 240, 230)) if rng.random() < 0.7 else wall * 0.6
    floors = int(rng.choice((1, 2, 3), p=(0.45, 0.45, 0.1)))
    eave, lit, dim = 2.9 * floors, wall, wall * 0.78
    gable, side = (dim, lit) if flip == scene.side else (lit, dim)
    if rng.random() < 0.7:
        pen.box(front / 2 + wing * rng.uniform(0.2, 0.8), eave, 0.8, rise + 0.9, (150, 86, 70))
    pen.box(front, 0, wing, eave, side)
    pen.shape([(0, 0), (front, 0), (front, eave), (front / 2, eave + rise), (0, eave)], gable)
    for level in np.arange(0.5, eave, 0.5) if rng.random() < 0.6 else ():
        pen.line([(0, level), (front, level)], 0.06, gable * 0.9)
        pen.line([(front, level), (front + wing, level)], 0.06, side * 0.9)
    pen.box(0, 0, front + wing, 0.35, wall * 0.6)
    roof = (_SNOW if scene.snow else tiles) * (1.0 if flip == scene.side else 0.86)
    ridge, drip = np.array(((front / 2, eave + rise), (front + 0.4, eave - 0.8 * rise / front)))
    far = np.array((wing + 0.3, 0))
    pen.shape([ridge, drip, drip + far, ridge + far], roof)
    for share in np.linspace(0.14, 0.86, 6):
        course = ridge + (drip - ridge) * share
        pen.line([course, course + far], 0.07, roof * 0.86)
    pen.line([(-0.4, drip[1]), ridge, drip], 0.34, tiles * 0.8)
    pen.line([drip, drip + far], 0.2, tiles * 0.66)

    door = front + rng.uniform(0.3, wing - 1.6)
    columns = [*np.linspace(0, front, int(front // 2.1) + 2)[1:-1],
               *np.linspace(front, front + wing, int(wing // 2.2) + 2)[1:-1]]  # fmt: skip
    windows = [(left - 0.5, 0.95 + 2.9 * floor) for floor in range(floors) for left in columns
               if floor or abs(left - 0.5 - door) > 1.4]  # fmt: skip
    windows += [(front / 2 - 0.5, eave + 0.1)] * int(rise > 2.6)
    shutters = rng.random() < 0.5
    for left, low in windows:
        if shutters:
            pen.box(left - 0.5, low, 2, 1.4, shutter)
        pen.box(left - 0.12, low - 0.12, 1.24, 1.64, trim)
        shines = scene.night and rng.random() < 0.65
        pane = (255, 206, 112) if shines else _vary(rng, (92, 118, 142))
        pen.box(left, low, 1, 1.4, pane, shines)
        pen.line([(left + 0.5, low), (left + 0.5, low + 1.4)], 0.1, trim)
        pen.line([(left, low + 0.8), (left + 1, low + 0.8)], 0.1, trim)
    pen.box(door - 0.12, 0, 1.34, 2.4, trim)
    pen.box(door, 0, 1.1, 2.25, shutter)


def _draw_car(scene: _Scene, x: float, y: float, leading_away: bool) -> None:
    """Draw a car or a van, from behind or in front on a road that leads away, else from aside."""
    rng, pen = scene.rng, _Pen(scene, CAR, x, y, int(scene.rng.choice((-1, 1))))
    paint, glass, tyre = _pick(rng, (*_PAINTS, *_ROOFS)), (70, 88, 106), (38, 38, 44)
    van = rng.random() < 0.3
    if leading_away:
        tall, roof = (2.1, 0.83) if van else (1.5, 0.65)
        for left in (-0.8, 0.48):
            pen.box(left, 0, 0.32, 0.5, tyre)
        half = np.array(((0.9, 0.25), (0.9, 0.85), (roof, tall)))
        pen.shape([*half, *half[::-1] * (-1, 1)], paint)
        half = np.array(((roof * 1.08, 0.95), (roof * 0.9, tall - 0.13)))
        pen.shape([*half, *half[::-1] * (-1, 1)], glass)
        pen.box(-0.9, 0.25, 1.8, 0.16, paint * 0.6)
        pen.box(-0.28, 0.4, 0.56, 0.16, (236, 236, 226))
        lamps = (216, 40, 36) if rng.random() < 0.5 else (255, 246, 206)
        for left in (-0.85, 0.55):
            pen.box(left, 0.6, 0.3, 0.2, lamps, scene.night)
        return
    if van:
        body = [(-2.15, 0.3), (-2.15, 2.15), (-2.0, 2.25), (0.9, 2.25), (1.2, 2.1), (1.7, 1.2),
                (2.1, 1.0), (2.15, 0.3)]  # fmt: skip
        panes = [[(0.3, 1.25), (1.55, 1.25), (1.1, 2.0), (0.3, 2.0)]]
        panes += [[(k, 1.25), (k + 0.9, 1.25), (k + 0.9, 2.0), (k, 2.0)]
                  for k in (-1.85, -0.8) if rng.random() < 0.6]  # fmt: skip
    else:
        back = rng.uniform(-2.05, -1.3)
        body = [(-2.1, 0.3), (-2.15, 0.85), (back - 0.1, 1.0), (back + 0.4, 1.42), (-0.6, 1.52),
                (0.3, 1.48), (1.1, 0.98), (1.9, 0.86), (2.15, 0.65), (2.15, 0.3)]  # fmt: skip
        panes = [[(back + 0.25, 0.98), (-0.3, 0.98), (-0.3, 1.4), (back + 0.55, 1.36)],
                 [(-0.18, 0.98), (0.85, 0.98), (0.25, 1.37), (-0.18, 1.4)]]  # fmt: skip
    pen.shape(body, paint)
    pen.box(-2.12, 0.3, 4.25, 0.22, paint * 0.66)
    for pane in panes:
        pen.shape(pane, glass)
    pen.box(1.9, 0.62, 0.24, 0.18, (255, 244, 200), scene.night)
    pen.box(-2.14, 0.65, 0.16, 0.2, (206, 40, 36), scene.night)
    for radius, colour in ((0.36, tyre), (0.18, (168, 170, 176))):
        pen.discs([(-1.35, 0.33), (1.4, 0.33)], [radius] * 2, [colour] * 2)


def _draw_lamp(scene: _Scene, x: float, y: float, style: int, paint: np.ndarray) -> None:
    """Draw a lantern (style 0) or a post with one or two arms."""
    pen = _Pen(scene, LAMP, x, y)
    tall, bulb = (5.4 if style else 4.0), (255, 238, 184)
    pen.line([(0, 0), (0, tall)], 0.13, paint)
    pen.line([(0, 0), (0, 0.7)], 0.26, paint)
    for arm in ((), (1.1,), (1.1, -1.1))[style]:
        pen.line([(0, tall - 0.3), (arm / 2, tall + 0.1), (arm, tall + 0.1)], 0.1, paint)
        pen.box(arm - 0.35, tall - 0.08, 0.7, 0.14, bulb, scene.night)
        pen.box(arm - 0.4, tall + 0.06, 0.8, 0.16, paint)
    if not style:
        cup = [(-0.2, tall), (0.2, tall), (0.3, tall + 0.55), (-0.3, tall + 0.55)]
        pen.shape(cup, bulb, scene.night)
        pen.shape([(-0.4, tall + 0.55), (0.4, tall + 0.55), (0, tall + 0.9)], paint)
    if scene.night:
        _glow(scene.image, x, y - tall * pen.scale, 2.6 * pen.scale, bulb)


def _draw_birds(scene: _Scene) -> None:
    rng, unit = scene.rng, min(scene.height, scene.width) * scene.scale
    paint = _pick(rng, ((226, 226, 230),) if scene.night else ((38, 36, 44), (66, 52, 48)))
    flock = rng.uniform((0.1, 0.06), (0.9, 0.9)) * (scene.width, scene.horizon)
    for _ in range(rng.integers(1, 6)):
        span, lift, bank = rng.uniform((0.022, -0.1, -0.25), (0.05, 0.6, 0.25))
        wing = np.array(((0.12, -0.2), (0.45, 0.3 * lift), (1, lift), (0.5, 0.45 * lift + 0.32)))
        bird = np.vstack([wing, [(0, 0.08)], wing[::-1] * (-1, 1)])
        turn = np.array(((1, bank), (bank, -1))) * span * unit
        spot = flock + rng.normal(0, 0.08, 2) * unit
        scene.fill([bird @ turn + spot], scene.tone(paint), BIRD)


def _place_objects(scene: _Scene, place: _Place, leading_away: bool) -> list[tuple]:
    """Choose what stands where: (row, column, half width in metres, function, its arguments)."""
    rng = scene.rng
    things: list[tuple] = []

    def add(draw: Callable, half: float, gap: float, x: float, y: float, *rest) -> None:
        apart = gap * scene.metre(y)
        alike = ((x - thing[1], 3 * (y - thing[0])) for thing in things if thing[3] is draw)
        if all(math.hypot(*offset) > apart for offset in alike):
            things.append((y, x, half, draw, rest))

    for draw, half, gap, count, low, high in (
        (_draw_house, 6, 11, rng.integers(1, 7), 0.1, 0.45),
        (_draw_tree, 2.2, 1, rng.integers(5, 35), 0.02, 0.09),
        (_draw_tree, 2.2, 1, rng.integers(4, 14), 0.1, 0.5),
        (_draw_tree, 2.2, 1, rng.integers(0, 3), 0.5, 0.95),
    ):
        for right, depth in rng.uniform((0, low), (1, high), (scene.many(int(count)), 2)).tolist():
            x, y = right * scene.width, scene.horizon + depth * scene.ground
            reach = half * scene.metre(y)
            if ROAD not in scene.label[int(y), max(int(x - reach), 0) : int(x + reach) + 1]:
                add(draw, half, gap, x, y)
    cars = int(rng.integers(0, 6) / scene.scale)  # they stand along a line
    ways = rng.uniform(0.12 * leading_away, 1 - 0.3 * leading_away, cars)
    for spot in place(ways, rng.choice((-0.5, 0.5), ways.size)):
        add(_draw_car, 1.3 if leading_away else 2.5, 5, *spot, leading_away)
    if rng.random() < 0.75:
        style, paint = int(rng.integers(3)), _pick(rng, _POSTS)
        posts = rng.uniform(0.16, 0.4) * scene.scale * (
            rng.random() + np.arange(round(6 / scene.scale)))
        side = rng.choice((-1.2, 1.2))
        for spot in place(0.8 / (1 + 3 * posts) if leading_away else posts, side):
            add(_draw_lamp, 0.4, 1, *spot, style, paint)
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
        DataError: If the size is not two numbers of at least 32.
    """
    _check_size(size)
    height, width = size
    # Twice as large, so that edges come out smooth; the label takes every second pixel.
    scene = _Scene(rng, 2 * height, 2 * width, scale)
    _draw_hills(scene)
    place, stations, leading_away = _plan_road(scene)
    _draw_ground(scene, place, stations)
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
        _draw_birds(scene)
    image = cv2.resize(scene.image, (width, height), interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.6))
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(0.8, 2.8)
    return np.clip(image + noise, 0, 255).astype(np.uint8), scene.label[::2, ::2].copy()


def draw_dataset(
    root: str | Path,
    *,
    train: int = 400,
    val: int = 80,
    size: tuple[int, int] = (192, 256),
    seed: int = 0,
    scale: float = 1.,
) -> Path:
    """Draw a data set into a folder laid out like ADE20K, unless it is there already.

    The pictures are `images/{training,validation}/NNNNN.png`; their labels have the same names
    under `annotations`. Each depends on seed, split and number alone, so a larger data set begins
    with the pictures of a smaller one. `synthetic.json`, written last, records what was asked for:
    if it says the same, nothing is done, and otherwise everything is drawn again.

    Args:
        root: The folder; it is made if missing, and must hold nothing but this data set.
        train: Number of training pictures.
        val: Number of validation pictures.
        size: Height and width of each picture in pixels, each at least 32.
        seed: Chooses the pictures.
        scale: See `draw_scene`.

    Returns:
        The folder.

    Raises:
        DataError: If a number is too small, or if the folder holds anything that this function
            does not write; the folder is then left as it is.
    """
    if train < 1 or val < 1:
        raise DataError(f'train is {train} and val is {val}: ask for at least one picture of each')
    if seed < 0:
        raise DataError(f'seed is {seed}: choose 0 or more')
    _check_size(size)
    root = Path(root)
    marker = root / 'synthetic.json'
    asked = {'train': train, 'val': val, 'size': list(size), 'seed': seed, 'revision': _REVISION}
    if scale != 1:
        asked['scale'] = scale
    record = json.dumps(asked, indent=2) + '\n'
    if marker.is_file() and marker.read_text(encoding='utf-8') == record:
        return root
    # The marker comes first, so that an interruption from here on is seen by the next run.
    for path in _own_files(root):
        path.unlink()
    for split, (name, count) in enumerate((('training', train), ('validation', val))):
        images, labels = root / 'images' / name, root / 'annotations' / name
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, label = draw_scene(np.random.default_rng((seed, split, index)), size, scale)
            Image.fromarray(image).save(images / f'{index:05d}.png', compress_level=1)
            Image.fromarray(label).save(labels / f'{index:05d}.png', compress_level=1)
    marker.write_text(record, encoding='utf-8')
    return root


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 32:
        raise DataError(f'size is {size}: give a height and a width of at least 32 pixels')


def _own_files(root: Path) -> list[Path]:
    """List the files that `draw_dataset` wrote, from the top down, or refuse the folder."""
    if root.exists() and not root.is_dir():
        raise DataError(f'{root} is a file: choose a folder')
    own: list[Path] = []
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder).relative_to(root)
        names = [(here / name).as_posix() for name in files]
        names += [f'{(here / name).as_posix()}/' for name in folders]
        foreign = sorted(name for name in names if not _NAMES.fullmatch(name))
        if foreign:
            raise DataError(
                f'{root} holds {", ".join(foreign[:3])}{", ..." if foreign[3:] else ""}, which the '
                'synthetic data set does not: choose a new folder, or move these files away'
            )
        own += [Path(folder) / name for name in files]
    return own
