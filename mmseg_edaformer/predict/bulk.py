"""Masks of millions of images, made by many processes on many machines with Ray Data.

A finished mask notes what it was made from, and a worker looks at it before it predicts: so nothing
is done twice, whatever dies, and re-running resumes.
"""
import hashlib
import json
import os
import pickle
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from .. import __version__
from ..errors import ConfigError, DataError, UserError, shown
from ..files import replacing, write_file
from .inputs import IMAGES, find_images, name_targets
from .outputs import Summary, make_note, read_result, remove_leftovers, write_result, writing
from .ray_pool import connect, count_workers, import_ray, run_workers
from .run import progress_bar
from .segmenter import Segmentation, Segmenter, class_shares, count_pixels
from .shards import SHARDS, Sample, expand, is_shard, read_samples

MANIFEST = 'manifest.jsonl'

_MOST_IMAGES = 64  # that a worker is given at once
_SHARD_IMAGES = 16  # the same from shards, whose number of images is unknown
_BATCHES = 16  # of each worker, at least: the last ones end at about the same time


class _Result(NamedTuple):
    """What became of a sample: the pixels of each class, or the reason why it was skipped."""
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

    The masks are those of `predict_images`, and the arguments those of tools/predict_many.py, which
    docs/predict_many.md describes.
    """
    if threads < 1 or (workers is not None and workers < 1):
        raise ConfigError(f'workers {workers}, threads {threads}: they must be 1 or more')
    import_ray()
    out = Path(os.path.abspath(out))
    files = find_images(os.path.abspath(source), Path(os.path.realpath(out)), IMAGES | SHARDS)
    samples = [Sample(str(path), target, str(path))
               for path, target in name_targets(files).items()]
    shards = any(is_shard(sample.file) for sample in samples)
    if column is not None and not shards:
        raise ConfigError(f'--column {column} is for shards: {source} holds none')
    first = next(read_samples(samples[0], column, IMAGES))  # fail early if there is no such column
    settings: dict[str, Any] = {  # with absolute paths, for workers elsewhere
        name: os.path.abspath(path) if path is not None and os.path.exists(path) else path
        for name, path in (('model', model), ('checkpoint', checkpoint))}
    settings |= dict(isr_ratio=isr_ratio, max_side=max_side, batch_size=batch_size)
    segmenter = Segmenter(device='cpu', **settings)
    summary = Summary(segmenter, out)
    token = out / f'.{socket.gethostname()}.{os.getpid()}.partial'
    with writing(out):
        for name in MANIFEST, 'summary.json':  # they are not to speak for this run yet
            (out / name).unlink(missing_ok=True)
        summary.begin()
        write_file(token, '')
    top = os.path.commonpath([os.path.dirname(sample.file) for sample in samples])
    try:
        with connect(address, workers and workers * threads):
            workers, gpus = count_workers(workers, threads)
            print(f'{shown(segmenter.source)}, {len(segmenter.classes)} classes, on {workers} '
                  f'{"GPU" if gpus else "CPU"} worker{"s" * (workers > 1)} with {threads} '
                  f'thread{"s" * (threads > 1)} each', flush=True)
            if not gpus:
                _tell_cost(segmenter, first, threads)
            size = _SHARD_IMAGES if shards else -(-len(samples) // workers // _BATCHES)
            size = min(_MOST_IMAGES, max(size, batch_size or (8 if gpus else 1)))
            results = run_workers(
                samples, partial(expand, column=column, endings=IMAGES) if shards else None,
                _Worker, (settings, out, threads, overlays, segmenter.fingerprint(), top, token),
                batch_size=size, workers=workers, num_cpus=threads, num_gpus=1 if gpus else None)
            done = _collect(results, None if shards else len(samples), summary)
        return summary.write(device='cuda' if gpus else 'cpu', workers=workers, threads=threads,
                             images=done)
    finally:
        remove_leftovers(out)


def _tell_cost(segmenter: Segmenter, sample: Sample, threads: int) -> None:
    """Log what an image takes a worker, whose own log nobody sees."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with suppress(DataError), tempfile.TemporaryDirectory() as folder:  # the worker lists it
        segmenter.tell_cost(sample.as_file(folder))
    torch.set_num_threads(before)


def _collect(results: Iterator[_Result], total: int | None, summary: Summary) -> int:
    """Write the manifest and fill the summary; returns the number of masks."""
    done = 0
    with writing(summary.out), replacing(summary.out / MANIFEST) as path, path.open('w') as lines:
        try:
            first = next(results)  # the models are loaded: time begins to count
            with progress_bar('predict', total) as advance:
                for result in chain([first], results):
                    line: dict[str, Any] = dict(image=summary.place(result.address))
                    if result.counts is None:
                        summary.skipped[result.address] = line['skipped'] = result.reason
                    else:
                        done += 1
                        summary.counts += result.counts
                        summary.reduced += result.reduced
                        summary.kept += result.kept
                        line.update(mask=f'masks/{shown(result.target)}.png', shares=class_shares(
                            result.counts, summary.segmenter.classes))
                    lines.write(json.dumps(line) + '\n')
                    advance(done + len(summary.skipped))
        except KeyboardInterrupt:
            print(f'{done} images are done: run the same command again to resume', file=sys.stderr)
            raise
        if not done:
            raise DataError('no image can be read: ' + next(iter(summary.skipped.values())))
    return done


class _Worker:
    """A model in a process of its own, which predicts batches of pickled samples."""

    def __init__(self, settings: dict[str, Any], out: Path, threads: int, overlays: bool,
                 fingerprint: str, *seen: str | Path) -> None:
        self.settings, self.out, self.threads, self.overlays = settings, out, threads, overlays
        self.fingerprint, self.seen = fingerprint, seen
        self.segmenter: Any = None  # which the first call loads, see there

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return pickled results in the order of the samples, or the error that ends the run."""
        rows: list[Any] = [*map(pickle.loads, batch['row'])]
        try:
            for error in rows:
                if isinstance(error, UserError):
                    raise error
            if self.segmenter is None:  # an error of the constructor would lose its class
                self._load()
            with writing(self.out):
                rows = self._predict(rows)
        except UserError as error:
            rows = [error]
        return dict(row=[*map(pickle.dumps, rows)])

    def _load(self) -> None:
        here = socket.gethostname()
        for path in self.seen:
            if not os.path.exists(path):
                raise ConfigError(f'{here} does not see {path}: images, model and results must lie '
                                  'where all machines see them, under the same paths')
        torch.set_num_threads(self.threads)
        cv2.setNumThreads(self.threads)
        segmenter = Segmenter(**self.settings)
        if segmenter.fingerprint() != self.fingerprint:
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
            notes[index] = make_note(self.fingerprint, sample.file, sample.target)
            labels = read_result(self.out, sample.target, notes[index], self.overlays)
            if labels is not None:
                results[index] = self._count(sample, labels, kept=True)
        for index, result in self._segment(samples, sorted(notes.keys() - results.keys())):
            sample = samples[index]
            if isinstance(result, Segmentation):
                write_result(self.out, sample.target, result, notes[index], self.overlays)
                results[index] = self._count(sample, result.labels)
            else:
                results[index] = _Result(sample.target, sample.address, result)
        return [results[index] for index in range(len(samples))]

    def _count(self, sample: Sample, labels: np.ndarray, kept: bool = False) -> _Result:
        counts = count_pixels(labels, len(self.segmenter.classes))
        return _Result(sample.target, sample.address, '', counts,
                       self.segmenter.is_reduced(*labels.shape), kept)

    def _segment(self, samples: Sequence[Sample], left: Sequence[int]
                 ) -> Iterator[tuple[int, Segmentation | str]]:
        """Yield the samples that are left, with a segmentation or the reason why there is none."""
        if not left:
            return
        # A journal outlives a worker that dies: the next one predicts one image at a time, and
        # notes each before, so that the journal tells which one it is.
        name = hashlib.sha256(os.fsencode(samples[0].target)).hexdigest()[:16]
        journal = self.out / f'.{name}.partial'
        done: set[int] = set()
        skipped: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as folder:
            paths = {index: samples[index].as_file(folder) for index in left}
            if not journal.exists():
                journal.touch()
                with suppress(DataError):  # one does not fit into the memory of the device
                    for result in self.segmenter.stream(paths.values(), skipped):
                        index = next(index for index in left if index not in done and
                                     paths[index] not in skipped)
                        done.add(index)
                        yield index, result
            tries = Counter(journal.read_text().split())
            for index in left:
                if index in done:
                    continue
                reason = skipped.get(paths[index], '')
                if not reason and tries[str(index)] > 1:
                    reason = (f'{paths[index]}: its worker died three times over it, for lack of '
                              'memory or by a bug in a library: look at it, or run again')
                if not reason:
                    with journal.open('a') as file:
                        file.write(f'{index}\n')
                    try:
                        yield index, next(self.segmenter.stream([paths[index]]))
                        continue
                    except DataError as error:
                        reason = str(error)
                yield index, reason.replace(paths[index], samples[index].address)
        journal.unlink(missing_ok=True)
