"""EFT, the embedding-free transformer encoder (arXiv 2407.17261, section 3 and table 8)."""
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from mmseg.registry import MODELS
from torch import nn

from ..errors import ConfigError
from .blocks import Encoder, TransformerBlock, stage_parts
from .layers import PixelNorm, check_lengths

ARCHITECTURES: dict[str, dict[str, Sequence[float]]] = {
    'tiny': dict(embed_dims=(32, 64, 128, 256), depths=(2, 2, 10, 2), num_heads=(1, 2, 4, 8),
                 ffn_ratios=(3.8, 3.8, 3.8, 3.8), pool_ratios=(8, 4, 2, 1)),
    'base': dict(embed_dims=(64, 128, 256, 512), depths=(3, 3, 22, 3), num_heads=(1, 2, 4, 8),
                 ffn_ratios=(4, 4, 4, 4), pool_ratios=(8, 4, 2, 1)),
}


@MODELS.register_module()
class EFT(Encoder):
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
        sizes = _sizes(arch, embed_dims=embed_dims, depths=depths, num_heads=num_heads,
                       ffn_ratios=ffn_ratios, pool_ratios=pool_ratios)
        num_stages = len(sizes['depths'])
        if not out_indices or not set(out_indices) <= set(range(num_stages)):
            raise ConfigError(f'out_indices={tuple(out_indices)}: they must lie within '
                              f'0 to {num_stages - 1}')
        stages = []
        for (patch_embed, rates), dim, heads, ffn_ratio, pool_ratio in zip(
                stage_parts(in_channels, sizes['embed_dims'], sizes['depths'], drop_path_rate),
                sizes['embed_dims'], sizes['num_heads'], sizes['ffn_ratios'],
                sizes['pool_ratios']):
            blocks = [TransformerBlock(dim, heads, pool_ratio, ffn_ratio, drop_rate=drop_rate,
                                       drop_path_rate=rate) for rate in rates]
            stages.append(nn.Sequential(OrderedDict(
                patch_embed=patch_embed, blocks=nn.Sequential(*blocks),
                norm=PixelNorm(dim, eps=1e-6))))
        super().__init__(stages, out_indices, init_cfg)
        self.embed_dims = tuple(sizes['embed_dims'])


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
    check_lengths('EFT needs one entry per stage in every size', sizes)
    return sizes
