"""The canvas, the light and the pen with which scenes are drawn."""
import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike

CLASSES: tuple[str, ...] = ('sky', 'meadow', 'road', 'house', 'tree', 'car', 'lamp', 'bird')
PALETTE: list[list[int]] = [
    [108, 180, 238], [168, 208, 92], [128, 112, 140], [238, 128, 88],
    [30, 128, 96], [222, 52, 100], [255, 214, 64], [72, 44, 160],
]  # fmt: skip
MEADOW, ROAD, HOUSE, TREE, CAR, LAMP, BIRD = range(1, len(CLASSES))

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

class Scene:
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
        self.zenith, self.low = vary(rng, zenith), vary(rng, low)
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
        polygons = corners(points)
        cv2.fillPoly(self.image, polygons, colour.tolist(), shift=4)
        cv2.fillPoly(self.label, polygons, label, shift=4)

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
            glow(sky, x, y, radius * 5, orb)
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


class Pen:
    """Draws an object in metres from its foot, into the same pixels of image and label."""

    def __init__(self, scene: Scene, label: int, x: float, y: float, flip: int = 1) -> None:
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


def vary(rng: np.random.Generator, colour: ArrayLike) -> np.ndarray:
    return np.clip(np.asarray(colour) + rng.normal(0, 9) + rng.normal(0, 5, 3), 0, 255)


def pick(rng: np.random.Generator, colours: Sequence | np.ndarray) -> np.ndarray:
    return vary(rng, colours[int(rng.integers(len(colours)))])


def corners(polygons: ArrayLike) -> list[np.ndarray]:
    """Pixels as OpenCV takes them with `shift=4`: in sixteenths."""
    return list(np.rint(np.multiply(polygons, 16)).astype(np.int32))


def glow(image: np.ndarray, x: float, y: float, radius: float, colour: ArrayLike) -> None:
    left, top = max(int(x - radius), 0), max(int(y - radius), 0)
    part = image[top : max(int(y + radius), 0), left : max(int(x + radius), 0)]
    rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
    near = np.clip(1 - np.hypot(rows + top - y, columns + left - x) / radius, 0, 1) ** 2
    part[:] = part + np.maximum(colour - part.astype(float), 0) * near[..., None]
