"""EFT, the embedding-free transformer encoder (arXiv 2407.17261, section 3 and table 8)."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..errors import ConfigError
from .blocks import PatchEmbed, TransformerBlock
from .layers import PixelNorm, channels_last, init_weights

ARCHITECTURES: dict[str, dict[str, Sequence[float]]] = {
    'tiny': dict(embed_dims=(32, 64, 128, 256), depths=(2, 2, 10, 2), num_heads=(1, 2, 4, 8),
                 ffn_ratios=(3.8, 3.8, 3.8, 3.8), pool_ratios=(8, 4, 2, 1)),
    'base': dict(embed_dims=(64, 128, 256, 512), depths=(3, 3, 22, 3), num_heads=(1, 2, 4, 8),
                 ffn_ratios=(4, 4, 4, 4), pool_ratios=(8, 4, 2, 1)),
}


class EFTStage(nn.Module):
    """One stage: patch embedding, transformer blocks, LayerNorm; a map in, a map out."""

    def __init__(self, patch_embed: PatchEmbed, blocks: Sequence[TransformerBlock],
                 norm: PixelNorm) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.patch_embed(x)))


@MODELS.register_module()
class EFT(BaseModule):
    """Hierarchical encoder of embedding-free attention, four stages at strides 4, 8, 16, 32.

    Args:
        arch: 'tiny' (3.4 M parameters), 'base' (24.9 M), or a dict of the five sizes below, where
            missing ones are those of 'tiny'.
        embed_dims: Channels of each stage; this and the next four replace the sizes of ``arch``.
        depths: Transformer blocks of each stage.
        num_heads: Attention heads of each stage.
        ffn_ratios: Expansion of the feed-forward networks of each stage.
        pool_ratios: Pool of the keys during training, for each stage.
        in_channels: Channels of the image.
        drop_rate: Dropout in the feed-forward networks.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        out_indices: Stages whose maps are returned, counted from 0.
        init_cfg: mmengine's initialisation, such as
            ``dict(type='Pretrained', checkpoint=...)``; by default the released one.

    Raises:
        ConfigError: ``arch`` or a size is unknown, or the sizes differ in length.
    """

    def __init__(self, arch: str | dict[str, Sequence[float]] = 'tiny', *,
                 embed_dims: Sequence[int] | None = None, depths: Sequence[int] | None = None,
                 num_heads: Sequence[int] | None = None,
                 ffn_ratios: Sequence[float] | None = None,
                 pool_ratios: Sequence[int] | None = None, in_channels: int = 3,
                 drop_rate: float = 0., drop_path_rate: float = 0.2,
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None) -> None:
        super().__init__(init_cfg)
        sizes = _sizes(arch, embed_dims=embed_dims, depths=depths, num_heads=num_heads,
                       ffn_ratios=ffn_ratios, pool_ratios=pool_ratios)
        num_stages = len(sizes['depths'])
        if not out_indices or not set(out_indices) <= set(range(num_stages)):
            raise ConfigError(f'out_indices={tuple(out_indices)}: they must lie within '
                              f'0 to {num_stages - 1}')
        self.embed_dims = tuple(sizes['embed_dims'])
        self.out_indices = tuple(out_indices)
        drop_paths = np.linspace(0, drop_path_rate, sum(sizes['depths'])).tolist()
        self.stages = nn.ModuleList()
        for i, (dim, depth, heads, ffn_ratio, pool_ratio) in enumerate(zip(*(
                sizes[name] for name in ('embed_dims', 'depths', 'num_heads', 'ffn_ratios',
                                         'pool_ratios')))):
            patch_embed = (PatchEmbed(self.embed_dims[i - 1], dim, 3, 2) if i else
                           PatchEmbed(in_channels, dim, 7, 4))
            blocks = [TransformerBlock(dim, heads, pool_ratio, ffn_ratio, drop_rate=drop_rate,
                                       drop_path_rate=drop_paths.pop(0)) for _ in range(depth)]
            self.stages.append(EFTStage(patch_embed, blocks, PixelNorm(dim, eps=1e-6)))
        self.to(memory_format=torch.channels_last)

    def init_weights(self) -> None:
        """Initialise as released, or as ``init_cfg`` says."""
        if self.init_cfg is None:
            init_weights(self)
        super().init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encode images.

        Args:
            x: Normalised images, N x in_channels x H x W, of any size.

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


def _sizes(arch: str | dict[str, Sequence[float]],
           **given: Sequence[float] | None) -> dict[str, Sequence[Any]]:
    """The sizes of ``arch``, with those given beside it, checked."""
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            raise ConfigError(f"EFT has no arch '{arch}': use one of {', '.join(ARCHITECTURES)}, "
                              'or a dict of sizes')
        arch = ARCHITECTURES[arch]
    unknown = set(arch) - set(given)
    if unknown:
        raise ConfigError(f"EFT has no size {', '.join(sorted(unknown))}: "
                          f"the sizes are {', '.join(given)}")
    sizes = {**ARCHITECTURES['tiny'], **arch,
             **{name: values for name, values in given.items() if values is not None}}
    if len({len(values) for values in sizes.values()}) > 1:
        raise ConfigError('EFT needs one entry per stage in every size, found ' +
                          ', '.join(f'{len(values)} {name}' for name, values in sizes.items()))
    return sizes
