"""What the processes of the server tell each other; it imports nothing heavy."""
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ConfigError


@dataclass(frozen=True)
class Policy:
    """What can be changed while a server runs.

    Attributes:
        isr_ratio: From the finest to the coarsest.
        deadline_ms: Time from a request to its answer.
        miou: mIoU of ratios, where a sweep measured it.
        megapixels: Largest image.
        allow_overrides: Whether requests may choose one of these ratios, a size and a deadline.
    """
    isr_ratio: list[str] = field(default_factory=lambda: ['none'])
    deadline_ms: float = 1000.
    miou: dict[str, float] = field(default_factory=dict)
    megapixels: float = 16.
    allow_overrides: bool = False

    def __post_init__(self) -> None:
        if not (self.isr_ratio and self.deadline_ms > 0 and self.megapixels > 0):
            raise ConfigError('a server needs an isr_ratio, and a deadline_ms and megapixels above '
                              f'0: {self}')


class Wish(BaseModel):
    """What a request sets itself."""
    model_config = ConfigDict(extra='forbid')

    isr_ratio: str | None = Field(None, max_length=60)
    query_ratio: str | None = Field(None, max_length=60)
    max_side: int | None = Field(None, ge=32)
    deadline_ms: float | None = Field(None, gt=0, le=3e5)
    rle: bool = False


class Answer(NamedTuple):
    """A PNG, or what becomes JSON, or a message; ``wait`` is for Retry-After. Times in seconds."""
    status: int
    content: bytes | dict[str, Any] | str
    isr_ratio: str = ''
    queue: float = 0.
    compute: float = 0.
    wait: float | None = None
