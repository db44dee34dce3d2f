"""ISR on Segmenter, whose decoder keeps a token for each class behind the patches."""
import pytest
import torch
from mmseg.registry import MODELS

from mmseg_edaformer.isr import report_isr

from .check import check_adapter, lively


def segmenter():
    return lively(MODELS.build(dict(
        type='EncoderDecoder', train_cfg=dict(), test_cfg=dict(mode='whole'),
        backbone=dict(type='VisionTransformer', embed_dims=48, num_layers=2, num_heads=4,
                      img_size=(64, 64), patch_size=16, out_indices=(1,), with_cls_token=False),
        decode_head=dict(type='SegmenterMaskTransformerHead', in_channels=48, channels=48,
                         num_classes=7, num_layers=2, num_heads=4, embed_dims=48))))


@pytest.mark.parametrize('size', [(96, 96), (80, 112)], ids=str)
def test_segmenter(size):
    check_adapter(segmenter(), torch.randn(2, 3, *size), [(size[0] // 16, size[1] // 16)],
                  suffix=lambda name: 7 * ('decode_head' in name), expected=4)


def test_report():
    report = report_isr(segmenter(), 2, (80, 112))
    assert [(stage.stage, stage.blocks, stage.keys) for stage in report.stages] == [
        ('encoder 1', 2, (35, 12)), ('decoder 1', 2, (35 + 7, 12 + 7))]
    assert not report.untouched
