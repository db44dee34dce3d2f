"""torchvision, and the encoder that segmentation-models-pytorch has of its own."""
from ..key_layout import Arguments, Patches, Window
from ..rules import AttentionRule, Irreducible, Rule

_MODELS = 'torchvision.models'
_VIDEO = Irreducible('its keys lie in a volume of several frames')

RULES: dict[str, Rule] = {
    f'{_MODELS}.vision_transformer.EncoderBlock:self_attention':
        AttentionRule(Patches('conv_proj'), 1),
    # and SwinV2's, which is a subclass
    f'{_MODELS}.swin_transformer.ShiftedWindowAttention':
        AttentionRule(Window(shift='shift_size')),
    f'{_MODELS}.maxvit.RelativePositionalMultiHeadAttention': AttentionRule(Window('size')),
    f'{_MODELS}.video.swin_transformer.ShiftedWindowAttention3d': _VIDEO,
    f'{_MODELS}.video.mvit.MultiscaleAttention': _VIDEO,
    'segmentation_models_pytorch.encoders.mix_transformer.Attention':
        AttentionRule(Arguments(('height', 'width')), projections=('kv',)),
}
