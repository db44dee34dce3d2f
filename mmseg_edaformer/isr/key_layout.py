"""Where the keys of an attention module lie, read from the call of its forward or the model."""
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..compat import is_exporting
from .pooling import Grid, Layout


@dataclass
class Call:
    """One call of an attention module's forward.

    ``maps`` are the sizes of what its own convolutions and pools have made so far; ``owners`` are
    the modules elsewhere in the model that its grid is read from.
    """
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    owners: dict[str, nn.Module]
    maps: list[Grid] = field(default_factory=list)

    def argument(self, name: str) -> Any:
        """An argument by name, or None where the caller left it out."""
        if name in self.kwargs:
            return self.kwargs[name]
        reduced: Any = type(self.module)
        position = reduced.isr_parameters.index(name)
        return self.args[position] if position < len(self.args) else None

    def layout(self, source: 'GridSource', prefixes: Collection[int], total: int,
               suffix: int = 0) -> Layout | None:
        """How ``total`` keys lie, if they do on a grid that the source finds.

        Args:
            source: The source.
            prefixes: How many single tokens may stand in front.
            total: Number of keys.
            suffix: Single tokens behind.
        """
        grids = source.find(self)
        chosen: Layout | None = None
        for rows, columns in reversed(grids):
            front = total - suffix - rows * columns
            if front not in prefixes:
                continue
            if chosen is not None and chosen.grids[0] != (rows, columns):  # strips of either side
                return None
            chosen = Layout(((rows, columns),), front, source.order(self, (rows, columns)))
            if is_exporting():  # sizes are symbols, of which one question too many is a limit
                break
        if chosen is not None:
            return chosen
        front = total - suffix - sum(rows * columns for rows, columns in grids)
        if len(grids) > 1 and front in prefixes:
            return Layout(tuple(grids), front)
        return None


class GridSource:
    """Finds the grids that the keys of a module may lie on.

    ``owner`` is the path, below some module around the attention, of a module that the source
    needs; ``recorded`` says that it needs the size of that module's output. ``beside`` is another.
    """
    owner: str | None = None
    beside: str | None = None
    recorded = False

    def find(self, call: Call) -> list[Grid]:
        raise NotImplementedError

    def fitting(self, call: Call, ratio: int, method: str) -> tuple[int, str]:
        """The ratio that this call allows, and why if it is another one."""
        return ratio, ''

    def spares(self, call: Call) -> str:
        """Why this call of the module keeps its keys, or an empty string if it does not."""
        return ''

    def order(self, call: Call, grid: Grid) -> Tensor | None:
        """Places among the keys of a map's tokens, row by row, if they lie in another order."""
        return None

    def present(self, call: Call) -> Tensor | None:
        """Which keys are tokens, not padding that the module masks; None if all are.

        Returns:
            ... x h x N, which is 1 or 0, for keys ... x h x N x d.
        """
        return None


@dataclass(frozen=True)
class Arguments(GridSource):
    """Arguments of the forward: one that holds (h, w), or two; or what its convolutions made."""
    names: tuple[str, ...]

    def find(self, call: Call) -> list[Grid]:
        values = [call.argument(name) for name in self.names]
        if None in values:
            return list(call.maps)
        rows, columns = values if len(values) == 2 else values[0][-2:]
        return [(int(rows), int(columns)), *call.maps]


@dataclass(frozen=True)
class OwnMaps(GridSource):
    """What the module's own convolutions and pools make during its forward."""

    def find(self, call: Call) -> list[Grid]:
        return list(call.maps)


@dataclass(frozen=True)
class InputMap(GridSource):
    """The first argument is a map, N x C x h x w, or N x h x w x C with ``channels_last``."""
    channels_last: bool = False

    def find(self, call: Call) -> list[Grid]:
        x = call.args[0] if call.args else next(iter(call.kwargs.values()))
        if x.dim() != 4:
            return list(call.maps)
        rows, columns = x.shape[1:3] if self.channels_last else x.shape[-2:]
        return [(rows, columns), *call.maps]


@dataclass(frozen=True)
class Window(GridSource):
    """Windows of ``size``, an attribute of the module or of the one that has the shift.

    ``shift`` is an attribute of the module around it. The borders of the regions that a shifted
    window joins stand at size - shift, where cells must end too, or they would mix regions.
    """
    size: str = 'window_size'
    shift: str | None = None

    @property
    def owner(self) -> str | None:  # type: ignore[override]
        return self.shift and f'@{self.shift}'

    def find(self, call: Call) -> list[Grid]:
        module = call.module if self.shift is None or hasattr(call.module, self.size) else (
            call.owners[f'@{self.shift}'])
        return [_pair(getattr(module, self.size))]

    def fitting(self, call: Call, ratio: int, method: str) -> tuple[int, str]:
        if self.shift is None:
            return ratio, ''
        shift = _pair(getattr(call.owners[f'@{self.shift}'], self.shift))
        window = self.find(call)[0]
        if not any(shift):
            return ratio, ''
        if method not in ('average', 'max'):
            return 1, f'{method} would mix the regions of a shifted window'
        if any(step and (side - step) % ratio for side, step in zip(window, shift)):
            return 1, (f'cells of {ratio} would mix the regions of a window of {window[0]} shifted '
                       f'by {shift[0]}')
        return ratio, ''


@dataclass(frozen=True)
class Patches(GridSource):
    """The maps that a module gives, found by its path from some module around.

    Such as the patch embedding, or a pixel decoder, whose maps at several scales are told apart by
    the number of keys. Of several paths, separated by ``|``, the first that exists counts.
    """
    path: str = 'patch_embed.proj'
    recorded = True

    @property
    def owner(self) -> str:  # type: ignore[override]
        return self.path

    def find(self, call: Call) -> list[Grid]:
        return list(getattr(call.owners[self.path], 'isr_grids', ()))


@dataclass(frozen=True)
class Unfolded(Patches):
    """Tokens at one place in each patch of a map: MobileViT. ``side`` is an attribute around."""
    side: str = 'patch_size'

    @property
    def beside(self) -> str:  # type: ignore[override]
        return f'@{self.side}'

    def find(self, call: Call) -> list[Grid]:
        height, width = _pair(getattr(call.owners[self.beside], self.side))
        return [(-(-rows // height), -(-columns // width)) for rows, columns in super().find(call)]


def _pair(value: int | Sequence[int]) -> Grid:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
