"""How an attention layer is to be reduced, and the record of one forward pass."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import RatioError
from .pooling import OpenRatio, Ratio
from .ratio import multiplier_near
from .rules import AttentionRule


@dataclass(frozen=True)
class Setting:
    """How to reduce an attention layer; the default is the trained model.

    ``keys`` and ``queries`` are numbers to stay near, whatever the size of the map, or None;
    ``strict`` makes it an error if the keys lie on no grid.
    """
    isr_ratio: Ratio = 1
    method: str = 'average'
    keys: int | None = None
    strict: bool = False
    query_ratio: Ratio = 1
    queries: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.isr_ratio, OpenRatio) and self.method != 'average':
            raise RatioError(f'isr_method {self.method} needs a ratio with a value: give one in '
                             'place of runtime, or use the method average')

    @property
    def off(self) -> bool:
        return self.isr_ratio == self.query_ratio == 1 and self.keys is self.queries is None

    def multiplier(self, total: int) -> Ratio:
        """The ratio for this number of keys."""
        return _near(self.keys, total, self.isr_ratio)

    def query_multiplier(self, total: int) -> Ratio:
        """Side of the cells for this number of queries."""
        return _near(self.queries, total, self.query_ratio)


def _near(wanted: int | None, total: int, ratio: Ratio) -> Ratio:
    return ratio if wanted is None or isinstance(ratio, OpenRatio) else (
        multiplier_near(wanted, total, ratio))


@dataclass
class Reduction:
    """What a reduced module carries besides its weights.

    It is no submodule. ``owners`` are modules elsewhere in the model that the grid is read from;
    under ``@name`` it holds the module around the layer that has an attribute of that name. ``ran``
    says whether the module's forward has run since. ``interception`` makes another `Interception`
    of each forward, for ways of reducing that are not of this package.
    """
    setting: Setting
    rule: AttentionRule
    owners: dict[str, nn.Module]
    ran: bool = False
    interception: Callable[..., Any] | None = None

    def recorded(self) -> list[nn.Module]:
        """Modules whose output maps are recorded."""
        return [owner for name, owner in self.owners.items()
                if self.rule.grid.recorded and not name.startswith('@')]


@dataclass
class Record:
    """What one forward pass did in a module: keys and queries before and after, or why not."""
    keys: tuple[int, int] = (0, 0)
    isr_ratio: Ratio = 1
    reason: str = ''
    queries: tuple[int, int] = (0, 0)
    query_ratio: Ratio = 1
    queries_reason: str = ''


_records: dict[nn.Module, Record] | None = None


def is_recording() -> bool:
    """Whether a `recording` block is active."""
    return _records is not None


def record(module: nn.Module, entry: Record) -> None:
    """Keep an entry for the active `recording` block, if there is one."""
    if _records is not None:
        _records[module] = entry


@contextmanager
def recording() -> Iterator[dict[nn.Module, Record]]:
    """Collect a `Record` for each reduced module that runs within the block."""
    global _records
    _records = {}
    try:
        yield _records
    finally:
        _records = None


def resolve(module: nn.Module, path: str) -> tuple[bool, Any]:
    """Whether a path of attributes below a module leads to something, and to what."""
    value: Any = module
    for key in path.split('.'):
        if not hasattr(value, key):
            return False, None
        value = getattr(value, key)
    return True, value


def count_tokens(module: nn.Module | None, path: str) -> int:
    """Number of tokens that a module declares at a path: a number, or a tensor of n x C or C."""
    value = module and resolve(module, path)[1]
    if isinstance(value, Tensor):
        return value.shape[-2] if value.dim() > 1 else 1
    return int(value or 0)
