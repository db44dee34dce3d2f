"""What the encoder and the decoder are built from (arXiv 2407.17261, section 3).

Shapes: N batch, C channels, H x W the map; everything takes and returns one channels-last map.
"""
import torch.nn.functional as F
from mmcv.cnn.bricks.drop import DropPath
from torch import Tensor, nn

from .attention import EmbeddingFreeAttention
from .layers import PixelLinear, PixelNorm


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then LayerNorm.

    Args:
        in_channels: Channels of the image or of the stage before.
        dim: Channels C of the stage.
        kernel_size: Kernel; the padding is half of it.
        stride: Stride.
    """

    def __init__(self, in_channels: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size, stride, kernel_size // 2)
        self.norm = PixelNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class MixFFN(nn.Module):
    """Feed-forward network with a depth-wise 3x3 convolution between its linear layers.

    Args:
        dim: Channels C.
        ffn_ratio: Hidden channels are ``int(dim * ffn_ratio)``.
        relu: ReLU before the convolution, as the encoder has it.
        drop_rate: Dropout after GELU and after the last layer.
    """

    def __init__(self, dim: int, ffn_ratio: float, *, relu: bool, drop_rate: float = 0.) -> None:
        super().__init__()
        hidden = int(dim * ffn_ratio)
        self.fc1 = PixelLinear(dim, hidden)
        self.act = nn.ReLU() if relu else nn.Identity()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = PixelLinear(hidden, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.dwconv(self.act(self.fc1(x))))
        return self.drop(self.fc2(self.drop(x)))


class TransformerBlock(nn.Module):
    """Pre-norm block of embedding-free attention and MixFFN, for the encoder and the decoder.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        pool_ratio: Pool of the keys during training.
        ffn_ratio: Expansion of the feed-forward network.
        decoder: The decoder's variant: norm and GELU on the keys, no ReLU in the feed-forward
            network, LayerNorm epsilon 1e-5 instead of 1e-6.
        drop_rate: Dropout in the feed-forward network.
        drop_path_rate: Probability of dropping a residual branch.
    """

    def __init__(self, dim: int, num_heads: int, pool_ratio: int, ffn_ratio: float, *,
                 decoder: bool = False, drop_rate: float = 0., drop_path_rate: float = 0.) -> None:
        super().__init__()
        eps = 1e-5 if decoder else 1e-6
        self.norm1 = PixelNorm(dim, eps=eps)
        self.attn = EmbeddingFreeAttention(dim, num_heads, pool_ratio, kv_norm=decoder,
                                           norm_eps=eps)
        self.norm2 = PixelNorm(dim, eps=eps)
        self.ffn = MixFFN(dim, ffn_ratio, relu=not decoder, drop_rate=drop_rate)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))
