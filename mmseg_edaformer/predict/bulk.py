"""Pictures by the million: the masks of `predictor`, made by many processes on many machines.

Ray Data deals blocks of names out to workers that hold one model each, and deals those of a worker
that died out again. What is done stands in the masks themselves, each of which notes what it is of:
whoever gets a block looks there first. So nothing is done twice, whatever dies, the driver too; and
pictures never travel: each worker reads and writes on a file system that all of them share.
"""
import itertools
import json
import os
import posixpath
import socket
import sys
import tarfile
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.fileio import BaseStorageBackend, register_backend

from .. import __version__
from ..compat import install_command
from ..data.transforms import MAX_PIXELS
from ..errors import ConfigError, DataError, UserError, shown
from ..files import remove_partial_files, replacing, write_file
from .inputs import IMAGES, find_images, name_targets
from .outputs import (
    Summary,
    draw_legend,
    encode_png,
    make_folders,
    make_note,
    read_mask,
    write_result,
    writing,
)
from .run import progress_bar
from .segmenter import Segmentation, Segmenter, class_shares, count_pixels

SHARDS = frozenset({'.parquet', '.tar'})
"""What files end in that hold many pictures each."""
MANIFEST = 'manifest.jsonl'

_BLOCK = 64  # pictures that a worker is given at once, at most
_BLOCKS = 16  # of each worker, at least: the last ones end at about the same time
_RETRIES = 2
_STORE = 2 ** 27  # bytes; only names and counts are in it
_ANSWER = 10.  # seconds
_LONGEST = 2000  # bytes of a name with its folders: 4096, less those of the results
_ROWS = 16
_PREFIX = 'sample://'
_ENVIRONMENT = dict(
    RAY_USAGE_STATS_ENABLED='0', RAY_DATA_LOG_LEVEL='CRITICAL', RAY_BACKEND_LOG_LEVEL='fatal',
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO='0')


class Sample(NamedTuple):
    """Where a picture lies.

    Attributes:
        address: For messages and the manifest; the path, with a place in a shard after ``#``.
        name: What it is called, with a suffix.
        file: The picture, or the shard.
        start: First byte in a .tar, row in a .parquet; -1 of a file of its own.
        length: Bytes in a .tar.
    """
    address: str
    name: str
    file: str
    start: int = -1
    length: int = 0


def find_samples(source: str | Path, without: Path | None = None, column: str | None = None
                 ) -> tuple[list[Sample], dict[str, str]]:
    """The pictures that a path means: their places and names, of shards without their content.

    In a .tar a picture is called as its sample is, up to the first dot; in a .parquet as the
    ``path`` beside its bytes says, or else by the shard and the number of the row.

    Args:
        source: A folder, a file or a pattern, see `find_images`; of pictures, or of
            shards (.tar as WebDataset has them, .parquet).
        without: A folder to pass over, such as that of the results.
        column: Of a .parquet the column of the pictures, by default ``image``, or else the only one
            that can hold them; of a .tar the ending of the pictures' names, for samples with
            several.

    Returns:
        The pictures, and what of the shards cannot be read, with the reasons.

    Raises:
        DataError: There is no picture, the path is of another kind, the column is not there, or two
            pictures have one place.
    """
    files = find_images(source, without, IMAGES | SHARDS)
    kinds = {_ending(path) for path, _ in files}
    other = kinds - IMAGES - SHARDS
    if other:
        path = next(path for path, _ in files if _ending(path) in other)
        raise DataError(f'{path} is neither a picture nor a shard, which end in .tar or .parquet'
                        + (': unpack it, what is compressed cannot be read from the middle'
                           if _ending(path) in ('.gz', '.tgz', '.zip', '.zst') else ''))
    if kinds & IMAGES and kinds & SHARDS:
        raise DataError(f'{source} holds pictures and shards: give a pattern that means one of '
                        'them, such as "folder/*.tar"')
    if column is not None and not kinds & SHARDS:
        raise ConfigError(f'--column {column} is for .tar and .parquet: {source} holds neither')
    samples: list[Sample] = []
    skipped: dict[str, str] = {}
    for path, name in files:
        if _ending(path) in SHARDS and not path.is_file():
            skipped[str(path)] = f'{path} is a broken link or no regular file: remove it'
            continue
        if _ending(path) == '.tar':
            found = _list_tar(path, column, skipped)
        elif _ending(path) == '.parquet':
            found = _list_parquet(path, os.path.splitext(name)[0], column, skipped)
        else:
            found = [Sample(str(path), name, str(path))]
        for sample in found:
            reason = _refused(sample)
            if reason is None:
                samples.append(sample._replace(name=posixpath.normpath(sample.name.lstrip('/'))))
            else:
                skipped[sample.address] = reason
    taken: set[str] = set()
    for sample in samples:
        if sample.address in taken:
            raise DataError(f'{sample.address} is there twice: make the shard anew')
        taken.add(sample.address)
    if not samples:
        raise DataError('not one picture can be read: ' + next(
            iter(skipped.values()), f'{source} holds none'))
    return samples, skipped


def predict_many(source: str | Path, model: str | Path, out: str | Path, *,
                 checkpoint: str | Path | None = None, isr: str | None = None,
                 max_side: int | None = None, workers: int | None = None, threads: int = 1,
                 address: str | None = None, overlays: bool = False, batch_size: int | None = None,
                 column: str | None = None) -> dict[str, Any]:
    """Write the masks of many pictures to a folder, with Ray; a run that was stopped goes on.

    The masks are those of `predict_images`. Pictures that cannot be read are passed
    over, and so are those whose worker dies again and again.

    Args:
        source: See `find_samples`.
        model: See `Segmenter`, as ``checkpoint``, ``isr``, ``max_side`` and ``batch_size``.
        out: Gets ``masks``, ``legend.png``, and when all is done ``manifest.jsonl``, a line for
            each picture in their order, and ``summary.json``. Like the model and the pictures it
            must be seen by all machines.
        workers: So many models at once; by default one for each GPU, or without one for every
            ``threads`` cores.
        threads: Cores of each worker.
        address: Of a running Ray, such as ``auto`` or ``ray://host:10001``; by default one is
            started here and ended. A Ray that this process is connected to is taken as it is.
        overlays: Whether to write ``overlays`` as well.
        column: See `find_samples`.

    Returns:
        What the summary holds.

    Raises:
        DataError: See `find_samples`; or not one can be read, or two would get the same name.
        ConfigError: Ray is missing or does not answer, has no room for the workers, a machine does
            not see the files, or the folder cannot be written to.
        UserError: See `Segmenter`.
    """
    if threads < 1 or (workers is not None and workers < 1):
        raise ConfigError(f'workers {workers}, threads {threads}: they must be 1 or more')
    _import_ray()
    out = Path(os.path.abspath(out))
    places = [os.path.abspath(path) if path is not None and '://' not in str(path) else path
              for path in (source, model, checkpoint)]
    samples, skipped = find_samples(str(places[0]), Path(os.path.realpath(out)), column)
    targets = name_targets([(sample.address, sample.name) for sample in samples])
    segmenter = Segmenter(str(places[1]), places[2], device='cpu', isr_ratio=isr, max_side=max_side,
                          batch_size=batch_size)
    summary = Summary(segmenter, out)
    summary.skipped.update(skipped)
    kinds = ('masks', 'overlays') if overlays else ('masks',)
    token = out / f'.{socket.gethostname()}.{os.getpid()}.partial'
    with writing(out):
        for name in MANIFEST, 'summary.json':  # they are not to speak for this run yet
            (out / name).unlink(missing_ok=True)
        write_file(out / 'legend.png', encode_png(draw_legend(segmenter)))
        make_folders(out, targets.values(), kinds)
        remove_partial_files(out)
        write_file(token, '')
    job = _Job(str(places[1]), places[2], isr, max_side, batch_size, threads, str(out),
               overlays, column, segmenter.fingerprint(), (*_roots(samples), str(token)))
    try:
        with _connected(address, None if workers is None else workers * threads), \
                tempfile.TemporaryFile(dir=out) as lines:
            pool = _Pool(*_count_workers(workers, threads), job)
            print(f'{shown(segmenter.source)}, {len(segmenter.classes)} classes, on {pool.workers} '
                  f'{"GPU" if pool.gpus else "CPU"} worker{"s" * (pool.workers > 1)} with '
                  f'{threads} thread{"s" * (threads > 1)} each', flush=True)
            if not pool.gpus:
                _tell_cost(segmenter, samples[0], column, threads)
            with progress_bar('predict', len(samples)) as advance:
                order = _collect(pool, samples, targets, summary, lines, advance)
            make_folders(out, targets.values(), kinds)
            done = len(samples) + len(skipped) - len(summary.skipped)
            if not done:
                raise DataError('not one picture can be read: ' +
                                next(iter(summary.skipped.values())))
            with writing(out), replacing(out / MANIFEST) as partial, partial.open('wb') as file:
                for start in order:
                    lines.seek(start)
                    file.write(lines.readline())
                for place, reason in skipped.items():
                    file.write(_line(picture=summary.place(place), skipped=reason))
        return summary.write(
            device='cuda' if pool.gpus else 'cpu', workers=pool.workers, threads=threads,
            images=done)
    finally:
        token.unlink(missing_ok=True)


def _tell_cost(segmenter: Segmenter, sample: Sample, column: str | None, threads: int) -> None:
    """Log here what a picture takes a worker, whose own log nobody sees."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        segmenter.tell_cost(next(_open([sample], column)))
    except DataError:
        pass  # the worker lists it
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Job:
    """What all workers are told; paths are absolute."""
    model: str
    checkpoint: Any
    isr: str | None
    max_side: int | None
    batch_size: int | None
    threads: int
    out: str
    overlays: bool
    column: str | None
    base: str
    seen: tuple[str, ...]


class _Worker:
    """One model in a process of its own, which predicts blocks of samples.

    All that goes wrong comes back as a row: Ray would wrap it, or start the worker anew.
    """

    def __init__(self, job: _Job) -> None:
        self.job, self.out = job, Path(job.out)
        self.trouble: dict[str, Any] | None = None
        try:
            self._start()
        except Exception as error:
            self.trouble = _told(error)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, Any]:
        """The rows of a block: ``index`` with ``counts`` or ``skipped``; or ``error``."""
        names = ('address', 'target', 'file')
        rows = [(int(index), os.fsdecode(target), Sample(
            os.fsdecode(address), '', os.fsdecode(file), int(start), int(length)))
            for index, start, length, address, target, file in zip(
                *(block[name] for name in ('index', 'start', 'length', *names)))]
        found = []
        try:
            if self.trouble is None:
                with writing(self.out):
                    found = list(self._predict(rows))
        except Exception as error:
            self.trouble = _told(error)
        return dict(row=[json.dumps(each) for each in (
            found if self.trouble is None else [self.trouble])])

    def _start(self) -> None:
        here = socket.gethostname()
        for path in self.job.seen:
            if not os.path.exists(path):
                raise ConfigError(f'{here} does not see {path}: pictures, model and results must '
                                  'lie where all machines see them, under the same paths')
        torch.set_num_threads(self.job.threads)
        cv2.setNumThreads(self.job.threads)
        self.segmenter = Segmenter(self.job.model, self.job.checkpoint, isr_ratio=self.job.isr,
                                   max_side=self.job.max_side, batch_size=self.job.batch_size)
        if self.segmenter.fingerprint() != self.job.base:
            raise ConfigError(
                f'{here} has another model in {self.segmenter.source} than the machine that asks, '
                f'or another version than mmseg_edaformer {__version__}: give all the same')

    def _predict(self, rows: Sequence[tuple[int, str, Sample]]) -> Iterator[dict[str, Any]]:
        left, notes = [], {}
        for index, target, sample in rows:
            both, alone = notes[index] = self._notes(target, sample)
            labels = read_mask(self.out / 'masks' / f'{target}.png', both,
                               *([] if self.job.overlays else [alone]))
            if labels is None:
                left.append((index, target, sample))
            else:
                yield dict(self._count(index, labels), kept=True)
        for (index, target, _), result in self._results(left):
            if isinstance(result, Segmentation):
                write_result(self.out, target, result, notes[index][not self.job.overlays],
                             self.job.overlays)
                yield self._count(index, result.labels)
            else:
                yield dict(index=index, skipped=result.replace(_PREFIX, ''))

    def _notes(self, target: str, sample: Sample) -> tuple[str, str]:
        """What a mask notes that has an overlay, as predict_images writes it, and one without."""
        place = target if sample.start < 0 else f'{target} {sample.start} {sample.length}'
        first, second = (make_note(self.job.base, sample.file, f'{place}{alone}')
                         for alone in ('', ' alone'))
        return first, second

    def _count(self, index: int, labels: np.ndarray) -> dict[str, Any]:
        counts = count_pixels(labels, len(self.segmenter.classes))
        return dict(index=index, reduced=self.segmenter.is_reduced(*labels.shape), counts={
            int(each): int(counts[each]) for each in np.flatnonzero(counts)})

    def _results(self, rows: Sequence[tuple[int, str, Sample]]) -> Iterator[tuple[Any, Any]]:
        """The rows, each with its segmentation or the reason why it has none."""
        skipped: dict[str, str] = {}
        waiting = iter(rows)
        number = 0
        try:
            for result in self.segmenter.stream(_open([row[2] for row in rows], self.job.column),
                                                skipped):
                for row in waiting:
                    number += 1
                    reason = skipped.get(_key(row[2]))
                    yield row, result if reason is None else reason
                    if reason is None:
                        break
        except DataError:  # one does not fit into the memory of the device
            for row in rows[number:]:
                try:
                    [picture] = _open([row[2]], self.job.column)
                    yield row, next(self.segmenter.stream([picture]))
                except DataError as error:
                    yield row, str(error)
            return
        for row in waiting:
            yield row, skipped[_key(row[2])]


@dataclass(frozen=True)
class _Pool:
    """The workers, and what they do."""
    workers: int
    gpus: int
    job: _Job

    def run(self, rows: Sequence[tuple[int, str, Sample]], size: int) -> Iterator[dict[str, Any]]:
        """Have rows predicted in blocks of a size; what comes back, as it comes."""
        import ray
        from ray.data import ActorPoolStrategy, DataContext
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # whose rows do not come back
        with warnings.catch_warnings():
            # Of max_task_retries, which has no other place yet.
            warnings.filterwarnings('ignore', message='`ray_remote_args` is deprecated')
            found = ray.data.from_blocks(_tables(rows, size)).map_batches(
                _Worker, fn_constructor_args=(self.job,), batch_size=size, batch_format='numpy',
                compute=ActorPoolStrategy(size=self.workers, max_tasks_in_flight_per_actor=2),
                num_cpus=self.job.threads, num_gpus=1 if self.gpus else None,
                max_restarts=-1, max_task_retries=_RETRIES)
        try:
            for batch in found.iter_batches(batch_size=None):
                for row in batch['row'].tolist():
                    yield json.loads(row)
        except ray.exceptions.RayError as error:
            raise ConfigError(
                f'the workers cannot be started or were lost ({_last_line(error)}). All machines '
                'need mmseg_edaformer with the extra cluster, of one version, and memory for the '
                'model. Run again, it goes on') from error


def _tables(rows: Sequence[tuple[int, str, Sample]], size: int) -> list[Any]:
    """The blocks, without the names: a worker needs none."""
    import pyarrow
    return [pyarrow.table(dict(
        index=[index for index, _, _ in part],
        start=[sample.start for _, _, sample in part],
        length=[sample.length for _, _, sample in part],
        # Names of files need not be text.
        address=[os.fsencode(sample.address) for _, _, sample in part],
        target=[os.fsencode(target) for _, target, _ in part],
        file=[os.fsencode(sample.file) for _, _, sample in part]))
        for part in (rows[start:start + size] for start in range(0, len(rows), size))]


def _collect(pool: _Pool, samples: Sequence[Sample], targets: dict[str, str], summary: Summary,
             lines: Any, advance: Any) -> np.ndarray:
    """Run all samples, and write the lines of the manifest as they come.

    Returns:
        Where the line of each sample begins.
    """
    starts = np.full(len(samples), -1, np.int64)
    count = 0
    size = min(_BLOCK, max(pool.job.batch_size or 1, -(-len(samples) // pool.workers // _BLOCKS)))

    def add(index: int, **entry: Any) -> None:
        nonlocal count
        starts[index] = lines.tell()
        lines.write(_line(picture=summary.place(samples[index].address), **entry))
        count += 1
        advance(count)

    try:
        for each in (size, 1):  # what is lost with its block again and again is tried alone
            rows = [(index, targets[samples[index].address], samples[index])
                    for index in np.flatnonzero(starts < 0).tolist()]
            for row in pool.run(rows, each) if rows else ():
                if 'error' in row:
                    raise _ERRORS.get(row['kind'], RuntimeError)(row['error'])
                index = row['index']
                if starts[index] >= 0:
                    continue
                if 'skipped' in row:
                    summary.skipped[samples[index].address] = row['skipped']
                    add(index, skipped=row['skipped'])
                    continue
                counts = np.zeros_like(summary.counts)
                for label, pixels in row['counts'].items():
                    counts[int(label)] = pixels
                summary.counts += counts
                summary.reduced += row['reduced']
                summary.kept += row.get('kept', False)
                add(index, mask=f'masks/{shown(targets[samples[index].address])}.png',
                    shares=class_shares(counts, summary.segmenter.classes))
    except KeyboardInterrupt:
        print(f'{count} of {len(samples)} pictures are done: run the same again, it goes on',
              file=sys.stderr)
        raise
    for index in np.flatnonzero(starts < 0).tolist():
        place = samples[index].address
        reason = (f'{place}: its worker died {_RETRIES + 1} times over it, for want of memory or '
                  'of a defect of a library: look at it, or run again')
        summary.skipped[place] = reason
        add(index, skipped=reason)
    return starts


_ERRORS: dict[str, type[Exception]] = {
    each.__name__: each for each in UserError.__subclasses__()}


def _told(error: Exception) -> dict[str, Any]:
    """An error as a row."""
    return dict(kind=type(error).__name__,
                error=str(error) if isinstance(error, UserError) else traceback.format_exc())


def _line(**entry: Any) -> bytes:
    return json.dumps(entry).encode() + b'\n'


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# Ray.

def _import_ray() -> None:
    """Import Ray Data so that it keeps quiet.

    Raises:
        ConfigError: It is not installed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'Ray Data is not installed here ({error}): '
                          f'{install_command("cluster")}') from error


@contextmanager
def _connected(address: str | None, cpus: int | None) -> Iterator[None]:
    """A Ray that this process is connected to.

    Raises:
        ConfigError: None answers.
    """
    import ray
    if ray.is_initialized() and address is None:
        yield
        return
    quiet: dict[str, Any] = dict(logging_level='ERROR', log_to_driver=False)
    # In Ray's own default folder: sockets allow no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix=f'ray-{os.getpid()}-', dir='/tmp',
                                     ignore_cleanup_errors=True) as folder:
        try:
            if address is not None and ':' in address:  # Ray would wait for minutes
                host, _, port = address.removeprefix('ray://').rpartition(':')
                socket.create_connection((host, int(port)), _ANSWER).close()
            with _silent_stderr():
                if address is None:
                    ray.init('local', num_cpus=cpus, include_dashboard=False, _temp_dir=folder,
                             object_store_memory=_STORE, **quiet)
                else:
                    ray.init(address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f'no Ray answers at {address} ({_last_line(error)}): start one with "ray start '
                '--head", or leave --address out' if address is not None else
                f'Ray cannot be started here: {_last_line(error)}') from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep what Ray's C++ says of its own log level off the terminal; its errors are raised."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _count_workers(asked: int | None, threads: int) -> tuple[int, int]:
    """The number of workers, and of GPUs if they get one each.

    Raises:
        ConfigError: There is no room for so many.
    """
    import ray
    there = ray.cluster_resources()
    cores, gpus = int(there.get('CPU', 0)), int(there.get('GPU', 0))
    most = min(gpus, cores // threads) if gpus else cores // threads
    if not most or (asked or 0) > most:
        raise ConfigError(f'Ray has {cores} cores and {gpus} GPUs, room for {most} workers with '
                          f'{threads} threads each{" and a GPU" if gpus else ""}: ask for fewer')
    return asked or most, gpus


# Pictures that lie in other files.

class _Encoded(str):
    """The address of a picture, of which a pipeline reads the bytes that are given with it."""
    content: Any

    def __new__(cls, address: str, content: Any) -> '_Encoded':
        made = super().__new__(cls, _PREFIX + address)
        made.content = content
        return made

    def __deepcopy__(self, memo: Any) -> str:  # a pipeline keeps the address of what it has read
        return str(self)


@register_backend('sample', prefixes=_PREFIX.removesuffix('://'))
class _SampleBackend(BaseStorageBackend):
    """Reads an `_Encoded` for mmengine's fileio."""

    def get(self, filepath: Any) -> bytes:
        """The bytes of the picture."""
        content = filepath.content
        if isinstance(content, DataError):
            raise content
        return content() if callable(content) else content

    def get_text(self, filepath: Any, encoding: str = 'utf-8') -> str:
        """The same as text."""
        return self.get(filepath).decode(encoding)


def _key(sample: Sample) -> str:
    """What `Segmenter.stream` calls a sample."""
    return sample.file if sample.start < 0 else _PREFIX + sample.address


def _open(samples: Iterable[Sample], column: str | None) -> Iterator[str]:
    """What a pipeline reads the samples by; of a .parquet a few rows are held."""
    for path, group in itertools.groupby(samples, lambda sample: sample.file):
        part = list(group)
        if _ending(path) == '.parquet':
            contents = _read_rows(path, column, [sample.start for sample in part])
            yield from (_Encoded(sample.address, content)
                        for sample, content in zip(part, contents))
        else:
            for sample in part:
                yield path if sample.start < 0 else _Encoded(sample.address, partial(
                    _read_part, path, sample.start, sample.length))


def _read_part(path: str, start: int, length: int) -> bytes:
    with open(path, 'rb') as file:
        file.seek(start)
        return file.read(length)


def _ending(path: str | Path) -> str:
    return Path(path).suffix.lower()


def _refused(sample: Sample) -> str | None:
    """Why a sample gets no mask: its place or its name."""
    if sample.length > 4 * MAX_PIXELS:
        return f'{sample.address} has {sample.length} bytes, too many for {MAX_PIXELS} pixels'
    parts = posixpath.normpath(sample.name.lstrip('/')).split('/')
    if '..' in parts or '.' in parts or '\0' in sample.name:
        return f'{sample.address}: its name leads out of the folder of the results'
    if len(os.fsencode(sample.name)) > _LONGEST:
        return f'{sample.address}: its name is longer than {_LONGEST} bytes'
    return None


def _list_tar(path: Path, column: str | None, skipped: dict[str, str]) -> list[Sample]:
    """The pictures of a .tar, by its headers."""
    found: dict[str, list[tuple[str, Sample]]] = {}
    size, end, count = path.stat().st_size, 0, 0
    wanted = IMAGES if column is None else {'.' + column.lower().removeprefix('.')}
    damage = ''
    try:
        with tarfile.open(path, 'r:') as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # which would grow
                count += 1
                end = member.offset_data + -(-member.size // 512) * 512
                folder, name = posixpath.split(member.name)
                key, _, ending = name.partition('.')
                if not member.isreg() or member.issparse() or not key or (
                        f'.{ending.lower()}' not in wanted):
                    continue
                address = f'{path}#{member.name}'
                if member.offset_data + member.size > size:
                    skipped[address] = f'{address}: the shard ends before it does: copy it again'
                    continue
                found.setdefault(posixpath.join(folder, key), []).append((ending, Sample(
                    address, posixpath.join(folder, f'{key}.{ending.rpartition(".")[2]}'),
                    str(path), member.offset_data, member.size)))
        # What is no header ends a tar silently, and so does the end of the file.
        with path.open('rb') as file:
            file.seek(end)
            damage = '' if file.read(512) == bytes(512) else 'it has no end mark'
    except (OSError, tarfile.TarError) as error:
        damage = str(error)
    if damage:
        skipped[str(path)] = (f'{path} is cut off or damaged after {count} files ({damage}): copy '
                              'it again')
    elif not found:
        raise DataError(f'{path} holds no sample that ends in {", ".join(sorted(wanted))}' + (
            ': name the ending of its pictures with --column' if column is None else ''))
    for key, several in found.items():
        endings = [ending for ending, _ in several]
        if column is None and len(set(endings)) > 1:
            raise DataError(f'the sample {key} in {path} has {" and ".join(endings)}: say with '
                            f'--column which is the picture, such as --column {endings[0]}')
    return [sample for several in found.values() for _, sample in several]


def _list_parquet(path: Path, label: str, column: str | None, skipped: dict[str, str]
                  ) -> list[Sample]:
    """The pictures of a .parquet, by its footer and the paths beside the pictures."""
    import pyarrow
    from pyarrow import parquet
    try:
        with path.open('rb') as raw, parquet.ParquetFile(raw) as file:
            name, inner = _find_column(path, file.schema_arrow, column)
            names = [None] * file.metadata.num_rows if 'path' not in inner else [
                row for batch in file.iter_batches(columns=[f'{name}.path'])
                for row in batch.column(0).field('path').to_pylist()]
    except (OSError, pyarrow.ArrowException) as error:
        skipped[str(path)] = f'{path} is damaged ({_last_line(error)}): copy it again'
        return []
    return [Sample(f'{path}#{row}', own or f'{label}/{row:06}', str(path), row)
            for row, own in enumerate(names)]


def _find_column(path: str | Path, schema: Any, column: str | None) -> tuple[str, list[str]]:
    """The column of the pictures, and what fields it has.

    Raises:
        DataError: There is none, or several are possible.
    """
    from pyarrow import types

    def fields(kind: Any) -> dict[str, Any]:
        return {each.name: each.type for each in kind} if types.is_struct(kind) else {}

    def is_binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    fitting = [each.name for each in schema
               if is_binary(each.type) or is_binary(fields(each.type).get('bytes', each.type))]
    chosen = column or ('image' if 'image' in fitting else fitting[0] if len(fitting) == 1 else '')
    if chosen not in fitting:
        what = f'no column {chosen} of' if column else 'several columns of' if fitting else 'no'
        raise DataError(f'{path} has {what} encoded pictures, its columns are '
                        f'{", ".join(schema.names)}' +
                        (f': name one of {", ".join(fitting)} with --column' if fitting else ''))
    return chosen, list(fields(schema.field(chosen).type))


def _read_rows(path: str, column: str | None, rows: Sequence[int]) -> Iterator[Any]:
    """The pictures of some rows, which ascend: bytes, or the error that each would be."""
    import pyarrow
    from pyarrow import parquet
    done = 0
    try:
        # Without a buffer a row group, which can be large, would be read as a whole. A file, for
        # pyarrow takes no path that is not UTF-8.
        with open(path, 'rb') as raw, parquet.ParquetFile(
                raw, buffer_size=2 ** 20, pre_buffer=False) as file:
            name, inner = _find_column(path, file.schema_arrow, column)
            first = 0
            for group in range(file.num_row_groups):
                after = first + file.metadata.row_group(group).num_rows
                if done < len(rows) and rows[done] < after:
                    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[name]):
                        values = batch.column(0)
                        values = values.field('bytes') if inner else values
                        while done < len(rows) and rows[done] < first + len(batch):
                            content = values[rows[done] - first].as_py()
                            yield content if content is not None else DataError(
                                f'{path}#{rows[done]} holds no picture')
                            done += 1
                        first += len(batch)
                        if done == len(rows):
                            return
                first = after
    except (OSError, pyarrow.ArrowException) as error:
        for row in rows[done:]:
            yield DataError(f'{path}#{row} cannot be read ({_last_line(error)}): copy the shard '
                            'again')


def _roots(samples: Sequence[Sample]) -> tuple[str, ...]:
    """A folder above all pictures."""
    return (os.path.commonpath([os.path.dirname(sample.file) for sample in samples]),)
