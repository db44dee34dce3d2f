"""ISR on mmpretrain's transformers."""
import math

import pytest
import torch

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')

from mmpretrain.models import backbones

from mmseg_edaformer.isr import report_isr
from mmseg_edaformer.isr.registry import find_attention

from .check import check_adapter, layers


def build(type, **config):
    """A backbone with random weights and layer scales of 1."""
    model = getattr(backbones, type)(**config)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
    for key, parameter in model.named_parameters():
        if 'gamma' in key:
            torch.nn.init.ones_(parameter)
    return model


def image(*size):
    return torch.randn(1, 3, *size)


ARCH = dict(embed_dims=48, num_layers=2, num_heads=4, feedforward_channels=64)
SIZES = pytest.mark.parametrize('size', [(96, 96), (80, 112)], ids=str)


@SIZES
@pytest.mark.parametrize(('config', 'prefix'), [
    (dict(type='VisionTransformer', arch=ARCH), 1),
    (dict(type='VisionTransformer', arch=ARCH, with_cls_token=False), 0),
    (dict(type='DistilledVisionTransformer', arch=ARCH), 2),
    (dict(type='DeiT3', arch=ARCH), 1),
    (dict(type='BEiTViT', arch=ARCH), 1),
    (dict(type='ViTEVA02', arch={**ARCH, 'embed_dims': 64}), 1),
    (dict(type='ViTSAM', arch={**ARCH, 'global_attn_indexes': (1,)}, window_size=4,
          out_channels=0), 0),
], ids=lambda value: value['type'] if isinstance(value, dict) else str(value))
def test_vit(config, prefix, size):
    model = build(img_size=size, patch_size=16, **{'out_type': 'featmap', **config} if
                  config['type'] != 'ViTSAM' else config)
    grid = size[0] // 16, size[1] // 16
    grids = [(4, 4), grid] if config['type'] == 'ViTSAM' else [grid]
    check_adapter(model, image(*size), grids, prefix=prefix, expected=2,
                  compiled=size[0] == size[1])


SWIN = dict(embed_dims=24, depths=(2, 2, 1, 1), num_heads=(1, 2, 3, 4))


@pytest.mark.parametrize(('config', 'size'), [
    (dict(type='SwinTransformer', pad_small_map=True, window_size=7), (112, 112)),
    (dict(type='SwinTransformer', pad_small_map=True, window_size=7), (104, 120)),
    (dict(type='SwinTransformerV2', pad_small_map=True, window_size=8), (128, 128)),
    (dict(type='SwinTransformerV2', pad_small_map=True, window_size=8), (104, 120)),
], ids=str)
def test_swin(config, size):
    extra = {} if config['type'] == 'SwinTransformer' else dict(extra_norm_every_n_blocks=0)
    model = build(arch={**SWIN, **extra}, img_size=size, **config)
    side = config['window_size']

    def ratio(name, asked):
        shift = model.get_submodule(name.rpartition('.')[0]).shift_size
        return 1 if shift and (side - shift) % asked else asked

    found = layers(model)
    check_adapter(model, image(*size), lambda name: [tuple(found[name].window_size)],
                  ratio_of=ratio, expected=6, compiled=size == (128, 128))


@pytest.mark.parametrize('size', [(96, 96), (128, 160)], ids=str)
def test_davit(size):
    model = build(type='DaViT', arch=dict(embed_dims=24, depths=(1, 1, 2, 1),
                                          num_heads=(1, 2, 4, 8)),
                  pad_small_map=True)
    check_adapter(model, image(*size), [(7, 7)], expected=5, compiled=False)
    reasons = set(find_attention(model).irreducible.values())
    assert reasons == {'ChannelAttention: its keys are channels, not tokens'}


@pytest.mark.parametrize('size', [(128, 192), (136, 200), (112, 136)], ids=str)
@pytest.mark.parametrize('kind', ['PCPVT', 'SVT'])
def test_twins(kind, size):
    """Windows of the first stage are full, padded on both sides, and on one side."""
    sr_ratios = [8, 4, 2, 1]
    arch = dict(embed_dims=[8, 16, 32, 64], num_heads=[1, 2, 4, 8], patch_sizes=[4, 2, 2, 2],
                strides=[4, 2, 2, 2], mlp_ratios=[2, 2, 2, 2], depths=[1, 2, 2, 2],
                sr_ratios=sr_ratios)
    if kind == 'SVT':
        arch['window_sizes'] = [7, 7, 7, 7]
    model = build(kind, arch=arch, out_indices=(0, 1, 2, 3), norm_after_stage=False)
    grids = [(7, 7)] * (kind == 'SVT') + [
        tuple(math.ceil(side / stride) // reduction for side in size)
        for stride, reduction in zip((4, 8, 16, 32), sr_ratios)]
    check_adapter(model, image(*size), grids, expected=7, compiled=kind == 'SVT' and size[0] == 136,
                  masked=-500 if kind == 'SVT' else None)


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


@pytest.mark.parametrize('size', [(96, 96), (160, 96)], ids=str)
def test_mvit(size):
    model = build(type='MViT', arch=dict(embed_dims=16, num_layers=5, num_heads=1,
                                         downscale_indices=[1, 3, 4]),
                  img_size=96, out_scales=(0, 1, 2, 3))
    grids = [tuple(math.ceil(side / 4 / stride) for side in size) for stride in (4, 2, 1)]
    check_adapter(model, image(*size), grids, expected=5, compiled=False)


@SIZES
def test_xcit(size):
    """Only its class attention has tokens for keys."""
    model = build('XCiT', img_size=size, patch_size=16, embed_dims=48, depth=1, cls_attn_layers=2,
                  num_heads=4)
    check_adapter(model, image(*size), [(size[0] // 16, size[1] // 16)], prefix=1, expected=2,
                  compiled=False)
