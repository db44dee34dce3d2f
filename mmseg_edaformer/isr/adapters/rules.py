"""What a table says of an attention class."""
from dataclasses import dataclass

from ..grids import GridSource


@dataclass(frozen=True)
class AttentionRule:
    """Attention whose keys lie on a grid; arguments are those of `register_isr`."""
    grid: GridSource
    prefix: int | str | None = 0


@dataclass(frozen=True)
class Irreducible:
    """Attention without keys to reduce, and why."""
    reason: str


Rule = AttentionRule | Irreducible
