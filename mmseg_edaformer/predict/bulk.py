"""Masks of millions of images, made by many processes on many machines with Ray Data.

A finished mask notes what it was made from, and a worker looks at it before it predicts: so nothing
is done twice, whatever dies, and re-running resumes.
"""
import hashlib
import json
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch

from .. import __version__
from ..errors import ConfigError, DataError, shown
from ..files import replacing, write_file
from .inputs import IMAGES
from .outputs import Outcome, Results, Summary, remove_leftovers, writing
from .ray_pool import connect, count_workers, import_ray, run_workers
from .run import collect, find_samples
from .segmenter import Segmentation, Segmenter
from .shards import SHARDS, Sample, is_shard, read_samples

MANIFEST = 'manifest.jsonl'

_MOST_IMAGES = 64  # that a worker is given at once
_SHARD_IMAGES = 16  # the same from shards, whose number of images is unknown
_BATCHES = 16  # of each worker, at least: the last ones end at about the same time


def predict_many(source: str | Path, model: str | Path, out: str | Path, *,
                 checkpoint: str | Path | None = None, isr_ratio: str | None = None,
                 max_side: int | None = None, keep_ratio: bool = False,
                 workers: int | None = None, threads: int = 1, address: str | None = None,
                 overlays: bool = False, batch_size: int | None = None,
                 column: str | None = None) -> dict[str, Any]:
    """Write the masks of many images to a folder with Ray; re-running resumes where it stopped.

    The masks are those of `predict_images`, and the arguments those of tools/predict_many.py, which
    docs/predict_many.md describes.
    """
    if threads < 1 or (workers is not None and workers < 1):
        raise ConfigError(f'workers {workers}, threads {threads}: they must be 1 or more')
    import_ray()
    out = Path(os.path.abspath(out))
    samples = find_samples([os.path.abspath(source)], out, IMAGES | SHARDS)
    shards = any(is_shard(sample.file) for sample in samples)
    if column is not None and not shards:
        raise ConfigError(f'--column {column} is for shards: {source} holds none')
    first = next(read_samples(samples[0], column, IMAGES))  # fail early if there is no such column
    settings: dict[str, Any] = {  # with absolute paths, for workers elsewhere
        name: os.path.abspath(path) if path is not None and os.path.exists(path) else path
        for name, path in (('model', model), ('checkpoint', checkpoint))}
    settings |= dict(isr_ratio=isr_ratio, max_side=max_side, keep_ratio=keep_ratio,
                     batch_size=batch_size)
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
            outcomes = run_workers(
                samples, partial(read_samples, column=column, endings=IMAGES) if shards else None,
                _Worker, (settings, out, threads, overlays, segmenter.fingerprint(), (top, token)),
                batch_size=size, workers=workers, num_cpus=threads, num_gpus=1 if gpus else None)
            with writing(out), replacing(out / MANIFEST) as path, path.open('w') as lines:
                collect(outcomes, None if shards else len(samples), summary,
                        lambda image, entry: print(json.dumps(
                            dict(image=summary.place(image)) | entry), file=lines))
        return summary.write(device='cuda' if gpus else 'cpu', workers=workers, threads=threads,
                             images=summary.done)
    finally:
        remove_leftovers(out)


def _tell_cost(segmenter: Segmenter, sample: Sample, threads: int) -> None:
    """Log what an image takes a worker, whose own log nobody sees."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with suppress(DataError), tempfile.TemporaryDirectory() as folder:  # the worker lists it
        segmenter.tell_cost(sample.as_file(folder))
    torch.set_num_threads(before)


@dataclass
class _Worker:
    """A model in a process of its own, which predicts batches of samples."""
    settings: dict[str, Any]
    out: Path
    threads: int
    overlays: bool
    fingerprint: str
    seen: Sequence[str | Path] = ()  # what must be there
    results: Any = None  # the first call loads them: Ray loses the class of a constructor's error

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Return the outcomes of samples in their order."""
        if self.results is None:
            self.results = self._load()
        with writing(self.out):
            return self._predict(samples)

    def _load(self) -> Results:
        here = socket.gethostname()
        for path in self.seen:
            if not os.path.exists(path):
                raise ConfigError(f'{here} does not see {path}: images, model and results must lie '
                                  'where all machines see them, under the same paths')
        torch.set_num_threads(self.threads)
        cv2.setNumThreads(self.threads)
        results = Results(Segmenter(**self.settings), self.out, self.overlays)
        if results.fingerprint != self.fingerprint:
            raise ConfigError(f'{here} has another model in {results.segmenter.source} than the '
                              'machine that asks, or another version than mmseg_edaformer '
                              f'{__version__}: give all the same')
        return results

    def _predict(self, samples: Sequence[Sample]) -> list[Outcome]:
        outcomes = [Outcome(sample.target, sample.address, sample.reason) if sample.reason else
                    self.results.find(sample) for sample in samples]
        left = [index for index, outcome in enumerate(outcomes) if outcome is None]
        if not left:
            return outcomes
        # A journal outlives a worker that dies: the next one predicts one image at a time, and
        # notes each before, so that the journal tells which one it is.
        name = hashlib.sha256(os.fsencode(samples[0].target)).hexdigest()[:16]
        journal = self.out / f'.{name}.partial'
        with tempfile.TemporaryDirectory() as folder:
            paths = {index: samples[index].as_file(folder) for index in left}
            if journal.exists():
                predictions = self._predict_singly(paths, journal)
            else:
                journal.touch()
                predictions = self.results.segmenter.predict(paths.values())
            for (path, result), index in zip(predictions, left):
                if isinstance(result, DataError):
                    result = DataError(str(result).replace(path, samples[index].address))
                outcomes[index] = self.results.add(samples[index], result)
        journal.unlink(missing_ok=True)
        return outcomes

    def _predict_singly(self, paths: dict[int, str], journal: Path
                        ) -> Iterator[tuple[str, Segmentation | DataError]]:
        tries = Counter(journal.read_text().split())
        for index, path in paths.items():
            if tries[str(index)] > 1:
                yield path, DataError(f'{path}: its worker died three times over it, for lack of '
                                      'memory or by a bug in a library: look at it, or run again')
                continue
            with journal.open('a') as file:
                file.write(f'{index}\n')
            yield from self.results.segmenter.predict([path])
