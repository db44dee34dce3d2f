"""mmseg's PhotoMetricDistortion for whole batches, on the device where they are.

It takes a fifth of the time of the processes that read the data; a GPU does it at no cost.
"""
from collections.abc import Sequence
from math import isnan, nan

import cv2
import numpy as np
import torch
from torch import Tensor

_LEVELS = np.arange(256, dtype=np.float32)


def draw_distortions(count: int, *, brightness_delta: float = 32,
                     contrast_range: Sequence[float] = (0.5, 1.5),
                     saturation_range: Sequence[float] = (0.5, 1.5),
                     hue_delta: int = 18) -> Tensor:
    """Draw with the probabilities of mmseg's PhotoMetricDistortion, from torch's CPU generator.

    Args:
        count: Number of images.
        brightness_delta: Largest shift, in levels of 255.
        contrast_range: Smallest and largest factor.
        saturation_range: Smallest and largest factor.
        hue_delta: The shift is -hue_delta to hue_delta - 1, in units of two degrees.

    Returns:
        The steps of each image in their order, count x 5, nan where one is left out: what is added
        to every channel, a factor of contrast, factor of saturation, what is added to the hue, and
        a factor of contrast if there was none before.
    """
    low, high = torch.tensor([
        (-brightness_delta, brightness_delta), contrast_range, saturation_range,
        (-hue_delta, hue_delta)], dtype=torch.float64).T
    numbers = torch.rand(count, 9, dtype=torch.float64)
    drawn = (low + numbers[:, 4:8] * (high - low)).where(numbers[:, :4] < 0.5, nan)
    light, contrast, saturation, hue = drawn.split(1, 1)
    first = numbers[:, 8:] < 0.5
    return torch.cat([light, contrast.where(first, nan), saturation, hue.floor(),
                      contrast.where(~first, nan)], 1).float()


def distort(images: Tensor, drawn: Tensor) -> Tensor:
    """Distort each image of a batch by its own draws.

    Every step rounds to whole levels, and HSV has 180 hues, as with mmseg's uint8 images in OpenCV.
    On the CPU the result is OpenCV's; elsewhere a conversion from HSV differs by one level in fewer
    than 1 of 10,000 values.

    Args:
        images: N x 3 x H x W, uint8, BGR; the result is float32.
        drawn: Result of `draw_distortions`.
    """
    if images.device.type != 'cpu':
        return distort_batch(images.float(), drawn)
    distorted = torch.empty(images.shape)
    for image, steps, result in zip(images, drawn.tolist(), distorted):
        pixels = _distort_image(image.permute(1, 2, 0).contiguous().numpy(), *steps)
        result.copy_(torch.from_numpy(pixels).permute(2, 0, 1))
    return distorted


def _distort_image(image: np.ndarray, light: float, before: float, saturation: float, hue: float,
                   after: float) -> np.ndarray:
    if not isnan(light):
        image = cv2.LUT(image, _table(_LEVELS + light))
    if not isnan(before):
        image = cv2.LUT(image, _table(_LEVELS * before))
    if not isnan(saturation):
        image = _look_up_hsv(image, _LEVELS, _LEVELS * saturation)
    if not isnan(hue):
        image = _look_up_hsv(image, (_LEVELS + hue) % 180, _LEVELS)
    return image if isnan(after) else cv2.LUT(image, _table(_LEVELS * after))


def _table(levels: np.ndarray) -> np.ndarray:
    """Convert to uint8 as OpenCV does."""
    return np.clip(levels, 0, 255).astype(np.uint8)


def _look_up_hsv(image: np.ndarray, hues: np.ndarray, saturations: np.ndarray) -> np.ndarray:
    table = _table(np.stack([hues, saturations, _LEVELS], -1))[None]
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), table)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def distort_batch(images: Tensor, drawn: Tensor) -> Tensor:
    """Distort float32 images, N x 3 x H x W, BGR, in place and without waiting for the device.

    All go through the same operations, which do not change an image for which nothing was drawn.
    """
    light, before, saturation, hue, after = drawn.to(
        images.device, non_blocking=True).T[..., None, None, None]
    _whole(images.add_(light.nan_to_num(0.)))
    _whole(images.mul_(before.nan_to_num(1.)))
    h, s, v = _to_hsv(images)
    _put(images, h, _whole(s.mul_(saturation)), v, saturation)
    h, s, v = _to_hsv(images)
    _put(images, h.add_(hue).remainder_(180), s, v, hue)
    return _whole(images.mul_(after.nan_to_num(1.)))


def _whole(levels: Tensor) -> Tensor:
    """Round as a conversion to uint8 does, in place."""
    return levels.clamp_(0, 255).floor_()


def _to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """OpenCV's BGR to HSV for uint8, with its reciprocals in units of 1 / 4096, in float32.

    All products are whole numbers below 2 ** 24, so float32 holds them exactly.
    """
    blue, green, red = images.split(1, 1)
    v = images.amax(1, keepdim=True)
    span = v - images.amin(1, keepdim=True)
    s = (255 * 4096 / v.clamp(min=1)).round_().mul_(span)
    h = torch.where(v == red, green - blue, torch.where(
        v == green, (blue - red).add_(span, alpha=2), (red - green).add_(span, alpha=4)))
    h.mul_((30 * 4096 / span.clamp(min=1)).round_())
    h, s = (part.add_(2048).mul_(1 / 4096).floor_() for part in (h, s))
    return torch.where(h < 0, h + 180, h), s, v


def _put(images: Tensor, h: Tensor, s: Tensor, v: Tensor, drawn: Tensor) -> None:
    """Convert from HSV, rounding as OpenCV does, into those images that have a draw."""
    h, s, v = h * (1 / 30), s * (1 / 255), v * (1 / 255)
    for index, distance in enumerate((
            (h - 4).abs_().sub_(1), (h - 2).abs_().sub_(1), 2 - (h - 3).abs_())):
        plane = images[:, index:index + 1]
        level = (1 - distance.clamp_(0, 1).mul_(s)).mul_(v).mul_(255).floor_()
        plane.copy_(torch.where(drawn.isnan(), plane, level))
