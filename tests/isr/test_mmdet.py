"""ISR on mmsegmentation's heads of queries, whose layers are those of mmdet."""
import copy

import pytest
import torch
from mmengine import ConfigDict
from mmseg.registry import MODELS

pytest.importorskip('mmdet', reason='this checks layers of mmdet')

from mmseg_edaformer.isr.registry import find_attention

from .check import check_adapter, check_report, lively, sizes

BACKBONES = {
    'resnet': dict(type='ResNet', depth=18, base_channels=16, stem_channels=16),
    'swin': dict(type='SwinTransformer', embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
                 out_indices=(0, 1, 2, 3)),
}
ATTENTION = dict(embed_dims=32, num_heads=4, batch_first=True)
FFN = dict(embed_dims=32, feedforward_channels=32, num_fcs=2, act_cfg=dict(type='ReLU'))
SINE = dict(num_feats=16, normalize=True)
LOSSES = dict(
    loss_cls=dict(type='mmdet.CrossEntropyLoss', class_weight=[1.] * 19 + [0.1]),
    loss_mask=dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True),
    loss_dice=dict(type='mmdet.DiceLoss', use_sigmoid=True, activate=True))


def decoder(num_layers):
    return dict(return_intermediate=True, num_layers=num_layers, layer_cfg=dict(
        self_attn_cfg=ATTENTION, cross_attn_cfg=ATTENTION, ffn_cfg=FFN))


MASK2FORMER = dict(
    type='Mask2FormerHead', strides=[4, 8, 16, 32], num_transformer_feat_level=3,
    enforce_decoder_input_project=False, positional_encoding=SINE, transformer_decoder=decoder(4),
    pixel_decoder=dict(
        type='mmdet.MSDeformAttnPixelDecoder', num_outs=3, norm_cfg=dict(type='GN', num_groups=4),
        act_cfg=dict(type='ReLU'), positional_encoding=SINE,
        encoder=dict(num_layers=1, layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=32, num_heads=4, num_levels=3, num_points=4,
                               batch_first=True), ffn_cfg=FFN))))
MASKFORMER = dict(
    type='MaskFormerHead', enforce_decoder_input_project=False, positional_encoding=SINE,
    transformer_decoder=decoder(2),
    pixel_decoder=dict(
        type='mmdet.TransformerEncoderPixelDecoder', norm_cfg=dict(type='GN', num_groups=4),
        act_cfg=dict(type='ReLU'), positional_encoding=SINE,
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=ATTENTION, ffn_cfg=FFN))))


class Whole(torch.nn.Module):
    """A segmentor that is given nothing but images."""

    def __init__(self, segmentor):
        super().__init__()
        self.segmentor = segmentor

    def forward(self, image):
        size = tuple(image.shape[2:])
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size)
        return self.segmentor.encode_decode(image, [meta] * len(image))


def segmentor(head, backbone):
    channels = [16, 32, 64, 128]
    head = dict(in_channels=channels, feat_channels=32, out_channels=32, num_classes=19,
                num_queries=9, **LOSSES, **head)
    return MODELS.build(ConfigDict(copy.deepcopy(dict(
        type='EncoderDecoder', backbone=BACKBONES[backbone], decode_head=head, train_cfg=dict(),
        test_cfg=dict(mode='whole')))))


@pytest.mark.parametrize('size', [(128, 192), (112, 200)], ids=str)
@pytest.mark.parametrize(('head', 'backbone', 'cross', 'rest'), [
    (MASK2FORMER, 'resnet', 4, 0), (MASK2FORMER, 'swin', 4, 4),
    (MASKFORMER, 'resnet', 2, 1)], ids=['mask2former', 'mask2former-swin', 'maskformer'])
def test_reduced_exactly(head, backbone, cross, rest, size):
    """MaskFormer's pixel decoder attends to itself first."""
    model = lively(Whole(segmentor(head, backbone)))
    check_adapter(model, torch.randn(2, 3, *size), [(7, 7), *sizes(*size)], expected=cross + rest,
                  decoder='cross_attn' * (head is MASK2FORMER), compiled=False,
                  pickled=False)
    assert not find_attention(model).unknown
    if head is MASK2FORMER:
        check_report(model.segmentor, (128, 192), cross, *[
            'its keys are the queries of the decoder, which lie on no grid'] * 4,
            'deformable attention')
