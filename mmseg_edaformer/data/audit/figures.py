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
    figure = Figure(figsize=(3.4 * _SAMPLES, 3 * len(rows) + 1), layout='constrained')
    axes = figure.subplots(len(rows), _SAMPLES, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for (part, pairs), row in zip(rows, axes):
        for axis, (image, mask) in zip(row, pairs):
            axis.imshow(_paint(part, image, mask))
            axis.set_title(f'{part.name}: {_short(Path(image).name, 40)}', fontsize=9)
    part = rows[0][0]
    if len(part.classes) <= 24:
        handles = [Patch(color=np.array(colour) / 255, label=_short(name, 24))
                   for name, colour in zip(part.classes, part.dataset.metainfo['palette'])]
        figure.legend(handles=handles, loc='outside lower center', ncols=8, fontsize=9)
    figure.suptitle('Masks over images; where there is no label the image is grey', fontsize=12)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    return True


def _paint(part: Part, image: str, mask: str) -> np.ndarray:
    """Return a small image, H x W x 3, under the colours of its labels."""
    with Image.open(image) as opened:
        upright = ImageOps.exif_transpose(opened).convert('RGB')
    size = _WIDTH, max(round(upright.height * _WIDTH / upright.width), 1)
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
