"""mmsegmentation's own backbones and heads, and the networks that this package compares with."""
from ..key_layout import Arguments, OwnMaps, Patches, Window
from ..rules import AttentionRule, Irreducible, Rule
from .mmpretrain import MaskedWindow

_COMPARISON = 'mmseg_edaformer.models.comparison'
_BACKBONES = 'mmseg.models.backbones'
_QUERY_LAYERS = 'mmdet.models.layers.transformer'
_OWN_MAPS = AttentionRule(OwnMaps(), queries=False)
_SAMPLED = Irreducible('deformable attention: its keys are a few points sampled for each query')

RULES: dict[str, Rule] = {
    f'{_BACKBONES}.mit.EfficientMultiheadAttention': AttentionRule(Arguments(('hw_shape',))),
    f'{_BACKBONES}.twins.GlobalSubsampledAttention': AttentionRule(Arguments(('hw_shape',))),
    f'{_BACKBONES}.twins.LocallyGroupedSelfAttention': AttentionRule(MaskedWindow()),
    f'{_BACKBONES}.swin.WindowMSA': AttentionRule(Window(shift='shift_size'),
                                               projections=('qkv',)),
    f'{_BACKBONES}.beit.BEiTAttention': AttentionRule(
        Patches('patch_embed.projection'), ('cls_token',), projections=('qkv',)),
    # ViT, and SAN's side adapter, whose queries stand in front.
    'mmcv.cnn.bricks.transformer.MultiheadAttention':
        AttentionRule(Patches('patch_embed.projection'), ('cls_token', 'query_embed')),
    # Segmenter: a token for each class stands behind the patches.
    'mmseg.models.decode_heads.segmenter_mask_head.SegmenterMaskTransformerHead:layers.*.attn':
        AttentionRule(Patches('backbone'), suffix='num_classes'),
    # MaskFormer and Mask2Former, whose layers are mmdet's.
    f'{_QUERY_LAYERS}.detr_layers.DetrTransformerEncoderLayer:self_attn':
        AttentionRule(Patches('encoder_in_proj')),
    f'{_QUERY_LAYERS}.detr_layers.DetrTransformerDecoderLayer:cross_attn':
        AttentionRule(Patches('pixel_decoder'), queries=False),
    f'{_QUERY_LAYERS}.detr_layers.DetrTransformerDecoderLayer:self_attn':
        Irreducible('its keys are the queries of the decoder, which lie on no grid'),
    f'{_QUERY_LAYERS}.deformable_detr_layers.DeformableDetrTransformerEncoderLayer:self_attn':
        _SAMPLED,
    'mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttention': _SAMPLED,
    # EFT and EDAFormerHead need no rule: their attention has an isr_ratio of its own.
    f'{_COMPARISON}.lvt.RecursiveAtrousSelfAttention': _OWN_MAPS,
    f'{_COMPARISON}.lvt.ConvolutionalSelfAttention': Irreducible(
        'it attends within 3x3 windows, by weights that depend on the query alone'),
    f'{_COMPARISON}.feedformer_head.LowLevelCrossAttention': _OWN_MAPS,
}
