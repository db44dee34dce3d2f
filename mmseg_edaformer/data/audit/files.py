"""What an image or a mask holds: one pass over each file, on all cores, cached between runs."""
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
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...errors import DataError
from ...files import write_file
from ..transforms import MAX_PIXELS, ORIENTATION, check_header, read_file, simplejpeg

MAX_VALUES = 512
"""Largest number of different labels of a mask that are kept."""

VERSION = 2
"""Raise it when `examine` gives other facts, so that no old cache is used."""

File = tuple[str, str]
"""Kind, 'image' or 'mask', and path."""
Facts = dict[str, Any]
"""Result of `examine`, of JSON's types."""

_CHUNK = 16
_MISSING = dict(problem='missing', detail='there is no such file')


def examine(kind: str, path: str) -> Facts:
    """Decode a whole file and describe it.

    Args:
        kind: 'image' or 'mask'.
        path: The file.

    Returns:
        ``problem`` ('missing' or 'unreadable') and ``detail`` for a bad file. Otherwise ``size``
        (width and height as stored) and ``format``, and

        - for an image ``orientation`` (EXIF's, 1 is upright), ``bytes`` and ``pixels`` (hashes of
          the file and of the upright image);
        - for a mask ``values`` (labels and their pixels), ``bits``, and ``palette`` (index, red,
          green, blue of what it uses) where it has one; or ``channels``, if there are several.
    """
    if not os.path.isfile(path):  # a pipe would block
        return _MISSING
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a large image; what matters of others raises
            content = read_file(kind, path)
            if not content:
                raise DataError('the file has 0 bytes')
            check_header(kind, '', content, MAX_PIXELS)
            with Image.open(io.BytesIO(content)) as image:
                facts = dict(size=[*image.size], format=image.format)
                image.load()
                if kind == 'mask':
                    return {**facts, **_labels(image)}
                return {**facts, 'orientation': _orientation(image), 'pixels': _hash_pixels(image),
                        'bytes': hashlib.blake2b(content, digest_size=16).hexdigest()}
    except DataError as error:  # training refuses it, too
        return dict(problem='unreadable', detail=str(error).partition(' bytes): ')[2] or str(error))
    except Exception as error:  # damaged files raise anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return dict(problem='unreadable', detail=reason)


def header(path: str) -> Facts:
    """Return size and orientation of an image as `examine` does, from its first bytes alone."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter('ignore')
            return dict(size=list(image.size), orientation=_orientation(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return examine('image', path)  # which says what is wrong


def _labels(image: Image.Image) -> Facts:
    array = np.asarray(image)
    if array.ndim > 2:
        return dict(channels=array.shape[2])
    if array.dtype in (np.uint8, bool):
        # In blocks, because bincount converts them to int64.
        blocks = np.array_split(array.ravel().view(np.uint8), -(-array.size // 2 ** 22))
        counts = np.sum([np.bincount(block, minlength=256) for block in blocks], 0)
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(array, return_counts=True)
    facts: Facts = dict(bits=8 * array.dtype.itemsize, values=[
        [v.item(), n.item()] for v, n in zip(values, counts)][:MAX_VALUES])
    if image.mode == 'P':
        colours = np.array(image.getpalette('RGB')).reshape(-1, 3).tolist()
        facts['palette'] = [[v, *colours[v]] for v, _ in facts['values'] if v < len(colours)]
    return facts


def _hash_pixels(image: Image.Image) -> str:
    upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
    if not upright.mode.startswith(('I', 'F')):  # of 16 bits and more, which RGB would clip
        upright = upright.convert('RGB')
    label = f'{upright.mode} {upright.size}'.encode()
    return hashlib.blake2b(upright.tobytes() + label, digest_size=16).hexdigest()


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # EXIF can hold anything, and decoders ignore what they do not understand
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def examine_files(files: Iterable[File], *, workers: int | None = None,
                  cache: Path | None = None, fresh: bool = False,
                  advance: Callable[[int, int], None] = lambda done, total: None
                  ) -> tuple[dict[File, Facts], int]:
    """Examine many files, each once.

    Args:
        files: Kinds and paths.
        workers: Number of processes; by default one for each core.
        cache: File with the facts of earlier runs. A file of unchanged size and modification time
            is not read again. A cache that is damaged or of another version is replaced.
        fresh: Whether to read every file again.
        advance: Called with the number of files done and the number of files to read.

    Returns:
        The facts of each file, and the number of files that were read.

    Raises:
        DataError: A process was killed, most likely for lack of memory.
    """
    cached = _read_cache(cache) if cache and not fresh else {}
    facts: dict[File, Facts] = {}
    todo: list[File] = []
    stamps = {}
    for file in dict.fromkeys(files):
        stamps[file] = stamp = _stamp(file[1])
        entry = cached.get(_key(file))
        if stamp is None:
            facts[file] = _MISSING
        elif entry is not None and entry[:2] == stamp:
            facts[file] = entry[2]
        else:
            todo.append(file)
    try:
        for chunk, results in _run(todo, workers):
            facts.update(zip(chunk, results))
            advance(len(facts) - (len(stamps) - len(todo)), len(todo))
    finally:
        if cache and todo:  # also what was done before an interruption
            body = json.dumps({**cached, **{
                _key(file): [*(stamps[file] or ()), result] for file, result in facts.items()
                if stamps[file]}}, separators=(',', ':')).encode()
            write_file(cache, _seal(body) + b'\n' + body)
    return facts, len(todo)


def _run(files: Sequence[File], workers: int | None
         ) -> Iterator[tuple[Sequence[File], list[Facts]]]:
    chunks = [files[start:start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else
                          os.cpu_count() or 1)
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
        raise DataError('a process that read images was killed, most likely for lack of memory: '
                        'run again with fewer --workers') from error
    finally:
        pool.shutdown(cancel_futures=True)


def _examine_chunk(files: Sequence[File]) -> list[Facts]:
    return [examine(*file) for file in files]


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the process that waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stamp(path: str) -> list[int] | None:
    """Return size and modification time, None for what is no file."""
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
    seal, _, body = content.partition(b'\n')
    return json.loads(body) if seal == _seal(body) else {}


def _seal(body: bytes) -> bytes:
    """Return the first line of an undamaged cache of this version."""
    digest = hashlib.blake2b(body, digest_size=16).hexdigest()
    return f'data_check {VERSION} {MAX_PIXELS} {bool(simplejpeg)} {digest}'.encode()
