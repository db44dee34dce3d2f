"""timm, and mmseg's TIMMBackbone around it."""
from ..grids import Arguments, Patches, Window
from .rules import AttentionRule, Rule

RULES: dict[str, Rule] = {
    'timm.layers.attention.Attention': AttentionRule(Patches('patch_embed.proj'), None),
    'timm.models.swin_transformer.WindowAttention': AttentionRule(Window(shift='shift_size')),
    'timm.models.swin_transformer_v2.WindowAttention': AttentionRule(Window(shift='shift_size')),
    'timm.models.pvt_v2.Attention': AttentionRule(Arguments(('feat_size',))),
    'timm.models.mvitv2.MultiScaleAttention':
        AttentionRule(Arguments(('feat_size',)), 'has_cls_token'),
}
