"""timm, and mmseg's TIMMBackbone around it."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..key_layout import Arguments, Call, GridSource, InputMap, OwnMaps, Patches, Unfolded, Window
from ..pooling import Grid
from ..registry import AttentionRule, Irreducible, Rule


@dataclass(frozen=True)
class Blocks(GridSource):
    """Square windows whose side is the attribute ``size`` of a module around (NesT)."""
    size: str

    @property
    def owner(self) -> str:  # type: ignore[override]
        return f'@{self.size}'

    def find(self, call: Call) -> list[Grid]:
        side = getattr(call.owners[self.owner], self.size)
        return [(side, side)]


@dataclass(frozen=True)
class Unrolled(GridSource):
    """Tokens sorted by Hiera: the place within the smallest blocks first, then in larger ones.

    ``path`` is the path of the module that sorts, with the map's size and the sides of the blocks.
    Windows are what one block of the largest size holds. Its tokens tell after how many poolings
    the attention stands: their number alone may be that of a later map where a mask left some out.
    """
    path: str = 'unroll'

    @property
    def owner(self) -> str:  # type: ignore[override]
        return self.path

    def find(self, call: Call) -> list[Grid]:
        return [grid for grid, _ in self._levels(call)]

    def order(self, call: Call, grid: Grid) -> Tensor:
        blocks = next(blocks for level, blocks in self._levels(call) if level == grid)
        height, width = _product(blocks)
        sides = [side for block in blocks for side in block]
        sides += [grid[0] // height, grid[1] // width]
        last = len(sides) - 1
        device = next(call.module.parameters()).device
        places = torch.arange(grid[0] * grid[1], device=device).view(sides)
        return places.permute(*range(last - 1, -1, -2), *range(last, 0, -2)).flatten()

    def _levels(self, call: Call) -> list[tuple[Grid, list[Grid]]]:
        """Possible grids of the keys: after each pooling of the model, with the blocks left."""
        size, schedule = self.sorting(call)
        attn: Any = call.module
        stride = attn.q_stride if hasattr(attn, 'q_stride') else attn.query_stride
        levels = []
        for done in range(len(schedule) + 1 if len(size) == 2 else 0):
            blocks = schedule[done:]
            grid = _product(blocks)
            if math.prod(grid) != stride * attn.window_size:
                continue
            if not attn.use_mask_unit_attn:
                height, width = _product(schedule[:done])
                grid = size[0] // height, size[1] // width
            levels.append((grid, blocks))
        return levels

    def sorting(self, call: Call) -> tuple[Sequence[int], list[Grid]]:
        """Size of the map that is sorted, and the sides of the blocks."""
        unroll: Any = call.owners[self.path]
        return unroll.size, unroll.schedule


@dataclass(frozen=True)
class Branches(GridSource):
    """Maps of several patch embeddings, told apart by their number of patches (CrossViT)."""
    owner = 'patch_embed'

    def find(self, call: Call) -> list[Grid]:
        embeddings: Any = call.owners[self.owner]
        return [(embedding.img_size[0] // embedding.patch_size[0],
                 embedding.img_size[1] // embedding.patch_size[1]) for embedding in embeddings]


def _product(blocks: list[Grid]) -> Grid:
    """Sides of a block of blocks of blocks."""
    return math.prod([block[0] for block in blocks]), math.prod([block[1] for block in blocks])


_PREFIX = ('num_prefix_tokens',)
_PATCHES = AttentionRule(Patches('patch_embed.proj'), _PREFIX)
_SHIFTED = AttentionRule(Window(shift='shift_size'))
_RESOLUTION = AttentionRule(Window('resolution'))
_MAP = AttentionRule(InputMap())
_MAP_LAST = AttentionRule(InputMap(channels_last=True))
_BRANCHES = AttentionRule(Branches(), 1)
_POOL = AttentionRule(InputMap(), 1)  # behind a class token, or the mean of the map
_CHANNELS = Irreducible('its keys are channels, not tokens')
_LINEAR = Irreducible('it sums up its keys before the queries see them, at a cost linear in them')

RULES: dict[str, Rule] = {
    **dict.fromkeys((
        'timm.layers.attention.Attention',
        'timm.models.beit.Attention',
    ), AttentionRule(Patches('patch_embed.proj'), _PREFIX, projections=('qkv',))),
    **dict.fromkeys((
        'timm.layers.attention.AttentionRope',
        'timm.layers.attention_pool.AttentionPoolLatent',
        'timm.layers.diff_attention.DiffAttention',
        'timm.models.vision_transformer.ParallelScalingBlock',
        'timm.models.vision_transformer.DiffParallelScalingBlock',
        'timm.models.vision_transformer_relpos.RelPosAttention',
        'timm.models.eva.EvaAttention',
        'timm.models.cait.ClassAttn',  # XCiT's as well
        'timm.models.cait.TalkingHeadAttn',
        'timm.models.convit.MHSA',
    ), _PATCHES),
    **dict.fromkeys((
        'timm.models.swin_transformer_v2.WindowAttention',
        'timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention',
    ), _SHIFTED),
    'timm.models.swin_transformer.WindowAttention':
        AttentionRule(Window(shift='shift_size'), projections=('qkv',)),
    'timm.models.davit.WindowAttention': AttentionRule(Window(), projections=('qkv',)),
    'timm.models.gcvit.WindowAttentionGlobal': AttentionRule(Window()),
    'timm.models.twins.LocallyGroupedAttn': AttentionRule(Window('ws')),
    'timm.models.twins.GlobalSubSampleAttn': AttentionRule(Arguments(('size',)),
                                                            projections=('kv',)),
    'timm.models.pvt_v2.Attention': AttentionRule(Arguments(('feat_size',)), projections=('kv',)),
    'timm.models.mvitv2.MultiScaleAttention':
        AttentionRule(Arguments(('feat_size',)), 'has_cls_token'),
    'timm.models.hiera.MaskUnitAttention': AttentionRule(Unrolled()),
    **dict.fromkeys((
        'timm.models.tiny_vit.Attention',
        'timm.models.levit.Attention',
        'timm.models.levit.AttentionDownsample',
    ), _RESOLUTION),
    **dict.fromkeys((
        'timm.layers.attention_pool2d.AttentionPool2d',
        'timm.layers.attention_pool2d.RotAttentionPool2d',
    ), _POOL),
    **dict.fromkeys((
        'timm.models.cpubone.ConvAttention',
        'timm.models.lowformer.ConvAttention',
    ), AttentionRule(OwnMaps())),
    'timm.layers.halo_attn.HaloAttn': AttentionRule(Window('win_size')),
    'timm.models.crossvit.MultiScaleBlock:blocks.*.*.attn': _BRANCHES,
    'timm.models.crossvit.CrossAttention': _BRANCHES,
    'timm.models.mobilevit.MobileVitBlock:transformer.*.attn':
        AttentionRule(Unfolded('conv_1x1'), projections=('qkv',)),
    'timm.models.pit.Transformer:blocks.*.attn':
        AttentionRule(Patches('pool.conv|patch_embed.conv'), ('cls_token',),
                      projections=('qkv',)),
    **dict.fromkeys((
        'timm.layers.attention2d.Attention2d',
        'timm.layers.bottleneck_attn.BottleneckAttn',
        'timm.layers.attention2d.MultiQueryAttention2d',
        'timm.models.maxxvit.Attention2d',
        'timm.models.efficientformer_v2.Attention2d',
        'timm.models.efficientformer_v2.Attention2dDownsample',
        'timm.models.efficientvit_msra.CascadedGroupAttention',
        'timm.models.fastvit.Attention',
        'timm.models.visformer.Attention',
    ), _MAP),
    **dict.fromkeys((
        'timm.models.hieradet_sam2.MultiScaleAttention',
        'timm.models.maxxvit.AttentionCl',
        'timm.models.vision_transformer_sam.Attention',
        'timm.models.volo.Attention',
    ), _MAP_LAST),
    'timm.models.volo.ClassAttention': AttentionRule(Patches('network.1.proj'), ('cls_token',)),
    **dict.fromkeys((
        'timm.models.efficientformer.Attention',
        'timm.models.metaformer.Attention',
    ), AttentionRule(Patches('downsample.conv'))),
    'timm.models.nest.Attention': AttentionRule(Blocks('block_size')),
    'timm.models.volo.OutlookAttention':
        Irreducible('it has no keys: each query predicts the weights of its neighbours'),
    **dict.fromkeys((
        'timm.layers.non_local_attn.BilinearAttnTransform',
        'timm.layers.selective_kernel.SelectiveKernelAttn',
        'timm.layers.split_attn.SplitAttn',
    ), Irreducible('it weighs a map by gates, without keys')),
    **dict.fromkeys((
        'timm.models.davit.ChannelAttention',
        'timm.models.davit.ChannelAttentionV2',
        'timm.models.edgenext.CrossCovarianceAttn',
        'timm.models.xcit.XCA',
    ), _CHANNELS),
    **dict.fromkeys((
        'timm.models.coat.FactorAttnConvRelPosEnc',
        'timm.models.mobilevit.LinearSelfAttention',
        'timm.models.swiftformer.EfficientAdditiveAttention',
    ), _LINEAR),
    'timm.models.nextvit.EfficientAttention':
        Irreducible('its own pool averages runs of tokens, so that its keys lie on no grid'),
    'timm.models.nextvit.ConvAttention': Irreducible('it is a convolution, without keys'),
    'timm.models.convit.GPSA':
        Irreducible('a part of its weights comes from positions alone, without keys'),
}
