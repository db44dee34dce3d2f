"""ISR on mmsegmentation's own transformers."""
import copy

import pytest
import torch
from mmengine import ConfigDict
from mmseg.models.decode_heads import san_head
from mmseg.registry import MODELS

from mmseg_edaformer.isr import report_isr

from .check import check_adapter, lively


def sizes(height, width, reductions=(1,), strides=(4, 8, 16, 32)):
    """Grids of the keys: the maps of each stage, reduced by strided convolutions that round down.

    Patch embeddings round up.
    """
    return [(-(-height // stride) // reduction, -(-width // stride) // reduction)
            for stride, reduction in zip(strides, reductions * len(strides))]


def shifted(name, ratio):
    """Windows of 7 that are shifted by 3 allow cells of 1, 2 and 4."""
    odd = int(name.split('.')[3]) % 2
    return 1 if odd and ratio == 3 else ratio


def patches(height, width):
    return [(height // 16, width // 16)]


def reduced(height, width):
    return sizes(height, width, (8, 4, 2, 1))


REDUCED = [(128, 192), (136, 200)]
PLAIN = [(96, 96), (80, 112)]
VIT = dict(embed_dims=48, num_layers=2, num_heads=4)
TWINS = dict(in_channels=3, embed_dims=[8, 16, 32, 64], num_heads=[1, 2, 4, 8],
             patch_sizes=[4, 2, 2, 2], strides=[4, 2, 2, 2], mlp_ratios=[2, 2, 2, 2],
             sr_ratios=[8, 4, 2, 1], out_indices=(0, 1, 2, 3), norm_after_stage=False)
MODEL_CASES = [
    (dict(type='MixVisionTransformer', num_layers=[1, 1, 2, 1], sr_ratios=[8, 4, 2, 1],
          embed_dims=8, num_heads=[1, 2, 4, 8]), REDUCED, reduced, dict(expected=5)),
    (dict(type='SwinTransformer', embed_dims=24, depths=[2, 2, 2, 1], num_heads=[1, 2, 3, 4]),
     [(112, 112), (100, 120)], lambda *_: [(7, 7)], dict(ratio_of=shifted, expected=7)),
    *((dict(VIT, type='VisionTransformer', img_size=(64, 64), patch_size=16,
            with_cls_token=token, output_cls_token=False), PLAIN, patches,
       dict(prefix=int(token), expected=2)) for token in (True, False)),
    *((dict(VIT, type='BEiT', img_size=size), [size], patches, dict(prefix=1, expected=2))
      for size in PLAIN),
    (dict(TWINS, type='PCPVT', depths=[1, 1, 1, 1]), REDUCED, reduced, dict(expected=4)),
    # Windows at the border are padded on both sides, which is masked, or on one, which is not.
    (dict(TWINS, type='SVT', depths=[2, 2, 2, 2], windiow_sizes=[7, 7, 7, 7]),
     [*REDUCED, (112, 136)], lambda *size: [(7, 7), *reduced(*size)],
     dict(expected=8, masked=-500)),
]


@pytest.mark.parametrize(('config', 'size', 'grids', 'checks'), [
    pytest.param(config, size, grids, checks, id=f'{config["type"]}-{size}', marks=[
        pytest.mark.gpu] * (config['type'] in ('MixVisionTransformer', 'SwinTransformer')))
    for config, shapes, grids, checks in MODEL_CASES for size in shapes])
def test_backbones(config, size, grids, checks, device):
    model = MODELS.build(copy.deepcopy(config))
    check_adapter(model, torch.randn(2, 3, *size).to(device), grids(*size), **checks)


def segmenter():
    return lively(MODELS.build(dict(
        type='EncoderDecoder', train_cfg=dict(), test_cfg=dict(mode='whole'),
        backbone=dict(VIT, type='VisionTransformer', img_size=(64, 64), patch_size=16,
                      out_indices=(1,), with_cls_token=False),
        decode_head=dict(type='SegmenterMaskTransformerHead', in_channels=48, channels=48,
                         num_classes=7, num_layers=2, num_heads=4, embed_dims=48))))


@pytest.mark.parametrize('size', PLAIN, ids=str)
def test_segmenter(size):
    """Its decoder keeps a token for each class behind the patches."""
    check_adapter(segmenter(), torch.randn(2, 3, *size), patches(*size),
                  suffix=lambda name: 7 * ('decode_head' in name), expected=4)


def test_segmenter_report():
    report = report_isr(segmenter(), 2, (80, 112))
    assert [(stage.stage, stage.blocks, stage.keys) for stage in report.stages] == [
        ('encoder 1', 2, (35, 12)), ('decoder 1', 2, (35 + 7, 12 + 7))]
    assert not report.untouched


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
