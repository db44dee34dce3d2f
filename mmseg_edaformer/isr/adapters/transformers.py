"""transformers."""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..key_layout import Arguments, Call, InputMap, OwnMaps, Patches, Unfolded, Unrolled, Window
from ..pooling import Grid
from ..rules import AttentionRule, Irreducible, Rule


@dataclass(frozen=True)
class Hiera(Unrolled):
    """Tokens sorted by Hiera, whose encoder knows how."""
    path: str = 'encoder'

    def sorting(self, call: Call) -> tuple[Sequence[int], list[Grid]]:
        encoder: Any = call.owners[self.path]
        blocks, size = encoder.schedule[0]
        return size, blocks


def _full(family: str, name: str) -> str:
    """The full name of a class of a family of models."""
    return f'transformers.models.{family}.modeling_{family}.{name}'


_QUERIES = Irreducible('its keys are the queries of the decoder, which lie on no grid')
_SAMPLED = Irreducible('deformable attention: its keys are a few points sampled for each query')
_LINEAR = Irreducible('it sums up its keys before the queries see them, at a cost linear in them')
_TEXT = Irreducible('its keys are words or queries, which lie on no grid')

_SIZE = Arguments(('height', 'width'))
_PROJECTIONS = ('k_proj', 'v_proj')
_KEY_VALUE = ('key', 'value')
_LEVELS = AttentionRule(Patches('pixel_level_module'), queries=False)
_SHIFTED = AttentionRule(Window(shift='shift_size'))
_MAP = AttentionRule(InputMap(channels_last=True))


def _patches(*prefix: str, path: str = 'patch_embeddings.projection',
             projections: tuple[str, ...] = _PROJECTIONS, suffix: str | int = 0) -> AttentionRule:
    """Patches behind tokens that the embeddings hold, named from the patches outward."""
    return AttentionRule(Patches(f'embeddings.{path}'),
                         tuple(f'embeddings.{name}' for name in prefix), suffix, projections)


_CLASS = _patches('cls_token')
_CLIP = _patches('class_embedding', path='patch_embedding')
_REGISTERS = 'register_tokens', 'cls_token'
_FEATURES = AttentionRule(Patches('input_projection'))
_CROSS = replace(_FEATURES, queries=False)

RULES: dict[str, Rule] = {
    _full('segformer', 'SegformerAttention'): AttentionRule(_SIZE, projections=_PROJECTIONS),
    # A class token joins in the last stage, which nothing in the module tells.
    _full('pvt', 'PvtEfficientSelfAttention'): AttentionRule(_SIZE, (1,), projections=_KEY_VALUE),
    _full('pvt_v2', 'PvtV2SelfAttention'): AttentionRule(_SIZE, projections=_KEY_VALUE),
    _full('glpn', 'GLPNEfficientSelfAttention'): AttentionRule(_SIZE, projections=_KEY_VALUE),
    _full('cvt', 'CvtSelfAttention'): AttentionRule(OwnMaps(), 'with_cls_token'),

    **dict.fromkeys((
        _full('vit', 'ViTAttention'),
        _full('vit_msn', 'ViTMSNAttention'),
        _full('beit', 'BeitAttention'),
        _full('dinov2', 'Dinov2Attention'),
        _full('internvl', 'InternVLVisionAttention'),
        _full('pixio', 'PixioAttention'),
    ), _CLASS),
    **dict.fromkeys((
        _full('flava', 'FlavaSelfAttention'),
        'transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionSelfAttention',
    ), _patches('cls_token', projections=_KEY_VALUE)),
    _full('yolos', 'YolosSelfAttention'):
        _patches('cls_token', projections=_KEY_VALUE, suffix='embeddings.detection_tokens'),
    _full('deit', 'DeiTAttention'): _patches('distillation_token', 'cls_token'),
    _full('ijepa', 'IJepaAttention'): _patches(),
    _full('vitpose_backbone', 'VitPoseBackboneSelfAttention'): _patches(projections=_KEY_VALUE),
    _full('mgp_str', 'MgpstrAttention'): _patches('cls_token', path='proj', projections=()),
    _full('dinov2_with_registers', 'Dinov2WithRegistersAttention'): _patches(*_REGISTERS),
    _full('tipsv2', 'Tipsv2VisionAttention'): _patches(*_REGISTERS),
    # Keys are rotated.
    _full('dinov3_vit', 'DINOv3ViTAttention'):
        _patches(*_REGISTERS, path='patch_embeddings', projections=()),
    _full('sapiens2', 'Sapiens2Attention'):
        _patches(*_REGISTERS, path='patch_embeddings', projections=()),
    _full('dpt', 'DPTSelfAttention'): AttentionRule(
        Patches('embeddings.patch_embeddings.projection|embeddings.projection'),
        ('embeddings.cls_token',), projections=_KEY_VALUE),
    # In the last blocks queries stand in front of the other tokens.
    _full('eomt', 'EomtAttention'): AttentionRule(
        Patches('embeddings.patch_embeddings.projection'),
        ('embeddings.register_tokens', 'embeddings.cls_token', 'query.weight'),
        projections=_PROJECTIONS),
    _full('eomt_dinov3', 'EomtDinov3Attention'): AttentionRule(
        Patches('embeddings.patch_embeddings'),
        ('embeddings.register_tokens', 'embeddings.cls_token', 'query.weight')),

    **dict.fromkeys((f'{_full(family, name)}TextModel:encoder.layers.*.self_attn'
                     for family, name in (('clip', 'CLIP'), ('clipseg', 'CLIPSeg'),
                                          ('metaclip_2', 'MetaClip2'), ('siglip', 'Siglip'))),
                    _TEXT),
    **dict.fromkeys((f'{_full(family, name)}TextTransformer:encoder.layers.*.self_attn'
                     for family, name in (('owlvit', 'OwlViT'), ('owlv2', 'Owlv2'))), _TEXT),
    _full('aimv2', 'Aimv2TextModel:encoder.layers.*.attention'): _TEXT,
    **dict.fromkeys((
        _full('altclip', 'AltCLIPAttention'),
        _full('chinese_clip', 'ChineseCLIPVisionAttention'),
        _full('clip', 'CLIPAttention'),
        _full('clipseg', 'CLIPSegAttention'),
        _full('git', 'GitVisionAttention'),
        _full('metaclip_2', 'MetaClip2Attention'),
        _full('owlvit', 'OwlViTAttention'),
        _full('owlv2', 'Owlv2Attention'),
    ), _CLIP),
    **dict.fromkeys((  # one layer makes queries, keys and values, and MLCD rotates keys
        _full('blip', 'BlipAttention'),
        _full('blip_2', 'Blip2Attention'),
        _full('instructblip', 'InstructBlipAttention'),
        _full('mlcd', 'MLCDAttention'),
    ), _patches('class_embedding', path='patch_embedding', projections=())),
    _full('siglip', 'SiglipAttention'): _patches(path='patch_embedding'),
    _full('siglip', 'SiglipMultiheadAttentionPoolingHead:attention'):
        AttentionRule(Patches('embeddings.patch_embedding'), queries=False),
    _full('janus', 'JanusVisionAttention'): _patches(path='patch_embedding', projections=()),
    _full('aimv2', 'Aimv2Attention'): _patches(path='patch_embed'),
    _full('aimv2', 'Aimv2AttentionPoolingHead'):
        replace(_patches(path='patch_embed'), queries=False),

    **dict.fromkeys((
        _full('sam', 'SamVisionAttention'),
        _full('sam2', 'Sam2MultiScaleAttention'),
        _full('sam3', 'Sam3ViTRoPEAttention'),
        _full('sam_hq', 'SamHQVisionAttention'),
        _full('vitdet', 'VitDetAttention'),
    ), _MAP),
    _full('hiera', 'HieraMaskUnitAttention'): AttentionRule(Hiera()),
    _full('mobilevit', 'MobileViTSelfAttention'):
        AttentionRule(Unfolded('conv_1x1', 'patch_width'), projections=_KEY_VALUE),
    _full('mobilevitv2', 'MobileViTV2LinearSelfAttention'): _LINEAR,
    _full('swiftformer', 'SwiftFormerEfficientAdditiveAttention'): _LINEAR,
    _full('vit_mae', 'ViTMAEAttention'):
        Irreducible('its keys are some of the patches, shuffled'),

    _full('swin', 'SwinAttention'): AttentionRule(Window(shift='shift_size'),
                                                  projections=_PROJECTIONS),
    **dict.fromkeys((
        _full('swin2sr', 'Swin2SRSelfAttention'),
        _full('swinv2', 'Swinv2SelfAttention'),
        'transformers.models.donut.modeling_donut_swin.DonutSwinSelfAttention',
        'transformers.models.maskformer.modeling_maskformer_swin.MaskFormerSwinSelfAttention',
    ), _SHIFTED),

    **dict.fromkeys((
        _full('conditional_detr', 'ConditionalDetrEncoderLayer:self_attn'),
        _full('dab_detr', 'DabDetrEncoderLayer:self_attn'),
        _full('detr', 'DetrEncoderLayer:self_attn'),
    ), _FEATURES),
    **dict.fromkeys((
        _full('conditional_detr', 'ConditionalDetrDecoderLayer:encoder_attn'),
        _full('dab_detr', 'DabDetrDecoderLayerCrossAttention:cross_attn'),
        _full('detr', 'DetrDecoderLayer:encoder_attn'),
    ), _CROSS),
    **dict.fromkeys((
        _full('conditional_detr', 'ConditionalDetrDecoderLayer:self_attn'),
        _full('dab_detr', 'DabDetrDecoderLayerSelfAttention:self_attn'),
        _full('detr', 'DetrDecoderLayer:self_attn'),
    ), _QUERIES),

    _full('table_transformer', 'TableTransformerAttention'):
        Irreducible('it checks the number of its keys'),

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
