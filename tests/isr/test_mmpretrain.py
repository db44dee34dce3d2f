"""ISR on mmpretrain's transformers."""
import math

import pytest
import torch

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')

from mmpretrain.models import backbones

from mmseg_edaformer.isr import report_isr

from .check import PLAIN, REDUCED, ROWS, awake, check_adapter, patches, reduced, row


def build(type, **config):
    """A backbone with random weights and layer scales of 1."""
    return awake(getattr(backbones, type)(**config))


def of(type, images, grids, expected=2, compiled=True, **config):
    """Tests of a backbone; one that asks for it is told the size of its image."""
    checks = {key: config.pop(key) for key in ('prefix', 'masked', 'irreducible') if key in config}

    def make(size, number):
        told = dict(img_size=size) if config.get('img_size', 0) is None else {}
        return build(type, **config | told)
    return row(make, images, grids, expected, name=type, compiled=compiled, **checks)


def vit(type, prefix, arch=None, **config):
    return of(type, PLAIN, patches, img_size=None, patch_size=16, out_type='featmap',
              arch=arch or ARCH, prefix=prefix, **config)


ARCH = dict(embed_dims=48, num_layers=2, num_heads=4, feedforward_channels=64)
SWIN = dict(embed_dims=24, depths=(2, 2, 1, 1), num_heads=(1, 2, 3, 4))
TWINS = dict(embed_dims=[8, 16, 32, 64], num_heads=[1, 2, 4, 8], patch_sizes=[4, 2, 2, 2],
             strides=[4, 2, 2, 2], mlp_ratios=[2, 2, 2, 2], depths=[1, 2, 2, 2],
             sr_ratios=[8, 4, 2, 1])
PADDED = [*REDUCED, (112, 136)]
CASES = [
    *vit('VisionTransformer', 1),
    *vit('VisionTransformer', 0, with_cls_token=False, compiled=False),
    *vit('DistilledVisionTransformer', 2, compiled=False), *vit('DeiT3', 1), *vit('BEiTViT', 1),
    *vit('ViTEVA02', 1, {**ARCH, 'embed_dims': 64}),
    *of('ViTSAM', PLAIN, lambda *size: [(4, 4), *patches(*size)], img_size=None, patch_size=16,
        out_channels=0, window_size=4, arch={**ARCH, 'global_attn_indexes': (1,)}),
    *of('DaViT', [(96, 96), (128, 160)], [(7, 7)], 5, compiled=False, pad_small_map=True,
        arch=dict(embed_dims=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
        irreducible='ChannelAttention: its keys are channels, not tokens'),
    *of('PCPVT', PADDED, reduced, 7, compiled=False, arch=TWINS, out_indices=(0, 1, 2, 3),
        norm_after_stage=False),
    # Windows of the first stage are full, padded on both sides, and on one side.
    *of('SVT', PADDED, lambda *size: [(7, 7), *reduced(*size)], 7, compiled=False, masked=-500,
        arch=dict(TWINS, window_sizes=[7, 7, 7, 7]), out_indices=(0, 1, 2, 3),
        norm_after_stage=False),
    *of('MViT', [(96, 96), (160, 96)], lambda *size: [
        tuple(math.ceil(side / 4 / stride) for side in size) for stride in (4, 2, 1)], 5,
        compiled=False, img_size=96, out_scales=(0, 1, 2, 3),
        arch=dict(embed_dims=16, num_layers=5, num_heads=1, downscale_indices=[1, 3, 4])),
    # Only its class attention has tokens for keys.
    *of('XCiT', PLAIN, patches, prefix=1, compiled=False, img_size=None, patch_size=16,
        embed_dims=48, depth=1, cls_attn_layers=2, num_heads=4),
    *of('SwinTransformer', [(112, 112), (104, 120)], 'window_size', 6, compiled=False, arch=SWIN,
        img_size=None, pad_small_map=True, window_size=7),
    *of('SwinTransformerV2', [(128, 128), (104, 120)], 'window_size', 6, img_size=None,
        arch=dict(SWIN, extra_norm_every_n_blocks=0), pad_small_map=True, window_size=8),
]


@pytest.mark.parametrize(ROWS, CASES)
def test_reduced_exactly(make, size, grids, checks):
    check_adapter(make(), torch.randn(1, 3, *size), grids, **checks)


@pytest.mark.parametrize('method', ['max', 'bipartite'])
def test_padding_of_twins(method):
    """Other methods than averages leave windows as they are where padding is masked."""
    arch = dict(embed_dims=[8] * 4, num_heads=[1] * 4, patch_sizes=[4, 2, 2, 2],
                strides=[4, 2, 2, 2], mlp_ratios=[2] * 4, depths=[2, 0, 0, 0],
                sr_ratios=[8, 4, 2, 1], window_sizes=[7] * 4)
    model = build('SVT', arch=arch, out_indices=(0,), norm_after_stage=False)
    report = report_isr(model, 2, (136, 200), method=method)
    assert set(report.untouched.values()) == {
        f'LocallyGroupedSelfAttention: {method} would mix tokens and the padding of a window'}
    assert not report_isr(model, 2, (112, 112), method=method).untouched
