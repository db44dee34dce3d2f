"""The ratio that follows the size of the image."""
import copy

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn

from mmseg_edaformer import EFT, apply_isr, isr, remove_isr, report_isr
from mmseg_edaformer.isr.apply import training_size
from mmseg_edaformer.models import EmbeddingFreeAttention
from tests.conftest import MINI, segmentor_config


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, EmbeddingFreeAttention)]


def keys(model):
    return {layer.isr_keys for layer in layers(model)}


@pytest.mark.parametrize(('size', 'ratio'), [
    ((64, 64), 1), ((33, 47), 1), ((32, 128), 1), ((64, 128), 1), ((128, 128), 2),
    ((256, 256), 4)])
@pytest.mark.gpu
@torch.no_grad()
def test_it_equals_the_ratio_that_the_size_asks_for(segmentor, size, ratio, device):
    image = torch.randn(1, 3, *size).to(device)
    segmentor.to(device)
    with isr(segmentor, ratio):
        expected = segmentor(image)
    state = copy.deepcopy(segmentor.state_dict())
    for _ in range(2):
        apply_isr(segmentor, 'auto')
        assert torch.equal(segmentor(image), expected)
    assert segmentor.state_dict().keys() == state.keys()
    remove_isr(segmentor)
    assert keys(segmentor) == {None}


@pytest.mark.parametrize('pool_ratio', [1, 4])
@pytest.mark.parametrize('crop', [(16, 16), (17, 30), (5, 9)])
def test_the_number_of_keys_stays_near_on_any_map(pool_ratio, crop):
    layer = EmbeddingFreeAttention(8, 2, pool_ratio)
    wanted = layer.num_keys(*crop)
    layer.isr_keys = wanted
    assert layer.num_keys(*crop) == wanted

    for height in (1, 9, 16, 31, 32, 33, 50, 101):
        for width in (2, 16, 31, 47, 64, 150):
            without = layer.num_keys(height, width, 1)
            m = layer.multiplier(height, width)
            # m is closer to the wanted number, by factor, than its neighbours.
            assert without <= wanted * m * (m + 1)
            assert m == 1 or without > wanted * m * (m - 1)
            # The cells of a thin map cannot grow beyond its side.
            if min(height, width) >= pool_ratio * m:
                assert min(without, wanted / 3) <= layer.num_keys(height, width) <= 2 * wanted


@pytest.mark.parametrize('crop', [(64, 64), (65, 100)])
def test_the_keys_of_training_are_those_of_a_forward_pass(segmentor, crop):
    apply_isr(segmentor, 'auto', crop_size=crop)
    sizes = {}
    for layer in layers(segmentor):
        layer.register_forward_pre_hook(
            lambda layer, args: sizes.update({layer: args[0].shape[2:]}))
    segmentor(torch.randn(1, 3, *crop))
    assert all(layer.num_keys(*size, multiplier=1) == layer.isr_keys
               for layer, size in sizes.items())
    assert len(sizes) == len(layers(segmentor))


def test_the_size_of_training(segmentor):
    assert training_size(segmentor) == (64, 64)
    assert training_size(nn.Sequential(segmentor)) == (64, 64)
    assert training_size(EFT(MINI)) == (512, 512)
    config = segmentor_config()
    config['data_preprocessor'].update(size=None, size_divisor=32)
    assert training_size(MODELS.build(config)) == (512, 512)
    apply_isr(segmentor, 'auto', crop_size=(128, 256))
    assert keys(segmentor) == {32}
    with isr(segmentor, 'auto'):
        assert keys(segmentor) == {4}
    assert keys(segmentor) == {32}


def test_the_cost_of_a_pixel_stays_flat(segmentor):
    """`tests/isr/test_docs.py` counts that of EDAFormer-T."""
    reports = {side: report_isr(segmentor, 'auto', (side, side)) for side in (64, 192, 256)}
    per_pixel = {side: report.macs[1] / side ** 2 for side, report in reports.items()}
    assert max(per_pixel.values()) < 1.05 * min(per_pixel.values())
    assert reports[64].macs[0] == reports[64].macs[1]
    assert reports[256].macs[1] == report_isr(segmentor, 4, (256, 256)).macs[1]
    assert {stage.keys for stage in reports[256].stages} == {(64, 4)}
    assert 'ISR auto on 256x256' in str(reports[256])
    assert keys(segmentor) == {None}


@pytest.mark.parametrize('dynamic', [None, True])
@torch.no_grad()
def test_compiled_attention_follows_the_size(segmentor, dynamic):
    layer = segmentor.backbone.stages[0].blocks[0].attn
    images = [torch.randn(1, 16, *size) for size in ((16, 16), (32, 32), (40, 24), (64, 64))]
    apply_isr(segmentor, 'auto')
    assert [layer.multiplier(*x.shape[2:]) for x in images] == [1, 2, 2, 4]
    expected = [layer(x) for x in images]
    compiled = torch.compile(layer, backend='eager', dynamic=dynamic)
    for x, output in zip(images, expected):
        torch.testing.assert_close(compiled(x), output, atol=1e-4, rtol=1e-4)
    remove_isr(segmentor)
    torch.testing.assert_close(compiled(images[1]), layer(images[1]), atol=1e-4, rtol=1e-4)
