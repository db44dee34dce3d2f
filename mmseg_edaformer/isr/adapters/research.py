"""Published research code, known by the names of its classes and the attributes they have.

Such code is copied from repository to repository, so where a class comes from says nothing.
"""
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..grids import Arguments, Call, GridSource, InputMap, OwnMaps, Patches, Window
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
    """Several maps behind each other: that of the arguments, pooled by each ratio (P2T)."""
    ratios: str

    def find(self, call: Call) -> list[Grid]:
        rows, columns = call.argument('H'), call.argument('W')
        return [(round(rows / ratio), round(columns / ratio))
                for ratio in getattr(call.module, self.ratios)]


@dataclass(frozen=True)
class Regions(GridSource):
    """Windows of RegionViT, of side ``kernel_size``, behind the token of their region.

    The same module is called without ``patch_attn`` for the tokens of all regions, which are few
    and stay. Padding is masked, also for the region's own token.
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


_MAP_ARGUMENTS = AttentionRule(Arguments(('H', 'W')))
_PATCHES = AttentionRule(Patches('patch_embed.proj'), None)
_NEIGHBOURS = Irreducible('its keys are the neighbours of each query, other ones for each')
_CONVOLUTION = Irreducible('it is a convolution, without keys')

RULES: dict[str, tuple[tuple[tuple[str, ...], Rule], ...]] = {
    'Attention': (
        (('rasa_cfg', 'kv'), AttentionRule(InputMap(channels_last=True))),  # LVT
        (('grid_size', 'head_dim', 'proj_norm'),  # HAT-Net
         AttentionRule(WindowThenMaps('grid_size'))),
        # DynamicViT, until it prunes: what is left then lies on no grid.
        (('softmax_with_policy', 'qkv'), AttentionRule(Patches('patch_embed.proj'), 1)),
        (('q', 'sr_ratio'), _MAP_ARGUMENTS),  # PVT, SegFormer, Shunted, CMT
        (('qkv', 'proj', 'num_heads'), _PATCHES),  # ViT, DeiT, U-ViT, ResFormer
    ),
    'CSA': ((('unfold', 'csa_group'),  # LVT
             Irreducible('it has no keys: each query predicts the weights of its neighbours')),),
    'CrossAttention': ((('q', 'kv', 'pool', 'sr'), AttentionRule(OwnMaps())),),  # FeedFormer
    'LePEAttention': (
        (('get_v', 'H_sp', 'W_sp'), AttentionRule(Stripes('H_sp', 'W_sp'))),  # CSWin
        (('get_v', 'split_size', 'mode'), AttentionRule(OwnMaps())),  # GPViT
    ),
    'LightAttModule': ((('k_proj',), AttentionRule(Patches('patch_embed.projection'))),),  # GPViT
    'FullAttnModule': ((('k_proj', 'v_proj'),  # GPViT
                        Irreducible('its keys are group tokens, which lie on no grid')),),
    'SSA': ((('c_new', 'sr_ratio'), _MAP_ARGUMENTS),),  # ScalableViT
    'IWSA': ((('ws', 'lim_func'), AttentionRule(Window('ws'))),),  # ScalableViT
    'AttentionWithRelPos': ((('rel_pos', 'num_cls_tokens'),  # RegionViT
                             AttentionRule(Regions(), 'num_cls_tokens')),),
    'Attention2d': ((('qkv', 'out_dim'), AttentionRule(InputMap())),),  # RegionViT
    'PoolingAttention': ((('pool_ratios', 'kv'), AttentionRule(Pyramid('pool_ratios'))),),  # P2T
    'WindowAttention': (
        (('window_size', 'rel_pos_msg'), AttentionRule(Window(), 1)),  # MSG-Transformer
        (('window_size', 'relative_position_bias_table'),  # Swin
         AttentionRule(Window(shift='shift_size'))),
    ),
    'ShiftWindowAttention': ((('window_size', 'shift_size'), Irreducible(  # DAT
        'it checks the number of its keys while it adds its mask')),),
    'LocalAttention': ((('window_size', 'proj_qkv'), AttentionRule(Window())),),  # DAT
    'DAttentionBaseline': ((('conv_offset', 'proj_k'), AttentionRule(Patches('conv_offset'))),),
    'PyramidAttention': ((('kv', 'sr_ratio'), AttentionRule(OwnMaps())),),  # DAT
    'NeighborhoodAttention2D': ((('kernel_size', 'qkv'), _NEIGHBOURS),),
    'SlideAttention': ((('dep_conv', 'ka'), _NEIGHBOURS),),
    'FusedKQnA': ((('q_param', 'ksize'), _NEIGHBOURS),),
    'FactorAtt_ConvRelPosEnc': ((('crpe', 'qkv'), Irreducible(  # CoaT, MPViT
        'it sums up its keys before the queries see them, at a cost linear in them')),),
    'AttentionModule': ((('conv0', 'conv3'), _CONVOLUTION),),  # SegNeXt
}
"""For each class the attributes that must be there, and the rule; the first that fits counts."""


LIBRARIES = {'mmcv', 'mmdet', 'mmpretrain', 'mmseg', 'segmentation_models_pytorch', 'timm', 'torch',
             'torchvision', 'transformers'}
"""They have tables of their own; what is not there must not be guessed by its name."""


def find(module: nn.Module) -> Rule | None:
    """The rule for a module, if it is one of these."""
    for cls in type(module).__mro__:
        if cls.__module__.partition('.')[0] in LIBRARIES:
            continue
        for attributes, rule in RULES.get(cls.__name__, ()):
            if all(hasattr(module, name) for name in attributes) and _takes(module, rule):
                return rule
    return None


def _takes(module: nn.Module, rule: Rule) -> bool:
    """Whether the arguments that the rule reads are arguments of the module's forward."""
    grid = rule.grid if isinstance(rule, AttentionRule) else None
    names = grid.names if isinstance(grid, Arguments) else ()
    original = getattr(type(module), 'isr_original', type(module))
    return set(names) <= inspect.signature(original.forward).parameters.keys()
