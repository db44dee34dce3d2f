"""What a run writes: masks, overlays, a legend, videos and a summary."""
import hashlib
import io
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .. import __version__
from ..errors import ConfigError, DataError, shown
from ..files import remove_partial_files, write_file
from .inputs import silent_opencv
from .segmenter import Segmentation, Segmenter, class_shares, count_pixels
from .shards import Sample

_TEXT = 'mmseg_edaformer'
_SHOWN = 5  # classes, and images that were skipped


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn OSError into a ConfigError that names the folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f'{out} cannot be written to: {error.strerror or error}: free some '
                          'space, or give another --out') from error


def remove_leftovers(out: Path) -> None:
    """Remove what killed runs left half-written."""
    for folder in out, *(Path(folder) for kind in ('masks', 'overlays')
                         for folder, _, _ in os.walk(out / kind)):
        remove_partial_files(folder)


def make_note(base: str, path: str | Path, target: str) -> str:
    """Return a hash of what a mask is made from, to be stored in it.

    Args:
        base: The fingerprint of the `Segmenter`.
        path: The image; without one the note is empty, as reading it will explain.
        target: The name of the results.
    """
    try:
        stat = os.stat(path)
    except OSError:
        return ''
    return hashlib.sha256(os.fsencode(
        f'{base} {target} {stat.st_size} {stat.st_mtime_ns}')).hexdigest()


class Outcome(NamedTuple):
    """What became of a sample: the pixels of each class, or the reason why it was skipped."""
    target: str
    address: str
    reason: str = ''
    counts: np.ndarray | None = None
    is_reduced: bool = False  # whether it is large and was predicted at auto by default
    is_kept: bool = False  # whether an earlier run had finished it


class Results:
    """The masks and overlays of a model in a folder."""

    def __init__(self, segmenter: Segmenter, out: Path, overlays: bool = True) -> None:
        self.segmenter, self.out, self.overlays = segmenter, out, overlays
        self.fingerprint = segmenter.fingerprint()
        self._notes: dict[str, str] = {}  # by targets, made before their images are read

    def find(self, sample: Sample) -> Outcome | None:
        """Return the outcome of a sample whose mask would come out the same, otherwise None."""
        note = make_note(self.fingerprint, sample.file, sample.target)
        labels = self._read(sample.target, note)
        if labels is None:
            self._notes[sample.target] = note
            return None
        return self.count(sample, labels, is_kept=True)

    def _read(self, target: str, note: str) -> np.ndarray | None:
        """Return the labels of a mask with this note, if its overlay is there too."""
        if self.overlays and not any(path.is_file() for path in self._overlays(target)):
            return None
        try:
            with Image.open(self.out / 'masks' / f'{target}.png') as mask:
                return np.array(mask) if mask.info.get(_TEXT) == note else None
        except (OSError, SyntaxError, ValueError):
            return None

    def add(self, sample: Sample, result: Segmentation | DataError) -> Outcome:
        """Write the overlay, or remove an old one, and then the mask with its note."""
        note = self._notes.pop(sample.target, None)
        if isinstance(result, DataError):
            return Outcome(sample.target, sample.address, str(result))
        jpeg, png = self._overlays(sample.target)
        for path in jpeg, png:
            path.unlink(missing_ok=True)
        if self.overlays:
            drawn = result.draw()
            path = jpeg if max(drawn.shape) <= 65500 else png  # the longest side of a JPEG
            content = cv2.imencode(path.suffix, drawn, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
            write_file(path, content.tobytes())
        write_file(self.out / 'masks' / f'{sample.target}.png', encode_png(result.mask, note))
        return self.count(sample, result.labels)

    def count(self, sample: Sample, labels: np.ndarray, is_kept: bool = False) -> Outcome:
        """Return the outcome of a sample whose labels are known."""
        return Outcome(sample.target, sample.address, '',
                       count_pixels(labels, len(self.segmenter.classes)),
                       self.segmenter.is_reduced(*labels.shape), is_kept)

    def _overlays(self, target: str) -> tuple[Path, Path]:
        return self.out / 'overlays' / f'{target}.jpg', self.out / 'overlays' / f'{target}.png'


def encode_png(image: Image.Image, note: str | None = None) -> bytes:
    """Return a PNG, with a note in it."""
    info = PngInfo()
    if note is not None:
        info.add_text(_TEXT, note)
    content = io.BytesIO()
    image.save(content, 'PNG', pnginfo=info)
    return content.getvalue()


def draw_legend(classes: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> Image.Image:
    """Draw the names of classes beside their colours (RGB), in as many columns as fit."""
    font = ImageFont.load_default(15)
    column = 50 + max(int(font.getlength(name)) for name, _ in classes)
    across = max(1, width // column)
    legend = Image.new('RGB', (max(width, column), -(-len(classes) // across) * 28), 'white')
    pen = ImageDraw.Draw(legend)
    for i, (name, colour) in enumerate(classes):
        x, y = i % across * column, i // across * 28
        pen.rectangle((x, y + 2, x + 26, y + 20), colour, (90, 90, 90))
        pen.text((x + 34, y + 11), name, 'black', font, 'lm')
    return legend


class Summary:
    """Collects what ``summary.json`` holds."""

    def __init__(self, segmenter: Segmenter, out: Path) -> None:
        self.segmenter, self.out = segmenter, out
        self.skipped: dict[str, str] = {}  # reasons why images could not be read, by their paths
        self.counts = np.zeros(len(segmenter.classes), np.int64)  # pixels of each class
        self.done = self.reduced = self.kept = 0  # images or frames
        self.before: dict[str, Any] = {}  # the summary of an earlier run
        with suppress(OSError, ValueError, TypeError):
            self.before |= json.loads((out / 'summary.json').read_text(encoding='utf-8'))
        self.start = time.perf_counter()

    def begin(self) -> None:
        """Write the legend, and remove what killed runs left half-written."""
        with writing(self.out):
            classes = list(zip(self.segmenter.classes, self.segmenter.description.palette))
            write_file(self.out / 'legend.png', encode_png(draw_legend(classes, 600)))
            remove_leftovers(self.out)

    def add(self, outcome: Outcome) -> dict[str, Any]:
        """Add the outcome of an image; returns its mask and shares, or why it was skipped."""
        if outcome.counts is None:
            self.skipped[outcome.address] = outcome.reason
            return dict(skipped=outcome.reason)
        self.done += 1
        self.counts += outcome.counts
        self.reduced += outcome.is_reduced
        self.kept += outcome.is_kept
        return dict(mask=f'masks/{shown(outcome.target)}.png',
                    shares=class_shares(outcome.counts, self.segmenter.classes))

    def place(self, address: str) -> str:
        """Return a path, with a place in a shard after ``#``, relative to the summary's folder."""
        path, mark, inside = address.partition('#')
        folder, name = os.path.split(path)
        with suppress(ValueError):  # on another drive of Windows
            folder = os.path.relpath(folder or '.', os.path.realpath(self.out))
        return shown(os.path.join(folder, name) + mark + inside)

    def write(self, **more: Any) -> dict[str, Any]:
        """Write ``summary.json`` with further entries, or others instead, and return it."""
        own = self.segmenter
        seconds = time.perf_counter() - self.start
        if self.kept:  # add the run that made them; a run that predicts nothing does not count
            before = self.before.get('seconds') or 0.
            seconds = before + seconds * (self.done > self.kept or not before)
        ratio = str(own.isr_ratio)
        if self.reduced:
            ratio = ('auto' if self.reduced == self.done else
                     f'none, auto for {self.reduced} of {self.done}')
        summary = dict(
            checkpoint=self.place(own.source) if os.path.exists(own.source) else own.source,
            device=str(own.device), isr_ratio=ratio,
            seconds=round(seconds, 3),
            versions=dict(mmseg_edaformer=__version__, torch=torch.__version__),
            classes={name: '#' + bytes(colour).hex()
                     for name, colour in zip(own.classes, own.description.palette)},
            shares=class_shares(self.counts, own.classes), kept=self.kept,
            skipped={self.place(path): reason for path, reason in self.skipped.items()}) | more
        with writing(self.out):
            write_file(self.out / 'summary.json', json.dumps(summary, indent=2) + '\n')
        return summary


def describe_summary(summary: dict[str, Any], out: str | Path,
                     files: str = 'masks, overlays, legend.png and summary.json') -> str:
    """Return a few lines for a terminal: what was done, skipped and found, and where it is."""
    lines = []
    skipped = list(summary['skipped'].values())
    if 'video' in summary:
        lines.append(f'{summary["frames"]} frames at ISR ratio {summary["isr_ratio"]}')
        if (summary['frames_expected'] or 0) > summary['frames'] + 1:
            lines.append(f'the file states {summary["frames_expected"]} frames: it may be cut off')
        if summary['codec'] != 'h264':
            lines.append('the result is MPEG-4 part 2, which browsers do not play: install ffmpeg, '
                         'remove the video and run again to get H.264')
        place = shown(Path(out, summary['video']))
    else:
        images = summary['images']
        done = images if isinstance(images, int) else len(images)
        lines.append(f'{done} image{"s" * (done != 1)} at ISR ratio {summary["isr_ratio"]}' +
                     (f', {summary["kept"]} of them done before' if summary['kept'] else '') +
                     (f', {len(skipped)} skipped' if skipped else ''))
        place = f'{files} are in {shown(out)}'
    lines += [f'skipped: {reason}' for reason in skipped[:_SHOWN]]
    if len(skipped) > _SHOWN:
        lines.append(f'skipped: {len(skipped) - _SHOWN} more, see summary.json')
    shares = [f'{name} {share:.1%}' for name, share in summary['shares'].items()]
    lines.append('pixels: ' + ', '.join(shares[:_SHOWN]) +
                 (f' and {len(shares) - _SHOWN} more classes' if len(shares) > _SHOWN else ''))
    return '\n'.join([*lines, place])


class _FFmpeg:
    """Writes frames as H.264 through the command ffmpeg, as ``cv2.VideoWriter`` does."""

    def __init__(self, path: Path, size: tuple[int, int], rate: float) -> None:
        self.process: Any = subprocess.Popen(
            ['ffmpeg', '-y', '-loglevel', 'quiet', '-f', 'rawvideo', '-pix_fmt', 'bgr24',
             '-video_size', '{}x{}'.format(*size), '-framerate', str(rate), '-i', 'pipe:',
             '-vf', 'crop=trunc(iw/2)*2:trunc(ih/2)*2',  # browsers want two rows to share colours
             '-c:v', 'h264', '-pix_fmt', 'yuv420p', '-movflags', '+faststart', f'file:{path}'],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def write(self, frame: np.ndarray) -> None:
        try:
            self.process.stdin.write(frame.tobytes())
        except BrokenPipeError as error:
            raise OSError('ffmpeg ended too early') from error

    def release(self) -> None:
        self.process.communicate()


def open_video_writer(path: Path, size: tuple[int, int], rate: float) -> tuple[Any, str]:
    """Return a writer of a video, and its codec: 'h264' if ffmpeg or OpenCV has it, or 'mpeg4'."""
    with suppress(OSError):  # it may be missing, without encoder, or with one for other hardware
        trial = _FFmpeg(path, size, rate).process
        trial.communicate(bytes(3 * size[0] * size[1]))
        if trial.returncode == 0:
            return _FFmpeg(path, size, rate), 'h264'
    name: Any = os.fsencode(path)
    for fourcc, codec in ('avc1', 'h264'), ('mp4v', 'mpeg4'):
        with silent_opencv():
            writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*fourcc), rate, size)
        if writer.isOpened():
            return writer, codec
    raise ConfigError('neither ffmpeg nor OpenCV can write a video of {}x{} pixels to {}: install '
                      'ffmpeg'.format(*size, path.parent))
