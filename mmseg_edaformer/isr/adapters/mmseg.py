"""mmsegmentation's own backbones and heads."""
from ..grids import Arguments, Patches, Window
from .rules import AttentionRule, Irreducible, Rule

_BACKBONES = 'mmseg.models.backbones'

RULES: dict[str, Rule] = {
    f'{_BACKBONES}.mit.EfficientMultiheadAttention': AttentionRule(Arguments(('hw_shape',))),
    f'{_BACKBONES}.twins.GlobalSubsampledAttention': AttentionRule(Arguments(('hw_shape',))),
    f'{_BACKBONES}.twins.LocallyGroupedSelfAttention': Irreducible(''),
    f'{_BACKBONES}.swin.WindowMSA': AttentionRule(Window(shift='shift_size')),
    f'{_BACKBONES}.beit.BEiTAttention': AttentionRule(Patches('patch_embed.projection'), None),
    'mmcv.cnn.bricks.transformer.MultiheadAttention':
        AttentionRule(Patches('patch_embed.projection'), None),
}
