"""Hills, meadows and the road."""
from collections.abc import Callable

import cv2
import numpy as np

from .canvas import MEADOW, ROAD, Scene, corners, pick, vary

_ASPHALTS = ((104, 106, 114), (136, 132, 132), (84, 86, 98))
_DIRTS = ((186, 150, 108), (164, 124, 88), (206, 186, 152))

# From ways along the road, 0..1, and across it, -1..1 from edge to edge, to (x, y) in pixels.
Place = Callable[[np.ndarray, np.ndarray | float], np.ndarray]

def draw_hills(scene: Scene) -> None:
    rng, x = scene.rng, np.linspace(0, 1, 65)
    for layer in range(rng.integers(1, 4), 0, -1):
        turns = np.outer((1, 2, 5), x) * rng.uniform(0.5, 1.1) + rng.random((3, 1))
        waves = (np.sin(2 * np.pi * turns) / ((1,), (2,), (5,))).sum(0)
        rise = layer * scene.height * rng.uniform(0.02, 0.05) * (1 + 0.55 * waves)
        ridge = np.stack([x * scene.width, scene.horizon - rise], 1)
        grass = scene.tone(pick(rng, scene.grass) * (1 - 0.12 * layer))
        colour = grass + (scene.low - grass) * min(layer * (0.12 + 0.3 * scene.haze), 0.85)
        foot = [(scene.width, scene.horizon + 1), (0, scene.horizon + 1)]
        scene.fill([np.vstack([ridge, foot])], colour, MEADOW)


def plan_road(scene: Scene) -> tuple[Place, np.ndarray, bool]:
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


def draw_ground(scene: Scene, place: Place, stations: np.ndarray) -> None:
    rng, top, width = scene.rng, int(scene.horizon) & ~1, scene.width // 2

    def band(left: float, right: float) -> list[np.ndarray]:
        return corners([np.vstack([place(stations, left), place(stations[::-1], right)])])

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

    low, high = (scene.tone(vary(rng, grass)).astype(np.float32) for grass in scene.grass)
    shade = (0.88 + 0.12 * depth + 0.07 * grain)[..., None]
    scene.image[top:] = finish((low + (high - low) * np.clip(mix, 0, 1)[..., None]) * shade)
    dirt = rng.random() < 0.3
    paint = scene.tone(pick(rng, _DIRTS if dirt else _ASPHALTS)).astype(np.float32)
    road = finish(paint * (1 + 0.05 * grain + 0.02 * patches)[..., None])
    cv2.copyTo(road, (scene.label[top:] == ROAD).view(np.uint8), scene.image[top:])
    if dirt:
        for track in (band(-0.62, -0.36), band(0.36, 0.62)):
            cv2.fillPoly(scene.image, track, (paint * 0.88).tolist(), shift=4)
        return
    white = scene.tone((232, 228, 214) if rng.random() < 0.7 else (240, 200, 90)).tolist()
    left, right = place(stations, -0.035), place(stations, 0.035)
    dashes = np.stack([left[::2], left[1::2], right[1::2], right[::2]], 1)
    cv2.fillPoly(scene.image, corners(dashes), white, shift=4)
    for line in (band(-0.93, -0.86), band(0.86, 0.93)) if rng.random() < 0.6 else ():
        cv2.fillPoly(scene.image, line, white, shift=4)
