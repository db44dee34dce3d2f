"""What is in an image or a mask: one pass over each file, on all cores, remembered between runs."""
import hashlib
import io
import json
import multiprocessing
import os
import signal
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ...errors import DataError
from ...files import write_file
from ..transforms import MAX_PIXELS, check_header, simplejpeg

MAX_VALUES = 512
"""So many different labels or colours of a mask are kept."""

VERSION = 1
"""Raise it when `examine` gives other facts, so that what is remembered is not used."""

File = tuple[str, str]
"""Kind, 'image' or 'mask', and path."""
Facts = dict[str, Any]
"""What `examine` found, of JSON's types."""

_ORIENTATION = 0x0112
_CHUNK = 16


def examine(kind: str, path: str) -> Facts:
    """Decode all of a file and say what it holds.

    Args:
        kind: 'image' or 'mask'.
        path: The file.

    Returns:
        ``problem`` ('missing' or 'unreadable') and ``detail`` for a bad file. Otherwise ``size``
        (width and height as stored), ``format`` and ``mode``, and

        - for an image ``orientation`` (EXIF's, 1 is upright), ``bytes`` and ``pixels`` (hashes of
          the file and of the upright picture);
        - for a mask ``values`` (labels and their pixels), ``bits`` and ``kind`` (numpy's letter of
          its type), ``palette`` (index, red, green, blue of what it uses) where it has one; or, for
          several channels, ``channels`` and ``colours`` (red, green, blue), None for too many.
    """
    if not os.path.isfile(path):  # a pipe would block
        return _problem('missing', 'there is no such file')
    try:
        with warnings.catch_warnings(), open(path, 'rb') as file:
            warnings.simplefilter('ignore')  # a large image; what matters of others raises
            return _examine(kind, file)
    except DataError as error:  # a header that training refuses, too
        return _problem('unreadable', str(error).partition(' bytes): ')[2] or str(error))
    except Exception as error:  # decoders of damaged files raise anything, and others follow
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return _problem('unreadable', reason)


def header(path: str) -> Facts:
    """Size and orientation of an image as in `examine`, from its first bytes alone."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter('ignore')
            return dict(size=list(image.size), orientation=_orientation(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return examine('image', path)  # which says what is wrong


def _examine(kind: str, file: BinaryIO) -> Facts:
    length = os.fstat(file.fileno()).st_size
    if not length:
        return _problem('unreadable', 'the file has 0 bytes')
    if length > 4 * MAX_PIXELS:
        return _problem('unreadable', f'{length:,} bytes are too many for {MAX_PIXELS:,} pixels')
    content = file.read()
    check_header(kind, '', content, MAX_PIXELS)
    with Image.open(io.BytesIO(content)) as image:
        facts = dict(size=[*image.size], format=image.format, mode=image.mode)
        image.load()
        if kind == 'mask':
            return {**facts, **_labels(image)}
        return {**facts, 'orientation': _orientation(image), 'pixels': _hash_picture(image),
                'bytes': hashlib.blake2b(content, digest_size=16).hexdigest()}


def _labels(image: Image.Image) -> Facts:
    array = np.asarray(image)
    if array.ndim > 2:
        colours = None
        if array.shape[2] >= 3:
            packed = array[..., :3].astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
            found = np.unique(packed)
            if len(found) <= MAX_VALUES:
                colours = [[int(c) >> 16, int(c) >> 8 & 255, int(c) & 255] for c in found]
        return dict(channels=array.shape[2], colours=colours)
    if array.dtype in (np.uint8, bool):
        # In blocks, for bincount makes int64 of them.
        blocks = np.array_split(array.ravel().view(np.uint8), -(-array.size // 2 ** 22))
        counts = sum(np.bincount(block, minlength=256) for block in blocks)
        values = np.flatnonzero(counts)
        counts = np.asarray(counts)[values]
    else:
        values, counts = np.unique(array, return_counts=True)
    facts: Facts = dict(bits=8 * array.dtype.itemsize, kind=array.dtype.kind,
                        values=[[v.item(), n.item()] for v, n in zip(values, counts)][:MAX_VALUES])
    if image.mode == 'P':
        colours = np.array(image.getpalette('RGB')).reshape(-1, 3).tolist()
        facts['palette'] = [[v, *colours[v]] for v, _ in facts['values'] if v < len(colours)]
    return facts


def _hash_picture(image: Image.Image) -> str:
    picture = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
    if not picture.mode.startswith(('I', 'F')):  # of 16 bits and more, which RGB would clip
        picture = picture.convert('RGB')
    label = f'{picture.mode} {picture.size}'.encode()
    return hashlib.blake2b(picture.tobytes() + label, digest_size=16).hexdigest()


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # EXIF is anything; decoders pass over what they do not understand
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _problem(name: str, detail: str) -> Facts:
    return dict(problem=name, detail=detail)


def examine_files(files: Iterable[File], *, workers: int | None = None,
                  cache: Path | None = None, fresh: bool = False,
                  advance: Callable[[int, int], None] = lambda done, total: None
                  ) -> tuple[dict[File, Facts], int]:
    """Examine many files.

    Args:
        files: Each is examined once.
        workers: Processes; by default one for each core.
        cache: A file that remembers what was found. A file of unchanged size and time of change is
            not read again. What is damaged or of another version is replaced.
        fresh: Read every file again nonetheless.
        advance: Called with the files done and all files that are to be read.

    Returns:
        What was found in each file, and how many were read for it.

    Raises:
        DataError: A process was killed, most likely for want of memory.
    """
    remembered = _read_cache(cache) if cache and not fresh else {}
    found: dict[File, Facts] = {}
    todo: list[File] = []
    stamps = {}
    for file in dict.fromkeys(files):
        stamps[file] = stamp = _stamp(file[1])
        entry = remembered.get(_key(file))
        if stamp is None:
            found[file] = _problem('missing', 'there is no such file')
        elif entry is not None and entry[:2] == stamp:
            found[file] = entry[2]
        else:
            todo.append(file)
    try:
        for chunk, facts in _run(todo, workers or _cores()):
            found.update(zip(chunk, facts))
            advance(len(found) - (len(stamps) - len(todo)), len(todo))
    finally:
        if cache and todo:  # also what was done before an interruption
            _write_cache(cache, {**remembered, **{
                _key(file): [*(stamps[file] or ()), facts] for file, facts in found.items()
                if stamps[file]}})
    return found, len(todo)


def _run(files: Sequence[File], workers: int) -> Iterator[tuple[Sequence[File], list[Facts]]]:
    chunks = [files[start:start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    if workers == 1 or len(chunks) < 2:
        for chunk in chunks:
            yield chunk, _examine_chunk(chunk)
        return
    # A fork shares what is imported; elsewhere every process would import torch.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
    pool = ProcessPoolExecutor(min(workers, len(chunks)), context, _ignore_interrupts)
    try:
        futures = {pool.submit(_examine_chunk, chunk): chunk for chunk in chunks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError('a process that read images was killed, most likely for want of memory: '
                        'run again with fewer --workers') from error
    finally:
        pool.shutdown(cancel_futures=True)


def _examine_chunk(files: Sequence[File]) -> list[Facts]:
    return [examine(*file) for file in files]


def _ignore_interrupts() -> None:
    """Ctrl-C is for the process that waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cores() -> int:
    return (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else
            os.cpu_count() or 1)


def _stamp(path: str) -> list[int] | None:
    """Size and time of change, None for what is no file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns] if stat.S_ISREG(status.st_mode) else None


def _key(file: File) -> str:
    return f'{file[0]} {os.path.abspath(file[1])}'


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    head, _, body = content.partition(b'\n')
    return json.loads(body) if head == _seal(body) else {}


def _write_cache(path: Path, entries: dict[str, Any]) -> None:
    body = json.dumps(entries, separators=(',', ':')).encode()
    write_file(path, _seal(body) + b'\n' + body)


def _seal(body: bytes) -> bytes:
    """What the first line of an undamaged cache of this version says."""
    digest = hashlib.blake2b(body, digest_size=16).hexdigest()
    return f'data_check {VERSION} {MAX_PIXELS} {bool(simplejpeg)} {digest}'.encode()
