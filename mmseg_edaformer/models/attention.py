"""Embedding-free attention (EDAFormer, arXiv 2407.17261, section 3).

Shapes: N batch, C channels, H x W the map, M keys, h heads, d = C / h.
"""
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat import is_exporting
from ..errors import ConfigError
from ..isr.pooling import (
    Cell,
    Grid,
    Layout,
    OpenRatio,
    cells,
    merging,
    pool_map,
    pool_queries,
    query_cell,
    spread_queries,
)
from ..isr.ratio import multiplier_near
from ..isr.reducers import MergedKeys
from . import cpu_kernels
from .layers import PixelLinear, PixelNorm, split_heads, to_map, to_tokens


class EmbeddingFreeAttention(nn.Module):
    """Attention whose queries are the input itself and whose keys are its values.

    The map is average-pooled and projected once (``kv``), and serves as both keys and values; there
    is no query projection.

    Plain attributes, which are no weights, reduce a trained model at inference. Fewer keys
    (inference spatial reduction, section 4): ``isr_ratio`` multiplies the pool; 1 is bit for bit
    the trained model. ``isr_keys`` is a number of keys to stay near whatever the size of the map,
    or None. ``isr_method`` is one of `pooling.METHODS`; all but `average` reduce what the training
    pool leaves (table 6a). Fewer queries: ``query_ratio`` is the side of the cells whose queries
    are averaged, and ``isr_queries`` a number of queries to stay near, or None.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide ``dim``.
        pool_ratio: Kernel and stride of the pool during training. Rows and columns that do not
            fill a cell are dropped.
        kv_norm: Pass the keys through LayerNorm and GELU, as the decoder does.
        norm_eps: Epsilon of that norm.

    Raises:
        ConfigError: ``num_heads`` does not divide ``dim``, or ``pool_ratio`` is below 1.
    """

    def __init__(self, dim: int, num_heads: int, pool_ratio: int = 1, *, kv_norm: bool = False,
                 norm_eps: float = 1e-5) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f'num_heads={num_heads} does not divide dim={dim}')
        if pool_ratio < 1:
            raise ConfigError(f'pool_ratio={pool_ratio}: it must be 1 or more')
        self.num_heads = num_heads
        self.pool_ratio = pool_ratio
        self.isr_ratio = 1
        self.isr_keys: int | None = None
        self.query_ratio = 1
        self.isr_queries: int | None = None
        self.isr_method = 'average'
        self.kv = nn.Conv2d(dim, dim, 1)
        self.kv_norm = PixelNorm(dim, eps=norm_eps) if kv_norm else None
        self.proj = PixelLinear(dim, dim)

    def multiplier(self, height: int, width: int) -> int:
        """Multiplier of the training pool on a map of this size.

        It is ``isr_ratio``, or at least that with ``isr_keys``: `multiplier_near`. Between half and
        twice ``isr_keys`` remain: less what does not fill a cell, and more on a map that is thinner
        than a cell.
        """
        return self.isr_ratio if self.isr_keys is None else (
            multiplier_near(self.isr_keys, self.num_keys(height, width, 1), self.isr_ratio))

    def query_cell(self, height: int, width: int) -> Cell:
        """Sides of the cells whose queries are averaged on a map of this size."""
        return query_cell((height, width), self.query_ratio if self.isr_queries is None else (
            multiplier_near(self.isr_queries, height * width, self.query_ratio)))

    def pool_size(self, height: int, width: int, multiplier: int | None = None) -> tuple[int, int]:
        """Kernel of the pool on a map of this size: never larger than the map.

        ``multiplier`` is one of the training pool, in place of the current one.
        """
        if multiplier is None:
            multiplier = self.multiplier(height, width)
        kernel = self.pool_ratio * multiplier
        return (kernel if height >= kernel else height, kernel if width >= kernel else width)

    def num_keys(self, height: int, width: int, multiplier: int | None = None) -> int:
        """Number of keys M on a map of this size; the arguments are those of `pool_size`."""
        if multiplier is None:
            multiplier = self.multiplier(height, width)
        if self.isr_method != 'average' and multiplier > 1:
            grid = self._trained_grid(height, width)
            left, total = math.prod(cells(grid, multiplier)), math.prod(grid)
            return max(left, total - total // 2) if self.isr_method == 'bipartite' else left
        rows, columns = self.pool_size(height, width, multiplier)
        return (height // rows) * (width // columns)

    def _trained_grid(self, height: int, width: int) -> Grid:
        """Rows and columns that the training pool leaves of a map."""
        rows, columns = self.pool_size(height, width, 1)
        return height // rows, width // columns

    def pooled(self, x: Tensor) -> Tensor:
        """The pooled and projected map, N x C x H/p x W/p, from which keys and values are made."""
        if isinstance(self.isr_ratio, OpenRatio):
            return self._project(self.isr_ratio.average(x, self.pool_ratio, whole=True))
        kernel = self.pool_size(x.shape[2], x.shape[3])
        if not torch.compiler.is_compiling() and min(kernel) < self.pool_ratio * self.isr_ratio:
            # The same text for every size, so that Python's filter shows it once.
            warnings.warn('a feature map is smaller than the pool of its keys, so the pool shrinks '
                          'to the map: lower isr_ratio or enlarge the input', stacklevel=3)
        if self.isr_method != 'average':
            multiplier = self.multiplier(x.shape[2], x.shape[3])
            kernel = self.pool_size(x.shape[2], x.shape[3], 1)
        if kernel != (1, 1):
            x = F.avg_pool2d(x, kernel)
        if self.isr_method in ('max', 'overlap') and multiplier > 1:
            x = pool_map(x, multiplier, self.isr_method)
        return self._project(x)

    def _project(self, x: Tensor) -> Tensor:
        kv = self.kv(x)
        return kv if self.kv_norm is None else F.gelu(self.kv_norm(kv))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x)

    def attend(self, x: Tensor, queries: Tensor) -> Tensor:
        """Attention of a map of queries to the keys of a map x, and its projection."""
        grid = x.shape[2], x.shape[3]
        cell = self.query_cell(*grid)
        queries, kv = pool_queries(queries, cell), self.pooled(x)
        # Before the queries are spread: the projection commutes with that.
        out = self.proj(self.attend_pooled(queries, kv, grid))
        return spread_queries(out, cell, grid)

    def attend_pooled(self, queries: Tensor, kv: Tensor, grid: Grid) -> Tensor:
        """Attention of a map of queries to a pooled map, of which ``grid`` was the size."""
        if queries.device.type == 'cpu' and not torch.is_grad_enabled() and (
                self.isr_method != 'bipartite') and not is_exporting():
            return attend_by_rows(queries, kv, self.num_heads)
        keys = split_heads(kv, self.num_heads)  # N C H/p W/p -> N h M d
        return self.attend_heads(queries, keys, keys, grid)

    def attend_heads(self, queries: Tensor, keys: Tensor, values: Tensor, grid: Grid) -> Tensor:
        """Attention of a map N x C x H x W to keys and values N x h x M x d."""
        n, c, height, width = queries.shape
        q, mask = split_heads(queries, self.num_heads), None
        multiplier = self.multiplier(*grid)
        if self.isr_method == 'bipartite' and multiplier > 1:
            merged = MergedKeys(merging(keys, Layout((self._trained_grid(*grid),)), multiplier))
            keys, values = merged.tokens(keys), merged.tokens(values)
            mask = merged.mask(None, q)
        out = F.scaled_dot_product_attention(q, keys, values, mask)  # N h (H W) d
        return to_map(out.transpose(1, 2).reshape(n, height, width, c))

    def extra_repr(self) -> str:
        method = '' if self.isr_method == 'average' else f', isr_method={self.isr_method}'
        return (f'num_heads={self.num_heads}, pool_ratio={self.pool_ratio}, '
                f'isr_ratio={self.isr_ratio}, isr_keys={self.isr_keys}, '
                f'query_ratio={self.query_ratio}{method}')


class EmbeddedAttention(EmbeddingFreeAttention):
    """The same attention with Q, K and V projections, with which the ablations compare.

    Queries are projected from the map, keys and values each from the pooled and projected map (the
    spatial reduction of PVTv2), so the pool and ISR act as they do without embedding. The decoder
    of EDAFormer-T grows by 0.70 M parameters; table 5(b) has 4.9 M and 5.7 M.

    Arguments and errors are those of `EmbeddingFreeAttention`.
    """

    def __init__(self, dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.query = PixelLinear(dim, dim)
        self.key = PixelLinear(dim, dim)
        self.value = PixelLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.query(x))

    def attend_pooled(self, queries: Tensor, kv: Tensor, grid: Grid) -> Tensor:
        return self.attend_heads(queries, split_heads(self.key(kv), self.num_heads),
                                 split_heads(self.value(kv), self.num_heads), grid)


SCORE_BYTES = 4 << 20
"""Bytes of scores that `attend_by_rows` holds at once, about what a CPU's caches keep."""


@torch.library.custom_op('mmseg_edaformer::attend_by_rows', mutates_args=())
def attend_by_rows(x: Tensor, kv: Tensor, num_heads: int) -> Tensor:
    """Attention on a CPU, without gradients: compiled code, or some rows of queries at a time.

    For heads this short the CPU's ``scaled_dot_product_attention`` leaves much of the machine
    unused, most of all in bfloat16. `cpu_kernels.attend` is the fastest. If it cannot be compiled,
    the keys become the weights of a grouped 1x1 convolution, one group per head, so that oneDNN
    computes scores and output in the layout of the maps.

    ``x`` are the queries, N x C x H x W, channels-last, as is the result; ``kv``, N x C x rows x
    columns, the keys and values.
    """
    compiled = cpu_kernels.attend(x, kv, num_heads)
    if compiled is not None:
        return compiled
    channels, width = x.shape[1], x.shape[3]
    dim, num_keys = channels // num_heads, kv.shape[2] * kv.shape[3]
    rows = max(1, SCORE_BYTES // (width * num_heads * num_keys * x.element_size()))
    out = torch.empty_like(x, memory_format=torch.channels_last)
    for image, keys, result in zip(x.split(1), to_tokens(kv), out.split(1)):
        keys = keys.reshape(num_keys, num_heads, dim)
        k = (keys / math.sqrt(dim)).transpose(0, 1).reshape(num_heads * num_keys, dim, 1, 1)
        v = keys.permute(1, 2, 0).reshape(channels, num_keys, 1, 1)
        for queries, part in zip(image.split(rows, dim=2), result.split(rows, dim=2)):
            scores = F.conv2d(queries, k, groups=num_heads)
            by_head = to_tokens(scores).unflatten(3, (num_heads, num_keys))
            torch.softmax(by_head, -1, out=by_head)
            values = F.conv2d(scores, v, groups=num_heads)
            if values.shape == x.shape:
                return values
            part.copy_(values)
    return out


@attend_by_rows.register_fake
def _(x: Tensor, kv: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)
