"""The building blocks of the encoder and the decoder (arXiv 2407.17261, section 3).

Shapes: N batch, C channels, H x W the map; each module takes and returns one channels-last map.
"""
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.drop import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..errors import ConfigError
from .attention import EmbeddedAttention, EmbeddingFreeAttention
from .layers import PixelLinear, PixelNorm, channels_last, gelu, init_weights, pixel_linear

ALIGNMENT = 8
"""Channels are padded to a multiple of this on GPUs: bfloat16 matrix units load 16 bytes."""

ALIGN_FROM = 1 << 21
"""Elements of a map from which channels are padded; below, padding the weights costs more."""


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then LayerNorm."""

    def __init__(self, in_channels: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size, stride, kernel_size // 2)
        self.norm = PixelNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class MixFFN(nn.Module):
    """Feed-forward network with a depth-wise 3x3 convolution between its linear layers.

    With ``relu``, as in the encoder, ReLU precedes the convolution.
    """

    def __init__(self, dim: int, ffn_ratio: float, *, relu: bool, drop_rate: float = 0.) -> None:
        super().__init__()
        hidden = int(dim * ffn_ratio)
        self.fc1 = PixelLinear(dim, hidden)
        self.act = nn.ReLU(inplace=True) if relu else nn.Identity()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = PixelLinear(hidden, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        weights: list[Tensor] = [self.fc1.weight, self.fc1.bias, self.dwconv.weight,
                                 cast(Tensor, self.dwconv.bias), self.fc2.weight]
        w1, b1, w3, b3, w2 = weights
        if padding := _padding(x, len(w1)):
            # Zero channels stay zero up to fc2, which ignores them.
            w1, w3 = F.pad(w1, (0, 0, 0, padding)), F.pad(w3, (0, 0, 0, 0, 0, 0, 0, padding))
            b1, b3, w2 = (F.pad(t, (0, padding)) for t in (b1, b3, w2))
        x = pixel_linear(x, w1, b1)
        x = gelu(F.conv2d(self.act(x), w3, b3, padding=1, groups=len(w3)))
        return self.drop(pixel_linear(self.drop(x), w2, self.fc2.bias))


def _padding(x: Tensor, hidden: int) -> int:
    """Number of channels to add to a feed-forward network on a GPU, if the map is large enough."""
    if not x.is_cuda or x.numel() < ALIGN_FROM:
        return 0
    # Eager training waits for the CPU, which would also do the padding.
    eager_training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return 0 if eager_training else -hidden % ALIGNMENT


class Block(nn.Module):
    """Pre-norm block of an attention, or what stands in its place, and a feed-forward network."""

    def __init__(self, dim: int, attn: nn.Module, ffn: nn.Module, drop_path_rate: float = 0.,
                 eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = PixelNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = PixelNorm(dim, eps=eps)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


TOKEN_MIXERS = ('embedding_free', 'embedded', 'depthwise_conv', 'conv')
"""Layers that can replace the attention in a block (table 3a). The paper gives neither the kernel
nor the surroundings of its convolutions; here they are 3x3, with bias."""


class TransformerBlock(Block):
    """Block of embedding-free attention and MixFFN, for the encoder and the decoder.

    ``decoder`` selects the decoder's variant: norm and GELU on the keys, no ReLU in the
    feed-forward network, LayerNorm epsilon 1e-5 instead of 1e-6. ``token_mixer`` is one of
    `TOKEN_MIXERS`.
    """

    def __init__(self, dim: int, num_heads: int, pool_ratio: int, ffn_ratio: float, *,
                 decoder: bool = False, token_mixer: str = 'embedding_free',
                 drop_rate: float = 0., drop_path_rate: float = 0.) -> None:
        eps = 1e-5 if decoder else 1e-6
        if token_mixer not in TOKEN_MIXERS:
            raise ConfigError(f"there is no token_mixer '{token_mixer}': use one of "
                              f'{", ".join(TOKEN_MIXERS)}')
        if token_mixer in ('depthwise_conv', 'conv'):
            groups = 1 if token_mixer == 'conv' else dim
            attn: nn.Module = nn.Conv2d(dim, dim, 3, padding=1, groups=groups)
        else:
            kind = EmbeddedAttention if token_mixer == 'embedded' else EmbeddingFreeAttention
            attn = kind(dim, num_heads, pool_ratio, kv_norm=decoder, norm_eps=eps)
        super().__init__(dim, attn, MixFFN(dim, ffn_ratio, relu=not decoder, drop_rate=drop_rate),
                         drop_path_rate, eps)


class Encoder(BaseModule):
    """Stages at strides 4, 8, 16 and 32, each of which takes a map and returns one.

    ``out_indices`` are the stages whose maps are returned, counted from 0. Without ``init_cfg``
    the weights are initialised as the released implementation does.
    """

    def __init__(self, stages: Iterable[nn.Module], out_indices: Sequence[int],
                 init_cfg: dict[str, Any] | list[dict[str, Any]] | None) -> None:
        super().__init__(init_cfg)
        self.stages = nn.ModuleList(stages)
        self.out_indices = tuple(out_indices)
        self.to(memory_format=torch.channels_last)

    def init_weights(self) -> None:
        """Initialise as released, or as ``init_cfg`` says."""
        if self.init_cfg is None:
            init_weights(self)
        super().init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encode images N x C x H x W.

        Returns:
            The maps of ``out_indices``, N x C_i x H/2^(i+2) x W/2^(i+2), rounded up, channels-last.
        """
        x = channels_last(x)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps.append(x)
        return tuple(maps)


def stage_parts(in_channels: int, dims: Sequence[int], depths: Sequence[int], drop_path_rate: float
                ) -> Iterator[tuple[PatchEmbed, list[float]]]:
    """Yield the patch embedding of each stage, and the stochastic depth of each of its blocks."""
    rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
    for i, (dim, depth) in enumerate(zip(dims, depths)):
        yield (PatchEmbed(dims[i - 1], dim, 3, 2) if i else PatchEmbed(in_channels, dim, 7, 4),
               list(islice(rates, depth)))
