"""What the processes of the server tell each other; it imports nothing heavy."""
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import ConfigError


@dataclass(frozen=True)
class Policy:
    """What can be changed while a server runs.

    Attributes:
        isr_ratio: From the least to the most reduced, which is the floor.
        deadline_ms: Time from a request to its answer.
        miou: mIoU of ratios, where a sweep measured it.
        in_flight: Most requests that a replica holds.
        megapixels: Largest image.
        overrides: Whether requests may set their ratio, size and deadline.
    """
    isr_ratio: list[str]
    deadline_ms: float
    miou: dict[str, float] = field(default_factory=dict)
    in_flight: int = 64
    megapixels: float = 16.
    overrides: bool = False

    def __post_init__(self) -> None:
        if not self.isr_ratio or min(self.deadline_ms, self.in_flight, self.megapixels) <= 0:
            raise ConfigError('a server needs an isr_ratio, and a deadline_ms, in_flight and '
                              f'megapixels above 0: {self}')


class Wish(NamedTuple):
    """What a request asks for; ``json`` for figures in place of a mask, ``rle`` for runs too."""
    isr_ratio: str | None = None
    query_ratio: str | None = None
    max_side: int | None = None
    deadline_ms: float | None = None
    json: bool = False
    rle: bool = False


class Answer(NamedTuple):
    """A PNG, or what becomes JSON, or a message; ``wait`` is for Retry-After. Times in seconds."""
    status: int
    content: bytes | dict[str, Any] | str
    isr_ratio: str = ''
    queue: float = 0.
    compute: float = 0.
    wait: float | None = None
