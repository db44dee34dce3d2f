"""Who is served next, and at which ratio: the finest one at which all that wait are in time.

Nothing here knows of Ray, models or clocks, so that a simulation runs the same code.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

_WEIGHT = 0.2  # of a new measurement
_UNSURE = 0.1  # deviation of a first measurement, relative to it
_OUTLIER = 3.  # times the average, above which a measurement counts as that


@dataclass(eq=False)
class Job:
    """A request that waits: when its answer is due, and what it asks for.

    ``size`` is the height and width that the network sees; ``ratio`` is None where the controller
    chooses.
    """
    due: float
    size: tuple[int, int]
    ratio: str | None

    @property
    def pixels(self) -> int:
        return math.prod(self.size)


AnyJob = TypeVar('AnyJob', bound=Job)


class Costs:
    """Seconds that an image takes at each ratio, learnt for sizes that differ by less than 1.4."""

    def __init__(self) -> None:
        self._costs: dict[str, dict[int, tuple[float, float]]] = {}

    def add(self, ratio: str, pixels: int, seconds: float) -> None:
        """Learn what an image took: an average in which older ones fade, and its deviation."""
        known, size, value = self._costs.setdefault(ratio, {}), _bucket(pixels), seconds / pixels
        mean, deviation = known.get(size, (value, _UNSURE * value))
        error = min(value, _OUTLIER * mean) - mean
        known[size] = mean + _WEIGHT * error, deviation + _WEIGHT * (abs(error) - deviation)

    def expect(self, ratio: str, pixels: int) -> tuple[float, float]:
        """Return the mean and the deviation, 0 if unknown.

        Of a size that was never seen, they are those of the nearest one in proportion to the
        pixels.
        """
        known = self._costs.get(ratio, {0: (0., 0.)})
        mean, deviation = known[min(known, key=lambda size: abs(size - _bucket(pixels)))]
        return pixels * mean, pixels * deviation

    def seconds(self, ratio: str, pixels: int) -> float:
        """Return the mean and the deviation together, an estimate on the safe side."""
        return sum(self.expect(ratio, pixels))

    def table(self) -> dict[str, dict[int, float]]:
        """Return milliseconds by ratio and by side of a square image."""
        return {ratio: {round(2 ** (size / 4)): round(1e3 * 2 ** (size / 2) * mean, 2)
                        for size, (mean, _) in sorted(sizes.items())}
                for ratio, sizes in self._costs.items()}


def _bucket(pixels: int) -> int:
    return round(2 * math.log2(pixels))


@dataclass(frozen=True)
class Controller:
    """Chooses among ratios, which are listed from the finest to the coarsest.

    While several requests wait, ``reserve`` of the time that is left to each is kept free for those
    that are still to come, and a finer ratio than the last one needs ``calm`` more, so that ratios
    do not alternate. A request that waits alone may take all of its time: nothing is reduced
    without a queue.
    """
    ratios: tuple[str, ...]
    reserve: float = 0.5
    calm: float = 0.15

    def choose(self, now: float, waiting: Sequence[Job], costs: Costs, last: str | None = None
               ) -> str:
        """Return the ratio for those that wait, served in the order of ``waiting``.

        If none is fast enough, it is the fastest for the first of them.
        """
        before = self.ratios.index(last) if last in self.ratios else 0
        for index, ratio in enumerate(self.ratios):
            share = 1. if len(waiting) == 1 else 1 - self.reserve - self.calm * (index < before)
            if all(end <= share * (job.due - now)
                   for job, end in zip(waiting, _ends(waiting, ratio, costs))):
                return ratio
        return self.fastest(waiting[0].pixels, costs)

    def fastest(self, pixels: int, costs: Costs) -> str:
        """Return the ratio at which an image takes least."""
        return min(self.ratios, key=lambda ratio: costs.seconds(ratio, pixels))

    def least(self, job: Job, costs: Costs) -> tuple[float, float]:
        """Return mean and deviation of the seconds at the fastest ratio, or at the job's own."""
        return costs.expect(job.ratio or self.fastest(job.pixels, costs), job.pixels)

    def find_late(self, now: float, waiting: Sequence[AnyJob], costs: Costs) -> list[AnyJob]:
        """Return those that are late even if all get the fastest ratio."""
        late, before = [], (0., 0.)
        for job in waiting:
            after = _add(before, self.least(job, costs))
            if now + sum(after) > job.due:
                late.append(job)
            else:
                before = after
        return late


def _add(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Add means, and deviations as those of independent times."""
    return first[0] + second[0], math.hypot(first[1], second[1])


def _ends(waiting: Sequence[Job], ratio: str, costs: Costs) -> Iterator[float]:
    expected = 0., 0.
    for job in waiting:
        expected = _add(expected, costs.expect(job.ratio or ratio, job.pixels))
        yield sum(expected)


class Queue(Generic[AnyJob]):
    """Those who wait for one model, the earliest deadline first.

    Attributes:
        waiting: Those who wait.
        free: When the model is expected to have finished what it computes.
        doubt: A ratio that seemed too slow for a request though nobody else waited, and that
            request. As it is not learnt otherwise whether it still is, it is to be tried.
    """

    def __init__(self, controller: Controller, costs: Costs) -> None:
        self.controller, self.costs = controller, costs
        self.waiting: list[AnyJob] = []
        self.free, self._last = 0., ''
        self.doubt: tuple[str, AnyJob] | None = None

    def admit(self, now: float, job: AnyJob) -> bool:
        """Let a request wait, unless it or another one would then be late at the fastest ratio."""
        start, waiting = max(now, self.free), sorted([*self.waiting, job], key=lambda job: job.due)
        if {*self.controller.find_late(start, waiting, self.costs)} <= {
                *self.controller.find_late(start, self.waiting, self.costs)}:
            self.waiting = waiting
            return True
        if not self.waiting and self.free <= now:
            self.doubt = job.ratio or self.controller.fastest(job.pixels, self.costs), job
        return False

    def drop_late(self, now: float) -> list[AnyJob]:
        """Take out those who are late even at the fastest ratio."""
        late = self.controller.find_late(max(now, self.free), self.waiting, self.costs)
        self.waiting = [job for job in self.waiting if job not in late]
        return late

    def take(self, now: float, most: int = 1) -> tuple[str, list[AnyJob]]:
        """Return a ratio, and the first request with others of its size, ``most`` in all.

        These are served together, which may make none of them late, and none of the others.
        """
        first, *rest = self.waiting
        ratio = first.ratio
        if ratio is None:
            ratio = self._last = self.controller.choose(now, self.waiting, self.costs, self._last)
            if not rest and ratio != self.controller.ratios[0]:
                self.doubt = self.controller.ratios[0], first
        seconds, jobs = self.costs.seconds(ratio, first.pixels), [first]
        for job in [job for job in rest if (job.ratio, job.size) == (first.ratio, first.size)]:
            others, end = [other for other in rest if other is not job], now + seconds
            if len(jobs) == most or end + seconds * len(jobs) > first.due or (
                    self.controller.find_late(end + seconds * len(jobs), others, self.costs)):
                break
            jobs.append(job)
            rest = others
        self.waiting, self.free = rest, now + len(jobs) * seconds
        return ratio, jobs

    def wait(self, now: float) -> float:
        """Return the seconds until all who wait are served at the fastest ratio."""
        return max(0., self.free - now) + sum(
            self.controller.least(job, self.costs)[0] for job in self.waiting)
