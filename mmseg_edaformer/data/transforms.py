"""Reading images and labels so that a bad file is named before it reaches the GPU; sizes, crops.

Each class is one of mmcv's or mmseg's with more checks, and takes all of its arguments. `REPLACES`
says which one.
"""
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv.image.geometric import rescale_size
from mmcv.transforms import LoadImageFromFile
from mmcv.transforms.utils import cache_randomness
from mmengine import fileio
from mmseg.datasets.transforms import LoadAnnotations, RandomCrop, Resize
from mmseg.registry import TRANSFORMS
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from .bad_files import SkipList

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: damaged JPEGs are read as OpenCV reads them
    simplejpeg = None  # type: ignore[assignment]

IGNORED = 255
MAX_PIXELS = 2 ** 28
"""Larger images are refused before they are decoded: a few KB can hold gigabytes of pixels."""

ORIENTATION = 0x0112
"""EXIF's tag for how the camera was held."""

_FORMATS = {'AVIF', 'BMP', 'DIB', 'GIF', 'JPEG', 'JPEG2000', 'MPO', 'PCX', 'PNG', 'PPM', 'SGI',
            'SUN', 'TGA', 'TIFF', 'WEBP'}
_HARMLESS = 'JFIF|Adobe|ICC|subsampling|extraneous bytes before marker 0x(db|c[0-2]|e|fe)'
"""libjpeg's warnings about JPEGs whose pixels are right, and about CMYK, which simplejpeg lacks."""
_REMEDY = 'replace it or remove it'


def read_file(kind: str, path: str, backend_args: dict[str, Any] | None = None,
              max_pixels: int = MAX_PIXELS) -> bytes:
    """Read a file of at most four bytes for each of ``max_pixels``.

    Raises:
        DataError: It cannot be read, or it is a folder, a pipe or the like.
    """
    try:
        if '://' not in str(path) and (backend_args or {}).get('backend', 'local') == 'local':
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                actual = 'a folder' if stat.S_ISDIR(status.st_mode) else 'not a regular file'
                raise DataError(f'{kind} {path} is {actual}: put the {kind} there, or remove it')
            if status.st_size > 4 * max_pixels:
                raise DataError(f'{kind} {path} has {status.st_size} bytes, too many for '
                                f'{max_pixels} pixels (max_pixels of the transform): {_REMEDY}')
        return fileio.get(path, backend_args=backend_args)
    except FileNotFoundError as error:
        target = (f': it is a link to {os.readlink(path)}, which does not exist'
                  if os.path.islink(path) else '')
        raise DataError(f'{kind} not found: {path}{target}') from error
    except OSError as error:
        raise DataError(f'{kind} cannot be read: {path} ({error.strerror or error}): check its '
                        'permissions and its disk') from error


def allow_pixels(max_pixels: int) -> None:
    """Raise Pillow's limit on pixels for the whole process; larger images are refused here."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
        # Pillow only warns of up to twice as many.
        warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


def check_header(kind: str, path: str, content: bytes, max_pixels: int = MAX_PIXELS,
                 checksums: bool = False) -> str:
    """Check by its header that an image can be decoded, and at what cost.

    Args:
        kind: 'image' or 'mask', for messages.
        path: Path of the file, for messages.
        content: The whole file.
        max_pixels: Largest number of pixels that is decoded; see `allow_pixels`.
        checksums: Whether to check those of a PNG. OpenCV does when it decodes; Pillow does not,
            and takes damage in the last bytes for pixels.

    Returns:
        Pillow's mode of the image: 'RGB', 'L', 'P', ..., 'F' for floats.

    Raises:
        DataError: It is no image, damaged, too large, or an animation.
    """
    wrong = f'{kind} cannot be decoded: {path} ({len(content)} bytes)'
    allow_pixels(max_pixels)
    try:
        with Image.open(io.BytesIO(content)) as header:
            (width, height), mode, format = header.size, header.mode, header.format
            start = header.fp.tell() if header.fp is not None else 0
            several = _is_sequence(header)
            if checksums:
                header.verify()
    except UnidentifiedImageError as error:
        reason = (f'its format is unknown, it begins with {content[:16]!r}' if content
                  else 'it is empty')
        raise DataError(f'{wrong}: {reason}: {_REMEDY}') from error
    except Image.DecompressionBombError as error:
        raise DataError(f'{wrong}: it has more than {max_pixels} pixels (max_pixels of the '
                        f'transform): {_REMEDY}') from error
    except Exception as error:  # damaged files raise anything
        raise DataError(f'{wrong}: it is damaged ({error}): {_REMEDY}') from error
    if format not in _FORMATS:
        raise DataError(f'{wrong}: {format} files are not supported: convert it to PNG')
    if width * height > max_pixels:
        raise DataError(f'{wrong}: it has {width}x{height} pixels, more than {max_pixels} '
                        f'(max_pixels of the transform): {_REMEDY}')
    if several:
        raise DataError(f'{wrong}: it holds several images: save the right one alone')
    if format in ('JPEG', 'MPO'):
        # Some versions of OpenCV decode half a JPEG to a half grey image. The data of a scan
        # cannot hold the end mark by chance; the thumbnail before it, and what follows it, can.
        if not content.endswith(b'\xff\xd9') and content.find(b'\xff\xd9', start) < 0:
            raise DataError(f'{wrong}: it is cut off: {_REMEDY}')
        if simplejpeg is not None:
            try:  # reads every bit, but computes few pixels; OpenCV drops these warnings
                simplejpeg.decode_jpeg(content, 'GRAY', min_height=1, min_width=1, min_factor=8)
            except ValueError as error:
                if not re.search(_HARMLESS, str(error)):
                    raise DataError(f'{wrong}: it is damaged ({error}): save it again if it looks '
                                    f'right, or {_REMEDY}') from error
    return mode


def _is_sequence(header: Image.Image) -> bool:
    """Return whether a file holds more images than previews of the first one."""
    if header.format != 'TIFF':
        return header.format != 'MPO' and getattr(header, 'is_animated', False)
    try:
        header.seek(1)
    except EOFError:
        return False
    smaller_or_mask = 0b101
    return not header.tag_v2.get(254, 0) & smaller_or_mask  # type: ignore[attr-defined]


class _CheckedReader:
    """What `LoadSegImage` and `LoadSegLabels` share."""

    backend_args: dict[str, Any] | None
    imdecode_backend: str

    def _set_up(self, max_pixels: int, skip_list: str | None, blank: bool) -> None:
        self.max_pixels, self.blank = max_pixels, blank
        self.skip_list = SkipList(skip_list) if skip_list else None

    @contextmanager
    def _listing(self, path: str) -> Iterator[None]:
        """List a bad file instead of raising its error, if there is a list."""
        try:
            yield
            if self.skip_list is not None:
                self.skip_list.in_a_row = 0
        except DataError as error:
            if self.skip_list is None:
                raise
            self.skip_list.add(path, error)

    def _decode(self, kind: str, path: str, flag: str) -> np.ndarray:
        content = read_file(kind, path, self.backend_args, self.max_pixels)
        wrong = f'{kind} cannot be decoded: {path} ({len(content)} bytes)'
        if self.imdecode_backend in ('cv2', 'pillow'):
            mode = check_header(kind, path, content, self.max_pixels,
                                checksums=self.imdecode_backend == 'pillow')
            if mode == 'F' and flag != 'unchanged':
                raise DataError(f'{wrong}: its pixels are floats of unknown range: convert it to '
                                '8 bits per channel')
        try:
            pixels = mmcv.imfrombytes(content, flag, backend=self.imdecode_backend)
        except Exception as error:  # damaged files raise anything
            raise DataError(f'{wrong}: {_REMEDY}') from error
        if pixels is None or pixels.ndim < 2:
            raise DataError(f'{wrong}: {_REMEDY}')
        return pixels


@TRANSFORMS.register_module()
class LoadSegImage(_CheckedReader, LoadImageFromFile):
    """mmcv's LoadImageFromFile that names the file which it cannot read.

    A good file gives the same image: upright by EXIF, without alpha channel, 16 bits cut to 8,
    palettes and CMYK turned into colours. The decoders 'turbojpeg' and 'tifffile' read formats that
    Pillow does not know, and skip the check of the header.

    Args:
        to_float32: Whether the image becomes float32 instead of uint8.
        color_type: 'color', 'grayscale', 'unchanged' and more, see mmcv's imfrombytes.
        imdecode_backend: Decoder of the image.
        ignore_empty: Whether a bad image gives None instead of an error.
        backend_args: Backend of mmengine's fileio.
        max_pixels: Largest number of pixels that is decoded.
        skip_list: Text file to which bad images are appended instead of raising an error, see
            `SkipList`; the sample is then None, so that mmengine draws another one.
        blank: With ``skip_list``, return a small black image without labels instead of None.

    Raises:
        DataError: The image is missing or cannot be decoded.
    """

    def __init__(self, to_float32: bool = False, color_type: str = 'color',
                 imdecode_backend: str = 'cv2', *, ignore_empty: bool = False,
                 backend_args: dict[str, Any] | None = None, max_pixels: int = MAX_PIXELS,
                 skip_list: str | None = None, blank: bool = False) -> None:
        super().__init__(to_float32, color_type, imdecode_backend, ignore_empty=ignore_empty,
                         backend_args=backend_args)
        self._set_up(max_pixels, skip_list, blank)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Read the image into ``img`` (H x W x 3, BGR), and set ``img_shape`` and ``ori_shape``."""
        path, image = results['img_path'], None
        try:
            with self._listing(path):
                image = self._decode('image', path, self.color_type)
        except DataError:
            if self.skip_list is not None or not self.ignore_empty:
                raise
        if image is None:
            if self.skip_list is None or not self.blank:
                return None
            results['skipped'] = True
            image = np.zeros((64, 64) if 'grayscale' in self.color_type else (64, 64, 3), np.uint8)
        results['img'] = image.astype(np.float32) if self.to_float32 else image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results


@TRANSFORMS.register_module()
class LoadSegLabels(_CheckedReader, LoadAnnotations):
    """mmseg's LoadAnnotations that checks what it reads.

    Where no data set gives a mask, as in mmseg's inferencers, it does nothing.

    Args:
        reduce_zero_label: Whether 0 means no label; by default what the data set says.
        backend_args: Backend of mmengine's fileio.
        imdecode_backend: Decoder of the mask.
        num_classes: Number of classes; labels after ``reduce_zero_label`` and ``label_map`` lie
            below it or are 255. None checks no range.
        max_pixels: Largest number of pixels that is decoded.
        skip_list: Text file for bad masks, see `LoadSegImage`.
        blank: With ``skip_list``, return a mask without any label, all 255, instead of None.

    Raises:
        DataError: The mask is missing, cannot be decoded, is of another size than the image, has
            several channels, or a label is out of range; the message names the file.
    """

    def __init__(self, reduce_zero_label: bool | None = None,
                 backend_args: dict[str, Any] | None = None, imdecode_backend: str = 'pillow',
                 num_classes: int | None = None, max_pixels: int = MAX_PIXELS,
                 skip_list: str | None = None, blank: bool = False) -> None:
        super().__init__(reduce_zero_label, backend_args, imdecode_backend)
        self.num_classes = num_classes
        self._set_up(max_pixels, skip_list, blank)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Read the labels into ``gt_seg_map`` (H x W, uint8)."""
        if not results.get('skipped'):
            if 'seg_map_path' not in results:
                if 'seg_fields' not in results:
                    return results
                raise DataError(f'{results["img_path"]} has no mask: set data_prefix.seg_map_path '
                                f'of the data set, or remove {type(self).__name__}')
            with self._listing(results['seg_map_path']):
                return super().transform(results)
            if not self.blank:
                return None
        results['gt_seg_map'] = np.full(results['ori_shape'], IGNORED, np.uint8)
        results['seg_fields'].append('gt_seg_map')
        return results

    def table(self, results: Mapping[str, Any]) -> np.ndarray:
        """Return the label of each value of a mask, with ``label_map`` and the like of results."""
        table = np.arange(256)
        if self.zero_is_no_label(results):
            table = np.array([IGNORED, *range(254), IGNORED])
        mapped = table.copy()
        for old, new in (results.get('label_map') or {}).items():
            mapped[table == old] = new
        return mapped.astype(np.uint8)

    def zero_is_no_label(self, results: Mapping[str, Any]) -> bool:
        """Return ``reduce_zero_label``, that of the data set unless this transform has its own."""
        return bool(results.get('reduce_zero_label') if self.reduce_zero_label is None
                    else self.reduce_zero_label)

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        path = results['seg_map_path']
        mask = self._decode('mask', path, 'unchanged')
        if mask.ndim == 3 and mask.shape[2] == 1:
            mask = mask[..., 0]
        if mask.ndim != 2:
            raise DataError(f'mask {path} has {mask.shape[-1]} channels: it must be one channel of '
                            'class indices, not colours')
        shape = tuple(results.get('ori_shape', mask.shape))
        if mask.shape != shape:
            cause, image_path = 'they do not belong together', results.get('img_path') or ''
            if mask.shape == shape[::-1] and os.path.isfile(image_path):
                with Image.open(image_path) as image:
                    turned = orientation(image)
                if turned > 4:
                    cause = (f'its EXIF orientation, {turned}, turns the image and not the mask: '
                             'save the image upright, without EXIF')
            raise DataError(f'mask {path} is {mask.shape[1]}x{mask.shape[0]} pixels, its image '
                            f'{shape[1]}x{shape[0]}: {cause}')
        table = self.table(results)
        bad = (table >= (self.num_classes or IGNORED)) & (table != IGNORED)
        # OpenCV looks uint8 up four times as fast as numpy.
        with np.errstate(invalid='ignore'):
            small = mask.astype(np.uint8, copy=False)
        wrong = cv2.LUT(small, bad.astype(np.uint8))
        if mask.dtype not in (np.uint8, bool):
            wrong[mask != small] = 1
        if wrong.any():
            raise DataError(self._describe(mask, wrong > 0, results))
        results['gt_seg_map'] = cv2.LUT(small, table)
        results['seg_fields'].append('gt_seg_map')

    def _describe(self, mask: np.ndarray, wrong: np.ndarray, results: dict[str, Any]) -> str:
        values = np.unique(mask[wrong])
        zero = self.zero_is_no_label(results)
        valid = (f'its {self.num_classes} classes are {int(zero)} to {self.num_classes - 1 + zero}'
                 if self.num_classes else 'labels lie below 255')
        return (f'mask {results["seg_map_path"]} holds the label '
                f'{", ".join(map(str, values[:5]))}{" and more" if len(values) > 5 else ""} '
                f'({int(wrong.sum())} pixels): {valid}, and {"0 and " if zero else ""}255 mean no '
                'label')


@TRANSFORMS.register_module()
class SegResize(Resize):
    """mmseg's Resize that leaves the short side of a thin image at least one pixel."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize the image and its labels."""
        width, height = size = results['img'].shape[1::-1]
        if self.scale is None:
            size = tuple(int(side * factor + 0.5) for side, factor in zip(size, self.scale_factor))
        elif self.keep_ratio:
            size = rescale_size((width, height), self.scale)
        if min(size) > 0:
            return super().transform(results)
        return Resize(tuple(max(side, 1) for side in size), backend=self.backend,
                      interpolation=self.interpolation).transform(results)


@TRANSFORMS.register_module()
class RandomSegCrop(RandomCrop):
    """mmseg's RandomCrop, which draws the same crops and counts their labels without sorting."""

    @cache_randomness
    def crop_bbox(self, results: dict[str, Any]) -> tuple[int, int, int, int]:
        """Return top, bottom, left and right of a crop that no valid class dominates."""
        height, width = self.crop_size
        for checks_left in range(10 if self.cat_max_ratio < 1 else 0, -1, -1):
            top, left = (np.random.randint(0, max(whole - part, 0) + 1)
                         for whole, part in zip(results['img'].shape, self.crop_size))
            box = top, top + height, left, left + width
            if checks_left:
                labels = self.crop(results['gt_seg_map'], box).ravel()
                counts = np.bincount(labels, minlength=self.ignore_index + 1)
                counts[self.ignore_index] = 0
                if (np.count_nonzero(counts) > 1 and
                        counts.max() / counts.sum() < self.cat_max_ratio):
                    break
        return box


REPLACES: dict[str, type] = {'LoadImageFromFile': LoadSegImage, 'LoadAnnotations': LoadSegLabels,
                             'Resize': SegResize, 'RandomCrop': RandomSegCrop}
"""Names of mmcv's and mmseg's transforms, and the class that can stand in for each."""


def with_checks(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step of a pipeline with our class in place of the one that it can stand in for."""
    stand_in = REPLACES.get(step['type'])
    return {**step, 'type': stand_in.__name__} if stand_in else dict(step)


def without_checks(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step of a pipeline with the name of mmcv or mmseg in place of our class."""
    names = {**{cls.__name__: name for name, cls in REPLACES.items()},
             **{name: name for name in REPLACES}}
    return {**step, 'type': names.get(str(step['type']).rpartition('.')[2], step['type'])}


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8."""
    try:
        number = image.getexif().get(ORIENTATION)
    except Exception:  # EXIF can hold anything, and decoders ignore what they do not understand
        return 1
    return number if isinstance(number, int) and 1 <= number <= 8 else 1
