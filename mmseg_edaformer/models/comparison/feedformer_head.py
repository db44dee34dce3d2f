"""The decoder of FeedFormer (AAAI 2023, doi 10.1609/aaai.v37i2.25321), from its description.

Shapes: N batch, H x W a level, M keys, h heads; maps are channels-last.
"""
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...errors import ConfigError
from ..blocks import MixFFN
from ..fused_head import FusedHead
from ..layers import PixelLinear, PixelNorm, channels_last, to_map, to_tokens


class LowLevelCrossAttention(nn.Module):
    """Attention of a deep level's pixels on the pooled lowest level.

    Args:
        dim: Channels of the deep level.
        low_dim: Channels of the lowest level.
        num_heads: Heads; must divide ``dim``.
        pool_ratio: Kernel and stride of the pool of the lowest level.
    """

    def __init__(self, dim: int, low_dim: int, num_heads: int, pool_ratio: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f'num_heads={num_heads} does not divide in_channels={dim}')
        self.num_heads = num_heads
        self.pool = nn.AvgPool2d(pool_ratio, ceil_mode=True)
        self.reduce = PixelLinear(low_dim, low_dim)
        self.norm = PixelNorm(low_dim)
        self.q = PixelLinear(dim, dim)
        self.kv = PixelLinear(low_dim, 2 * dim)
        self.proj = PixelLinear(dim, dim)

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        n, c, height, width = x.shape
        k, v = self.kv(F.gelu(self.norm(self.reduce(self.pool(low))))).chunk(2, dim=1)
        q, k, v = (to_tokens(t).reshape(n, -1, self.num_heads, c // self.num_heads).transpose(1, 2)
                   for t in (self.q(x), k, v))  # N h M d
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(to_map(out.transpose(1, 2).reshape(n, height, width, c)))


class FeedFormerBlock(nn.Module):
    """Pre-norm block of cross attention and MixFFN; self-attention is left to the encoder's blocks.

    Args:
        dim: Channels of the deep level; the next three arguments are those of
            `LowLevelCrossAttention` too.
        ffn_ratio: Expansion of the feed-forward network.
    """

    def __init__(self, dim: int, low_dim: int, num_heads: int, pool_ratio: int,
                 ffn_ratio: float) -> None:
        super().__init__()
        self.norm1 = PixelNorm(dim)
        self.norm_low = PixelNorm(low_dim)
        self.attn = LowLevelCrossAttention(dim, low_dim, num_heads, pool_ratio)
        self.norm2 = PixelNorm(dim)
        self.ffn = MixFFN(dim, ffn_ratio, relu=False)

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.norm_low(low))
        return x + self.ffn(self.norm2(x))


@MODELS.register_module()
class FeedFormerHead(FusedHead):
    """Deep levels, each enhanced by one cross attention on the lowest level, then one fuse layer.

    The lists run from shallow to deep. FeedFormer-B0 is this on MiT-B0, with 4.5 M parameters. The
    fuse layer runs before resizing, so this costs less than where it follows (at 1024x2048 by 15
    GMACs). The released weights do not load.

    Args:
        in_channels: Channels of the lowest level and of those above it.
        channels: Channels of the fuse layer.
        in_index: Indices of the backbone's maps that are these levels.
        num_heads: Attention heads of each level above the lowest.
        pool_ratios: Pool of the lowest level, as keys and values of each level above it. The
            paper's pools are not known here; 8 is MiT's reduction of the keys of that level.
        ffn_ratio: Expansion of the feed-forward networks.
        norm_cfg: Norm after the fuse layer.
        kwargs: Arguments of mmseg's ``BaseDecodeHead``.

    Raises:
        ConfigError: The lists differ in length, or heads do not divide the channels.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, *,
                 in_index: Sequence[int] = (0, 1, 2, 3), num_heads: Sequence[int] = (2, 5, 8),
                 pool_ratios: Sequence[int] = (8, 8, 8), ffn_ratio: float = 4,
                 norm_cfg: dict[str, Any] | None = None, **kwargs: Any) -> None:
        lengths = dict(in_channels=len(in_channels) - 1, in_index=len(in_index) - 1,
                       num_heads=len(num_heads), pool_ratios=len(pool_ratios))
        if len(set(lengths.values())) > 1:
            raise ConfigError('FeedFormerHead needs one entry per level above the lowest, found ' +
                              ', '.join(f'{length} {name}' for name, length in lengths.items()))
        super().__init__(
            (FeedFormerBlock(dim, in_channels[0], heads, pool_ratio, ffn_ratio)
             for dim, heads, pool_ratio in zip(in_channels[1:], num_heads, pool_ratios)),
            in_channels, channels, in_index=in_index, norm_cfg=norm_cfg, **kwargs)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Decode the backbone's maps.

        Args:
            inputs: Maps of the backbone, from which ``in_index`` selects the levels.

        Returns:
            Logits, N x num_classes x H x W, at the size of the lowest level.
        """
        low, *deep = (channels_last(x) for x in self._transform_inputs(inputs))
        return self.classify([low, *(level(x, low) for level, x in zip(self.levels, deep))])
