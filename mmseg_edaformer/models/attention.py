"""Embedding-free attention (EDAFormer, arXiv 2407.17261, section 3).

Shapes: N batch, C channels, H x W the map, M keys, h heads, d = C / h.
"""
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .layers import PixelLinear, PixelNorm, to_map, to_tokens


class EmbeddingFreeAttention(nn.Module):
    """Attention whose queries are the input itself and whose keys are its values.

    The map is average-pooled, projected once (``kv``), and serves as keys and values alike; there
    is no query projection. ``isr_ratio`` multiplies the pool of a trained model at inference
    (inference spatial reduction, section 4): the same weights, fewer keys, all queries kept. It is
    a plain attribute, not a weight, and 1 is bit for bit the trained model.

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
        self.kv = nn.Conv2d(dim, dim, 1)
        self.kv_norm = PixelNorm(dim, eps=norm_eps) if kv_norm else None
        self.proj = PixelLinear(dim, dim)

    def pool_size(self, height: int, width: int) -> tuple[int, int]:
        """Kernel of the pool on a map of this size: never larger than the map."""
        kernel = self.pool_ratio * self.isr_ratio
        return (kernel if height >= kernel else height, kernel if width >= kernel else width)

    def num_keys(self, height: int, width: int) -> int:
        """Number of keys M on a map of this size."""
        rows, columns = self.pool_size(height, width)
        return (height // rows) * (width // columns)

    def split_heads(self, x: Tensor) -> Tensor:
        """View a map as heads: N C H W -> N h (H W) d."""
        n, c, height, width = x.shape
        return to_tokens(x).reshape(n, height * width, self.num_heads,
                                    c // self.num_heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        kernel = self.pool_size(height, width)
        if not torch.compiler.is_compiling() and min(kernel) < self.pool_ratio * self.isr_ratio:
            # One text for every size, so that Python's own filter shows it once.
            warnings.warn('a feature map is smaller than the pool of its keys, which shrinks to '
                          'the map: lower isr_ratio or enlarge the input', stacklevel=2)
        kv = self.kv(x if kernel == (1, 1) else F.avg_pool2d(x, kernel))
        if self.kv_norm is not None:
            kv = F.gelu(self.kv_norm(kv))
        kv = self.split_heads(kv)  # N C H/p W/p -> N h M d
        out = F.scaled_dot_product_attention(self.split_heads(x), kv, kv)
        return self.proj(to_map(out.transpose(1, 2).reshape(n, height, width, c)))

    def extra_repr(self) -> str:
        return (f'num_heads={self.num_heads}, pool_ratio={self.pool_ratio}, '
                f'isr_ratio={self.isr_ratio}')

