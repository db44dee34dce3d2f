"""mmsegmentation's own backbones and heads."""
from ..grids import Arguments, Patches, Window
from .mmpretrain import MaskedWindow
from .rules import AttentionRule, Rule

_BACKBONES = 'mmseg.models.backbones'

RULES: dict[str, Rule] = {
    f'{_BACKBONES}.mit.EfficientMultiheadAttention': AttentionRule(Arguments(('hw_shape',))),
    f'{_BACKBONES}.twins.GlobalSubsampledAttention': AttentionRule(Arguments(('hw_shape',))),
    f'{_BACKBONES}.twins.LocallyGroupedSelfAttention': AttentionRule(MaskedWindow()),
    f'{_BACKBONES}.swin.WindowMSA': AttentionRule(Window(shift='shift_size'),
                                               projections=('qkv',)),
    f'{_BACKBONES}.beit.BEiTAttention': AttentionRule(Patches('patch_embed.projection'), None),
    'mmcv.cnn.bricks.transformer.MultiheadAttention':
        AttentionRule(Patches('patch_embed.projection'), None),
}
