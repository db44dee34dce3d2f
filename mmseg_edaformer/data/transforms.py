"""Reading images and labels so that a bad file is named, before it reaches the GPU; sizes, crops.

All stand in for mmseg's transforms under the same names in its registry: MMSegInferencer and
inference_model look for these names in a pipeline, and every config gains the checks.
"""
import io
import os
import re
import stat
import warnings
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
"""Larger pictures are refused before they are decoded: a few KB can hold gigabytes of pixels."""

_FORMATS = {'AVIF', 'BMP', 'DIB', 'GIF', 'JPEG', 'JPEG2000', 'MPO', 'PCX', 'PNG', 'PPM', 'SGI',
            'SUN', 'TGA', 'TIFF', 'WEBP'}
_BLANK = 64
_HARMLESS = 'JFIF|Adobe|ICC|subsampling|extraneous bytes before marker 0x(db|c[0-2]|e|fe)'
"""What libjpeg says of JPEGs whose pixels are right, and of CMYK that simplejpeg does not read."""
_ORIENTATION = 0x0112
_REMEDY = 'replace it or remove it'


def read_picture(kind: str, path: str, backend_args: dict[str, Any] | None = None,
                 max_pixels: int = MAX_PIXELS) -> bytes:
    """Read a file once, if it is a file and not too large to be a picture.

    Args:
        kind: 'image' or 'mask', for messages.
        path: Where it is, or its address.
        backend_args: Where files come from, see mmengine's fileio.
        max_pixels: It may have four times as many bytes.

    Raises:
        DataError: It cannot be read, or it is a folder, a pipe or the like.
    """
    try:
        if '://' not in str(path) and (backend_args or {}).get('backend', 'local') == 'local':
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                what = 'a folder' if stat.S_ISDIR(found.st_mode) else 'not a regular file'
                raise DataError(f'{kind} {path} is {what}: put the {kind} there, or remove it')
            if found.st_size > 4 * max_pixels:
                raise DataError(f'{kind} {path} has {found.st_size} bytes, too many for '
                                f'{max_pixels} pixels (max_pixels of the transform): {_REMEDY}')
        return fileio.get(path, backend_args=backend_args)
    except FileNotFoundError as error:
        target = (f': it is a link to {os.readlink(path)}, which is not there'
                  if os.path.islink(path) else '')
        raise DataError(f'{kind} not found: {path}{target}') from error
    except OSError as error:
        raise DataError(f'{kind} cannot be read: {path} ({error.strerror or error}): check its '
                        'permissions and its disk') from error


def allow_pixels(max_pixels: int) -> None:
    """Lift Pillow's limit on pixels for the whole process; larger pictures are refused here."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
        # Up to twice as many Pillow only warns.
        warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


def check_header(kind: str, path: str, content: bytes, max_pixels: int = MAX_PIXELS,
                 checksums: bool = False) -> str:
    """See by its header that a picture can be decoded, and at what cost.

    Pillow's limit on pixels is lifted to ``max_pixels``, for the whole process.

    Args:
        kind: 'image' or 'mask', for messages.
        path: For messages.
        content: The whole file.
        max_pixels: So many pixels are decoded.
        checksums: Whether to check those of a PNG, which Pillow does not do when it decodes: it
            takes damage in the last bytes for pixels. OpenCV notices.

    Returns:
        Pillow's mode of it: 'RGB', 'L', 'P', ..., 'F' for floats.

    Raises:
        DataError: It is no picture, damaged, too large, or an animation.
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
        reason = (f'no picture is recognised in it, it begins with {content[:16]!r}' if content
                  else 'it is empty')
        raise DataError(f'{wrong}: {reason}: {_REMEDY}') from error
    except Image.DecompressionBombError as error:
        raise DataError(f'{wrong}: it has more than {max_pixels} pixels (max_pixels of the '
                        f'transform): {_REMEDY}') from error
    except Exception as error:  # damaged files raise anything
        raise DataError(f'{wrong}: it is damaged ({error}): {_REMEDY}') from error
    if format not in _FORMATS:
        raise DataError(f'{wrong}: {format} files are not read: convert it to PNG')
    if width * height > max_pixels:
        raise DataError(f'{wrong}: it has {width}x{height} pixels, more than {max_pixels} '
                        f'(max_pixels of the transform): {_REMEDY}')
    if several:
        raise DataError(f'{wrong}: it holds several pictures: save the right one alone')
    # What some versions of OpenCV make of half a JPEG is a half grey picture. The data of a scan
    # cannot hold the end mark by chance; the thumbnail before it, and what follows it, can.
    if format in ('JPEG', 'MPO') and not content.endswith(b'\xff\xd9') and (
            content.find(b'\xff\xd9', start) < 0):
        raise DataError(f'{wrong}: it is cut off: {_REMEDY}')
    if simplejpeg is not None and format in ('JPEG', 'MPO'):
        try:  # every bit of it is read, but few pixels are computed; OpenCV keeps no warning
            simplejpeg.decode_jpeg(content, 'GRAY', min_height=1, min_width=1, min_factor=8)
        except ValueError as error:
            if not re.search(_HARMLESS, str(error)):
                raise DataError(f'{wrong}: it is damaged ({error}): save it again if it looks '
                                f'right, or {_REMEDY}') from error
    return mode


def _is_sequence(header: Image.Image) -> bool:
    """Whether there are more pictures than previews of the first one."""
    if header.format != 'TIFF':
        return header.format != 'MPO' and getattr(header, 'is_animated', False)
    try:
        header.seek(1)
    except EOFError:
        return False
    smaller_or_mask = 0b101
    return not header.tag_v2.get(254, 0) & smaller_or_mask  # type: ignore[attr-defined]


@TRANSFORMS.register_module()
class LoadSegImage(LoadImageFromFile):
    """mmcv's LoadImageFromFile that names the file which it cannot read.

    What it reads it reads as mmcv does: upright by EXIF, with the alpha channel dropped, 16 bits
    cut to 8, palettes and CMYK turned into colours. The decoders 'turbojpeg' and 'tifffile' read
    what Pillow does not know, and come without the check of the header.

    Args:
        to_float32: Whether the image is to be float32 instead of uint8.
        color_type: 'color', 'grayscale', 'unchanged' and more, see mmcv's imfrombytes.
        imdecode_backend: Decoder of the image.
        ignore_empty: Whether a bad image gives None instead of an error.
        backend_args: Where files come from, see mmengine's fileio.
        max_pixels: Images with more pixels are refused before they are decoded.
        skip_list: A text file to which bad images are appended instead of raising an error, see
            `SkipList`; the sample is then None, upon which mmengine draws another one.
        blank: With ``skip_list``, go on with a small black image without labels instead.

    Raises:
        DataError: The image is missing or cannot be decoded.
    """

    def __init__(self, to_float32: bool = False, color_type: str = 'color',
                 imdecode_backend: str = 'cv2', *, ignore_empty: bool = False,
                 backend_args: dict[str, Any] | None = None, max_pixels: int = MAX_PIXELS,
                 skip_list: str | None = None, blank: bool = False) -> None:
        super().__init__(to_float32, color_type, imdecode_backend, ignore_empty=ignore_empty,
                         backend_args=backend_args)
        self.max_pixels = max_pixels
        self.skip_list = SkipList(skip_list) if skip_list else None
        self.blank = blank

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Read the image into ``img`` (H x W x 3, BGR), its size into two more entries."""
        path = results['img_path']
        try:
            image = self._read(path)
            if self.skip_list is not None:
                self.skip_list.in_a_row = 0
        except DataError as error:
            if self.skip_list is not None:
                self.skip_list.add(path, error)
            elif not self.ignore_empty:
                raise
            if self.skip_list is None or not self.blank:
                return None
            results['skipped'] = True
            channels = () if 'grayscale' in self.color_type else (3,)
            image = np.zeros((_BLANK, _BLANK, *channels), np.uint8)
        results['img'] = image.astype(np.float32) if self.to_float32 else image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results

    def _read(self, path: str) -> np.ndarray:
        content = read_picture('image', path, self.backend_args, self.max_pixels)
        wrong = f'image cannot be decoded: {path} ({len(content)} bytes)'
        if self.imdecode_backend in ('cv2', 'pillow'):
            mode = check_header('image', path, content, self.max_pixels,
                                checksums=self.imdecode_backend == 'pillow')
            if mode == 'F' and self.color_type != 'unchanged':
                raise DataError(f'{wrong}: its pixels are floats of unknown range: convert it to '
                                '8 bits per channel')
        try:
            image = mmcv.imfrombytes(content, self.color_type, backend=self.imdecode_backend)
        except Exception as error:  # damaged files raise anything
            raise DataError(f'{wrong}: {_REMEDY}') from error
        if image is None:
            raise DataError(f'{wrong}: {_REMEDY}')
        return image


@TRANSFORMS.register_module()
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
        max_pixels: Masks with more pixels are refused before they are decoded.
        skip_list: A text file to which bad masks are appended instead of raising an error, see
            `SkipList`; the sample is then None, upon which mmengine draws another one.
        blank: With ``skip_list``, go on without any label instead: all is 255.

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
        self.max_pixels = max_pixels
        self.skip_list = SkipList(skip_list) if skip_list else None
        self.blank = blank

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Read the labels into ``gt_seg_map`` (H x W, uint8)."""
        if not results.get('skipped'):
            try:
                results = super().transform(results)
                if self.skip_list is not None:
                    self.skip_list.in_a_row = 0
                return results
            except DataError as error:
                if self.skip_list is None:
                    raise
                self.skip_list.add(results['seg_map_path'], error)
            if not self.blank:
                return None
        results['gt_seg_map'] = np.full(results['ori_shape'], IGNORED, np.uint8)
        results['seg_fields'].append('gt_seg_map')
        return results

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        mask = self._read(results)
        shape = results.get('ori_shape', mask.shape)
        if mask.shape != tuple(shape):
            orientation = _orientation(results) if mask.shape == tuple(shape[::-1]) else 1
            cause = (f': its EXIF orientation, {orientation}, turns the image and not the mask: '
                     'save the image upright, without EXIF'
                     if orientation > 4 else ': they do not belong together')
            raise DataError(f'mask {results["seg_map_path"]} is {mask.shape[1]}x{mask.shape[0]} '
                            f'pixels, its image {shape[1]}x{shape[0]}{cause}')
        table = self._table(results)
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

    def _read(self, results: dict[str, Any]) -> np.ndarray:
        path = results['seg_map_path']
        content = read_picture('mask', path, self.backend_args, self.max_pixels)
        wrong = f'mask cannot be decoded: {path} ({len(content)} bytes)'
        if self.imdecode_backend in ('cv2', 'pillow'):
            check_header('mask', path, content, self.max_pixels,
                         checksums=self.imdecode_backend == 'pillow')
        try:
            mask = mmcv.imfrombytes(content, 'unchanged', backend=self.imdecode_backend)
        except Exception as error:  # damaged files raise anything
            raise DataError(f'{wrong}: {_REMEDY}') from error
        if mask is None or mask.ndim < 2:
            raise DataError(f'{wrong}: {_REMEDY}')
        if mask.ndim == 3 and mask.shape[2] == 1:
            mask = mask[..., 0]
        if mask.ndim != 2:
            raise DataError(f'mask {path} has {mask.shape[-1]} channels: it must be one channel of '
                            'class indices, not colours')
        return mask

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


@TRANSFORMS.register_module()
class SegResize(Resize):
    """mmseg's Resize that leaves the short side of a thin image at least one pixel."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize the image and what belongs to it."""
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


def _orientation(results: dict[str, Any]) -> int:
    """The EXIF orientation of the image, 1 to 8."""
    path = results.get('img_path') or ''
    if not os.path.isfile(path):
        return 1
    with Image.open(path) as image:
        return image.getexif().get(_ORIENTATION, 1)
