"""A model in a process of Ray Serve: requests wait in it, and its controller gives each a ratio."""
import asyncio
import io
import logging
import math
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from ..data.transforms import check_header
from ..errors import ConfigError, DataError, UserError
from ..isr import ISRRatio
from ..predict.segmenter import Loaded, Segmentation, Segmenter
from .controller import Controller, Costs, Job, faster
from .messages import Answer, Policy, Wish

_SIDES = 256, 512, 1024  # of the images that are timed at first
_MEASURING = 5.  # seconds after which no larger one is
_LOG = logging.getLogger('ray.serve')


@dataclass(eq=False)
class _Job(Job):
    came: float
    loaded: Loaded
    future: asyncio.Future[tuple[Segmentation, str, float, float]]


class _Late(Exception):
    """A request that has waited, and that the floor does not save."""


class Replica:
    """A model and those who wait for it.

    One thread computes, another one decodes images and encodes masks.

    Args:
        model: Arguments of `Segmenter`.
        threads: Those of PyTorch.
    """

    def __init__(self, model: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        self.segmenter = Segmenter(**model)
        self.costs, self.controller, self.last = Costs(), Controller(('none',)), ''
        self.waiting: list[_Job] = []
        self.held, self.free, self.broken = 0, 0., ''
        self.more = asyncio.Event()
        self.work: asyncio.Task[None] | None = None
        self.computing, self.coding = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    async def reconfigure(self, settings: dict[str, Any]) -> None:
        """Take the arguments of a `Policy`; ratios that are new are timed."""
        policy = Policy(**settings)
        ratios = await self._measure([str(ISRRatio.parse(ratio)) for ratio in policy.isr_ratio])
        self.policy, self.controller = policy, Controller(ratios)

    async def segment(self, body: bytes, wish: Wish, spent: float) -> Answer:
        """Answer a request that came ``spent`` seconds ago."""
        came = time.monotonic() - spent
        if self.held >= self.policy.in_flight:
            return self._refuse()
        self.held += 1
        try:
            ratio = self._read(wish)
            loaded = await self._run(self.coding, self._load, body, wish.max_side)
            job = _Job(came + (wish.deadline_ms or self.policy.deadline_ms) / 1e3, _pixels(loaded),
                       ratio, came, loaded, asyncio.get_running_loop().create_future())
            if job in self._find_late([*self.waiting, job]):
                return self._refuse()
            self.waiting = sorted([*self.waiting, job], key=lambda job: job.due)
            self.more.set()
            self.work = self.work or asyncio.create_task(self._work())
            return await self._run(self.coding, _encode, wish, *await job.future)
        except UserError as error:
            return Answer(422, str(error))
        except _Late:
            return self._refuse()
        finally:
            self.held -= 1

    async def describe(self) -> dict[str, Any]:
        """Return the classes, and what the ratios cost here."""
        table = self.costs.table()
        return dict(model=Path(self.segmenter.source).name, device=str(self.segmenter.device),
                    classes=self.segmenter.classes, palette=self.segmenter.description.palette,
                    deadline_ms=self.policy.deadline_ms, ratios=[
                        dict(isr_ratio=ratio, miou=self.policy.miou.get(ratio), ms=table[ratio])
                        for ratio in self.controller.ratios])

    async def check_health(self) -> None:
        """Raise an error, so that Ray Serve replaces this replica, if the model is broken."""
        if self.broken:
            raise RuntimeError(f'the model cannot predict any more: {self.broken}')

    async def _work(self) -> None:
        """Predict those that wait, the earliest deadline first."""
        while await self.more.wait():
            self.waiting = [job for job in self.waiting if not job.future.done()]
            for job in self._find_late(self.waiting):
                self.waiting.remove(job)
                job.future.set_exception(_Late())
            if not self.waiting:
                self.more.clear()
                continue
            start, first = time.monotonic(), self.waiting[0]
            ratio = first.ratio
            if ratio is None:
                ratio = self.last = self.controller.choose(
                    start, self.waiting, self.costs, self.last)
            jobs = [job for job in self.waiting if job.ratio == first.ratio and job.loaded[
                1]['inputs'].shape == first.loaded[1]['inputs'].shape][:self.segmenter.batch_size]
            self.waiting = [job for job in self.waiting if job not in jobs]
            self.free = start + len(jobs) * self.costs.seconds(ratio, first.pixels)
            try:
                results = await self._predict(ratio, [job.loaded for job in jobs])
            except Exception as error:  # which those that asked are told
                results = [error] * len(jobs)
                if not isinstance(error, UserError):
                    _LOG.exception('a prediction failed')
                    await self._test()
            now = self.free = time.monotonic()
            for job, result in zip(jobs, results):
                if job.future.done():  # its client is gone
                    continue
                if isinstance(result, Exception):
                    job.future.set_exception(result)
                else:
                    job.future.set_result((result, ratio, start - job.came, now - start))

    async def _predict(self, ratio: str, loaded: Sequence[Loaded], learn: bool = True) -> list[Any]:
        """Predict images of one size, and learn what that takes."""
        def predict() -> tuple[list[Any], float]:
            start = time.perf_counter()
            self.segmenter.isr_ratio = ratio  # type: ignore[assignment]
            results = self.segmenter.predict_loaded([(None, item) for item in loaded])
            return [result for _, result in results], time.perf_counter() - start

        results, seconds = await self._run(self.computing, predict)
        if learn:
            self.costs.add(ratio, _pixels(loaded[0]), seconds / len(loaded))
        return results

    async def _measure(self, ratios: Sequence[str]) -> tuple[str, ...]:
        """Time ratios at a few sizes, and return those that save time."""
        end = time.monotonic() + _MEASURING
        new = [ratio for ratio in ratios if ratio not in self.costs.table()]
        for side in _SIDES:
            noise = np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)
            loaded = await self._run(self.coding, self.segmenter.load, noise)
            for turn in range(3):
                for ratio in new:  # the first pass may compile
                    await self._predict(ratio, [loaded] * self.segmenter.batch_size, turn > 0)
            seconds = {ratio: self.costs.seconds(ratio, _pixels(loaded)) for ratio in ratios}
            if time.monotonic() > end:
                break
        return faster(ratios, seconds)

    async def _test(self) -> None:
        """Notice that no prediction works any more, such as after an error of a GPU."""
        try:
            await self._predict('none', [self.segmenter.load(np.zeros((64, 64, 3), np.uint8))])
        except Exception as error:
            self.broken = str(error)

    def _read(self, wish: Wish) -> str | None:
        """Return the ratio that a request asks for, if it asks for one."""
        if not self.policy.overrides and any(wish[:4]):
            raise ConfigError('this server chooses ratio, size and deadline itself: leave '
                              'isr_ratio, query_ratio, max_side and deadline_ms out')
        most = self.segmenter.max_side
        if wish.max_side is not None and not 32 <= wish.max_side <= (most or 0):
            raise ConfigError(f'max_side {wish.max_side}: give 32 to {most} pixels' if most else
                              'max_side: this server was started without --max-side, so that none '
                              'can be set')
        if wish.isr_ratio is None and wish.query_ratio is None:
            return None
        return str(ISRRatio.parse(wish.isr_ratio or 'none').with_queries(wish.query_ratio))

    def _load(self, body: bytes, max_side: int | None) -> Loaded:
        """Decode an image as tools/predict.py does."""
        name = 'of the request'
        check_header('image', name, body, round(self.policy.megapixels * 1e6))
        with tempfile.NamedTemporaryFile() as file:
            file.write(body)
            file.flush()
            try:
                return self.segmenter.load(file.name, max_side)
            except DataError as error:
                raise DataError(str(error).replace(file.name, name)) from error

    def _find_late(self, jobs: Sequence[_Job]) -> list[_Job]:
        late = self.controller.find_late(max(time.monotonic(), self.free), jobs, self.costs)
        return [jobs[index] for index in late]

    def _refuse(self) -> Answer:
        wait = self.controller.drain(self.waiting, self.costs) + max(
            0., self.free - time.monotonic())
        return Answer(503, 'too many requests wait for an answer in time: ask again later' if wait
                      else 'an image of this size cannot be predicted within the deadline',
                      wait=max(1., wait))

    async def _run(self, threads: ThreadPoolExecutor, call: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(threads, call, *args)


def _pixels(loaded: Loaded) -> int:
    return math.prod(loaded[1]['inputs'].shape[1:])


def _encode(wish: Wish, result: Segmentation, ratio: str, queue: float, compute: float) -> Answer:
    """Return the answer with a mask, or with figures."""
    if not wish.json:
        file = io.BytesIO()
        result.mask.save(file, 'PNG')
        return Answer(200, file.getvalue(), ratio, queue, compute)
    size = list(result.labels.shape)
    content: dict[str, Any] = dict(
        isr_ratio=ratio, queue_ms=round(1e3 * queue, 2), compute_ms=round(1e3 * compute, 2),
        size=size, classes=result.shares)
    if wish.rle:
        content['masks'] = {result.classes[index]: dict(size=size, counts=_runs(
            result.labels == index)) for index in np.unique(result.labels)}
    return Answer(200, content, ratio, queue, compute)


def _runs(mask: np.ndarray) -> list[int]:
    """Return the lengths of runs of 0 and of 1 in turn, column by column, as COCO has them."""
    flat = mask.ravel(order='F')
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return [int(run) for run in np.diff(edges, prepend=0, append=flat.size)]
