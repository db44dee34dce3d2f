"""Random crops for classification, resized several times as fast as Pillow does it."""
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from ..errors import ConfigError


@TRANSFORMS.register_module()
class RandomResizedCrop(BaseTransform):
    """Cut out a window of random area and shape, and resize it: bicubic, with antialiasing.

    The same random numbers give the same window as in mmpretrain's RandomResizedCrop. The pixels
    are those of its ``backend='pillow', interpolation='bicubic'`` up to one level of 255, rarely
    two: torch has Pillow's filter, but in vector instructions. Where a window shrinks in height and
    grows in width, newer versions of Pillow filter columns before rows and clip in between: the
    mean difference is a third of a level there, for noise.

    Args:
        scale: Height and width of the result in pixels, or one number for both.
        crop_ratio_range: Smallest and largest area of the window, as a share of the image.
        aspect_ratio_range: Smallest and largest width relative to the height.
        max_attempts: Attempts before falling back to a centre crop.

    Raises:
        ConfigError: A number is out of range, or the images are not of 8 bits.
    """

    def __init__(self, scale: int | Sequence[int],
                 crop_ratio_range: Sequence[float] = (0.08, 1.0),
                 aspect_ratio_range: Sequence[float] = (3 / 4, 4 / 3),
                 max_attempts: int = 10) -> None:
        height, width = (scale, scale) if isinstance(scale, int) else scale
        self.scale = height, width
        self.crop_ratio_range = low, high = tuple(crop_ratio_range)
        self.aspect_ratio_range = narrow, wide = tuple(aspect_ratio_range)
        self.max_attempts = max_attempts
        if min(self.scale) < 1 or not (0 < low <= high <= 1 and 0 < narrow <= wide):
            raise ConfigError(f'RandomResizedCrop: scale={scale}, crop_ratio_range='
                              f'{crop_ratio_range}, aspect_ratio_range={aspect_ratio_range}: use '
                              'pixels from 1 up, shares of at most 1, and the smaller one first')

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Replace ``img`` (H x W or H x W x C, uint8) and ``img_shape``."""
        image = results['img']
        if image.dtype != np.uint8:
            raise ConfigError(f'RandomResizedCrop takes uint8 images, not {image.dtype}: leave '
                              'to_float32 and color_type of LoadSegImage at their defaults')
        top, left, height, width = self.draw(*image.shape[:2])
        window = image[top:top + height, left:left + width].copy()
        planes = torch.from_numpy(window.reshape(height, width, -1)).permute(2, 0, 1)[None]
        resized = F.interpolate(planes, self.scale, mode='bicubic', antialias=True)
        # A view of planes, as batches have them, so that packing it later need not move a pixel.
        results['img'] = (resized[0].permute(1, 2, 0).numpy() if image.ndim == 3 else
                          resized[0, 0].numpy())
        results['img_shape'] = self.scale
        return results

    def draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw a window of an image, from numpy's generator: top, left, height and width."""
        (low, high), (narrow, wide) = self.crop_ratio_range, self.aspect_ratio_range
        for _ in range(self.max_attempts):
            area = np.random.uniform(low, high) * (height * width)
            aspect = math.exp(np.random.uniform(math.log(narrow), math.log(wide)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = np.random.randint(0, height - h + 1)
                return top, np.random.randint(0, width - w + 1), h, w
        # The largest window of an allowed shape, from the middle.
        w, h = min(width, round(height * wide)), min(height, round(width / narrow))
        return (height - h) // 2, (width - w) // 2, h, w
