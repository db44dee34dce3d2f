"""Which ratio the next request gets: the finest one at which every waiting request is in time.

Nothing here knows of Ray, models or clocks, so that a simulation runs the same code.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_WEIGHT = 0.2  # of a new measurement
_UNSURE = 0.1  # deviation of a first measurement, relative to it


@dataclass(eq=False)
class Job:
    """A request that waits: when its answer is due, and what it asks for.

    ``pixels`` are those that the network sees; ``ratio`` is None where the controller chooses.
    """
    due: float
    pixels: int
    ratio: str | None


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
