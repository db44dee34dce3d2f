"""A model in a process of Ray Serve: requests wait in it, and its controller gives each a ratio."""
import asyncio
import io
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from ..data.transforms import check_header
from ..errors import ConfigError, DataError, UserError
from ..isr import ISRRatio
from ..predict.segmenter import Loaded, Segmentation, Segmenter
from .controller import Controller, Costs, Job, Queue
from .messages import Answer, Policy, Wish

_SIDES = 256, 512, 1024  # of the images that are timed at first
_MEASURING = 5.  # seconds after which no larger one is
_TRYING = 10.  # seconds between attempts to unlearn that a ratio is too slow
_LOG = logging.getLogger('ray.serve')


@dataclass(eq=False)
class _Job(Job):
    came: float
    loaded: Loaded
    future: asyncio.Future[tuple[Segmentation, str, float, float]]


class _Late(Exception):
    """A request that has waited, and is late even at the fastest ratio."""


class Replica:
    """A model and those who wait for it.

    One thread computes, one decodes images, and one encodes masks.

    Args:
        model: Arguments of `Segmenter`.
        threads: Those of PyTorch.
    """

    def __init__(self, model: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        self.segmenter = Segmenter(**model)
        self.queue: Queue[_Job] = Queue(Controller(('none',)), Costs())
        self.policy: Policy | None = None
        self.encoding, self.tried = Costs(), 0.
        self.more = asyncio.Event()
        self.work: asyncio.Task[None] | None = None
        self.computing, self.decoder, self.encoder = (ThreadPoolExecutor(1) for _ in range(3))

    async def reconfigure(self, settings: dict[str, Any]) -> None:
        """Take the arguments of a `Policy`; ratios that are new are timed.

        Ray Serve would stop a replica that raises an error here, so a running one keeps what it
        has.
        """
        try:
            policy = Policy(**settings)
            ratios = tuple(str(ISRRatio.parse(ratio)) for ratio in policy.isr_ratio)
            await self._measure(ratios)
        except Exception as error:
            if self.policy is None:
                raise
            _LOG.error('the new settings are not taken: %s', error)
            return
        self.policy, self.queue.controller = policy, Controller(ratios)

    async def segment(self, body: bytes, wish: Wish, figures: bool, since: float) -> Answer:
        """Answer a request that came at the time ``since``, with a mask or with figures."""
        assert self.policy is not None
        came = time.monotonic() - max(0., time.time() - since)
        try:
            ratio = self._read(wish)
            loaded = await self._run(self.decoder, self._load, body, wish.max_side)
            form, pixels = (figures, wish.rle), math.prod(loaded[0].shape[:2])
            due = came + (wish.deadline_ms or self.policy.deadline_ms) / 1e3
            job = _Job(due - self.encoding.seconds(str(form), pixels), _size(loaded), ratio, came,
                       loaded, asyncio.get_running_loop().create_future())
            self._drop_gone()
            admitted = self.queue.admit(time.monotonic(), job)
            self.more.set()
            self.work = self.work or asyncio.create_task(self._work())
            if not admitted:
                return self._refuse(job)
            try:
                result, ratio, start, end = await job.future
            except _Late:
                return self._refuse(job)
            content = await self._run(self.encoder, _encode, result, *form)
            self.encoding.add(str(form), pixels, time.monotonic() - end)
            if figures:
                content |= dict(isr_ratio=ratio, queue_ms=1e3 * (start - came),
                                compute_ms=1e3 * (end - start))
            return Answer(200, content, ratio, start - came, end - start)
        except UserError as error:
            return Answer(422, str(error))
        except OSError as error:  # of the temporary file
            _LOG.exception('an image cannot be read')
            return Answer(503, f'the server cannot read images now: {error.strerror}', wait=60.)

    async def describe(self) -> dict[str, Any]:
        """Return the classes, and what the ratios cost here."""
        assert self.policy is not None
        table = self.queue.costs.table()
        return dict(model=Path(self.segmenter.source).name, device=str(self.segmenter.device),
                    classes=self.segmenter.classes, palette=self.segmenter.description.palette,
                    deadline_ms=self.policy.deadline_ms, ratios=[
                        dict(isr_ratio=ratio, miou=self.policy.miou.get(ratio), ms=table[ratio])
                        for ratio in self.queue.controller.ratios])

    async def check_health(self) -> None:
        """Raise an error, so that Ray Serve replaces this replica, if nothing is predicted."""
        if self.work is not None and self.work.done():
            self.work.result()

    async def _work(self) -> None:
        """Predict those that wait, the earliest deadline first."""
        while await self.more.wait():
            start, queue = time.monotonic(), self.queue
            self._drop_gone()
            for job in queue.drop_late(start):
                job.future.set_exception(_Late())
            if not queue.waiting and queue.doubt is not None and start > self.tried + _TRYING:
                (ratio, job), queue.doubt, self.tried = queue.doubt, None, start
                queue.waiting = [replace(job, due=math.inf, ratio=ratio,
                                         future=asyncio.get_running_loop().create_future())]
            if not queue.waiting:
                self.more.clear()
                continue
            ratio, jobs = queue.take(start, self.segmenter.batch_size)
            try:
                results = await self._predict(ratio, [job.loaded for job in jobs])
            except Exception as error:  # which those that asked are told
                results = [error] * len(jobs)
                if not isinstance(error, UserError):
                    _LOG.exception('a prediction failed')
                    await self._test()
            end = queue.free = time.monotonic()
            for job, result in zip(jobs, results):
                if job.future.done():  # its client is gone
                    continue
                if isinstance(result, Exception):
                    job.future.set_exception(result)
                else:
                    job.future.set_result((result, ratio, start, end))

    def _drop_gone(self) -> None:
        """Take out those whose clients are gone."""
        self.queue.waiting = [job for job in self.queue.waiting if not job.future.done()]

    async def _predict(self, ratio: str, loaded: Sequence[Loaded], learn: bool = True) -> list[Any]:
        """Predict images of one size, and learn what that takes."""
        def predict() -> tuple[list[Any], float]:
            start = time.perf_counter()
            self.segmenter.isr_ratio = ratio  # type: ignore[assignment]
            results = self.segmenter.predict_loaded([(None, item) for item in loaded])
            return [result for _, result in results], time.perf_counter() - start

        results, seconds = await self._run(self.computing, predict)
        if learn:
            self.queue.costs.add(ratio, math.prod(_size(loaded[0])), seconds / len(loaded))
        return results

    async def _measure(self, ratios: Sequence[str]) -> None:
        """Time new ratios at a few sizes; while others may wait, at the least one."""
        new = [ratio for ratio in ratios if ratio not in self.queue.costs.table()]
        end = time.monotonic() + _MEASURING
        for side in _SIDES[:1] if self.policy else _SIDES:
            noise = np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)
            loaded = await self._run(self.decoder, self.segmenter.load, noise)
            for turn in range(3):
                for ratio in new:  # the first pass may compile
                    if side == _SIDES[0] or time.monotonic() < end:
                        await self._predict(ratio, [loaded], turn > 0)

    async def _test(self) -> None:
        """End this process, which Ray Serve replaces, if no prediction works any more."""
        try:
            image = self.segmenter.load(np.zeros((64, 64, 3), np.uint8))
            await self._predict(self.queue.controller.ratios[0], [image], learn=False)
        except Exception:  # such as after an error of a GPU
            _LOG.exception('the model cannot predict any more')
            os._exit(1)

    def _read(self, wish: Wish) -> str | None:
        """Return the ratio that a request asks for, if it asks for one."""
        assert self.policy is not None
        asked = wish.model_dump(exclude_none=True, exclude={'rle'})
        if asked and not self.policy.allow_overrides:
            raise ConfigError('this server chooses ratio, size and deadline itself: leave out '
                              + ', '.join(asked))
        most = self.segmenter.max_side
        if wish.max_side is not None and wish.max_side > (most or 0):
            raise ConfigError(f'max_side {wish.max_side}: give at most {most}' if most else
                              'max_side: this server was started without --max-side, so that none '
                              'can be set')
        if wish.isr_ratio is None and wish.query_ratio is None:
            return None
        ratio = str(ISRRatio.parse(
            'none' if wish.isr_ratio is None else wish.isr_ratio).with_queries(wish.query_ratio))
        ratios = self.queue.controller.ratios
        if ratio not in ratios:
            raise ConfigError(f'this server predicts at {", ".join(ratios)}, not at {ratio}')
        return ratio

    def _load(self, body: bytes, max_side: int | None) -> Loaded:
        """Decode an image as tools/predict.py does."""
        assert self.policy is not None
        name = 'the body'
        check_header('image', name, body, round(self.policy.megapixels * 1e6))
        with tempfile.NamedTemporaryFile() as file:
            file.write(body)
            file.flush()
            try:
                return self.segmenter.load(file.name, max_side)
            except DataError as error:
                raise DataError(str(error).replace(file.name, name)) from error

    def _refuse(self, job: _Job) -> Answer:
        """Return what one is told who is late, or makes others late."""
        if job.came + sum(self.queue.controller.least(job, self.queue.costs)) > job.due:
            return Answer(503, 'an image of this size cannot be predicted within the deadline')
        return Answer(503, 'too many requests wait: ask again later',
                      wait=max(1., self.queue.wait(time.monotonic())))

    async def _run(self, threads: ThreadPoolExecutor, call: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(threads, call, *args)


def _size(loaded: Loaded) -> tuple[int, int]:
    height, width = loaded[1]['inputs'].shape[1:]
    return height, width


def _encode(result: Segmentation, figures: bool, rle: bool) -> bytes | dict[str, Any]:
    """Return the mask as a PNG, or figures."""
    if not figures:
        file = io.BytesIO()
        result.mask.save(file, 'PNG')
        return file.getvalue()
    size = list(result.labels.shape)
    masks = [{'class': result.classes[index], 'size': size, 'counts': _runs(result.labels == index)}
             for index in np.unique(result.labels)] if rle else []
    return dict(size=size, classes=result.shares) | (dict(masks=masks) if rle else {})


def _runs(mask: np.ndarray) -> list[int]:
    """Return the lengths of runs of 0 and of 1 in turn, column by column, as COCO has them."""
    flat = mask.ravel(order='F')
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return [int(run) for run in np.diff(edges, prepend=0, append=flat.size)]
