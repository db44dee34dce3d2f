"""Reduction of the keys of one attention: `pooling` for one layout and ratio, for `intercept`.

Shapes: N keys before, M after; h heads, d channels of each; B batch.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..compat import is_exporting
from . import pooling
from .pooling import Grid, Layout, Ratio


def _mean_of_free(x: Tensor, average: Callable[[Tensor], Tensor]) -> Tensor:
    """Average the members of a bias that are not masked; a cell without any is masked."""
    masked = x <= pooling.MASKED
    free = average((~masked).to(x.dtype))
    mean = average(x.masked_fill(masked, 0)) / free.clamp(min=1e-6)
    return torch.where(free > 0, mean, torch.finfo(x.dtype).min)


class PooledKeys:
    """Cells of a fixed layout: the same for every batch element and head."""

    def __init__(self, layout: Layout, ratio: Ratio, method: str, total: int) -> None:
        self.layout, self.ratio, self.method, self.total = layout, ratio, method, total
        self.left = pooling.num_keys(layout, total, ratio)
        self.grid: Grid | None = layout.grids[0] if len(layout.grids) == 1 else None
        self.cells: Grid = pooling.cells(layout.grids[0], ratio)
        # Even cells weigh alike, so that log n cancels and no mask costs a fast kernel. A graph for
        # any size must not rest on the one that it was traced with.
        sizes = layout.sizes(total)
        self.uneven = ratio != 1 and (is_exporting() or sizes[0] + sizes[-1] > 0 or any(
            side % ratio for grid in layout.grids for side in grid))

    def tokens(self, x: Tensor) -> Tensor:
        return pooling.pool_tokens(x, self.layout, self.ratio, self.method)

    def columns(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        pool = pooling.pool_mask if x.dtype == torch.bool else pooling.pool_bias
        return pool(x, self.layout, self.ratio)

    def sides(self, x: Tensor) -> Tensor:
        """A bias for the rows of the keys, ... x h x 1, or for the columns, ... x 1 x w."""
        assert self.grid is not None
        rows, columns = self.grid
        if x.shape[-2] == rows and rows != 1:
            x = pooling.pool_bias(x.transpose(-2, -1), Layout(((rows, 1),)),
                                  self.ratio).transpose(-2, -1)
        if x.shape[-1] == columns and columns != 1:
            x = pooling.pool_bias(x, Layout(((columns, 1),)), self.ratio)
        return x

    def log_counts(self, scores: Tensor) -> Tensor:
        return pooling.counts(self.layout, self.total, self.ratio,
                              scores.device).log().to(scores.dtype)

    def mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The mask of ``scaled_dot_product_attention``, where True means that a key is seen."""
        if mask is not None and mask.shape[-1] == self.total:
            mask = ~self.columns(~mask, query) if mask.dtype == torch.bool else (
                self.columns(mask, query))
        if not self.uneven:
            return mask
        logs = self.log_counts(query)
        if mask is None:
            # Graphs would spell a mask out for each query.
            return logs.expand(*query.shape[:-2], 1 if is_exporting() else query.shape[-2], -1)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
        return mask + logs


class PooledQueries:
    """Cells of queries: each has the mean query of its tokens, and gives them its result.

    Biases are averaged like queries. A cell sees what any of its members sees.
    """

    def __init__(self, layout: Layout, ratio: Ratio, total: int) -> None:
        self.layout, self.ratio, self.total = layout, ratio, total
        self.left = pooling.num_keys(layout, total, ratio)
        self.cells: Grid = pooling.cells(layout.grids[0], ratio)

    def tokens(self, x: Tensor) -> Tensor:
        """Queries ... x N x d, or rows of a bias, averaged by cell: ... x M x d."""
        return pooling.pool_query_tokens(x, self.layout, self.ratio)

    def rows(self, x: Tensor, seen: bool = False) -> Tensor:
        """The rows of a bias or a mask ... x N x keys; ``seen``: True in the mask is a key seen."""
        if x.dtype == torch.bool:
            open_ = self.tokens((x if seen else ~x).float()) > 0
            return open_ if seen else ~open_
        return _mean_of_free(x, self.tokens)

    def spread(self, x: Tensor) -> Tensor:
        """Results of cells ... x M x d, bilinear between their centres: ... x N x d."""
        return pooling.spread_query_tokens(x, self.layout, self.ratio)


class PresentKeys(PooledKeys):
    """Cells that average the tokens among their members, and padding only where they have none.

    ``present`` is ... x h x N. What sees no padding gets exact means; padding itself, as a query,
    does not.
    """

    def __init__(self, layout: Layout, ratio: Ratio, method: str, total: int,
                 present: Tensor) -> None:
        super().__init__(layout, ratio, method, total)
        self.present = present
        self.share = super().tokens(present.unsqueeze(-1)).squeeze(-1)  # ... x h x M
        self.uneven = True

    def tokens(self, x: Tensor) -> Tensor:
        return self._mean(x, self.present.unsqueeze(-1), self.share.unsqueeze(-1))

    def columns(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        if x.dtype == torch.bool:
            return super().columns(x, scores)
        return self._mean(x.unsqueeze(-1), self.present[..., None, :, None],
                          self.share[..., None, :, None]).squeeze(-1)

    def log_counts(self, scores: Tensor) -> Tensor:
        counts = pooling.counts(self.layout, self.total, self.ratio, scores.device)
        share = torch.where(self.share > 0, self.share, 1)
        return (share * counts).log().to(scores.dtype).unsqueeze(-2)

    def _mean(self, x: Tensor, present: Tensor, share: Tensor) -> Tensor:
        present, share = present.to(x.dtype), share.to(x.dtype)
        mean = super().tokens(x * present) / share.clamp(min=1e-6)
        return torch.where(share > 0, mean, super().tokens(x))


class MergedKeys(PooledKeys):
    """Merged tokens, other ones for each batch element: `pooling.merging`."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights  # B 1 N M
        self.total, self.left = weights.shape[-2:]
        self.grid = None
        self.cells = (0, 0)
        self.uneven = True

    def tokens(self, x: Tensor) -> Tensor:
        return self.weights.transpose(-2, -1).to(x.dtype) @ x

    def columns(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        weights = self._like(x if scores is None else scores)
        if x.dtype == torch.bool:
            return ((~x).to(weights.dtype) @ (weights > 0).to(weights.dtype)) == 0
        return _mean_of_free(x, lambda part: part @ weights)

    def log_counts(self, scores: Tensor) -> Tensor:
        # A column holds 1 / n for each of its n members.
        counts = (self._like(scores) > 0).sum(-2, keepdim=True)
        return counts.log().to(scores.dtype)

    def _like(self, scores: Tensor) -> Tensor:
        """The weights for scores ... x h x Nq x M, which may split the batch."""
        weights = self.weights.to(scores.dtype)
        return weights.reshape(*scores.shape[:-3], 1, self.total, self.left) if (
            scores.dim() > 4) else weights
