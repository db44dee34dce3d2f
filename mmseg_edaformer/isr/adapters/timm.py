"""timm, and mmseg's TIMMBackbone around it."""
from dataclasses import dataclass, replace
from typing import Any

from ..key_layout import (
    Arguments,
    Blocks,
    Call,
    GridSource,
    InputMap,
    OwnMaps,
    Patches,
    Unfolded,
    Unrolled,
    Window,
)
from ..pooling import Grid
from ..rules import AttentionRule, Irreducible, Rule


@dataclass(frozen=True)
class Branches(GridSource):
    """Maps of several patch embeddings, told apart by their number of patches (CrossViT)."""
    owner = 'patch_embed'

    def find(self, call: Call) -> list[Grid]:
        embeddings: Any = call.owners[self.owner]
        return [(embedding.img_size[0] // embedding.patch_size[0],
                 embedding.img_size[1] // embedding.patch_size[1]) for embedding in embeddings]


_PREFIX = ('num_prefix_tokens',)
_PATCHES = AttentionRule(Patches('patch_embed.proj'), _PREFIX)
_SHIFTED = AttentionRule(Window(shift='shift_size'))
_RESOLUTION = AttentionRule(Window('resolution'))
_MAP = AttentionRule(InputMap())
_MAP_LAST = AttentionRule(InputMap(channels_last=True))
_BRANCHES = AttentionRule(Branches(), 1)
_POOL = AttentionRule(InputMap(), 1)  # behind a class token or the mean of the map
_CHANNELS = Irreducible('its keys are channels, not tokens')
_LINEAR = Irreducible('it sums up its keys before the queries see them, at a cost linear in them')

RULES: dict[str, Rule] = {
    **dict.fromkeys((
        'timm.layers.attention.Attention',
        'timm.models.beit.Attention',
    ), AttentionRule(Patches('patch_embed.proj'), _PREFIX, projections=('qkv',))),
    **dict.fromkeys((
        'timm.layers.attention.AttentionRope',
        'timm.layers.diff_attention.DiffAttention',
        'timm.models.vision_transformer.ParallelScalingBlock',
        'timm.models.vision_transformer.DiffParallelScalingBlock',
        'timm.models.vision_transformer_relpos.RelPosAttention',
        'timm.models.eva.EvaAttention',
        'timm.models.cait.ClassAttn',  # and XCiT's
        'timm.models.cait.TalkingHeadAttn',
        'timm.models.convit.MHSA',
    ), _PATCHES),
    'timm.layers.attention_pool.AttentionPoolLatent':
        replace(_PATCHES, queries=False),
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
