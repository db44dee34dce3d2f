"""The networks against outputs of the released implementation and against the plain one."""
import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmseg_edaformer import EFT, EDAFormerHead, apply_isr
from mmseg_edaformer.cost import count_macs
from mmseg_edaformer.engine.convert import convert_state_dict
from mmseg_edaformer.isr import ISRRatio
from tests import plain

GOLDEN = Path(__file__).parents[1] / 'golden'
META = json.loads((GOLDEN / 'edaformer_mini.json').read_text())
DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)


def assert_near(found, expected, device):
    """Compare with float32 values by their standard deviation; a GPU adds in another order."""
    if found.dtype == torch.bfloat16:
        tolerance = 0.14  # twice what a CPU shows
    else:
        tolerance = 1e-3 if device.type == 'cuda' else 1e-4
    error = (found.float() - expected).abs().max() / expected.std()
    assert error < tolerance


class EDAFormer(torch.nn.Module):
    """Encoder and decoder without mmseg's segmentor around them."""

    def __init__(self, backbone, decode_head):
        super().__init__()
        self.backbone, self.decode_head = backbone, decode_head

    def forward(self, x):
        return self.decode_head(self.backbone(x))


def build(size, num_classes=150):
    backbone = EFT(size)
    channels, ratio = {'tiny': (128, 2), 'base': (768, 1)}[size]
    return EDAFormer(backbone, EDAFormerHead(backbone.embed_dims[1:], channels,
                                             num_classes=num_classes, ffn_ratios=ratio))


@pytest.fixture(scope='module')
def golden():
    return load_file(GOLDEN / 'edaformer_mini_outputs.safetensors')


@pytest.fixture(scope='module')
def mini():
    sizes = META['model']
    model = EDAFormer(
        EFT(dict(embed_dims=sizes['embed_dims'], depths=sizes['depths'],
                 num_heads=sizes['num_heads'], ffn_ratios=sizes['mlp_ratios'])),
        EDAFormerHead(sizes['embed_dims'][1:], sizes['decoder_channels'],
                      num_classes=sizes['num_classes'], ffn_ratios=sizes['decoder_mlp_ratio']))
    weights = load_file(GOLDEN / 'edaformer_mini_weights.safetensors')
    model.load_state_dict(convert_state_dict(weights).state_dict)
    return model.eval()


@pytest.mark.gpu
@pytest.mark.parametrize('case', META['cases'], ids=lambda case: f"case{case['case']}")
@DTYPES
def test_logits_and_maps_are_the_released_ones(mini, golden, case, dtype, device):
    name = f"case{case['case']}"
    model = copy.deepcopy(mini).to(device, dtype)
    apply_isr(model, ISRRatio(tuple(case['encoder']), tuple(case['decoder'])))
    with torch.no_grad():
        maps = model.backbone(golden[f'{name}.input'].to(device, dtype))
        logits = model.decode_head(maps)
    expected = golden[f'{name}.logits'].to(device)
    assert logits.shape == expected.shape
    assert_near(logits, expected, device)
    stages = [key for key in golden if key.startswith(f'{name}.stage')]
    assert len(stages) == (4 if case['case'] < 2 else 0)
    for key in stages:
        assert_near(maps[int(key[-1]) - 1], golden[key].to(device), device)


@pytest.mark.gpu
@pytest.mark.parametrize('size', ['tiny', 'base'])
@pytest.mark.parametrize('ratio', ['none', 'optimal', '3,3,2,2-2,3,4'])
@DTYPES
def test_fast_equals_plain(size, ratio, dtype, device):
    oracle = plain.build(size, num_classes=19).eval()
    model = build(size, num_classes=19).eval()
    model.load_state_dict(convert_state_dict(oracle.state_dict()).state_dict)
    oracle, model = oracle.to(device), model.to(device, dtype)
    parsed = ISRRatio.parse(ratio)
    apply_isr(model, parsed)
    oracle.set_isr(parsed.for_stages('encoder', 4), parsed.for_stages('decoder', 3))
    x = torch.randn(2, 3, 72, 136).to(device)
    with torch.no_grad():
        expected, found = oracle(x), model(x.to(dtype))
    assert_near(found, expected, device)


@pytest.mark.parametrize(('size', 'parameters'), [('tiny', 4_929_914), ('base', 29_438_166)])
def test_parameters_are_the_released_ones(size, parameters):
    assert sum(p.numel() for p in build(size).parameters()) == parameters


@pytest.mark.parametrize(('size', 'published'), [('tiny', (5.65, 4.72, 4.11)),
                                             ('base', (31.98, 29.43, 26.63))])
def test_cost_is_the_published_one(size, published):
    """The plain network costs what the release does; fusing before resizing saves a known part."""
    oracle, model = plain.build(size), build(size)
    dims, channels = model.backbone.embed_dims[1:], model.decode_head.channels
    # A level of stride 8, 16, 32 is fused at its own size instead of at stride 8.
    saved = channels * sum(dim * (64 ** 2 - (64 >> i) ** 2) for i, dim in enumerate(dims))
    for ratio, gmacs in zip(('none', 'optimal', '2222-222'), published):
        parsed = ISRRatio.parse(ratio)
        oracle.set_isr(parsed.for_stages('encoder', 4), parsed.for_stages('decoder', 3))
        apply_isr(model, parsed)
        cost = count_macs(oracle)
        assert cost / 1e9 == pytest.approx(gmacs, rel=0.02)
        assert count_macs(model) == cost - saved
