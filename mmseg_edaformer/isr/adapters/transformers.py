"""transformers."""
from ..grids import Arguments, OwnMaps, Patches, Window
from ..rules import AttentionRule, Irreducible, Rule


def _full(family: str, name: str) -> str:
    """The full name of a class of a family of models."""
    return f'transformers.models.{family}.modeling_{family}.{name}'


_QUERIES = Irreducible('its keys are the queries of the decoder, which lie on no grid')
_SAMPLED = Irreducible('deformable attention: its keys are a few points sampled for each query')
_TEXT = Irreducible('its keys are words or queries, which lie on no grid')

_SIZE = Arguments(('height', 'width'))
_PROJECTIONS = ('k_proj', 'v_proj')
_PATCHES = AttentionRule(Patches('embeddings.patch_embeddings.projection'), None,
                         projections=_PROJECTIONS)
_CONVOLUTION = AttentionRule(Patches('embeddings.patch_embeddings'), None)
_LEVELS = AttentionRule(Patches('pixel_level_module'))

RULES: dict[str, Rule] = {
    _full('segformer', 'SegformerAttention'): AttentionRule(_SIZE, projections=_PROJECTIONS),
    # A class token joins in the last stage, which nothing in the module tells.
    _full('pvt', 'PvtEfficientSelfAttention'):
        AttentionRule(_SIZE, (1,), projections=('key', 'value')),
    _full('pvt_v2', 'PvtV2SelfAttention'):
        AttentionRule(_SIZE, projections=('key', 'value')),
    _full('cvt', 'CvtSelfAttention'): AttentionRule(OwnMaps(), 'with_cls_token'),

    _full('vit', 'ViTAttention'): _PATCHES,
    _full('deit', 'DeiTAttention'): _PATCHES,
    _full('beit', 'BeitAttention'): _PATCHES,
    _full('dinov2', 'Dinov2Attention'): _PATCHES,
    _full('dinov2_with_registers', 'Dinov2WithRegistersAttention'): _PATCHES,
    _full('dinov3_vit', 'DINOv3ViTAttention'): _CONVOLUTION,
    _full('dpt', 'DPTSelfAttention'): AttentionRule(
        Patches('embeddings.patch_embeddings.projection|embeddings.projection'), None,
        projections=('key', 'value')),
    # In the last blocks queries stand in front of the other tokens.
    _full('eomt', 'EomtAttention'): _PATCHES,

    _full('swin', 'SwinAttention'): AttentionRule(Window(shift='shift_size'),
                                                  projections=_PROJECTIONS),
    _full('swinv2', 'Swinv2SelfAttention'): AttentionRule(Window(shift='shift_size')),
    'transformers.models.maskformer.modeling_maskformer_swin.MaskFormerSwinSelfAttention':
        AttentionRule(Window(shift='shift_size')),

    _full('maskformer', 'MaskFormerDetrCrossAttention'): _LEVELS,
    _full('maskformer', 'MaskFormerDetrSelfAttention'): _QUERIES,
    _full('mask2former', 'Mask2FormerMaskedAttentionDecoderLayer:cross_attn'): _LEVELS,
    _full('mask2former', 'Mask2FormerAttention'): _QUERIES,
    _full('mask2former', 'Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention'): _SAMPLED,
    _full('oneformer', 'OneFormerTransformerDecoderCrossAttentionLayer:multihead_attn'): _LEVELS,
    _full('oneformer', 'OneFormerTransformerDecoderQueryTransformerDecoderLayer:multihead_attn'):
        _LEVELS,
    _full('oneformer', 'OneFormerTransformerDecoderQueryTransformerDecoderLayer:self_attn'):
        _QUERIES,
    _full('oneformer', 'OneFormerAttention'): _QUERIES,
    _full('oneformer', 'OneFormerPixelDecoderEncoderMultiscaleDeformableAttention'): _SAMPLED,
    _full('oneformer', 'OneFormerTextTransformerLayer:self_attn'): _TEXT,
    _full('oneformer', 'OneFormerTextMapperAttention'): _TEXT,
}
