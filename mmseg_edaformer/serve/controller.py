"""Who is served next, and at which ratio: the finest one at which all that wait are in time.

Nothing here knows of Ray, models or clocks, so that a simulation runs the same code.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

_WEIGHT = 0.2  # of a new measurement
_UNSURE = 0.1  # deviation of a first measurement, relative to it


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
        error = value - mean
        known[size] = mean + _WEIGHT * error, deviation + _WEIGHT * (abs(error) - deviation)

    def seconds(self, ratio: str, pixels: int) -> float:
        """Return the mean and the deviation together, an estimate on the safe side; 0 if unknown.

        Of a size that was never seen, it is that of the nearest one in proportion to the pixels.
        """
        known = self._costs.get(ratio, {0: (0., 0.)})
        return pixels * sum(known[min(known, key=lambda size: abs(size - _bucket(pixels)))])

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
    reserve: float = 0.3
    calm: float = 0.15

    def choose(self, now: float, waiting: Sequence[Job], costs: Costs, last: str | None = None
               ) -> str:
        """Return the ratio for those that wait, served in the order of ``waiting``.

        If none is fast enough, it is the fastest.
        """
        before = self.ratios.index(last) if last in self.ratios else 0
        for index, ratio in enumerate(self.ratios):
            share = 1. if len(waiting) == 1 else 1 - self.reserve - self.calm * (index < before)
            if all(end <= share * (job.due - now)
                   for job, end in zip(waiting, _ends(waiting, ratio, costs))):
                return ratio
        return min(self.ratios, key=lambda ratio: max(_ends(waiting, ratio, costs)))

    def least(self, job: Job, costs: Costs) -> float:
        """Return the seconds of a request at the fastest ratio, or at its own."""
        return min(costs.seconds(ratio, job.pixels)
                   for ratio in ([job.ratio] if job.ratio else self.ratios))

    def find_late(self, now: float, waiting: Sequence[Job], costs: Costs) -> set[int]:
        """Return the indices of those that are late even if all get the fastest ratio."""
        late = set()
        for index, job in enumerate(waiting):
            end = now + self.least(job, costs)
            if end > job.due:
                late.add(index)
            else:
                now = end
        return late


def _ends(waiting: Sequence[Job], ratio: str, costs: Costs) -> Iterator[float]:
    seconds = 0.
    for job in waiting:
        seconds += costs.seconds(job.ratio or ratio, job.pixels)
        yield seconds


class Queue(Generic[AnyJob]):
    """Those who wait for one model, the earliest deadline first.

    Attributes:
        waiting: Those who wait.
        free: When the model is expected to have finished what it computes.
    """

    def __init__(self, controller: Controller, costs: Costs) -> None:
        self.controller, self.costs = controller, costs
        self.waiting: list[AnyJob] = []
        self.free, self._last = 0., ''

    def admit(self, now: float, job: AnyJob) -> bool:
        """Let a request wait, unless it or another one would then be late at the fastest ratio."""
        waiting = sorted([*self.waiting, job], key=lambda job: job.due)
        if len(self._find_late(now, waiting)) > len(self._find_late(now, self.waiting)):
            return False
        self.waiting = waiting
        return True

    def drop_late(self, now: float) -> list[AnyJob]:
        """Take out those who are late even at the fastest ratio."""
        late = self._find_late(now, self.waiting)
        dropped = [self.waiting[index] for index in late]
        self.waiting = [job for index, job in enumerate(self.waiting) if index not in late]
        return dropped

    def take(self, now: float, most: int = 1) -> tuple[str, list[AnyJob]]:
        """Return a ratio, and the first request with others of its size, ``most`` in all.

        These are served together, which may make none of them late, and none of the others.
        """
        first, *rest = self.waiting
        ratio = first.ratio
        if ratio is None:
            ratio = self._last = self.controller.choose(now, self.waiting, self.costs, self._last)
        seconds, jobs = self.costs.seconds(ratio, first.pixels), [first]
        for job in [job for job in rest if (job.ratio, job.size) == (first.ratio, first.size)]:
            others, end = [other for other in rest if other is not job], now + seconds
            if len(jobs) == most or end + seconds * len(jobs) > first.due or len(
                    self.controller.find_late(end + seconds * len(jobs), others, self.costs)):
                break
            jobs.append(job)
            rest = others
        self.waiting, self.free = rest, now + len(jobs) * seconds
        return ratio, jobs

    def wait(self, now: float) -> float:
        """Return the seconds until all who wait are served at the fastest ratio."""
        return max(0., self.free - now) + sum(
            self.controller.least(job, self.costs) for job in self.waiting)

    def _find_late(self, now: float, jobs: Sequence[Job]) -> set[int]:
        return self.controller.find_late(max(now, self.free), jobs, self.costs)
