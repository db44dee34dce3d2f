"""ISR on mmsegmentation's own transformers."""
import copy

import pytest
import torch
from mmengine import ConfigDict
from mmseg.models.decode_heads import san_head
from mmseg.registry import MODELS

from mmseg_edaformer.isr import report_isr

from .check import PLAIN, REDUCED, ROWS, check_adapter, lively, patches, reduced, row, sizes


def of(type, images, grids, expected, gpu=False, compiled=True, **config):
    """Tests of a backbone."""
    checks = {key: config.pop(key) for key in ('prefix', 'masked', 'queries') if key in config}

    def make(size, number):
        told = dict(img_size=size) if type == 'BEiT' else {}
        return MODELS.build(dict(copy.deepcopy(config), type=type, **told))
    return row(make, images, grids, expected, name=type, compiled=compiled, gpu=gpu, **checks)


VIT = dict(embed_dims=48, num_layers=2, num_heads=4)
TWINS = dict(in_channels=3, embed_dims=[8, 16, 32, 64], num_heads=[1, 2, 4, 8],
             patch_sizes=[4, 2, 2, 2], strides=[4, 2, 2, 2], mlp_ratios=[2, 2, 2, 2],
             sr_ratios=[8, 4, 2, 1], out_indices=(0, 1, 2, 3), norm_after_stage=False)
CASES = [
    *of('MixVisionTransformer', REDUCED, reduced, 4, gpu=True, queries=sizes,
        num_layers=[1, 1, 1, 1], sr_ratios=[8, 4, 2, 1], embed_dims=8, num_heads=[1, 2, 4, 8]),
    *of('SwinTransformer', [(112, 112), (100, 120)], [(7, 7)], 5, gpu=True, embed_dims=24,
        depths=[2, 1, 1, 1], num_heads=[1, 2, 3, 4]),
    *(test for token in (True, False) for test in of(
        'VisionTransformer', PLAIN, patches, 2, prefix=int(token), queries=patches, compiled=token,
        img_size=(64, 64), patch_size=16, with_cls_token=token, output_cls_token=False, **VIT)),
    *of('BEiT', PLAIN, patches, 2, prefix=1, queries=patches, **VIT),
    *of('PCPVT', REDUCED, reduced, 4, compiled=False, queries=sizes, depths=[1, 1, 1, 1], **TWINS),
    # Windows at the border are padded on both sides, which is masked, or on one, which is not.
    *of('SVT', [*REDUCED, (112, 136)], lambda *size: [(7, 7), *reduced(*size)], 6, masked=-500,
        queries=sizes, depths=[2, 1, 1, 2], windiow_sizes=[7, 7, 7, 7], **TWINS),
]


@pytest.mark.parametrize(ROWS, CASES)
def test_backbones(make, size, grids, checks, device):
    check_adapter(make(), torch.randn(2, 3, *size).to(device), grids, **checks)


@pytest.mark.parametrize('size', PLAIN, ids=str)
def test_segmenter(size):
    """Its decoder keeps a token for each class behind the patches."""
    model = lively(MODELS.build(dict(
        type='EncoderDecoder', train_cfg=dict(), test_cfg=dict(mode='whole'),
        backbone=dict(VIT, type='VisionTransformer', img_size=(64, 64), patch_size=16,
                      out_indices=(1,), with_cls_token=False),
        decode_head=dict(type='SegmenterMaskTransformerHead', in_channels=48, channels=48,
                         num_classes=7, num_layers=2, num_heads=4, embed_dims=48))))
    check_adapter(model, torch.randn(2, 3, *size), patches(*size),
                  suffix=lambda name: 7 * ('decode_head' in name), expected=4,
                  compiled=size == PLAIN[0], queries=patches(*size))
    report = report_isr(model, 2, (80, 112))
    assert [(stage.stage, stage.blocks, stage.keys) for stage in report.stages] == [
        ('encoder 1', 2, (35, 12)), ('decoder 1', 2, (35 + 7, 12 + 7))]


class SideAdapter(torch.nn.Module):
    """SAN's small transformer, without the features of CLIP that it can take in."""

    def __init__(self):
        super().__init__()
        self.network = san_head.SideAdapterNetwork(
            embed_dims=24, num_queries=5, fusion_index=[9],
            cfg_encoder=ConfigDict(num_encode_layer=2, num_heads=4, mlp_ratio=2),
            cfg_decoder=ConfigDict(num_heads=2, num_layers=1, embed_channels=8, mlp_channels=8,
                                   num_mlp=1, rescale=False))
        torch.nn.init.normal_(self.network.query_embed)

    def forward(self, image):
        return self.network.encode_feature(image, [None], [])[0]


@pytest.mark.parametrize('size', PLAIN, ids=str)
def test_side_adapter(size, monkeypatch):
    """Queries stand in front of the patches."""
    # The fork's class asks for an operator of mmcv that only its losses need.
    monkeypatch.setattr(san_head, 'point_sample', print, raising=False)
    check_adapter(SideAdapter(), torch.randn(2, 3, *size), patches(*size),
                  prefix=5, expected=2, compiled=False)
