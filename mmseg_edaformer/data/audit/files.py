"""What an image or a mask holds: one pass over each file, on all cores."""
import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from rich.progress import track

from ...errors import DataError
from ..transforms import check_header, orientation, read_file

File = tuple[str, str]
"""Kind, 'image' or 'mask', and path."""
Facts = dict[str, Any]
"""Result of `examine`, of JSON's types."""

_CHUNK = 16
_MAX_VALUES = 512  # labels of a mask that are kept


def examine(kind: str, path: str) -> Facts:
    """Decode a whole file and describe it.

    Args:
        kind: 'image' or 'mask'.
        path: The file.

    Returns:
        ``problem`` ('missing' or 'unreadable') and ``detail`` for a bad file. Otherwise ``size``
        (width and height as stored) and ``format``, and

        - for an image ``orientation`` (EXIF's, 1 is upright) and ``pixels`` (a hash of the upright
          image);
        - for a mask ``values`` (labels and their pixels), ``bits``, and ``palette`` (index, red,
          green, blue of what it uses) where it has one; or ``channels``, if there are several.
    """
    if not os.path.isfile(path):  # a pipe would block
        return dict(problem='missing', detail='')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a large image; what matters of others raises
            content = read_file(kind, path)
            check_header(kind, '', content)
            with Image.open(io.BytesIO(content)) as image:
                facts = dict(size=[*image.size], format=image.format)
                image.load()
                if kind == 'mask':
                    return {**facts, **_labels(image)}
                return {**facts, 'orientation': orientation(image), 'pixels': _hash_pixels(image)}
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
            return dict(size=list(image.size), orientation=orientation(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return examine('image', path)  # which says what is wrong


def _labels(image: Image.Image) -> Facts:
    array = np.asarray(image)
    if array.ndim > 2:
        return dict(channels=array.shape[2])
    values, counts = np.unique(array.view(np.uint8) if array.dtype == bool else array,
                               return_counts=True)
    facts: Facts = dict(bits=8 * array.dtype.itemsize, values=[
        [v.item(), n.item()] for v, n in zip(values, counts)][:_MAX_VALUES])
    if image.mode == 'P':
        colours = np.array(image.getpalette('RGB')).reshape(-1, 3).tolist()
        facts['palette'] = [[v, *colours[v]] for v, _ in facts['values'] if v < len(colours)]
    return facts


def _hash_pixels(image: Image.Image) -> str:
    upright = ImageOps.exif_transpose(image) if orientation(image) != 1 else image
    if not upright.mode.startswith(('I', 'F')):  # of 16 bits and more, which RGB would clip
        upright = upright.convert('RGB')
    content = upright.tobytes() + f'{upright.mode} {upright.size}'.encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def examine_files(files: Iterable[File], workers: int | None = None) -> dict[File, Facts]:
    """Examine many files, each once, and show the progress on a terminal.

    Args:
        files: Kinds and paths.
        workers: Number of processes; by default one for each core.

    Raises:
        DataError: A process was killed, most likely for lack of memory.
    """
    todo = [*dict.fromkeys(files)]
    results = track(_run(todo, workers), 'reading', len(todo), transient=True,
                    disable=not sys.stdout.isatty())
    return {file: facts for facts, file in zip(results, todo)}


def _run(files: Sequence[File], workers: int | None) -> Iterator[Facts]:
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else
                          os.cpu_count() or 1)
    if workers == 1 or len(files) <= _CHUNK:
        yield from itertools.starmap(examine, files)
        return
    # A fork shares what is imported; elsewhere every process would import torch.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
    # Ctrl-C is left to the process that waits.
    pool = ProcessPoolExecutor(min(workers, -(-len(files) // _CHUNK)), context, signal.signal,
                               (signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(examine, *zip(*files), chunksize=_CHUNK)
    except BrokenProcessPool as error:
        raise DataError('a process that read images was killed, most likely for lack of memory: '
                        'run again with fewer --workers') from error
    finally:
        pool.shutdown(cancel_futures=True)
