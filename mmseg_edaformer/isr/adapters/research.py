"""Published research code, recognised by the names of its classes and their attributes.

Such code is copied from repository to repository, so the module of a class tells nothing.
"""
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..key_layout import (
    Arguments,
    Blocks,
    Call,
    GridSource,
    InputMap,
    OwnMaps,
    Patches,
    Unrolled,
    Window,
)
from ..pooling import Grid
from ..rules import AttentionRule, Irreducible, Rule


@dataclass(frozen=True)
class Stripes(GridSource):
    """Windows of two sides, which are two attributes of the module: CSWin's stripes."""
    rows: str
    columns: str

    def find(self, call: Call) -> list[Grid]:
        return [(getattr(call.module, self.rows), getattr(call.module, self.columns))]


@dataclass(frozen=True)
class WindowThenMaps(GridSource):
    """A window, whose size is an attribute of the module, or what the module's own pools make.

    HAT-Net attends within windows first and to a pooled map after that.
    """
    size: str

    def find(self, call: Call) -> list[Grid]:
        side = getattr(call.module, self.size)
        return [(side, side), *call.maps]


@dataclass(frozen=True)
class Pyramid(GridSource):
    """Several maps behind each other: the map of the arguments, pooled by each ratio (P2T)."""
    ratios: str

    def find(self, call: Call) -> list[Grid]:
        rows, columns = call.argument('H'), call.argument('W')
        return [(round(rows / ratio), round(columns / ratio))
                for ratio in getattr(call.module, self.ratios)]


@dataclass(frozen=True)
class Regions(GridSource):
    """Windows of RegionViT, of side ``kernel_size``, behind the token of their region.

    The same module is called without ``patch_attn`` for the tokens of all regions, which are few
    and stay. Padding is masked, for the region's own token too.
    """
    owner = '@kernel_size'

    def find(self, call: Call) -> list[Grid]:
        sides: Any = call.owners['@kernel_size'].kernel_size
        rows, columns = sides[0]
        return [(rows, columns)] if call.argument('patch_attn') else []

    def spares(self, call: Call) -> str:
        return '' if call.argument('patch_attn') else 'the tokens of regions stay'

    def present(self, call: Call) -> Tensor | None:
        mask = call.argument('mask')
        return None if mask is None else mask[:, :1]


_MAP_LAST = AttentionRule(InputMap(channels_last=True))
_MAP_ARGUMENTS = AttentionRule(Arguments(('H', 'W')), ('cls_token',))
_PATCHES = AttentionRule(Patches('patch_embed.proj|pos_embed|encoder.patch_embed.proj'), None)
_OWN_MAPS = AttentionRule(OwnMaps(), queries=False)
_NEIGHBOURS = Irreducible('its keys are the neighbours of each query, other ones for each')
_COUNTED = Irreducible('it checks the number of its keys')
_CONVOLUTION = Irreducible('it is a convolution, without keys')

RULES: dict[str, tuple[tuple[tuple[str, ...], Rule], ...]] = {
    'Attention': (
        (('rasa_cfg', 'kv'), _MAP_LAST),  # LVT
        (('grid_size', 'head_dim', 'proj_norm'),  # HAT-Net
         AttentionRule(WindowThenMaps('grid_size'))),
        # DynamicViT, until it prunes: what is left then lies on no grid.
        (('softmax_with_policy', 'qkv'), AttentionRule(Patches('patch_embed.proj'), 1)),
        (('q', 'transform_norm'), Irreducible('it normalises its weights over all keys')),  # ResT
        (('q', 'sr_ratio'), _MAP_ARGUMENTS),  # PVT, SegFormer, Shunted, CMT, ResT
        (('conv_proj_k', 'with_cls_token'),  # CvT
         AttentionRule(Arguments(('h', 'w')), 'with_cls_token')),
        (('attention_biases', 'key_dim', 'norm'), AttentionRule(Blocks('window_size'))),  # TinyViT
        (('qkv', 'use_rel_pos'), _MAP_LAST),  # SAM, ViTDet
        (('qkv', 'keep_rate'), Irreducible('it picks tokens by its weights')),  # EViT
        (('qkv', 'proj'), _PATCHES),  # ViT, DeiT, DINO, UniFormer, Segmenter, U-ViT, ResFormer
    ),
    'GlobalSparseAttn': ((('sr', 'qkv'), _MAP_ARGUMENTS),),  # EdgeViT
    'GroupAttention': ((('ws', 'qkv', '!forward_mask'), AttentionRule(Window('ws'))),),  # Twins
    'SelfAttention': ((('qkv', 'apply_rope'), _PATCHES),),  # DINOv3
    'MaskUnitAttention': ((('q_stride', 'window_size'), AttentionRule(Unrolled())),),  # Hiera
    'MultiScaleAttention': (
        (('pool_k', 'has_cls_embed'),  # MViTv2
         AttentionRule(Arguments(('hw_shape',)), 'has_cls_embed')),
        (('qkv', 'q_pool'), _MAP_LAST),  # SAM 2
    ),
    'MHA_': ((('rpe', 'k_proj'), _COUNTED),),  # HRFormer
    'MultiheadAttentionRPE': ((('rpe', 'k_proj'), _COUNTED),),  # HRFormer
    'CSA': ((('unfold', 'csa_group'),  # LVT
             Irreducible('it has no keys: each query predicts the weights of its neighbours')),),
    'CrossAttention': ((('q', 'kv', 'pool', 'sr'), _OWN_MAPS),),  # FeedFormer
    'LePEAttention': (
        (('get_v', 'H_sp', 'W_sp'), AttentionRule(Stripes('H_sp', 'W_sp'))),  # CSWin
        (('get_v', 'split_size', 'mode'), AttentionRule(OwnMaps())),  # GPViT
    ),
    'FullAttnModule': ((('k_proj', 'v_proj'),  # GPViT
                        Irreducible('its keys are group tokens, which lie on no grid')),),
    'LightGroupAttnBlock': ((('norm_query', 'attn'), _COUNTED),),  # GPViT
    'ChannelAttention': ((('qkv', 'proj'),  # DaViT
                          Irreducible('its keys are channels, not tokens')),),
    'SSA': ((('c_new', 'sr_ratio'), _MAP_ARGUMENTS),),  # ScalableViT
    'IWSA': ((('ws', 'lim_func'), AttentionRule(Window('ws'))),),  # ScalableViT
    'AttentionWithRelPos': ((('rel_pos', 'num_cls_tokens'),  # RegionViT
                             AttentionRule(Regions(), 'num_cls_tokens')),),
    'Attention2d': ((('qkv', 'out_dim'), AttentionRule(InputMap())),),  # RegionViT
    'PoolingAttention': ((('pool_ratios', 'kv'), AttentionRule(Pyramid('pool_ratios'))),),  # P2T
    'WindowAttention': (
        (('window_size', 'rel_pos_msg'), AttentionRule(Window(), 1)),  # MSG-Transformer
        # Swin, SwinV2; what is told the places of its tokens (GreenMIM) has left some out.
        (('window_size', 'mask', '!pos_idx'), AttentionRule(Window(shift='shift_size'))),
        (('window_size', 'qkv', '!mask', '!relative_position_bias_table'),  # DaViT
         AttentionRule(Window())),
    ),
    'ShiftWindowAttention': ((('window_size', 'shift_size'), _COUNTED),),  # DAT
    'LocalAttention': ((('window_size', 'proj_qkv'), AttentionRule(Window())),),  # DAT
    'DAttentionBaseline': ((('conv_offset', 'proj_k'),
                            AttentionRule(Patches('conv_offset'), queries=False)),),
    'PyramidAttention': ((('kv', 'sr_ratio'), _OWN_MAPS),),  # DAT
    'NeighborhoodAttention2D': ((('kernel_size', 'qkv'), _NEIGHBOURS),),
    'SlideAttention': ((('dep_conv', 'ka'), _NEIGHBOURS),),
    'FusedKQnA': ((('q_param', 'ksize'), _NEIGHBOURS),),
    'FactorAtt_ConvRelPosEnc': ((('crpe', 'qkv'), Irreducible(  # CoaT, MPViT
        'it sums up its keys before the queries see them, at a cost linear in them')),),
    'AttentionModule': ((('conv0', 'conv3'), _CONVOLUTION),),  # SegNeXt
}
"""By class name: attributes or arguments of the forward that must exist, or after ``!`` must not,
and the rule; the first that fits counts."""
