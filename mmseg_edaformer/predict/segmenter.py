"""Pictures and videos in, label maps and overlays out."""
import glob
import hashlib
import io
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmseg.registry import TRANSFORMS
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from prettytable import PrettyTable
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from .. import __version__
from ..cost import count_macs
from ..data.transforms import MAX_PIXELS, allow_pixels, with_checks
from ..engine import load_checkpoint, load_from_file
from ..engine.allocator import keep_freed_memory
from ..engine.run_config import load_config
from ..engine.single_file import Description, describe, load_model, read_description
from ..errors import CheckpointError, ConfigError, DataError, shown
from ..files import remove_partial_files, replacing, shorten, write_file
from ..isr import ISRRatio, apply_isr, remove_isr
from ..isr.registry import find_attention

PICTURES = frozenset({'.avif', '.bmp', '.gif', '.jp2', '.jpeg', '.jpg', '.pgm', '.png', '.ppm',
                      '.tga', '.tif', '.tiff', '.webp'})
"""What files of a folder end in that are taken for pictures."""
VIDEOS = frozenset({'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv'})
"""What a file ends in that is taken for a video."""
LARGE = 2048 * 2048
"""Pixels of an image, and of what the network sees of it at once, above which the default ratio is
auto: attention is quadratic in them."""

_BATCH_PIXELS = 2 ** 23  # of the inputs that the network sees at once
_WINDOW_PIXELS = 2 ** 25  # of the pictures that wait for others of their size
_COUNTED = 2 ** 22
_TEXT = 'mmseg_edaformer'
_SHOWN = 20
_NONE, _AUTO = ISRRatio.parse('none'), ISRRatio.parse('auto')
_MEGAPIXELS = f'{LARGE / 1e6:.1f} megapixels'
_QUICK = 2 ** 21  # pixels that are not worth an estimate
_LONG = 5.  # seconds for one image, from which on the estimate is worth a line
_LOG = logging.getLogger(__name__)
_LONGEST = 235  # bytes of a name between two slashes: 255, less what a suffix needs
_P = TypeVar('_P')


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What was found in one picture.

    ``labels`` (H x W) are indices into ``classes``, uint8, or int16 of more than 256 classes;
    ``picture`` (H x W x 3, uint8, BGR) is what they belong to, upright; ``palette`` holds the
    colours of the classes, RGB.
    """
    labels: np.ndarray
    picture: np.ndarray
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the pixels that each class has, the largest first; those that occur."""
        return class_shares(count_pixels(self.labels, len(self.classes)), self.classes)

    @property
    def mask(self) -> Image.Image:
        """The labels as a picture in the colours of the classes whose pixel values are labels.

        Of more than 256 classes it is one of 16 bits without colours.
        """
        if self.labels.dtype != np.uint8:
            return Image.fromarray(self.labels.astype(np.uint16))
        mask = Image.fromarray(self.labels)
        mask.putpalette(bytes(np.array(self.palette, np.uint8)))
        return mask

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """The picture, tinted in the colours of the classes."""
        return Image.fromarray(self.draw(opacity)[..., ::-1])

    def draw(self, opacity: float = 0.5) -> np.ndarray:
        """The `overlay` as OpenCV has pictures, H x W x 3, BGR."""
        if self.labels.dtype == np.uint8:
            table = np.zeros((256, 1, 3), np.uint8)
            table[:len(self.palette), 0] = np.array(self.palette, np.uint8)[:, ::-1]
            colours = cv2.applyColorMap(self.labels, table)
        else:
            colours = np.array(self.palette, np.uint8)[self.labels, ::-1]
        return cv2.addWeighted(self.picture, 1 - opacity, colours, opacity, 0)


class _Turns:
    """A lock, and what each thread has set; a copy begins anew."""

    def __init__(self) -> None:
        self.lock, self.own = threading.Lock(), threading.local()

    def __reduce__(self) -> Any:
        return _Turns, ()


class Segmenter:
    """Predicts pictures of any size, one or many, as mmseg's ``inference_model`` does.

    The label maps are those of mmseg, and of `tools/test.py`, pixel for pixel. Threads may share
    one, see `isr`: it predicts for one of them at a time.

    Args:
        model: A work dir, a config, or a .safetensors that tools/convert_checkpoint.py --config
            wrote, which needs nothing else.
        checkpoint: Of a config; of a work dir by default its best one, or else its last one.
        device: Such as 'cpu' or 'cuda:1'; by default the first GPU, if there is one.
        isr: What `ISRRatio.parse` reads; hooks of the config are not looked at. The default is
            none, and auto for images of which the network sees more than `LARGE` pixels at once.
        max_side: The network sees larger images scaled down, so that the longer side has this many
            pixels (up to 31 more, where the pipeline rounds); label maps keep the original size.
        batch_size: So many images of equal size are predicted at once, by default 8 on a GPU and 1
            on a CPU, where more are not faster; large ones are fewer.

    Raises:
        UserError: The model, the checkpoint or the device is not there, or they do not fit.
    """

    def __init__(self, model: str | Path, checkpoint: str | Path | None = None, *,
                 device: str | None = None, isr: ISRRatio | int | str | None = None,
                 max_side: int | None = None, batch_size: int | None = None) -> None:
        if not isinstance(model, (str, Path)):
            raise ConfigError(f'model {model!r} is no path: give a work dir, a config or a '
                              '.safetensors')
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f'batch_size {batch_size}: it must be 1 or more')
        if max_side is not None and max_side < 32:
            raise ConfigError(f'max_side {max_side}: give 32 or more pixels')
        allow_pixels(MAX_PIXELS)
        self.device = _find_device(device)
        self.batch_size = batch_size or (1 if self.device.type == 'cpu' else 8)
        self.description, self.model, self.source = _load(Path(model), checkpoint)
        self.model.to(self.device)
        init_default_scope('mmseg')
        self.max_side = max_side
        self._turns = _Turns()
        self._isr: ISRRatio | None = None
        self._applied = _NONE
        self._told: dict[ISRRatio, int] = {}
        self._reduced: dict[tuple[int, int], bool] = {}
        try:
            first, *rest = map(with_checks, self.description.pipeline)
            self._read_file = TRANSFORMS.build(first)
            steps: list[Any] = rest
            if max_side is not None:  # after what resizes for good, before multiples of 32
                resized = [index for index, step in enumerate(steps, 1)
                           if 'Resize' in str(step['type']) and 'Multiple' not in str(step['type'])]
                steps.insert(max(resized, default=0), self._scale_down)
            self._prepare = Compose(steps)
            if Path(model).suffix == '.safetensors':
                self._rehearse()
        except Exception as error:  # of values that do not go together
            if Path(model).suffix != '.safetensors':
                raise
            raise CheckpointError(f'{model} is refused: it cannot predict an image '
                                  f'({_first_line(error)})') from error
        self.isr = isr  # type: ignore[assignment]
        del self._turns.own.isr  # this thread, too, follows others until it sets one

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.description.classes

    @property
    def isr(self) -> ISRRatio:
        """The ISR ratio, which can be set at any time: an `ISRRatio` or what its parse reads.

        Setting None brings the default back. A thread that has set a ratio keeps it; the others
        follow the last one that any thread has set.
        """
        return self._ratio or _NONE

    @isr.setter
    def isr(self, ratio: ISRRatio | int | str | None) -> None:
        parsed = None if ratio is None else ISRRatio.parse(ratio)
        with self._turns.lock:
            self._apply(parsed or _NONE)
            self._isr = self._turns.own.isr = parsed

    @property
    def _ratio(self) -> ISRRatio | None:
        """What this thread has set, None for the default."""
        found: ISRRatio | None = getattr(self._turns.own, 'isr', self._isr)
        return found

    def is_reduced(self, height: int, width: int) -> bool:
        """Whether the default ratio is in force and is auto for pictures of this size."""
        if self._ratio is not None or height * width <= LARGE:
            return False
        if (height, width) not in self._reduced:
            self._reduced[height, width] = self._is_large(
                self.load(np.zeros((height, width, 3), np.uint8))[1])
        return self._reduced[height, width]

    def __call__(self, source: Any, skipped: dict[str, str] | None = None) -> Any:
        """Predict a picture, or many one after the other.

        Args:
            source: A picture: a path, an array (H x W x 3, uint8, BGR as OpenCV and mmseg have it)
                or one of PIL. Or many: a list of them or any other iterable, a folder with all that
                is below it, a pattern such as ``'photos/*.jpg'``, or a video.
            skipped: Pictures that cannot be read are put in here, with the reason, and passed over;
                otherwise the first one is an error.

        Returns:
            A `Segmentation`; of many an iterator over them, which reads and predicts as it goes and
            keeps none of them.

        Raises:
            DataError: There is no such file, or it is no picture and no video.
        """
        if isinstance(source, (np.ndarray, Image.Image)):
            return next(self.stream([source]))
        if not isinstance(source, (str, Path)):
            return self.stream(source, skipped)
        path = Path(source)
        if os.path.isfile(path) and path.suffix.lower() in VIDEOS:
            return self.stream(Video(path), skipped)
        files = [file for file, _ in find_pictures(source)]
        return next(self.stream(files)) if os.path.isfile(path) else self.stream(files, skipped)

    def stream(self, items: Iterable[Any],
               skipped: dict[str, str] | None = None) -> Iterator[Segmentation]:
        """Predict pictures in their order, those of equal size together.

        Memory does not grow with their number: a thread reads a few ahead.

        Args:
            items: Paths, arrays or pictures of PIL.
            skipped: As of a call.

        Raises:
            DataError: One cannot be read, after all before it were predicted.
        """
        window: list[tuple[np.ndarray, dict[str, Any]]] = []
        pixels = 0
        for item, ready in _ahead(self.load, items, self.batch_size):
            try:
                window.append(ready.result())
                pixels += math.prod(window[-1][0].shape[:2])
            except DataError as error:
                if skipped is None:
                    yield from self._predict(window)
                    raise
                skipped[str(item) if isinstance(item, (str, Path)) else 'a picture'] = str(error)
            if pixels >= _WINDOW_PIXELS or len(window) >= (
                    4 * self.batch_size if self.batch_size > 1 else 1):
                yield from self._predict(window)
                window, pixels = [], 0
        yield from self._predict(window)

    def fingerprint(self) -> str:
        """What decides over the labels: model, weights, ratio and largest side, as a hash."""
        told: list[Any] = [asdict(self.description), str(self._ratio or f'auto above {LARGE}')]
        if self.max_side is not None:
            told.append(self.max_side)
        found = hashlib.sha256(json.dumps(told, default=str).encode())
        for name, value in self.model.state_dict().items():
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def load(self, item: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """A picture, H x W x 3, BGR, and what the model's ``data_preprocessor`` wants of it.

        Raises:
            DataError: It cannot be read.
        """
        if isinstance(item, (str, Path)):
            # A str may be more than that, see predict_many.
            results = self._read_file(dict(
                img_path=item if isinstance(item, str) else str(item)))
            image = results['img']
        else:
            image = _as_array(item)
            results = dict(img_path=None, img=image, img_shape=image.shape[:2],
                           ori_shape=image.shape[:2])
        picture = image.astype(np.uint8, copy=False)
        if picture.ndim == 2 or picture.shape[2] == 1:
            picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
        return picture[..., :3], self._prepare(results)

    def _predict(self, window: Sequence[tuple[np.ndarray, dict[str, Any]]]
                 ) -> Iterator[Segmentation]:
        sizes: dict[tuple[Any, ...], list[int]] = {}
        for index, (_, data) in enumerate(window):
            sizes.setdefault((self._is_large(data), *data['inputs'].shape), []).append(index)
        labels: dict[int, np.ndarray] = {}
        for (_, *shape), indices in sizes.items():
            step = max(1, min(self.batch_size, _BATCH_PIXELS // math.prod(shape[1:])))
            for start in range(0, len(indices), step):
                part = indices[start:start + step]
                labels.update(zip(part, self._labels([window[index][1] for index in part])))
        for index, (picture, _) in enumerate(window):
            yield Segmentation(labels[index], picture, self.classes, self.description.palette)

    def _rehearse(self) -> None:
        """Predict a small part of an image: what a file describes may fit no image at all."""
        data = self.load(np.zeros((64, 64, 3), np.uint8))[1]
        data['inputs'] = data['inputs'][:, :64, :64]
        self._labels([data])

    def _labels(self, batch: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """Label maps of images of one size; in halves where they do not fit into memory."""
        data = {name: [each[name] for each in batch] for name in ('inputs', 'data_samples')}
        model: Any = self.model
        try:
            with self._turns.lock, torch.no_grad():
                self._make_ready(batch[0])
                if hasattr(model, 'predict_labels'):
                    maps = model.predict_labels(**model.data_preprocessor(data, False))
                else:
                    dtype = torch.uint8 if len(self.classes) <= 256 else torch.int16
                    maps = [sample.pred_sem_seg.data[0].to(dtype)
                            for sample in model.test_step(data)]
                return [labels.cpu().numpy() for labels in maps]
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                height, width = batch[0]['inputs'].shape[1:]
                raise DataError(f'an image of {width}x{height} pixels does not fit into the memory '
                                f'of {self.device}: set isr to auto or a lower max_side, or take '
                                'device cpu') from None
        half = len(batch) // 2
        return self._labels(batch[:half]) + self._labels(batch[half:])

    def tell_cost(self, item: Any) -> None:
        """Log what one picture will take, if that is long, as predicting it does beforehand.

        Raises:
            DataError: It cannot be read.
        """
        _, data = self.load(item)
        with self._turns.lock, torch.no_grad():
            self._make_ready(data)

    def _scale_down(self, results: dict[str, Any]) -> dict[str, Any]:
        """The step of the pipeline that ``max_side`` is."""
        assert self.max_side is not None
        results['img'] = scale_down(results['img'], self.max_side)
        results['img_shape'] = results['img'].shape[:2]
        return results

    def _is_large(self, data: dict[str, Any]) -> bool:
        """Whether the default ratio of an image is auto."""
        return (math.prod(data['data_samples'].ori_shape) > LARGE and
                math.prod(data['inputs'].shape[1:]) > LARGE and
                math.prod(self._views(data)[0]) > LARGE and self._reducible)

    @property
    def _reducible(self) -> bool:
        return any(part.stages for part in find_attention(self.model).parts)

    def _views(self, data: dict[str, Any]) -> tuple[tuple[int, int], int]:
        """Height and width of what the network sees at once of an image, and how often it looks."""
        from ..analysis.benchmark import windows  # which takes a while
        height, width = data['inputs'].shape[1:]
        found = windows(self.model, (height, width))
        rows, columns = found[0]
        return (len(range(height)[rows]), len(range(width)[columns])), len(found)

    def _apply(self, ratio: ISRRatio) -> None:
        if ratio == _NONE:  # also of models in which there is nothing to reduce
            remove_isr(self.model)
        else:
            apply_isr(self.model, ratio)
        self._applied = ratio

    def _make_ready(self, data: dict[str, Any]) -> None:
        """Give the model the ratio of this thread and image, and log what takes long."""
        ratio = self._ratio or (_AUTO if self._is_large(data) else _NONE)
        if ratio != self._applied:
            self._apply(ratio)
        height, width = data['inputs'].shape[1:]
        if height * width <= self._told.get(ratio, _QUICK):
            return
        self._told[ratio] = 4 * height * width  # one line for all that are about as large
        view, count = self._views(data)
        seconds = count * self._estimate(view)
        by_default = self._ratio is None and ratio == _AUTO
        if by_default or not seconds <= _LONG:
            duration = ('long' if math.isnan(seconds) else f'about {seconds:.0f} s' if seconds < 100
                        else f'about {seconds / 60:.0f} min')
            height, width = data['data_samples'].ori_shape
            text = (f'an image of {width}x{height} pixels takes {duration} on {self.device} at ISR '
                    f'ratio {ratio}')
            if by_default:
                text += (f', the default above {_MEGAPIXELS} (isr none or --isr-ratio none: the '
                         'model as trained)')
            less = 'a smaller max_side (--max-side N) takes less'
            if ratio != _AUTO and count == 1 and self._reducible:
                less += ', and so may isr auto (--isr-ratio auto)'
            _LOG.warning('%s: %s', text, less)

    def _estimate(self, view: tuple[int, int]) -> float:
        """Seconds of a pass: those of a small one, by how many more multiply-accumulates it has.

        nan where it cannot be told.
        """
        model: Any = self.model
        scale = max(2., math.sqrt(math.prod(view)) / 1024)
        rows, columns = (max(32, round(side / scale / 32) * 32) for side in view)
        try:
            for _ in range(2):  # the first one may compile
                start = time.perf_counter()
                getattr(model, 'predict_labels', model.predict)(
                    torch.zeros(1, 3, rows, columns, device=self.device))
                if self.device.type == 'cuda':
                    torch.cuda.synchronize(self.device)
                seconds = time.perf_counter() - start
            large, small = (count_macs(model, size, compute=False)
                            for size in (view, (rows, columns)))
        except Exception:  # which the prediction itself need not meet
            return math.nan
        return seconds * large / small


class Video:
    """The frames of a video, H x W x 3, BGR; each iteration begins with the first.

    Attributes:
        size: Width and height in pixels.
        rate: Frames per second.
        frames: How many there are, as far as the file says; None where it does not.

    Raises:
        DataError: The file is not there, or OpenCV cannot decode a frame of it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not os.path.isfile(path):
            # OpenCV would also open an address, or look for a numbered series of pictures.
            raise DataError(f'no such video: {path}')
        with self._open() as capture:
            width, height = (int(capture.get(which)) for which in (
                cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            rate, count = (capture.get(which) for which in (
                cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
            if width * height > MAX_PIXELS:
                raise DataError(f'video {path} has frames of {width}x{height} pixels, more than '
                                f'{MAX_PIXELS}: make it smaller')
            first = capture.read()[1]
        if first is None:
            raise DataError(f'video cannot be decoded: {path} ({self.path.stat().st_size} bytes): '
                            'it is damaged, no video, or in a format that OpenCV lacks: convert it '
                            'to .mp4')
        self.size = first.shape[1], first.shape[0]
        self.rate = rate if math.isfinite(rate) and 0 < rate <= 1000 else 25.
        self.frames = int(count) if math.isfinite(count) and count > 0 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        with self._open() as capture:
            while (frame := capture.read()[1]) is not None:
                yield frame

    @contextmanager
    def _open(self) -> Iterator[cv2.VideoCapture]:
        name: Any = os.fsencode(self.path)  # a str that is not UTF-8 crashes OpenCV
        with _quiet_opencv():
            capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
        try:
            yield capture
        finally:
            capture.release()


class _FFmpeg:
    """Writes frames as H.264 through the command ffmpeg; it is used as ``cv2.VideoWriter`` is."""

    def __init__(self, path: Path, size: tuple[int, int], rate: float) -> None:
        self.process = subprocess.Popen(
            ['ffmpeg', '-y', '-loglevel', 'quiet', '-f', 'rawvideo', '-pix_fmt', 'bgr24',
             '-video_size', '{}x{}'.format(*size), '-framerate', str(rate), '-i', 'pipe:',
             '-vf', 'crop=trunc(iw/2)*2:trunc(ih/2)*2',  # browsers want two rows to share colours
             '-c:v', 'h264', '-pix_fmt', 'yuv420p', '-movflags', '+faststart', f'file:{path}'],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def write(self, frame: np.ndarray) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(frame.tobytes())
        except BrokenPipeError as error:
            raise OSError('ffmpeg ended too early, is the disk full?') from error

    def release(self) -> None:
        self.process.communicate()


def _open_writer(path: Path, size: tuple[int, int], rate: float) -> tuple[Any, str]:
    """Return what writes a video, and its codec: 'h264' if ffmpeg or OpenCV has it, or 'mpeg4'.

    Raises:
        ConfigError: None of them can.
    """
    with suppress(OSError):  # it may be missing, without encoder, or with one for other hardware
        trial = _FFmpeg(path, size, rate).process
        trial.communicate(bytes(3 * size[0] * size[1]))
        if trial.returncode == 0:
            return _FFmpeg(path, size, rate), 'h264'
    name: Any = os.fsencode(path)
    for fourcc, codec in ('avc1', 'h264'), ('mp4v', 'mpeg4'):
        with _quiet_opencv():
            writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*fourcc), rate, size)
        if writer.isOpened():
            return writer, codec
    raise ConfigError(f'{path.parent} gets no video: neither ffmpeg nor OpenCV can write one of '
                      '{}x{} pixels: install ffmpeg'.format(*size))


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Keep what OpenCV and its ffmpeg say of damage and of missing codecs off the terminal."""
    os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
    log: Any = cv2.utils.logging
    level = log.getLogLevel()
    log.setLogLevel(log.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        log.setLogLevel(level)


def scale_down(image: np.ndarray, max_side: int) -> np.ndarray:
    """An image, H x W or H x W x C, of at most so many pixels on its longer side."""
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def find_pictures(source: str | Path, without: Path | None = None,
                  endings: Set[str] = PICTURES) -> list[tuple[Path, str]]:
    """The pictures that a path means, and what each is called within it.

    Args:
        source: A file, whatever it ends in; a folder, with all that is below it and ends as
            pictures do, but nothing hidden and no links to folders; or a pattern such as
            ``photos/**/*.jpg``.
        without: A folder to pass over, such as that of the results.
        endings: What files of a folder are looked for.

    Raises:
        DataError: There is none.
    """
    path = Path(source)
    if os.path.isdir(path):  # Path's own raise where a name is too long
        found = []
        for where, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith('.') and
                                Path(where, name).resolve() != without)
            found += [Path(where, name) for name in sorted(names)
                      if not name.startswith('.') and Path(name).suffix.lower() in endings]
        if not found:
            raise DataError(f'no picture in the folder {path}: nothing below it ends in '
                            f'{", ".join(sorted(endings))}')
        return [(file, file.relative_to(path).as_posix()) for file in found]
    if os.path.lexists(path):  # reading it says where a broken link leads
        return [(path, path.name)]
    if not glob.has_magic(str(source)):
        raise DataError(f'no such file or folder: {source}')
    plain = list(path.parts[:-1])
    while any(map(glob.has_magic, plain)):
        plain.pop()
    root, parts = Path(*plain), path.parts[len(plain):]
    if '**' in parts:  # glob follows links, without end where one leads back up; pathlib does not
        pattern = '/'.join(part if part == '**' else part.replace('**', '*') for part in (
            *parts, *(['*'] if parts[-1] == '**' else [])))
        found = [file for file in root.glob(pattern) if '/.' in f'/{pattern}' or not any(
            name.startswith('.') for name in file.relative_to(root).parts)]
    else:
        found = [Path(name) for name in glob.glob(str(source))]
    found = sorted((file for file in found if not os.path.isdir(file) and without not in Path(
        os.path.realpath(file.parent), file.name).parents), key=str)
    if not found:
        raise DataError(f'no file matches {source}')
    return [(file, file.relative_to(root).as_posix()) for file in found]


def predict_pictures(segmenter: Segmenter, sources: Sequence[str | Path],
                     out: str | Path) -> dict[str, Any]:
    """Write masks and overlays of pictures to a folder; a run that was stopped goes on.

    A mask is a PNG of one channel in the colours of the classes. It is written last and whole, and
    notes of which picture, weights and ratio it is; those that are there and would come out the
    same are left alone. Of more than one picture, those that cannot be read are passed over. Paths
    in the summary are relative to its folder.

    Args:
        segmenter: What predicts.
        sources: Files, folders and patterns, see `find_pictures`.
        out: Gets ``masks``, ``overlays``, ``legend.png`` and ``summary.json``.

    Returns:
        What the summary holds.

    Raises:
        DataError: There is no picture, not one can be read, or two would get the same name.
        ConfigError: The folder cannot be written to.
    """
    out = Path(out)
    files = [each for source in sources
             for each in find_pictures(source, Path(os.path.realpath(out)))]
    targets = name_targets(files)
    with writing(out):
        write_file(out / 'legend.png', encode_png(draw_legend(segmenter)))
        make_folders(out, targets.values())
    summary = Summary(segmenter, out)
    base = segmenter.fingerprint()
    notes = {path: make_note(base, path, target) for path, target in targets.items()}
    ahead = []
    for path, target in targets.items():
        labels = read_mask(out / 'masks' / f'{target}.png', notes[path])
        if labels is None:
            ahead.append(path)
        else:
            summary.add(path, target, labels)
    summary.kept = len(targets) - len(ahead)
    lost = summary.skipped if len(targets) > 1 else None
    with writing(out), progress_bar('predict', len(targets), summary.kept) as advance:
        waiting = iter(ahead)
        for result in segmenter.stream(ahead, lost):
            path = next(path for path in waiting if str(path) not in summary.skipped)
            target = targets[path]
            write_result(out, target, result, notes[path])
            summary.add(path, target, result.labels)
            advance(len(summary.pictures) + len(summary.skipped))
    if not summary.pictures:
        raise DataError('not one picture can be read: ' + next(iter(summary.skipped.values())))
    return summary.write()


def predict_video(segmenter: Segmenter, source: str | Path, out: str | Path, *,
                  masks: bool = False) -> dict[str, Any]:
    """Write the overlays of a video to another one, which has the same pace and no sound.

    It is written whole; one that is there and would come out the same is left alone.

    Args:
        segmenter: What predicts.
        source: The video.
        out: Gets a video called after it, ``legend.png`` and ``summary.json``.
        masks: Whether to write the mask of each frame to ``masks`` as well.

    Returns:
        What the summary holds.

    Raises:
        DataError: The video cannot be decoded.
        ConfigError: The folder cannot be written to.
    """
    out, video = Path(out), Video(source)
    name = shorten(video.path.stem, _LONGEST)
    target = out / f'{name}_overlay.mp4'
    note = make_note(segmenter.fingerprint(), video.path, f'{target.name} {masks}')
    before = _read_json(out / 'summary.json')
    if target.is_file() and before.get('note') == note:
        return before
    summary = Summary(segmenter, out)
    with writing(out):
        write_file(out / 'legend.png', encode_png(draw_legend(segmenter)))
    # Where the video is replaced, the summary is not to speak for the new one yet.
    (out / 'summary.json').unlink(missing_ok=True)
    count = 0
    with writing(out), replacing(target) as partial, \
            progress_bar('frames', video.frames) as advance:
        writer, codec = _open_writer(partial, video.size, video.rate)
        try:
            for result in segmenter.stream(video):
                writer.write(cv2.resize(result.draw(), video.size))  # a video may change its size
                if masks:
                    write_file(out / 'masks' / name / f'{count:06}.png',
                               encode_png(result.mask))
                summary.count(result.labels)
                count += 1
                advance(count)
        finally:
            writer.release()
        try:
            written = Video(partial).frames
        except DataError:
            written = 0
        if written != count:  # the writer is silent about a full disk
            raise OSError(f'{written} of {count} frames arrived, is the disk full?')
    return summary.write(note=note, video=shown(target.name), codec=codec, frames=count,
                         frames_expected=video.frames)


def describe_summary(summary: dict[str, Any], out: str | Path,
                     files: str = 'masks, overlays, legend.png and summary.json') -> str:
    """A summary for a terminal: the classes that were found, what was done, what was not."""
    rows = PrettyTable(['class', 'share of pixels'], align='l')
    rows.align['share of pixels'] = 'r'
    shares = list(summary['shares'].items())
    for name, share in shares[:_SHOWN]:
        rows.add_row([name, f'{share:.1%}'])
    lines = [str(rows)]
    if len(shares) > _SHOWN:
        lines.append(f'and {len(shares) - _SHOWN} more classes')
    for reason in [*summary['skipped'].values()][:_SHOWN]:
        lines.append(f'skipped: {reason}')
    if len(summary['skipped']) > _SHOWN:
        lines.append(f'skipped: {len(summary["skipped"]) - _SHOWN} more, see summary.json')
    if 'video' in summary:
        lines.append(f'{summary["frames"]} frames at ISR ratio {summary["isr_ratio"]}: '
                     f'{shown(Path(out, summary["video"]))}')
        if summary.get('codec') != 'h264':
            lines.append('It is MPEG-4 part 2, which browsers do not play: install ffmpeg, remove '
                         'the video and run again to get H.264')
        if (summary['frames_expected'] or 0) > summary['frames'] + 1:
            lines.append(f'The file speaks of {summary["frames_expected"]} frames: it may be cut '
                         'off')
    else:
        pictures = summary['pictures']
        done = pictures if isinstance(pictures, int) else len(pictures)
        lines.append(f'{done} picture{"s" * (done != 1)} at ISR ratio {summary["isr_ratio"]}' +
                     (f', {summary["kept"]} of them done before' if summary['kept'] else '') +
                     (f', {len(summary["skipped"])} skipped' if summary['skipped'] else ''))
        lines.append(f'{files} are in {shown(out)}')
    return '\n'.join(lines)


def make_folders(out: Path, targets: Iterable[str],
                 kinds: Sequence[str] = ('masks', 'overlays')) -> None:
    """Make the folders of the results, and clear away what killed runs left half-written."""
    for folder in {out / kind / Path(target).parent for target in targets for kind in kinds}:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_files(folder)


def write_result(out: Path, target: str, result: Segmentation, note: str,
                 overlay: bool = True) -> None:
    """Write the overlay and then the mask, whose note says that both are there.

    Args:
        out: Folder of the results.
        target: What they are called.
        result: What was found.
        note: See `make_note`.
        overlay: Otherwise one that is there, which would not belong to the mask, is removed.
    """
    if overlay:
        _write_overlay(out / 'overlays' / target, result)
    else:
        for suffix in '.jpg', '.png':
            (out / 'overlays' / f'{target}{suffix}').unlink(missing_ok=True)
    write_file(out / 'masks' / f'{target}.png', encode_png(result.mask, note))


def read_mask(path: Path, *notes: str) -> np.ndarray | None:
    """The labels of a mask, if it is there and has one of these notes."""
    try:
        with Image.open(path) as mask:
            return np.array(mask) if mask.info.get(_TEXT) in notes else None
    except (OSError, SyntaxError, ValueError):
        return None


def make_note(base: str, path: str | Path, target: str) -> str:
    """What a mask notes of the picture and the settings that it is of.

    Args:
        base: The fingerprint of the `Segmenter`.
        path: The file that the picture is in; its size and time count.
        target: What the results are called, and all else that decides over them.

    Returns:
        A hash; '' for a file that is not there, as reading it will explain.
    """
    try:
        found = os.stat(path)
    except OSError:
        return ''
    return hashlib.sha256(os.fsencode(
        f'{base} {target} {found.st_size} {found.st_mtime_ns}')).hexdigest()


def count_pixels(labels: np.ndarray, classes: int) -> np.ndarray:
    """How many pixels each class has."""
    counts = np.zeros(classes, np.int64)
    rows = max(1, _COUNTED // labels.shape[1])
    for start in range(0, len(labels), rows):  # bincount needs eight bytes for each pixel
        counts += np.bincount(labels[start:start + rows].ravel(), minlength=classes)[:classes]
    return counts


def draw_legend(segmenter: Segmenter) -> Image.Image:
    """The names of the classes beside their colours, in columns."""
    font = ImageFont.load_default(16)
    rows = min(len(segmenter.classes), 25)
    width = 60 + max(int(font.getlength(name)) for name in segmenter.classes)
    columns = -(-len(segmenter.classes) // rows)
    legend = Image.new('RGB', (columns * width, rows * 28 + 12), 'white')
    pen = ImageDraw.Draw(legend)
    for index, (name, colour) in enumerate(zip(segmenter.classes, segmenter.description.palette)):
        x, y = index // rows * width + 10, index % rows * 28 + 10
        pen.rectangle((x, y, x + 28, y + 20), colour, (90, 90, 90))
        pen.text((x + 38, y + 10), name, 'black', font, 'lm')
    return legend


class Summary:
    """What a run finds, for ``summary.json``.

    Attributes:
        pictures: What was found in each, by its name.
        skipped: Why others could not be read, by their names.
        counts: Pixels of each class in all of them.
        reduced: How many large ones were predicted at auto by default.
        kept: How many were done before.
    """

    def __init__(self, segmenter: Segmenter, out: Path) -> None:
        self.segmenter, self.out = segmenter, out
        self.pictures: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.counts = np.zeros(len(segmenter.classes), np.int64)
        self.reduced = 0
        self.kept = 0
        self.before = _read_json(out / 'summary.json').get('seconds') or 0.
        self.start = time.perf_counter()

    def count(self, labels: np.ndarray) -> np.ndarray:
        """Count the pixels of each class; returns them for this picture."""
        counts = count_pixels(labels, len(self.segmenter.classes))
        self.counts += counts
        self.reduced += self.segmenter.is_reduced(*labels.shape)
        return counts

    def add(self, path: Path, target: str, labels: np.ndarray) -> None:
        """Note what was found in a picture."""
        self.pictures[str(path)] = dict(mask=f'masks/{shown(target)}.png', shares=class_shares(
            self.count(labels), self.segmenter.classes))

    def place(self, address: str) -> str:
        """A path, with a place in a shard after ``#``, relative to the folder of the summary."""
        path, mark, inside = address.partition('#')
        folder, name = os.path.split(path)
        with suppress(ValueError):  # of another drive of Windows
            folder = os.path.relpath(folder or '.', os.path.realpath(self.out))
        return shown(os.path.join(folder, name) + mark + inside)

    def write(self, **more: Any) -> dict[str, Any]:
        """Write ``summary.json``, with other entries or in place of its own; returns it."""
        own = self.segmenter
        seconds = time.perf_counter() - self.start
        if self.kept:  # with what they took; a run that predicts nothing does not count
            new = more.get('pictures', len(self.pictures)) > self.kept
            seconds = self.before + seconds * (new or not self.before)
        done = more.get('frames', more.get('pictures', len(self.pictures)))
        ratio = str(own.isr)
        if self.reduced:
            ratio = 'auto' if self.reduced == done else f'none, auto for {self.reduced} of {done}'
        summary = dict(
            checkpoint=self.place(own.source), device=str(own.device), isr_ratio=ratio,
            seconds=round(seconds, 3),
            versions=dict(mmseg_edaformer=__version__, torch=torch.__version__),
            classes={name: '#' + bytes(colour).hex()
                     for name, colour in zip(own.classes, own.description.palette)},
            shares=class_shares(self.counts, own.classes), kept=self.kept,
            skipped={self.place(path): reason for path, reason in self.skipped.items()},
            pictures={self.place(path): self.pictures[path] for path in sorted(self.pictures)})
        summary.update(more)
        with writing(self.out):
            write_file(self.out / 'summary.json', json.dumps(summary, indent=2) + '\n')
        return summary


def _load(model: Path, checkpoint: str | Path | None
          ) -> tuple[Description, torch.nn.Module, str]:
    """The description of a model, the model with its weights, and where those are from."""
    if model.suffix == '.safetensors':
        if checkpoint is not None:
            raise ConfigError(f'{model} holds its own weights: leave {checkpoint} out, or give a '
                              'config with it')
        content = load_from_file(model, 'cpu')
        description = read_description(model)
        try:
            return description, load_model(description, content), str(model)
        except Exception as error:  # of sizes that make no sense
            raise CheckpointError(f'{model} is refused: its model cannot be built '
                                  f'({_first_line(error)})') from error
    if checkpoint is None and not model.exists():
        raise ConfigError(f'no such file or folder: {model}: give the work dir of a training, a '
                          'config and its checkpoint, or a .safetensors')
    if model.is_dir():
        model, checkpoint = _find_in_work_dir(model, checkpoint)
    if model.suffix == '.pth':
        raise ConfigError(f'{model} is a checkpoint and does not say what model it is of: give its '
                          'work dir, or its config and then the checkpoint')
    if checkpoint is None:
        raise ConfigError(f'{model}: a config needs a checkpoint')
    cfg = load_config(model)
    content = load_checkpoint(checkpoint)
    description = describe(cfg, content['meta'])
    try:
        return description, load_model(description, content), str(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _find_in_work_dir(folder: Path, checkpoint: str | Path | None) -> tuple[Path, str | Path]:
    configs = sorted(folder.glob('*.py'))
    if len(configs) != 1:
        raise ConfigError(f'{folder} is the work dir of no training, it holds no config' if
                          not configs else f'{folder} holds several configs, '
                          f'{", ".join(path.name for path in configs[:4])}: give one of them and '
                          'its checkpoint')
    if checkpoint is None:
        found = sorted(folder.glob('best_*.pth'), key=os.path.getmtime)
        pointer = folder / 'last_checkpoint'
        if not found and pointer.is_file():
            # Relative to the work dir; mmengine's own is absolute, and the folder may have moved.
            last = folder / pointer.read_text(errors='replace').strip()
            found = [path for path in (last, folder / last.name) if path.is_file()][:1]
        if not found:
            raise CheckpointError(f'{folder} holds no checkpoint of a training: give one')
        checkpoint = found[-1]
    return configs[0], checkpoint


def _find_device(name: str | None) -> torch.device:
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f'device {name} cannot be used: {str(error).splitlines()[0]}') from error
    if device.type == 'cpu':
        keep_freed_memory()
    return device


def _as_array(item: Any) -> np.ndarray:
    """A picture in memory as OpenCV has it: H x W x 3, BGR, uint8.

    Raises:
        DataError: It is none.
    """
    if isinstance(item, Image.Image):
        if math.prod(item.size) > MAX_PIXELS:
            raise DataError(f'a picture of {item.width}x{item.height} pixels has more than '
                            f'{MAX_PIXELS}: make it smaller')
        if item.mode.startswith(('I', 'F')):
            raise DataError(f"a picture of PIL's mode {item.mode}: convert it to 8 bits per "
                            'channel')
        try:
            item = np.ascontiguousarray(
                np.array(ImageOps.exif_transpose(item).convert('RGB'))[..., ::-1])
        except (OSError, SyntaxError, ValueError) as error:  # it may be read only now
            raise DataError(f'a picture of PIL cannot be decoded: {error}') from error
    if not isinstance(item, np.ndarray):
        raise DataError(f'a {type(item).__name__} is no picture: give a path, an array or one of '
                        'PIL')
    if item.dtype != np.uint8 or item.ndim not in (2, 3) or not item.size or (
            item.ndim == 3 and item.shape[2] not in (1, 3, 4)):
        raise DataError(f'an array of shape {item.shape} and type {item.dtype} is no picture: it '
                        'must be H x W x 3, uint8, in the order blue, green, red')
    if item.ndim == 2 or item.shape[2] == 1:
        return cv2.cvtColor(item, cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(item[..., :3])


def _ahead(function: Any, items: Iterable[Any], count: int) -> Iterator[tuple[Any, Future[Any]]]:
    """Items and what a function makes of them, computed up to ``count`` items ahead."""
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        try:
            for item in items:
                waiting.append((item, thread.submit(function, item)))
                if len(waiting) > count:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


def name_targets(files: Sequence[tuple[_P, str]]) -> dict[_P, str]:
    """What the results of each picture are called, without a suffix.

    Args:
        files: The pictures, and what each is called within its folder.

    Raises:
        DataError: Two pictures have one name.
    """
    stems = Counter(os.path.splitext(name)[0] for _, name in dict(files).items())
    targets: dict[_P, str] = {}
    taken: dict[str, _P] = {}
    for path, name in dict(files).items():
        stem = os.path.splitext(name)[0]
        target = name if stems[stem] > 1 else stem  # a.jpg beside a.png
        targets[path] = '/'.join(shorten(part, _LONGEST) for part in target.split('/'))
        other = taken.setdefault(targets[path], path)
        if other != path:
            raise DataError(f'{other} and {path} would be written under one name: predict them '
                            'into different folders')
    return targets


def encode_png(picture: Image.Image, note: str | None = None) -> bytes:
    """A PNG, with a note in it."""
    info = PngInfo()
    if note is not None:
        info.add_text(_TEXT, note)
    content = io.BytesIO()
    picture.save(content, 'PNG', pnginfo=info)
    return content.getvalue()


def _write_overlay(target: Path, result: Segmentation) -> None:
    """Write an overlay as JPEG, or where a side is too long for that as PNG."""
    drawn = result.draw()
    suffix = '.jpg' if max(drawn.shape) <= 65500 else '.png'
    content = cv2.imencode(suffix, drawn, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
    write_file(target.with_name(target.name + suffix), content.tobytes())


def class_shares(counts: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """The share of the pixels that each class has, the largest first; those that occur."""
    shares: dict[str, float] = {}
    for index in np.argsort(-counts, kind='stable'):
        if counts[index]:
            share = round(float(counts[index] / counts.sum()), 6)
            shares[classes[index]] = shares.get(classes[index], 0.) + share
    return shares


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say of what cannot be written where that was."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f'{out} cannot be written to: {error.strerror or error}. Make room, or '
                          'give another --out') from error


@contextmanager
def progress_bar(title: str, total: int | None, done: int = 0) -> Iterator[Any]:
    """A bar with the time left where someone watches; gives the function that moves it.

    Elsewhere, as in a log file, lines on stderr: after 10 s, 20 s, 40 s and so on, then every five
    minutes.
    """
    log, watched = sys.stderr, sys.stdout.isatty()
    plain = not (watched and log.isatty())
    start = time.monotonic()
    due = start + 10

    def advance(completed: int) -> None:
        nonlocal due
        progress.update(task, completed=completed)
        now = time.monotonic()
        if plain and now >= due:
            due = now + min(now - start, 300)
            text = f'{title}: {completed}'
            if total is not None:
                left = (total - completed) * (now - start) / max(completed - done, 1)
                text += f' of {total}, {timedelta(seconds=max(round(left), 0))} left'
            print(text, file=log, flush=True)

    with Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                  TaskProgressColumn(show_speed=True), TextColumn('left'), TimeRemainingColumn(),
                  disable=not watched) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield advance
