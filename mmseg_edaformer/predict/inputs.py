"""Finding and reading what is predicted: images in files and in memory, the frames of videos."""
import functools
import glob
import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from ..data.transforms import MAX_PIXELS
from ..errors import DataError
from ..files import shorten

IMAGES = frozenset({'.avif', '.bmp', '.gif', '.jp2', '.jpeg', '.jpg', '.pgm', '.png', '.ppm',
                    '.tga', '.tif', '.tiff', '.webp'})
"""Endings of the files of a folder that are taken for images."""
VIDEOS = frozenset({'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv'})
"""Endings of the files that are taken for videos."""


def is_video(path: str | Path) -> bool:
    """Return whether a file has the ending of a video."""
    return Path(path).suffix.lower() in VIDEOS


def find_images(source: str | Path, without: Path | None = None,
                endings: Set[str] = IMAGES) -> list[tuple[Path, str]]:
    """Return the images that a path means, and the name of each within it.

    Args:
        source: A file, whatever it ends in; a folder, with everything below it except hidden files
            and links to folders; or a pattern such as ``photos/**/*.jpg``.
        without: A resolved folder to pass over, such as that of the results.
        endings: Endings that are looked for in a folder.
    """
    path = Path(source)
    if is_folder := os.path.isdir(path):  # Path's own raise where a name is too long
        root, pattern = path, '**/*'
    elif os.path.lexists(path):  # reading it says where a broken link leads
        return [(path, path.name)]
    elif not glob.has_magic(str(source)):
        raise DataError(f'no such file or folder: {source}')
    else:
        first = [glob.has_magic(part) for part in path.parts].index(True)
        parts = [part if part == '**' else part.replace('**', '*') for part in path.parts[first:]]
        root = Path(*path.parts[:first])
        pattern = '/'.join([*parts, '*'] if parts[-1] == '**' else parts)
    resolve = functools.lru_cache(os.path.realpath)
    files = []
    # pathlib does not follow links for **, which glob does, without end where one leads back up.
    for file in sorted(root.glob(pattern), key=str):
        name = file.relative_to(root).as_posix()
        is_hidden = '/.' in f'/{name}' and '/.' not in f'/{pattern}'
        if not is_hidden and (not is_folder or file.suffix.lower() in endings) and (
                not f'{resolve(file.parent)}{os.sep}'.startswith(f'{without}{os.sep}') and
                not os.path.isdir(file)):
            files.append((file, name))
    if not files:
        raise DataError(f'no image in the folder {path}: nothing below it ends in '
                        f'{", ".join(sorted(endings))}' if is_folder else
                        f'no file matches {source}')
    return files


def name_targets(files: Sequence[tuple[Path, str]]) -> dict[Path, str]:
    """Return the name of the results of each image, without a suffix, from those in its folder."""
    names = dict(files)
    stems = Counter(os.path.splitext(name)[0] for name in names.values())
    targets: dict[str, Path] = {}
    for path, name in names.items():
        stem = os.path.splitext(name)[0]
        target = name if stems[stem] > 1 else stem  # a.jpg beside a.png
        other = targets.setdefault('/'.join(map(shorten, target.split('/'))), path)
        if other != path:
            raise DataError(f'{other} and {path} would be written under one name: predict them '
                            'into different folders')
    return {path: target for target, path in targets.items()}


def to_array(image: Any) -> np.ndarray:
    """Return an image in memory as OpenCV has it: H x W x 3, BGR, uint8."""
    if isinstance(image, Image.Image):
        if math.prod(image.size) > MAX_PIXELS:
            raise DataError(f'an image of {image.width}x{image.height} pixels has more than '
                            f'{MAX_PIXELS}: make it smaller')
        if image.mode.startswith(('I', 'F')):
            raise DataError(f'a PIL image of mode {image.mode}: convert it to 8 bits per channel')
        try:
            return np.ascontiguousarray(
                np.array(ImageOps.exif_transpose(image).convert('RGB'))[..., ::-1])
        except (OSError, SyntaxError, ValueError) as error:  # it may be read only now
            raise DataError(f'a PIL image cannot be decoded: {error}') from error
    if not isinstance(image, np.ndarray):
        raise DataError(f'cannot predict a {type(image).__name__}: give a path, an array or a PIL '
                        'image')
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size or (
            image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise DataError(f'an array of shape {image.shape} and type {image.dtype} is not an image: '
                        'give H x W x 3, uint8, in the order blue, green, red')
    return to_bgr(image)


def to_bgr(image: np.ndarray) -> np.ndarray:
    """Return three channels of an image that has one, three or four."""
    if image.ndim == 2 or image.shape[2] == 1:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(image[..., :3])


def scale_down(image: np.ndarray, max_side: int) -> np.ndarray:
    """Scale an image, H x W or H x W x C, down to this many pixels on its longer side."""
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def read_ahead(read: Any, items: Iterable[Any], count: int) -> Iterator[tuple[Any, Future[Any]]]:
    """Yield items and what `read` returns for them, computed by a thread up to `count` ahead."""
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        try:
            for item in items:
                waiting.append((item, thread.submit(read, item)))
                if len(waiting) > count:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


class Video:
    """The frames of a video, H x W x 3, BGR; each iteration begins with the first.

    ``size`` is width and height, ``rate`` frames per second, and ``frames`` the number of frames
    that the file states, or None.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not os.path.isfile(path):
            # OpenCV would also open an address, or look for a numbered series of images.
            raise DataError(f'no such video: {path}')
        capture = self._open()
        width, height, rate, count = map(capture.get, (
            cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS,
            cv2.CAP_PROP_FRAME_COUNT))
        if width * height > MAX_PIXELS:
            raise DataError(f'video {path} has frames of {width:.0f}x{height:.0f} pixels, more '
                            f'than {MAX_PIXELS}: make it smaller')
        first = capture.read()[1]
        if first is None:
            raise DataError(f'video cannot be decoded: {path} ({self.path.stat().st_size} bytes): '
                            'it is damaged, no video, or in a format that OpenCV lacks: convert it '
                            'to .mp4')
        self.size = first.shape[1], first.shape[0]
        self.rate = rate if math.isfinite(rate) and 0 < rate <= 1000 else 25.
        self.frames = int(count) if math.isfinite(count) and count > 0 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        capture = self._open()
        while (frame := capture.read()[1]) is not None:
            yield frame

    def _open(self) -> cv2.VideoCapture:
        name: Any = os.fsencode(self.path)  # a str that is not UTF-8 crashes OpenCV
        with silent_opencv():
            return cv2.VideoCapture(name, cv2.CAP_FFMPEG)


@contextmanager
def silent_opencv() -> Iterator[None]:
    """Silence what OpenCV and its ffmpeg print about damage and missing codecs."""
    os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
    log: Any = cv2.utils.logging
    level = log.getLogLevel()
    log.setLogLevel(log.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        log.setLogLevel(level)
