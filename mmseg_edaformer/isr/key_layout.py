"""Where the keys of an attention module lie, read from the forward's arguments or the model."""
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import is_exporting
from .pooling import Grid, Layout, Ratio


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
        """The layout of ``total`` keys, or None if they lie on no grid that the source finds.

        ``prefixes`` are possible numbers of single tokens in front, ``suffix`` those behind.
        """
        grids = source.find(self)
        chosen: Layout | None = None
        for rows, columns in reversed(grids):
            front = total - suffix - rows * columns
            if front not in prefixes:
                continue
            if chosen is not None and chosen.grids[0] != (rows, columns):  # ambiguous: strips
                return None
            chosen = Layout(((rows, columns),), front, source.order(self, (rows, columns)))
            if is_exporting():  # sizes are symbols, and each question asked of them is a guard
                break
        if chosen is not None:
            return chosen
        front = total - suffix - sum(rows * columns for rows, columns in grids)
        if len(grids) > 1 and front in prefixes:
            return Layout(tuple(grids), front)
        return None


class GridSource:
    """Finds the grids that the keys of a module may lie on.

    ``owner`` is the path of a module that the source needs, from some module around the attention;
    ``recorded`` says that it needs the size of that module's output. ``beside`` is a second path.
    """
    owner: str | None = None
    beside: str | None = None
    recorded = False

    def find(self, call: Call) -> list[Grid]:
        raise NotImplementedError

    def fitting(self, call: Call, ratio: Ratio, method: str) -> tuple[Ratio, str]:
        """The ratio that this call allows, and the reason if it is another one."""
        return ratio, ''

    def spares(self, call: Call) -> str:
        """Why this call of the module keeps its keys; an empty string if it does not."""
        return ''

    def order(self, call: Call, grid: Grid) -> Tensor | None:
        """Places of a map's tokens among the keys, if those do not lie row by row."""
        return None

    def present(self, call: Call) -> Tensor | None:
        """1 for keys that are tokens, 0 for masked padding, ... x h x N; None if all are tokens."""
        return None


@dataclass(frozen=True)
class Arguments(GridSource):
    """Arguments of the forward: one that holds (h, w), or two; or maps of its convolutions."""
    names: tuple[str, ...]

    def find(self, call: Call) -> list[Grid]:
        values = [call.argument(name) for name in self.names]
        if None in values:
            return list(call.maps)
        # int would fix a symbol in a graph.
        rows, columns = (int(side) if isinstance(side, Tensor) else side for side in (
            values if len(values) == 2 else values[0][-2:]))
        return [(rows, columns), *call.maps]


@dataclass(frozen=True)
class OwnMaps(GridSource):
    """Maps that the module's own convolutions and pools make during its forward."""

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

    ``shift`` is an attribute of a module around it. A shifted window joins regions whose borders
    are at size - shift; cells must end there too, or they would mix regions.
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

    def fitting(self, call: Call, ratio: Ratio, method: str) -> tuple[Ratio, str]:
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
    """The maps that another module outputs, found by its path from some module around.

    It may be the patch embedding, or a pixel decoder, whose maps at several scales the number of
    keys tells apart. Of several paths, separated by ``|``, the first that exists counts.
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


@dataclass(frozen=True)
class Blocks(GridSource):
    """Square windows whose side is the attribute ``size`` of a module around (NesT)."""
    size: str

    @property
    def owner(self) -> str:  # type: ignore[override]
        return f'@{self.size}'

    def find(self, call: Call) -> list[Grid]:
        side = getattr(call.owners[self.owner], self.size)
        return [(side, side)]


@dataclass(frozen=True)
class Unrolled(GridSource):
    """Tokens sorted by Hiera: by their place within the smallest blocks first, then in larger ones.

    ``path`` is the path of the module that sorts, with the map's size and the sides of the blocks.
    A window is one block of the largest size. Its number of tokens tells how many poolings came
    before; the number of all tokens does not, because a mask may have left some out.
    """
    path: str = 'unroll'

    @property
    def owner(self) -> str:  # type: ignore[override]
        return self.path

    def find(self, call: Call) -> list[Grid]:
        return [grid for grid, _ in self._levels(call)]

    def order(self, call: Call, grid: Grid) -> Tensor:
        blocks = next(blocks for level, blocks in self._levels(call) if level == grid)
        height, width = _product(blocks)
        sides = [side for block in blocks for side in block]
        sides += [grid[0] // height, grid[1] // width]
        last = len(sides) - 1
        device = next(call.module.parameters()).device
        places = torch.arange(grid[0] * grid[1], device=device).view(sides)
        return places.permute(*range(last - 1, -1, -2), *range(last, 0, -2)).flatten()

    def _levels(self, call: Call) -> list[tuple[Grid, list[Grid]]]:
        """Possible grids of the keys: after each pooling of the model, with the blocks left."""
        size, schedule = self.sorting(call)
        attn: Any = call.module
        stride = attn.q_stride if hasattr(attn, 'q_stride') else attn.query_stride
        levels = []
        for done in range(len(schedule) + 1 if len(size) == 2 else 0):
            blocks = schedule[done:]
            grid = _product(blocks)
            if math.prod(grid) != stride * attn.window_size:
                continue
            if not attn.use_mask_unit_attn:
                height, width = _product(schedule[:done])
                grid = size[0] // height, size[1] // width
            levels.append((grid, blocks))
        return levels

    def sorting(self, call: Call) -> tuple[Sequence[int], list[Grid]]:
        """Size of the sorted map, and the sides of the blocks."""
        unroll: Any = call.owners[self.path]
        return unroll.size, unroll.schedule


def _product(blocks: list[Grid]) -> Grid:
    """Sides of a block of blocks of blocks."""
    return math.prod([block[0] for block in blocks]), math.prod([block[1] for block in blocks])


def _pair(value: int | Sequence[int]) -> Grid:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
