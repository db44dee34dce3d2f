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


def patches(height, width):
    return [(height // 16, width // 16)]


def reduced(height, width, strides=(4, 8, 16, 32), reductions=(8, 4, 2, 1)):
    return [(math.ceil(height / stride) // reduction, math.ceil(width / stride) // reduction)
            for stride, reduction in zip(strides, reductions)]


ARCH = dict(embed_dims=48, num_layers=2, num_heads=4, feedforward_channels=64)
SWIN = dict(embed_dims=24, depths=(2, 2, 1, 1), num_heads=(1, 2, 3, 4))
TWINS = dict(embed_dims=[8, 16, 32, 64], num_heads=[1, 2, 4, 8], patch_sizes=[4, 2, 2, 2],
             strides=[4, 2, 2, 2], mlp_ratios=[2, 2, 2, 2], depths=[1, 2, 2, 2],
             sr_ratios=[8, 4, 2, 1])
PLAIN, PADDED = [(96, 96), (80, 112)], [(128, 192), (136, 200), (112, 136)]
CASES = [
    *((dict(type=name, img_size=None, patch_size=16, out_type='featmap', arch=ARCH, **more), PLAIN,
       patches, dict(prefix=prefix, expected=2)) for name, prefix, more in (
        ('VisionTransformer', 1, {}), ('VisionTransformer', 0, dict(with_cls_token=False)),
        ('DistilledVisionTransformer', 2, {}), ('DeiT3', 1, {}), ('BEiTViT', 1, {}))),
    (dict(type='ViTEVA02', img_size=None, patch_size=16, out_type='featmap',
          arch={**ARCH, 'embed_dims': 64}), PLAIN, patches, dict(prefix=1, expected=2)),
    (dict(type='ViTSAM', img_size=None, patch_size=16, out_channels=0, window_size=4,
          arch={**ARCH, 'global_attn_indexes': (1,)}), PLAIN,
     lambda *size: [(4, 4), *patches(*size)], dict(expected=2)),
    (dict(type='DaViT', arch=dict(embed_dims=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
          pad_small_map=True), [(96, 96), (128, 160)], lambda *_: [(7, 7)],
     dict(expected=5, compiled=False)),
    (dict(type='PCPVT', arch=TWINS, out_indices=(0, 1, 2, 3), norm_after_stage=False), PADDED,
     reduced, dict(expected=7, compiled=False)),
    # Windows of the first stage are full, padded on both sides, and on one side.
    (dict(type='SVT', arch=dict(TWINS, window_sizes=[7, 7, 7, 7]), out_indices=(0, 1, 2, 3),
          norm_after_stage=False), PADDED, lambda *size: [(7, 7), *reduced(*size)],
     dict(expected=7, masked=-500)),
    (dict(type='MViT', arch=dict(embed_dims=16, num_layers=5, num_heads=1,
                                 downscale_indices=[1, 3, 4]),
          img_size=96, out_scales=(0, 1, 2, 3)), [(96, 96), (160, 96)],
     lambda *size: [tuple(math.ceil(side / 4 / stride) for side in size) for stride in (4, 2, 1)],
     dict(expected=5, compiled=False)),
    # Only its class attention has tokens for keys.
    (dict(type='XCiT', img_size=None, patch_size=16, embed_dims=48, depth=1, cls_attn_layers=2,
          num_heads=4), PLAIN, patches, dict(prefix=1, expected=2, compiled=False)),
]


@pytest.mark.parametrize(('config', 'size', 'grids', 'checks'), [
    pytest.param(config, size, grids, {'compiled': size == sizes[0], **checks},
                 id=f'{config["type"]}-{number}-{size}')
    for number, (config, sizes, grids, checks) in enumerate(CASES) for size in sizes])
def test_reduced_exactly(config, size, grids, checks):
    model = build(**config | (dict(img_size=size) if 'img_size' in config and
                              config['img_size'] is None else {}))
    check_adapter(model, image(*size), grids(*size), **checks)
    if config['type'] == 'DaViT':
        assert set(find_attention(model).irreducible.values()) == {
            'ChannelAttention: its keys are channels, not tokens'}


@pytest.mark.parametrize(('version', 'size'), [
    ('', (112, 112)), ('', (104, 120)), ('V2', (128, 128)), ('V2', (104, 120))])
def test_swin(version, size):
    side, extra = (8, dict(extra_norm_every_n_blocks=0)) if version else (7, {})
    model = build(f'SwinTransformer{version}', arch={**SWIN, **extra}, img_size=size,
                  pad_small_map=True, window_size=side)

    def ratio(name, asked):
        shift = model.get_submodule(name.rpartition('.')[0]).shift_size
        return 1 if shift and (side - shift) % asked else asked

    found = layers(model)
    check_adapter(model, image(*size), lambda name: [tuple(found[name].window_size)],
                  ratio_of=ratio, expected=6, compiled=size == (128, 128))


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
