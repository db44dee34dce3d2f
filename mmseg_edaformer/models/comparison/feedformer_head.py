"""The decoder of FeedFormer (AAAI 2023, doi 10.1609/aaai.v37i2.25321), from its description."""
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...errors import ConfigError
from ..blocks import MixFFN
from ..fused_head import FusedHead
from ..layers import PixelLinear, PixelNorm, attend_maps, channels_last, check_lengths


class LowLevelCrossAttention(nn.Module):
    """Attention of a deep level's pixels, of ``dim`` channels, on the pooled lowest level."""

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
        k, v = self.kv(F.gelu(self.norm(self.reduce(self.pool(low))))).chunk(2, dim=1)
        return self.proj(attend_maps(self.q(x), k, v, self.num_heads))


class FeedFormerBlock(nn.Module):
    """Pre-norm block of cross attention and MixFFN; self-attention is left to the encoder."""

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
        check_lengths('FeedFormerHead needs one entry per level above the lowest', dict(
            in_channels=in_channels[1:], in_index=in_index[1:], num_heads=num_heads,
            pool_ratios=pool_ratios))
        super().__init__(
            (FeedFormerBlock(dim, in_channels[0], heads, pool_ratio, ffn_ratio)
             for dim, heads, pool_ratio in zip(in_channels[1:], num_heads, pool_ratios)),
            in_channels, channels, in_index=in_index, norm_cfg=norm_cfg, **kwargs)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Decode the backbone's maps into logits N x num_classes x H x W of the lowest level."""
        low, *deep = (channels_last(x) for x in self._transform_inputs(inputs))
        return self.classify([low, *(level(x, low) for level, x in zip(self.levels, deep))])
