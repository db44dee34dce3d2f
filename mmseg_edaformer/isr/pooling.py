"""Reduction of keys, values, biases and masks: functions on tensors, independent of any model.

Shapes: N keys, of which some stand in front of or behind maps of h x w; M keys after reduction;
d channels of a head. Cells are r x r, anchored at the top left of a map, ceil(h / r) x ceil(w / r)
of them: those at the border average only the tokens that they have.

Reducing keys means that each cell J stands in for its n_J tokens::

    logit_iJ = s q_i . mean_J(k) + mean_J(b_i) + m_iJ + log n_J
    out_i    = sum_J softmax(logit_i)_J mean_J(v)

which is full attention in which the members of a cell have their mean key, bias and value. Source:
arXiv 2407.17261, section 4 and table 6; log n_J is proportional attention of Token Merging
(arXiv 2210.09461, section 3).
"""
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import is_exporting
from ..errors import RatioError

Grid = tuple[int, int]

METHODS = ('average', 'max', 'overlap', 'bipartite')
"""How keys are reduced: the paper's table 6(a). `average` is its choice; `overlap` averages windows
of 2 r - 1 at stride r; `bipartite` merges the most similar keys, half of them at most."""

MASKED = -3e4
"""An additive mask at or below this excludes its key: less than half of float16's lowest number."""


def check_method(method: str) -> str:
    """Return the method if it is valid."""
    if method not in METHODS:
        raise RatioError(f'isr_method {method!r} does not exist: use {", ".join(METHODS)}')
    return method


class Layout(NamedTuple):
    """Where the keys of an attention lie: ``prefix`` single tokens, then maps, row by row.

    Tokens behind the maps are single tokens too. Single tokens are never reduced. ``order`` holds
    the places of the tokens among the keys if they lie in another order.
    """
    grids: tuple[Grid, ...]
    prefix: int = 0
    order: Tensor | None = None

    def sizes(self, total: int) -> list[int]:
        """Number of tokens of the prefix, of each map and of the rest."""
        maps = [rows * columns for rows, columns in self.grids]
        return [self.prefix, *maps, total - self.prefix - sum(maps)]


class OpenRatio:
    """A ratio without a value yet: an input of an exported graph, a tensor without axes.

    A pool has a fixed kernel in all formats. So cells are averaged by one matrix product along each
    side, which runtimes compute as fast. The layers of a stage share the matrices.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._members: dict[tuple[str, int, bool], tuple[int, Tensor]] = {}

    def __rmod__(self, side: int) -> NoReturn:
        raise RatioError('cells that must fill a window need a ratio with a value: give one in '
                         'place of runtime')

    def members(self, side: int, pool: int = 1, whole: bool = False) -> tuple[int, Tensor]:
        """Return the side of the cells along a side of a map, and 1 for their places, 0 for others.

        Cells are ``pool`` times the ratio, but never larger than the map; ``whole`` drops the rest
        that does not fill one. The second result is cells x side.
        """
        key = str(side), pool, whole
        if key not in self._members:
            def number(value: Tensor) -> Any:  # a symbol of its own, not a formula of others
                count = value.item()
                torch._check(count >= 1)
                return count

            device = self.value.device
            cell = number(torch.minimum(self.value * pool, torch.scalar_tensor(
                side, dtype=torch.int64, device=device)))
            count = number(torch.scalar_tensor(
                (side if whole else side + cell - 1) // cell, dtype=torch.int64))
            offset = torch.arange(side, device=device) - (
                cell * torch.arange(count, device=device)[:, None])
            self._members[key] = cell, ((offset >= 0) & (offset < cell)).float()
        return self._members[key]

    def average(self, maps: Tensor, pool: int = 1, whole: bool = False) -> Tensor:
        """Average the cells of maps N x C x h x w; those at the border average what they have."""
        members = (self.members(side, pool, whole)[1] for side in maps.shape[2:])
        return _along_sides(maps, *(part / part.sum(1, keepdim=True) for part in members))

    def average_filled(self, maps: Tensor) -> Tensor:
        """`average`, where cells that reach beyond the map repeat its edge."""
        shares = []
        for side in maps.shape[2:]:
            cell, members = self.members(side)
            beyond = members.shape[0] * cell - side
            place = torch.arange(side, device=maps.device)
            shares.append(members * torch.where(place == side - 1, beyond + 1, 1) / cell)
        return _along_sides(maps, *shares)

    def spread(self, maps: Tensor, grid: Grid) -> Tensor:
        """Give each place of a map h x w its share of the cells, bilinear between their centres."""
        shares = []
        for side, count in zip(grid, maps.shape[2:]):
            place = torch.arange(side, device=maps.device)
            centre = ((place + 0.5) / self.members(side)[0] - 0.5).clamp(min=0).clamp(max=count - 1)
            distance = (centre[:, None] - torch.arange(count, device=maps.device)).abs()
            shares.append((1 - distance).clamp(min=0))
        return _along_sides(maps, *shares)


Ratio = int | OpenRatio
Cell = Grid | OpenRatio
"""The sides of a cell; an open ratio fits itself to each map."""


def _along_sides(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply a matrix with each column of maps N x C x h x w, and another with each row."""
    x = columns @ maps.permute(0, 2, 3, 1)  # N h w C: exported maps mostly come as tokens
    x = (rows @ x.flatten(2)).unflatten(2, x.shape[2:])
    return x.permute(0, 3, 1, 2)


def cells(grid: Grid, ratio: Ratio) -> Grid:
    """Rows and columns of cells of a map."""
    if isinstance(ratio, OpenRatio):
        rows, columns = (ratio.members(side)[1].shape[0] for side in grid)  # len would ask
        return rows, columns
    # Not -(-h // r): ONNX divides towards zero.
    return (grid[0] + ratio - 1) // ratio, (grid[1] + ratio - 1) // ratio


def num_keys(layout: Layout, total: int, ratio: Ratio) -> int:
    """Keys M that are left of ``total``."""
    before, *_, after = layout.sizes(total)
    return before + sum(math.prod(cells(grid, ratio)) for grid in layout.grids) + after


def pool_tokens(x: Tensor, layout: Layout, ratio: Ratio, method: str = 'average') -> Tensor:
    """Reduce tokens: ... x N x d to ... x M x d, by any method but `bipartite`."""
    if ratio == 1:
        return x
    if layout.order is not None:
        x = x[..., layout.order, :]
    return by_segment(x, layout, lambda part, grid: _pool_segment(part, grid, ratio, method))


def counts(layout: Layout, total: int, ratio: Ratio, device: torch.device | None = None) -> Tensor:
    """Tokens n that each of the M keys stands for.

    With `overlap` too, a key stands for the tokens of its own cell, whatever it averages.
    """
    def count(part: Tensor, grid: Grid) -> Tensor:
        if isinstance(ratio, OpenRatio):
            sides = [ratio.members(length)[1].sum(1) for length in grid]
            return (sides[0][:, None] * sides[1]).reshape(-1, 1)
        sides = []
        for length in grid:
            steps = torch.arange(0, length, ratio, device=device)
            sides.append((length - steps).clamp(max=ratio))
        return (sides[0][:, None] * sides[1]).reshape(-1, 1).float()

    return by_segment(torch.ones(total, 1, device=device), layout, count).squeeze(-1)


def pool_bias(bias: Tensor, layout: Layout, ratio: Ratio) -> Tensor:
    """Reduce the keys of an additive bias: ... x N to ... x M, by the mean of each cell.

    Members at or below `MASKED` do not count; a cell is masked if all its members are.
    """
    if ratio == 1:
        return bias
    x = bias.unsqueeze(-1)
    masked = x <= MASKED
    # A look at the values is cheap on a CPU; elsewhere it would wait for them, or break a graph.
    if bias.device.type == 'cpu' and not torch.compiler.is_compiling() and not masked.any():
        return pool_tokens(x, layout, ratio).squeeze(-1)
    free = pool_tokens((~masked).to(x.dtype), layout, ratio)
    mean = pool_tokens(x.masked_fill(masked, 0), layout, ratio) / free.clamp(min=1e-6)
    return torch.where(free > 0, mean, pool_tokens(x, layout, ratio, 'max')).squeeze(-1)


def pool_mask(masked: Tensor, layout: Layout, ratio: Ratio) -> Tensor:
    """Reduce the keys of a boolean mask, ... x N to ... x M: a cell is masked if all members are.

    A query that sees any key before therefore sees one after.
    """
    free = (~masked).to(torch.float32).unsqueeze(-1)
    return pool_tokens(free, layout, ratio, 'max').squeeze(-1) == 0


def merging(keys: Tensor, layout: Layout, ratio: Ratio) -> Tensor:
    """Averaging weights of the keys that `bipartite` matching merges.

    Every other key of the maps is matched with the most similar of the rest; the most similar
    pairs are merged until as many keys are left as the cells would leave, or half of them.

    Args:
        keys: ... x h x N x d for h heads; their mean decides.
        layout: Where they lie.
        ratio: Side r of the cells.

    Returns:
        Weights ... x 1 x N x M, whose columns add up to 1.
    """
    total = keys.shape[-2]
    before, *maps, after = layout.sizes(total)
    tokens = sum(maps)
    merged = min(tokens // 2, total - num_keys(layout, total, ratio))
    metric = F.normalize(keys.mean(-3)[..., before:before + tokens, :], dim=-1)
    odd, even = metric[..., 1::2, :], metric[..., ::2, :]
    best, match = (odd @ even.transpose(-2, -1)).max(-1)
    order = best.argsort(-1, descending=True)
    chosen, kept = order[..., :merged], order[..., merged:].sort(-1).values
    # Columns: single tokens in front, even keys, odd keys that stay, single tokens behind.
    column = torch.empty(*metric.shape[:-1], dtype=torch.long, device=keys.device)
    column[..., ::2] = torch.arange(even.shape[-2], device=keys.device)
    target = torch.empty_like(match)
    target.scatter_(-1, chosen, match.gather(-1, chosen))
    target.scatter_(-1, kept, torch.arange(kept.shape[-1], device=keys.device).expand_as(kept) +
                    even.shape[-2])
    column[..., 1::2] = target
    left = total - merged
    lead = column.shape[:-1]
    column = torch.cat([
        torch.arange(before, device=keys.device).expand(*lead, before), column + before,
        torch.arange(left - after, left, device=keys.device).expand(*lead, after)], -1)
    weights = F.one_hot(column, left).to(keys.dtype)
    return (weights / weights.sum(-2, keepdim=True)).unsqueeze(-3)


def by_segment(x: Tensor, layout: Layout, pool: Callable[[Tensor, Grid], Tensor]) -> Tensor:
    """Apply a function to the tokens of each map and keep single tokens: ... x N x d."""
    if layout.sizes(x.shape[-2])[::len(layout.grids) + 1] == [0, 0] and len(layout.grids) == 1:
        return pool(x, layout.grids[0])
    before, *maps, after = x.split(layout.sizes(x.shape[-2]), -2)
    return torch.cat([before, *(pool(part, grid) for part, grid in zip(maps, layout.grids)),
                      after], -2)


def pool_map(maps: Tensor, ratio: Ratio, method: str) -> Tensor:
    """Reduce maps N x C x h x w by any method but `bipartite`."""
    if isinstance(ratio, OpenRatio):
        return ratio.average(maps)
    if method == 'average':
        return F.avg_pool2d(maps, ratio, ceil_mode=True)
    if method == 'max':
        return F.max_pool2d(maps, ratio, ceil_mode=True)
    return F.avg_pool2d(maps, 2 * ratio - 1, ratio, ratio - 1, count_include_pad=False)


def query_cell(grid: Grid, ratio: Ratio) -> Cell:
    """Sides of the cells whose queries are averaged: ``ratio``, but never larger than the map."""
    if isinstance(ratio, OpenRatio):
        return ratio
    if not torch.compiler.is_compiling() and min(grid) < ratio:
        # The same text for every size, so that Python's filter shows it once.
        warnings.warn('a feature map is smaller than the cells of its queries, so the cells '
                      'shrink to the map: lower query_ratio or enlarge the input', stacklevel=4)
    return (ratio if grid[0] >= ratio else grid[0], ratio if grid[1] >= ratio else grid[1])


def pool_queries(maps: Tensor, cell: Cell) -> Tensor:
    """Average the queries of each cell: N x C x h x w to N x C x ceil(h / r) x ceil(w / r).

    A cell that reaches beyond the map repeats the map's edge, so that the centres of all cells lie
    where `spread_queries` puts them.
    """
    if isinstance(cell, OpenRatio):
        return cell.average_filled(maps)
    if cell == (1, 1):
        return maps
    below, right = -maps.shape[-2] % cell[0], -maps.shape[-1] % cell[1]
    if is_exporting() or below or right:  # a graph must not ask whether its sizes are even
        maps = F.pad(maps, (0, right, 0, below), mode='replicate')
    return F.avg_pool2d(maps, cell)


def spread_queries(maps: Tensor, cell: Cell, grid: Grid) -> Tensor:
    """Undo the size of `pool_queries`: bilinear by exactly the cell, cropped to the grid h x w."""
    if isinstance(cell, OpenRatio):
        return cell.spread(maps, grid)
    if cell == (1, 1):
        return maps
    size = maps.shape[-2] * cell[0], maps.shape[-1] * cell[1]
    return F.interpolate(maps, size, mode='bilinear')[..., :grid[0], :grid[1]]


def pool_query_tokens(x: Tensor, layout: Layout, ratio: Ratio) -> Tensor:
    """Average queries by cell, ... x N x d to ... x M x d, as `pool_queries` does on a map."""
    return by_segment(x, layout, lambda part, grid: on_map(
        part, grid, lambda maps: pool_queries(maps, query_cell(grid, ratio))))


def spread_query_tokens(x: Tensor, layout: Layout, ratio: Ratio) -> Tensor:
    """Spread the results of cells over their tokens: ... x M x d to ... x N x d."""
    grids = iter(layout.grids)

    def spread(part: Tensor, small: Grid) -> Tensor:
        grid = next(grids)
        return on_map(part, small,
                       lambda maps: spread_queries(maps, query_cell(grid, ratio), grid))

    small = tuple(cells(grid, ratio) for grid in layout.grids)
    return by_segment(x, Layout(small, layout.prefix), spread)


def _pool_segment(x: Tensor, grid: Grid, ratio: Ratio, method: str) -> Tensor:
    """Reduce one map of tokens: ... x (h w) x d to ... x M x d."""
    return on_map(x, grid, lambda maps: pool_map(maps, ratio, method))


def on_map(x: Tensor, grid: Grid, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of maps N x d x h x w to tokens ... x (h w) x d."""
    maps = function(x.reshape(-1, *grid, x.shape[-1]).permute(0, 3, 1, 2))
    return maps.permute(0, 2, 3, 1).reshape(*x.shape[:-2], -1, x.shape[-1])
