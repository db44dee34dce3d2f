"""What a table says about an attention class."""
from dataclasses import dataclass

from .key_layout import GridSource


@dataclass(frozen=True)
class AttentionRule:
    """Attention whose keys lie on a grid; the fields are the arguments of `register_isr`.

    With ``prefix=None`` a rule reduces nothing until `locate` has found out how many tokens stand
    around the grid. ``queries`` says that the queries are the tokens of the same maps.
    """
    grid: GridSource
    prefix: int | str | tuple[int | str, ...] | None = 0
    suffix: int | str = 0
    projections: tuple[str, ...] = ()
    traceable: bool = True
    queries: bool = True


@dataclass(frozen=True)
class Irreducible:
    """Attention without keys to reduce, and the reason."""
    reason: str


Rule = AttentionRule | Irreducible
