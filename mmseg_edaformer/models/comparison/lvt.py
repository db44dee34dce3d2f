"""LVT, the Lite Vision Transformer (arXiv 2112.10809), written from its description.

Where the description is incomplete, the choice here gives the published number of parameters
(3.4 M) and the multiply-adds of EDAFormer's table 7, with and without ISR. The released weights do
not load.

Shapes: N batch, C channels, H x W the map, h heads, d = C / h, M keys; maps are channels-last.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...errors import ConfigError
from ..blocks import Block, Encoder, MixFFN, stage_parts
from ..layers import (
    PixelLinear,
    PixelNorm,
    attend_maps,
    channels_last,
    check_lengths,
    to_tokens,
)

KERNEL = 3
"""Side of the neighbourhood of convolutional self-attention, and of the atrous convolutions."""


class ConvolutionalSelfAttention(nn.Module):
    """Attention within a 3x3 neighbourhood whose values are a convolution's (CSA).

    Every ``stride`` pixels, the centre gives the attention among the nine pixels around it; their
    values are the pixels times a matrix for each place in the neighbourhood, and overlapping
    results are added. There are no keys, so ISR has nothing to reduce.
    """

    def __init__(self, dim: int, num_heads: int, stride: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.stride = stride
        self.attn = PixelLinear(dim, num_heads * KERNEL ** 4)
        self.value = nn.Conv2d(dim * KERNEL ** 2, dim * KERNEL ** 2, 1, groups=KERNEL ** 2,
                               bias=False)
        self.proj = PixelLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        size, places = dict(kernel_size=KERNEL, padding=1, stride=self.stride), KERNEL ** 2
        centres = F.avg_pool2d(x, self.stride, ceil_mode=True)
        rows, columns = centres.shape[2:]
        attn = to_tokens(self.attn(centres)).reshape(n, rows * columns, self.num_heads, places,
                                                     places)
        attn = (attn * (c // self.num_heads) ** -0.5).softmax(-1)
        windows = F.unfold(x, **size).view(n, c, places, rows, columns).transpose(1, 2)
        v = self.value(windows.reshape(n, places * c, rows, columns))
        v = v.view(n, places, self.num_heads, c // self.num_heads, rows * columns)
        out = attn @ v.permute(0, 4, 2, 1, 3)  # N (rows columns) h 9 d
        out = out.permute(0, 2, 4, 3, 1).reshape(n, c * places, rows * columns)
        return self.proj(channels_last(F.fold(out, (height, width), **size)))


class RecursiveAtrousSelfAttention(nn.Module):
    """Self-attention with multi-scale queries, run twice with one set of weights (RASA).

    The queries are the sum of one depth-wise convolution at several dilations. The second pass
    takes the sum of the input and of the first pass's output, with two weights per channel. Keys
    and values are reduced by a strided convolution of kernel ``sr_ratio``.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int,
                 dilations: Sequence[int] = (1, 3, 5), num_passes: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dilations = tuple(dilations)
        self.q = PixelLinear(dim, dim)
        self.atrous = nn.Conv2d(dim, dim, KERNEL, padding=1, groups=dim)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio) if sr_ratio > 1 else nn.Identity()
        self.norm = PixelNorm(dim) if sr_ratio > 1 else nn.Identity()
        self.kv = PixelLinear(dim, 2 * dim)
        self.proj = PixelLinear(dim, dim)
        self.recursion = nn.Parameter(torch.ones(num_passes - 1, 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(x)
        for given, state in self.recursion:
            out = self.attend(given[:, None, None] * x + state[:, None, None] * out)
        return out

    def attend(self, x: Tensor) -> Tensor:
        """One pass, N C H W -> N C H W."""
        q, convolution = self.q(x), self.atrous
        q = torch.stack([F.silu(F.conv2d(q, convolution.weight, convolution.bias, padding=dilation,
                                         dilation=dilation, groups=x.shape[1]))
                         for dilation in self.dilations]).sum(0)
        k, v = self.kv(self.norm(self.sr(x))).chunk(2, dim=1)
        return self.proj(attend_maps(q, k, v, self.num_heads))


@MODELS.register_module()
class LVT(Encoder):
    """Lite Vision Transformer: convolutional, then three recursive atrous stages; 3.4 M parameters.

    Args:
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        ffn_ratios: Expansion of the feed-forward networks of each stage.
        sr_ratios: Reduction of keys and values of each stage; the first has none.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        init_cfg: mmengine's initialisation, such as ``dict(type='Pretrained', checkpoint=...)``.

    Raises:
        ConfigError: The sizes differ in length, or heads do not divide the channels.
    """

    def __init__(self, embed_dims: Sequence[int] = (64, 64, 160, 256),
                 depths: Sequence[int] = (2, 2, 2, 2), num_heads: Sequence[int] = (2, 2, 5, 8),
                 ffn_ratios: Sequence[float] = (4, 8, 4, 4),
                 sr_ratios: Sequence[int] = (8, 4, 2, 1), drop_path_rate: float = 0.1,
                 init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None) -> None:
        check_lengths('LVT needs one entry per stage in every size', dict(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, ffn_ratios=ffn_ratios,
            sr_ratios=sr_ratios))
        for dim, heads in zip(embed_dims, num_heads):
            if dim % heads:
                raise ConfigError(f'LVT: num_heads={heads} does not divide embed_dims={dim}')
        stages = []
        for i, ((patch_embed, rates), dim, heads, ffn_ratio, sr_ratio) in enumerate(zip(
                stage_parts(3, embed_dims, depths, drop_path_rate), embed_dims, num_heads,
                ffn_ratios, sr_ratios)):
            blocks = [Block(dim, RecursiveAtrousSelfAttention(dim, heads, sr_ratio) if i else
                            ConvolutionalSelfAttention(dim, heads),
                            MixFFN(dim, ffn_ratio, relu=False), rate) for rate in rates]
            stages.append(nn.Sequential(patch_embed, *blocks, PixelNorm(dim)))
        super().__init__(stages, range(len(stages)), init_cfg)
