"""Masks of millions of images, made by many processes on many machines with Ray Data.

Ray Data reads the shards, deals images out to workers that hold one model each, and deals those of
a worker that died out again. A finished mask notes what it was made from, and a worker looks at it
before it predicts: so nothing is done twice, whatever dies, and re-running resumes.
"""
import hashlib
import json
import os
import pickle
import socket
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from .. import __version__
from ..compat import install_command
from ..errors import ConfigError, DataError, UserError, shown
from ..files import remove_partial_files, replacing, write_file
from .inputs import IMAGES, find_images, name_targets
from .outputs import Summary, draw_legend, encode_png, make_note, read_mask, write_result, writing
from .run import progress_bar
from .segmenter import Segmentation, Segmenter, class_shares, count_pixels
from .shards import SHARDS, Sample, is_shard, last_line, read_samples

MANIFEST = 'manifest.jsonl'

_MOST_IMAGES = 64  # that a worker is given at once
_SHARD_IMAGES = 16  # the same of shards, whose number of images is unknown
_BLOCKS = 16  # of each worker, at least: the last ones end at about the same time
_BLOCK_BYTES = 2 ** 21  # of images that travel together
_DEATHS = 3  # of workers over an image until it is skipped
_STORE = 2 ** 28  # bytes of shared memory for images of shards
_ANSWER = 10.  # seconds
_ENVIRONMENT = dict(
    RAY_USAGE_STATS_ENABLED='0', RAY_DATA_LOG_LEVEL='CRITICAL', RAY_BACKEND_LOG_LEVEL='fatal',
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO='0')


@dataclass(frozen=True)
class _Job:
    """The settings of all workers; paths are absolute."""
    model: str
    checkpoint: Any
    isr_ratio: str | None
    max_side: int | None
    batch_size: int | None
    threads: int
    out: str
    overlays: bool
    fingerprint: str
    seen: tuple[str, ...]


class _Result(NamedTuple):
    """What became of a sample: pixels of each class, or the reason why it was skipped."""
    target: str
    address: str
    reason: str = ''
    counts: np.ndarray | None = None
    reduced: bool = False
    kept: bool = False


def predict_many(source: str | Path, model: str | Path, out: str | Path, *,
                 checkpoint: str | Path | None = None, isr_ratio: str | None = None,
                 max_side: int | None = None, workers: int | None = None, threads: int = 1,
                 address: str | None = None, overlays: bool = False, batch_size: int | None = None,
                 column: str | None = None) -> dict[str, Any]:
    """Write the masks of many images to a folder with Ray; re-running resumes where it stopped.

    The masks are those of `predict_images`. Images that cannot be read are skipped, and so are
    those whose worker dies again and again.

    Args:
        source: A folder, a file or a pattern, see `find_images`; of images and shards.
        model: See `Segmenter`, as ``checkpoint``, ``isr_ratio``, ``max_side`` and ``batch_size``.
        out: Folder for ``masks``, ``legend.png``, and at the end ``manifest.jsonl``, a line for
            each image in their order, and ``summary.json``. All machines must see it, the model and
            the images.
        workers: Number of models at once; by default one for each GPU, or without one for every
            ``threads`` cores.
        threads: Cores of each worker.
        address: Address of a running Ray, such as ``auto`` or ``ray://host:10001``; by default one
            is started here and ended. A Ray that this process is connected to is taken as it is.
        overlays: Whether to write ``overlays``.
        column: The images of a shard, see `read_samples`.

    Returns:
        The content of the summary.

    Raises:
        DataError: There is no image, none can be read, two would get the same name, or the column
            is not there.
        ConfigError: Ray is missing or does not answer, has no room for the workers, a machine does
            not see the files, or the folder cannot be written to.
        UserError: See `Segmenter`.
    """
    if threads < 1 or (workers is not None and workers < 1):
        raise ConfigError(f'workers {workers}, threads {threads}: they must be 1 or more')
    _import_ray()
    out = Path(os.path.abspath(out))
    source, model, checkpoint = (
        os.path.abspath(path) if path is not None and '://' not in str(path) else path
        for path in (source, model, checkpoint))
    files = find_images(str(source), Path(os.path.realpath(out)), IMAGES | SHARDS)
    samples = [Sample(str(path), target, str(path))
               for path, target in name_targets(files).items()]
    shards = sum(is_shard(sample.file) for sample in samples)
    if column is not None and not shards:
        raise ConfigError(f'--column {column} is for .tar and .parquet: {source} holds neither')
    segmenter = Segmenter(str(model), checkpoint, device='cpu', isr_ratio=isr_ratio,
                          max_side=max_side, batch_size=batch_size)
    summary = Summary(segmenter, out)
    token = out / f'.{socket.gethostname()}.{os.getpid()}.partial'
    with writing(out):
        for name in MANIFEST, 'summary.json':  # they are not to speak for this run yet
            (out / name).unlink(missing_ok=True)
        write_file(out / 'legend.png', encode_png(draw_legend(segmenter)))
        _clean(out)
        write_file(token, '')
    top = os.path.commonpath([os.path.dirname(sample.file) for sample in samples])
    job = _Job(str(model), checkpoint, isr_ratio, max_side, batch_size, threads, str(out), overlays,
               segmenter.fingerprint(), (top, str(token)))
    try:
        with _connected(address, None if workers is None else workers * threads):
            count, gpus = _count_workers(workers, threads)
            print(f'{shown(segmenter.source)}, {len(segmenter.classes)} classes, on {count} '
                  f'{"GPU" if gpus else "CPU"} worker{"s" * (count > 1)} with {threads} '
                  f'thread{"s" * (threads > 1)} each', flush=True)
            if not gpus and not is_shard(samples[0].file):
                _tell_cost(segmenter, samples[0], threads)
            size = _SHARD_IMAGES if shards else -(-len(samples) // count // _BLOCKS)
            size = min(_MOST_IMAGES, max(size, batch_size or (8 if gpus else 1)))
            with progress_bar('predict', None if shards else len(samples)) as advance:
                done = _collect(_run(samples, job, column, count, bool(gpus), size), summary,
                                advance)
        return summary.write(device='cuda' if gpus else 'cpu', workers=count, threads=threads,
                             images=done)
    finally:
        _clean(out)


def _collect(results: Iterator[_Result], summary: Summary, advance: Any) -> int:
    """Write the manifest and fill the summary; returns the number of masks.

    Raises:
        DataError: There is none.
    """
    done = 0
    with writing(summary.out), replacing(summary.out / MANIFEST) as partial, \
            partial.open('w') as lines:
        for result in results:
            entry: dict[str, Any] = dict(image=summary.place(result.address))
            if result.counts is None:
                summary.skipped[result.address] = entry['skipped'] = result.reason
            else:
                done += 1
                summary.counts += result.counts
                summary.reduced += result.reduced
                summary.kept += result.kept
                entry.update(mask=f'masks/{shown(result.target)}.png', shares=class_shares(
                    result.counts, summary.segmenter.classes))
            lines.write(json.dumps(entry) + '\n')
            advance(done + len(summary.skipped))
        if not done:
            raise DataError('no image can be read: ' + next(iter(summary.skipped.values())))
    return done


def _tell_cost(segmenter: Segmenter, sample: Sample, threads: int) -> None:
    """Log what an image takes a worker, whose own log nobody sees."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        segmenter.tell_cost(sample.file)
    except DataError:
        pass  # the worker lists it
    finally:
        torch.set_num_threads(before)


def _clean(out: Path) -> None:
    """Remove what killed runs and workers left half-written."""
    remove_partial_files(out)
    for kind in 'masks', 'overlays':
        for folder, _, _ in os.walk(out / kind):
            remove_partial_files(folder)


class _Worker:
    """A model in a process of its own, which predicts batches of pickled samples."""

    def __init__(self, job: _Job) -> None:
        self.job, self.out = job, Path(job.out)
        self.segmenter: Any = None  # which the first call loads: Ray would retry a constructor

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return pickled results in the order of the samples, or the error that ends the run."""
        rows: list[Any] = [pickle.loads(row) for row in batch['sample']]
        try:
            for row in rows:
                if isinstance(row, UserError):
                    raise row
            if self.segmenter is None:
                self._load()
            with writing(self.out):
                rows = self._predict(rows)
        except UserError as error:
            rows = [error]
        return dict(result=[pickle.dumps(row) for row in rows])

    def _load(self) -> None:
        job, here = self.job, socket.gethostname()
        for path in job.seen:
            if not os.path.exists(path):
                raise ConfigError(f'{here} does not see {path}: images, model and results must lie '
                                  'where all machines see them, under the same paths')
        torch.set_num_threads(job.threads)
        cv2.setNumThreads(job.threads)
        segmenter = Segmenter(job.model, job.checkpoint, isr_ratio=job.isr_ratio,
                              max_side=job.max_side, batch_size=job.batch_size)
        if segmenter.fingerprint() != job.fingerprint:
            raise ConfigError(
                f'{here} has another model in {segmenter.source} than the machine that asks, or '
                f'another version than mmseg_edaformer {__version__}: give all the same')
        self.segmenter = segmenter

    def _predict(self, samples: Sequence[Sample]) -> list[_Result]:
        results: dict[int, _Result] = {}
        notes: dict[int, str] = {}
        for index, sample in enumerate(samples):
            if sample.reason:
                results[index] = _Result(sample.target, sample.address, sample.reason)
                continue
            # A mask that has an overlay is noted as by predict_images, and will do without one.
            both, alone = (make_note(self.job.fingerprint, sample.file, f'{sample.target}{mark}')
                           for mark in ('', ' alone'))
            notes[index] = both if self.job.overlays else alone
            labels = read_mask(self.out / 'masks' / f'{sample.target}.png', both, notes[index])
            if labels is not None:
                results[index] = self._count(sample, labels, kept=True)
        for index, result in self._segment(samples, [*notes.keys() - results.keys()]):
            sample = samples[index]
            if isinstance(result, Segmentation):
                write_result(self.out, sample.target, result, notes[index], self.job.overlays)
                results[index] = self._count(sample, result.labels)
            else:
                results[index] = _Result(sample.target, sample.address, result)
        return [results[index] for index in range(len(samples))]

    def _count(self, sample: Sample, labels: np.ndarray, kept: bool = False) -> _Result:
        counts = count_pixels(labels, len(self.segmenter.classes))
        return _Result(sample.target, sample.address, '', counts,
                       self.segmenter.is_reduced(*labels.shape), kept)

    def _segment(self, samples: Sequence[Sample], left: list[int]
                 ) -> Iterator[tuple[int, Segmentation | str]]:
        """Yield the samples that are left, with a segmentation or the reason why there is none.

        A journal outlives a worker that dies of an image: the next worker then predicts one image
        at a time, so that the journal tells which one it is.
        """
        if not left:
            return
        name = hashlib.sha256(os.fsencode(samples[0].target)).hexdigest()[:16]
        journal = self.out / f'.{name}.partial'
        tries = Counter(journal.read_text().split() if journal.exists() else ())
        for part in [[index] for index in sorted(left)] if tries else [sorted(left)]:
            if tries[str(part[0])] < _DEATHS:
                yield from self._stream(samples, part, journal)
            else:
                yield part[0], (f'{samples[part[0]].address}: its worker died {_DEATHS} times over '
                                'it, for lack of memory or by a bug in a library: look at it, or '
                                'run again')
        journal.unlink(missing_ok=True)

    def _stream(self, samples: Sequence[Sample], part: list[int], journal: Path
                ) -> Iterator[tuple[int, Segmentation | str]]:
        paths: list[str] = []
        skipped: dict[str, str] = {}
        done = 0

        def find_paths() -> Iterator[str]:
            for index in part:
                with journal.open('a') as file:
                    file.write(f'{index}\n')
                path, content = samples[index].file, samples[index].content
                if content is not None:  # the reader of a pipeline wants a file
                    path = os.path.join(folder, str(index))
                    Path(path).write_bytes(content)
                paths.append(path)
                yield path

        def reason(position: int) -> str:
            path = paths[position]
            return skipped[path].replace(path, samples[part[position]].address)

        with tempfile.TemporaryDirectory() as folder:
            try:
                for result in self.segmenter.stream(find_paths(), skipped):
                    while paths[done] in skipped:
                        yield part[done], reason(done)
                        done += 1
                    yield part[done], result
                    done += 1
            except DataError as error:  # one does not fit into the memory of the device
                if len(part) == 1:
                    yield part[0], str(error)
                else:
                    for index in part[done:]:
                        yield from self._stream(samples, [index], journal)
                return
            for position in range(done, len(part)):
                yield part[position], reason(position)


# Ray.

def _run(samples: Sequence[Sample], job: _Job, column: str | None, workers: int, gpus: int,
         size: int) -> Iterator[_Result]:
    """Have Ray Data predict samples in batches of a size; yields the results in their order."""
    import pyarrow
    import ray
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = _BLOCK_BYTES
    shards = any(is_shard(sample.file) for sample in samples)
    step = 1 if shards else size
    dataset = ray.data.from_blocks([
        pyarrow.table(dict(sample=[*map(pickle.dumps, samples[start:start + step])]))
        for start in range(0, len(samples), step)])
    if shards:  # without a core of their own, for all of them belong to the workers
        dataset = dataset.flat_map(_expand, fn_args=(column,), num_cpus=0)
    dataset = dataset.map_batches(
        _Worker, fn_constructor_args=(job,), batch_size=size, batch_format='numpy',
        compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=job.threads,
        num_gpus=1 if gpus else None)
    try:
        for batch in dataset.iter_batches(batch_size=None):
            for row in map(pickle.loads, batch['result']):
                if isinstance(row, UserError):
                    raise row
                yield row
    except ray.exceptions.RayTaskError:
        raise  # a bug, whose traceback a report needs
    except ray.exceptions.RayError as error:
        raise ConfigError(
            f'the workers cannot be started or were lost ({last_line(error)}). All machines need '
            'mmseg_edaformer with the extra cluster, of one version, and memory for the model. '
            'Run again to resume') from error


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
    """Connect this process to a Ray.

    Raises:
        ConfigError: None answers.
    """
    import ray
    if ray.is_initialized() and address is None:
        yield
        return
    quiet: dict[str, Any] = dict(logging_level='ERROR', log_to_driver=False)
    try:
        if address is not None and ':' in address:  # Ray would wait for minutes
            host, _, port = address.removeprefix('ray://').rpartition(':')
            socket.create_connection((host, int(port)), _ANSWER).close()
        with _silent_stderr():
            if address is None:
                ray.init('local', num_cpus=cpus, include_dashboard=False,
                         object_store_memory=_STORE, **quiet)
            else:
                ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f'no Ray answers at {address} ({last_line(error)}): start one with "ray start --head", '
            'or leave --address out' if address is not None else
            f'Ray cannot be started here: {last_line(error)}') from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence what Ray's C++ prints about its own log level; its errors are raised."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _count_workers(workers: int | None, threads: int) -> tuple[int, int]:
    """Return the number of workers, and of GPUs if they get one each.

    Raises:
        ConfigError: There is no room for so many.
    """
    import ray
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get('CPU', 0)), int(resources.get('GPU', 0))
    most = min(gpus, cores // threads) if gpus else cores // threads
    if not most or (workers or 0) > most:
        raise ConfigError(f'Ray has {cores} cores and {gpus} GPUs, room for {most} workers with '
                          f'{threads} threads each{" and a GPU" if gpus else ""}: ask for fewer')
    return workers or most, gpus
