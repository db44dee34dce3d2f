"""What stands or flies in a scene."""
import numpy as np

from .canvas import BIRD, CAR, HOUSE, LAMP, TREE, Pen, Scene, glow, pick, vary

_PAINTS = np.array((
    (240, 232, 216), (232, 204, 140), (198, 82, 66), (104, 144, 178), (238, 178, 84),
    (148, 186, 158), (222, 150, 140), (122, 92, 78), (92, 104, 118), (214, 222, 228),
))  # fmt: skip
_ROOFS = ((188, 84, 58), (146, 62, 52), (92, 98, 112), (118, 86, 66), (70, 92, 88))
_SNOW = np.array((240, 244, 250))

def draw_tree(scene: Scene, x: float, y: float) -> None:
    rng, pen = scene.rng, Pen(scene, TREE, x, y, scene.side)
    leaf, bark = pick(rng, scene.leaves), pick(rng, ((104, 80, 62), (132, 118, 106)))
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


def draw_house(scene: Scene, x: float, y: float) -> None:
    """Draw a gable in front and a wing beside it, seen at a slant."""
    rng, flip = scene.rng, int(scene.rng.choice((-1, 1)))
    front, wing, rise = rng.uniform((4, 4.5, 1.8), (6.5, 10, 3.6))
    pen = Pen(scene, HOUSE, x - flip * (front + wing) / 2 * scene.metre(y), y, flip)
    wall, tiles, shutter = pick(rng, _PAINTS), pick(rng, _ROOFS), pick(rng, _PAINTS) * 0.8
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
        pane = (255, 206, 112) if shines else vary(rng, (92, 118, 142))
        pen.box(left, low, 1, 1.4, pane, shines)
        pen.line([(left + 0.5, low), (left + 0.5, low + 1.4)], 0.1, trim)
        pen.line([(left, low + 0.8), (left + 1, low + 0.8)], 0.1, trim)
    pen.box(door - 0.12, 0, 1.34, 2.4, trim)
    pen.box(door, 0, 1.1, 2.25, shutter)


def draw_car(scene: Scene, x: float, y: float, leading_away: bool) -> None:
    """Draw a car or a van, from behind or in front on a road that leads away, else from aside."""
    rng, pen = scene.rng, Pen(scene, CAR, x, y, int(scene.rng.choice((-1, 1))))
    paint, glass, tyre = pick(rng, (*_PAINTS, *_ROOFS)), (70, 88, 106), (38, 38, 44)
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


def draw_lamp(scene: Scene, x: float, y: float, style: int, paint: np.ndarray) -> None:
    """Draw a lantern (style 0) or a post with one or two arms."""
    pen = Pen(scene, LAMP, x, y)
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
        glow(scene.image, x, y - tall * pen.scale, 2.6 * pen.scale, bulb)


def draw_birds(scene: Scene) -> None:
    rng, unit = scene.rng, min(scene.height, scene.width) * scene.scale
    paint = pick(rng, ((226, 226, 230),) if scene.night else ((38, 36, 44), (66, 52, 48)))
    flock = rng.uniform((0.1, 0.06), (0.9, 0.9)) * (scene.width, scene.horizon)
    for _ in range(rng.integers(1, 6)):
        span, lift, bank = rng.uniform((0.022, -0.1, -0.25), (0.05, 0.6, 0.25))
        wing = np.array(((0.12, -0.2), (0.45, 0.3 * lift), (1, lift), (0.5, 0.45 * lift + 0.32)))
        bird = np.vstack([wing, [(0, 0.08)], wing[::-1] * (-1, 1)])
        turn = np.array(((1, bank), (bank, -1))) * span * unit
        spot = flock + rng.normal(0, 0.08, 2) * unit
        scene.fill([bird @ turn + spot], scene.tone(paint), BIRD)
