"""The figure of an audit: a few images under their masks."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageOps

from ...errors import shown
from ...files import replacing
from ..transforms import IGNORED
from .rules import CHECKS, Part

_DPI = 110
_SAMPLES = 4  # images in a row
_WIDTH = 360  # width of an image in pixels


def draw_samples(parts: Sequence[Part], path: Path) -> bool:
    """Draw a few images of each data set with their masks painted over, if there are any."""
    rows = []
    for part in parts:
        sound = [(image, mask) for (image, mask), checks in part.verdicts.items()
                 if mask and not any(CHECKS[check][0] == 'error' for check in checks)]
        if sound:
            chosen = sorted({*np.linspace(0, len(sound) - 1, _SAMPLES).astype(int)})
            rows.append((part, [sound[i] for i in chosen]))
    if not rows:
        path.unlink(missing_ok=True)  # of an earlier run
        return False
    painted = [[_paint(part, *pair) for pair in pairs] for part, pairs in rows]
    heights = [max(map(len, images)) / _DPI + 0.45 for images in painted]
    classes = rows[0][0].classes if len(rows[0][0].classes) <= 24 else ()
    figure = Figure(figsize=(_SAMPLES * (_WIDTH / _DPI + 0.1),
                             sum(heights) + 0.5 + 0.28 * -(-len(classes) // 8)),
                    layout='constrained')
    axes = figure.subplots(len(rows), _SAMPLES, squeeze=False,
                           gridspec_kw=dict(height_ratios=heights))
    for axis in axes.flat:
        axis.set_axis_off()
    for (part, pairs), images, row in zip(rows, painted, axes):
        for axis, image, (name, _) in zip(row, images, pairs):
            axis.imshow(image)
            axis.text(0.5, -0.02, f'{part.name}: {_short(Path(name).name, 40)}', fontsize=9,
                      transform=axis.transAxes, ha='center', va='top')
    if classes:
        colours = np.array(rows[0][0].dataset.metainfo['palette']) / 255
        figure.legend(handles=[Patch(color=colour, label=_short(name, 24))
                               for name, colour in zip(classes, colours)],
                      loc='outside lower center', ncols=min(len(classes), 8), frameon=False,
                      fontsize=9)
    figure.suptitle('Masks over images; where there is no label the image is grey', fontsize=12)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=_DPI)
    return True


def _paint(part: Part, image: str, mask: str) -> np.ndarray:
    """Return a small image, H x W x 3, under the colours of its labels."""
    with Image.open(image) as opened:
        upright = ImageOps.exif_transpose(opened).convert('RGB')
    height = max(round(upright.height * _WIDTH / upright.width), 1)
    size = (_WIDTH, min(height, 2 * _WIDTH))
    pixels = np.asarray(upright.resize(size, Image.Resampling.BILINEAR)).astype(np.float32)
    with Image.open(mask) as opened:
        stored = Image.fromarray(np.asarray(opened).astype(np.uint8))
    labels = part.table[np.asarray(stored.resize(size, Image.Resampling.NEAREST))]
    colours = np.zeros((256, 3), np.float32)
    palette = np.array(part.dataset.metainfo['palette'], np.float32).reshape(-1, 3)[:255]
    colours[:len(palette)] = palette
    grey = pixels.mean(-1, keepdims=True).repeat(3, -1)
    painted = np.where((labels == IGNORED)[..., None], grey, 0.4 * pixels + 0.6 * colours[labels])
    return painted.clip(0, 255).astype(np.uint8)


def _short(text: str, length: int) -> str:
    text = shown(text)
    text = text if len(text) <= length else f'{text[:length - 3]}...'
    return text.replace('$', r'\$')  # which would begin a formula
