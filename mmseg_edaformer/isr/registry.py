"""What a table says of an attention class."""
from dataclasses import dataclass

from .key_layout import GridSource


@dataclass(frozen=True)
class AttentionRule:
    """Attention whose keys lie on a grid; the fields are the arguments of `register_isr`.

    ``prefix=None`` waits for `locate`: such a rule reduces nothing until it says how many tokens
    stand around the grid.
    """
    grid: GridSource
    prefix: int | str | tuple[int | str, ...] | None = 0
    suffix: int | str = 0
    projections: tuple[str, ...] = ()
    traceable: bool = True


@dataclass(frozen=True)
class Irreducible:
    """Attention without keys to reduce, and why."""
    reason: str


Rule = AttentionRule | Irreducible
