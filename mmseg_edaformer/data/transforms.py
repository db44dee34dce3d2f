"""Reading images and labels so that a bad file is named, before it reaches the GPU, and cropping.

All stand in for mmseg's transforms under the same names in its registry: MMSegInferencer and
inference_model look for these names in a pipeline, and every config gains the checks.
"""
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmcv.transforms.utils import cache_randomness
from mmengine import fileio
from mmseg.datasets.transforms import LoadAnnotations, RandomCrop
from mmseg.registry import TRANSFORMS

from ..errors import DataError

IGNORED = 255


@TRANSFORMS.register_module(name='LoadImageFromFile', force=True)
class LoadSegImage(LoadImageFromFile):
    """mmcv's LoadImageFromFile that names the file which it cannot read.

    Raises:
        DataError: The image is missing or cannot be decoded.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        path = results['img_path']
        try:
            return super().transform(results)
        except FileNotFoundError as error:
            raise DataError(f'image not found: {path}') from error
        except (AssertionError, OSError, ValueError, cv2.error) as error:
            raise DataError(f'image cannot be decoded: {path} '
                            f'({_size(path)} bytes): replace it or remove it') from error


@TRANSFORMS.register_module(name='LoadAnnotations', force=True)
class LoadSegLabels(LoadAnnotations):
    """mmseg's LoadAnnotations that checks what it reads.

    A label out of range is an assertion deep in CUDA otherwise, a 16-bit label wraps around
    silently, and a coloured mask fails far from its cause.

    Args:
        reduce_zero_label: Whether 0 means no label; by default what the data set says.
        backend_args: Where files come from, see mmengine's fileio.
        imdecode_backend: Decoder of the mask.
        num_classes: Labels after ``reduce_zero_label`` and ``label_map`` lie below it or are 255;
            without it their range is not checked.

    Raises:
        DataError: The mask is missing, cannot be decoded, is of another size than the image, has
            several channels, or a label is out of range; the message names the file.
    """

    def __init__(self, reduce_zero_label: bool | None = None,
                 backend_args: dict[str, Any] | None = None, imdecode_backend: str = 'pillow',
                 num_classes: int | None = None) -> None:
        super().__init__(reduce_zero_label, backend_args, imdecode_backend)
        self.num_classes = num_classes

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        path = results['seg_map_path']
        try:
            mask = mmcv.imfrombytes(fileio.get(path, backend_args=self.backend_args),
                                    flag='unchanged', backend=self.imdecode_backend)
        except FileNotFoundError as error:
            raise DataError(f'mask not found: {path} for image {results.get("img_path")}'
                            ) from error
        except (OSError, ValueError, cv2.error) as error:
            raise DataError(f'mask cannot be decoded: {path} ({_size(path)} bytes)') from error
        if mask is None:
            raise DataError(f'mask cannot be decoded: {path} ({_size(path)} bytes)')
        mask = mask.squeeze()
        if mask.ndim != 2:
            raise DataError(f'mask {path} has {mask.shape[-1]} channels: it must be one channel of '
                            'class indices, not colours')
        if 'ori_shape' in results and mask.shape != tuple(results['ori_shape']):
            raise DataError(f'mask {path} is {mask.shape[1]}x{mask.shape[0]} pixels, its image '
                            f'{results["ori_shape"][1]}x{results["ori_shape"][0]}')
        table = self._table(results)
        bad = (table >= (self.num_classes or IGNORED)) & (table != IGNORED)
        # OpenCV looks uint8 up four times as fast as numpy.
        small = mask.astype(np.uint8, copy=False)
        wrong = cv2.LUT(small, bad.astype(np.uint8))
        if mask.dtype not in (np.uint8, bool):
            wrong |= mask != small
        if wrong.any():
            raise DataError(self._describe(mask, wrong > 0, results))
        results['gt_seg_map'] = cv2.LUT(small, table)
        results['seg_fields'].append('gt_seg_map')

    def _describe(self, mask: np.ndarray, wrong: np.ndarray, results: dict[str, Any]) -> str:
        values = np.unique(mask[wrong])
        zero = self._zero_is_no_label(results)
        valid = (f'its {self.num_classes} classes are {int(zero)} to {self.num_classes - 1 + zero}'
                 if self.num_classes else 'labels lie below 255')
        return (f'mask {results["seg_map_path"]} holds the label '
                f'{", ".join(map(str, values[:5]))}{" and more" if len(values) > 5 else ""} '
                f'({int(wrong.sum())} pixels): {valid}, and {"0 and " if zero else ""}255 mean no '
                'label')

    def _zero_is_no_label(self, results: dict[str, Any]) -> bool:
        return bool(results.get('reduce_zero_label') if self.reduce_zero_label is None
                    else self.reduce_zero_label)

    def _table(self, results: dict[str, Any]) -> np.ndarray:
        """What each of the 256 values of a mask becomes."""
        table = np.arange(256)
        if self._zero_is_no_label(results):
            table = np.where((table == 0) | (table == IGNORED), IGNORED, table - 1)
        if results.get('label_map') is not None:
            mapped = table.copy()
            for old, new in results['label_map'].items():
                mapped[table == old] = new
            table = mapped
        return table.astype(np.uint8)


@TRANSFORMS.register_module(name='RandomCrop', force=True)
class RandomSegCrop(RandomCrop):
    """mmseg's RandomCrop, which draws the same crops and counts their labels without sorting.

    With ``cat_max_ratio`` it counts the labels of up to ten crops per image.
    """

    @cache_randomness
    def crop_bbox(self, results: dict[str, Any]) -> tuple[int, int, int, int]:
        """Top, bottom, left and right of a crop that no class but ``ignore_index`` dominates."""
        box = self._draw(results['img'].shape)
        for _ in range(10 if self.cat_max_ratio < 1 else 0):
            labels, counts = count_labels(self.crop(results['gt_seg_map'], box))
            counts = counts[labels != self.ignore_index]
            if len(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio:
                break
            box = self._draw(results['img'].shape)
        return box

    def _draw(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        top, left = (np.random.randint(0, max(whole - part, 0) + 1)
                     for whole, part in zip(shape, self.crop_size))
        return top, top + self.crop_size[0], left, left + self.crop_size[1]


def count_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels of a map in ascending order, and the number of pixels of each."""
    if labels.dtype != np.uint8:
        return np.unique(labels, return_counts=True)
    # OpenCV counts in float32, which is exact up to 16 million pixels.
    counts = cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel().astype(int)
    present = np.flatnonzero(counts)
    return present, counts[present]


def _size(path: str) -> int | str:
    return Path(path).stat().st_size if Path(path).is_file() else 'unknown'
