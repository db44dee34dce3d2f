"""A fast random crop; mmpretrain's RandAugment and RandomErasing for whole batches on the device.

These two take a third or more of the time of the processes that read the data; a GPU does them at
no cost. mmpretrain's own transforms draw what happens to an image where it is read, from the same
random numbers; only the arithmetic is done on the device.
"""
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmengine.dataset import default_collate
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import FUNCTIONS
from mmseg.registry import MODELS, TRANSFORMS
from torch import Tensor

from ..errors import ConfigError

_RAMP = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
_BY_LEVEL = ('Invert', 'Posterize', 'Solarize', 'SolarizeAdd', 'Brightness')
_BY_STATISTICS = {'AutoContrast': 'auto_contrast', 'Equalize': 'equalize'}
_BY_FACTOR = {'ColorTransform': 'color', 'Contrast': 'contrast', 'Sharpness': 'sharpness'}
_GEOMETRIC = ('Rotate', 'Shear', 'Translate')


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


class Operation(NamedTuple):
    """One step for one image: a function of `augment_batch`, and its numbers."""

    kind: str
    values: Any = None


def draw_augmentation(transform: Any, shape: tuple[int, int]) -> Iterator[Operation]:
    """Draw what mmpretrain's RandAugment or RandomErasing would do to an image of height x width.

    It leaves numpy's generator as the transform does, except for the noise of RandomErasing, which
    comes from the generator of the device.
    """
    if type(transform).__name__ == 'RandomErasing':
        if not transform.random_disable():
            std = (0, 0, 0) if transform.mode == 'const' else transform.fill_std
            yield Operation('erase', (*transform.random_patch(*shape), *transform.fill_color, *std))
        return
    for index in transform.random_policy_indices():
        step = transform.transforms[index]
        name = type(step).__name__
        if name in _BY_LEVEL:  # a map of levels to levels, found by applying the step to all
            table = step.transform(dict(img=_RAMP.copy()))['img'][0, :, 0]
            if not np.array_equal(table, _RAMP[0, :, 0]):
                yield Operation('table', table)
        elif not step.random_disable():
            if name in _BY_STATISTICS:
                yield Operation(_BY_STATISTICS[name])
                continue
            value = step.angle if name == 'Rotate' else step.magnitude
            value = step.random_negative(step.random_magnitude() if value is None else value)
            if name in _BY_FACTOR:
                yield Operation(_BY_FACTOR[name], 1 + value)
            else:
                fill = np.broadcast_to(step.pad_val, 3)
                matrix = cv2.invertAffineTransform(_matrix(step, value, shape))
                yield Operation('warp', (*matrix.ravel().tolist(), *fill.tolist()))


def _matrix(step: Any, value: float, shape: tuple[int, int]) -> np.ndarray:
    """Return the 2 x 3 matrix by which Rotate, Shear or Translate moves the pixels (x, y)."""
    height, width = shape
    if type(step).__name__ == 'Rotate':
        center = step.center or ((width - 1) * 0.5, (height - 1) * 0.5)
        return cv2.getRotationMatrix2D(center, -value, step.scale)
    matrix = np.eye(2, 3, dtype=np.float32)
    along = 0 if step.direction == 'horizontal' else 1
    if type(step).__name__ == 'Shear':
        matrix[along, 1 - along] = value
    else:
        matrix[along, 2] = value * shape[1 - along]
    return matrix


def _find_limit(transform: Any) -> str | None:
    """Return why `augment_batch` cannot do a transform; None if it can."""
    name = type(transform).__name__
    if name == 'RandomErasing':
        return ('RandomErasing with mode="rand" needs a fill_std'
                if transform.mode == 'rand' and transform.fill_std is None else None)
    if name != 'RandAugment':
        return f'the device cannot do {name}, only RandAugment and RandomErasing'
    known = (*_BY_LEVEL, *_BY_STATISTICS, *_BY_FACTOR, *_GEOMETRIC)
    unknown = [type(step).__name__ for step in transform.transforms
               if type(step).__name__ not in known or
               getattr(step, 'interpolation', 'bicubic') != 'bicubic']
    return (f'the device cannot do {", ".join(unknown)} of RandAugment, only {", ".join(known)}, '
            'with hparams=dict(interpolation="bicubic")') if unknown else None


@TRANSFORMS.register_module()
class PackForDevice(BaseTransform):
    """mmpretrain's PackInputs, with transforms that are left to the training device.

    It stands last in a pipeline. The loader then needs `augment_collate` as its collate function
    and the model `AugmentingPreProcessor` as its data preprocessor.

    Args:
        transforms: Configs of mmpretrain's RandAugment and RandomErasing, in order.

    Raises:
        ConfigError: The device cannot do one of them.
    """

    def __init__(self, transforms: Sequence[dict[str, Any]]) -> None:
        self.transforms = [TRANSFORMS.build(transform) for transform in transforms]
        for limit in filter(None, map(_find_limit, self.transforms)):
            raise ConfigError(f'PackForDevice: {limit}. Put it into the pipeline before '
                              'PackForDevice')
        self.pack = TRANSFORMS.build(dict(type='mmpretrain.PackInputs'))

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Return ``inputs`` (3 x H x W, uint8), ``data_samples``, and what was ``drawn``."""
        shape = results['img'].shape[:2]
        drawn = [operation for transform in self.transforms
                 for operation in draw_augmentation(transform, shape)]
        return dict(self.pack(results), drawn=drawn)


class Unfinished:
    """Images of a batch before augmentation; only `AugmentingPreProcessor` takes them."""

    def __init__(self, images: Tensor, drawn: Sequence[Sequence[Operation]]) -> None:
        self.images, self.drawn = images, drawn

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        raise ConfigError('the images of this batch are not augmented yet: set model.data_'
                          "preprocessor.type to 'mmseg.AugmentingPreProcessor', or put the "
                          'transforms of PackForDevice into the pipeline, with PackInputs')

    def pin_memory(self) -> 'Unfinished':
        """Pin the images; DataLoader calls it."""
        return Unfinished(self.images.pin_memory(), self.drawn)


@FUNCTIONS.register_module()
def augment_collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack what `PackForDevice` packs, for an `AugmentingPreProcessor`."""
    return dict(inputs=Unfinished(default_collate([sample['inputs'] for sample in samples]),
                                  [sample['drawn'] for sample in samples]),
                data_samples=[sample['data_samples'] for sample in samples])


class _Augmenting(BaseDataPreprocessor):

    def forward(self, data: dict[str, Any], training: bool = False) -> Any:
        """Move a batch to the device, augment it, and continue as ClsDataPreprocessor."""
        inputs = data['inputs']
        if isinstance(inputs, Unfinished):
            data = dict(data, inputs=augment_batch(self.cast_data(inputs.images), inputs.drawn))
        return super().forward(data, training)


@MODELS.register_module(name='AugmentingPreProcessor')
def augmenting_preprocessor(**kwargs: Any) -> BaseDataPreprocessor:
    """mmpretrain's ClsDataPreprocessor that also takes the batches of `augment_collate`.

    The result is as if RandAugment and RandomErasing had been done before.
    """
    from mmpretrain.models import ClsDataPreprocessor
    made = type('AugmentingPreProcessor', (_Augmenting, ClsDataPreprocessor), {})(**kwargs)
    made._non_blocking = True  # matters where the dataloader pins memory
    return made


@torch.no_grad()
def augment_batch(images: Tensor, drawn: Sequence[Sequence[Operation]]) -> Tensor:
    """Augment each image of a batch, in place, and return the batch.

    Every operation rounds to whole levels, as mmpretrain's do with OpenCV and numpy. The results
    are the same; where pixels move, fewer than 1 of 1,000 values differs, by one level. OpenCV
    before 5 differs more, because it rounds positions to 1/32 of a pixel.

    Args:
        images: N x 3 x H x W, uint8, BGR.
        drawn: Operations of each image, in order.
    """
    for place in range(max(map(len, drawn), default=0)):
        groups: dict[str, dict[int, Any]] = {}
        for row, operations in enumerate(drawn):
            if place < len(operations):
                kind, values = operations[place]
                groups.setdefault(kind, {})[row] = values
        for kind, group in groups.items():
            rows = torch.tensor(list(group)).to(images.device, non_blocking=True)
            images[rows] = _KINDS[kind](images[rows], list(group.values()))
    return images


def _numbers(values: Sequence[Any], images: Tensor) -> Tensor:
    """Return one row for each image on its device, float32."""
    return torch.tensor(values, dtype=torch.float32).to(images.device, non_blocking=True)


def _blend(levels: Tensor, others: Tensor, factors: Sequence[float]) -> Tensor:
    """OpenCV's addWeighted of float32, cut to whole levels, with one rounding.

    With two, a blend of a level with itself often falls just short of it, and is cut to the next.
    """
    dims = (slice(None),) + (None,) * (levels.dim() - 1)
    share = _numbers(factors, levels)[dims]
    rest = _numbers([1 - factor for factor in factors], levels)[dims]
    blended = levels.double() * share.double() + (others * rest).double()
    return blended.float().clamp_(0, 255).to(torch.uint8)


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Map levels by the tables of each image and channel, N x 3 x 256."""
    return tables.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def _table(images: Tensor, values: Sequence[np.ndarray]) -> Tensor:
    tables = torch.from_numpy(np.stack(values)).to(images.device, non_blocking=True)
    return _look_up(images, tables[:, None].expand(-1, 3, -1))


def _auto_contrast(images: Tensor, _: Sequence[None]) -> Tensor:
    low, high = (side[..., None].double() for side in images.flatten(2).aminmax(dim=2))
    levels = torch.arange(256, device=images.device)
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    return _look_up(images, torch.where(
        high > low, (levels * scale - low * scale).clamp_(0, 255), levels))


def _equalize(images: Tensor, _: Sequence[None]) -> Tensor:
    """Spread the levels of each channel so that all are about as frequent."""
    flat = images.flatten(2).long()
    offsets = 256 * torch.arange(flat.shape[0] * 3, device=images.device).view(-1, 3, 1)
    index = (flat + offsets).flatten()
    counts = index.new_zeros(flat.shape[0] * 3 * 256).scatter_add_(
        0, index, torch.ones_like(index)).view(-1, 3, 256)
    brightest = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    below = F.pad(counts.cumsum(2)[..., :-1] + step // 2, (1, 0)) // step.clamp(min=1)
    levels = torch.arange(256, device=images.device)
    return _look_up(images, torch.where(step > 0, below.clamp_(max=255), levels))


def _grey(images: Tensor) -> Tensor:
    """OpenCV's BGR to grey, N x 1 x H x W, in whole levels; int32."""
    blue, green, red = images.int().split(1, 1)
    return (3735 * blue + 19235 * green + 9798 * red + 2 ** 14) >> 15


def _contrast(images: Tensor, factors: Sequence[float]) -> Tensor:
    """Blend with the mean grey."""
    mean = _grey(images).flatten(1).double().mean(1).round_().float()[:, None, None]
    levels = torch.arange(256., device=images.device).expand(len(images), 3, -1)
    return _look_up(images, _blend(levels, mean, factors))


def _color(images: Tensor, factors: Sequence[float]) -> Tensor:
    """Blend with the grey image."""
    factor = _numbers(factors, images)[:, None, None, None]
    return (images * factor + _grey(images) * (1 - factor)).round_().clamp_(0, 255).to(torch.uint8)


def _sharpness(images: Tensor, factors: Sequence[float]) -> Tensor:
    """Blend with a blurred image: nine pixels, the middle one five times."""
    sharp = images.float()
    nine = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), 'reflect'), 3, 1, divisor_override=1)
    return _blend(sharp, nine.add_(sharp, alpha=4).div_(13).round_(), factors)


def _warp(images: Tensor, values: Sequence[Sequence[float]]) -> Tensor:
    """Fetch each pixel from where an affine map says, bicubic; a colour fills the outside."""
    numbers = _numbers(values, images)
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    sides = []
    for side, row in zip((width, height), numbers[:, :6].view(-1, 2, 3).unbind(1)):
        a, b, c = row[:, :, None, None].unbind(1)
        sides.append((a * x + b * y + c).mul_(2 / max(side - 1, 1)).sub_(1))
    fill = numbers[:, 6:, None, None]
    moved = F.grid_sample(images - fill, torch.stack(sides, -1), 'bicubic', align_corners=True)
    return moved.add_(fill).round_().clamp_(0, 255).to(torch.uint8)


def _erase(images: Tensor, values: Sequence[Sequence[float]]) -> Tensor:
    """Fill a box with normal noise."""
    numbers = _numbers(values, images)[..., None, None]
    top, left, high, wide = numbers[:, :4].unbind(1)
    x = torch.arange(images.shape[3], device=images.device)
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    box = (y >= top) & (y < top + high) & (x >= left) & (x < left + wide)
    noise = torch.randn(images.shape, device=images.device)
    noise = noise.mul_(numbers[:, 7:]).add_(numbers[:, 4:7]).clamp_(0, 255).to(torch.uint8)
    return torch.where(box[:, None], noise, images)


_KINDS: dict[str, Callable[[Tensor, Any], Tensor]] = dict(
    table=_table, auto_contrast=_auto_contrast, equalize=_equalize, contrast=_contrast,
    color=_color, sharpness=_sharpness, warp=_warp, erase=_erase)
