"""The dial on a model: what it changes, what it leaves, and that it can be undone."""
import copy

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmseg.models import SegTTAModel
from mmseg.registry import MODELS
from torch import nn

from mmseg_edaformer import EFT, ISRRatio, apply_isr, isr, remove_isr, report_isr
from mmseg_edaformer.cost import count_macs
from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.models import EmbeddingFreeAttention
from tests.conftest import MINI, segmentor_config


@pytest.fixture
def image():
    return torch.randn(2, 3, 128, 128)


def ratios(model):
    return [layer.isr_ratio for layer in model.modules()
            if isinstance(layer, EmbeddingFreeAttention)]


def test_stages_get_their_own_multiplier(segmentor):
    apply_isr(segmentor, '2311-456')
    assert [{block.attn.isr_ratio for block in stage.blocks}
            for stage in segmentor.backbone.stages] == [{2}, {3}, {1}, {1}]
    assert [{block.attn.isr_ratio for block in level}
            for level in segmentor.decode_head.levels] == [{4}, {5}, {6}]


@pytest.mark.gpu
@torch.no_grad()
def test_off_is_exact_and_twice_is_once(segmentor, image, device):
    segmentor, image = segmentor.to(device), image.to(device)
    before = segmentor(image)
    state = copy.deepcopy(segmentor.state_dict())
    apply_isr(segmentor, 2)
    once = segmentor(image)
    apply_isr(segmentor, 2)
    assert torch.equal(segmentor(image), once)
    assert not torch.equal(once, before)
    assert once.shape == before.shape
    after = segmentor.state_dict()
    assert all(torch.equal(state[name], after[name]) for name in after)
    assert state.keys() == after.keys()
    remove_isr(segmentor)
    assert torch.equal(segmentor(image), before)


def test_block_restores_what_was_there_also_after_an_error(segmentor):
    apply_isr(segmentor, '2211-222')
    outside = ratios(segmentor)
    with isr(segmentor, 3):
        assert set(ratios(segmentor)) == {3}
        with isr(segmentor, 'none'):
            assert set(ratios(segmentor)) == {1}
        assert set(ratios(segmentor)) == {3}
    assert ratios(segmentor) == outside
    with pytest.raises(ZeroDivisionError), isr(segmentor, 3):
        raise ZeroDivisionError
    assert ratios(segmentor) == outside


@pytest.mark.parametrize('ratio', ['22-222', '2211-22', 'nonsense', 0])
def test_a_ratio_that_does_not_fit_changes_nothing(segmentor, ratio):
    apply_isr(segmentor, 2)
    with pytest.raises(RatioError):
        apply_isr(segmentor, ratio)
    assert set(ratios(segmentor)) == {2}


def test_a_model_without_such_attention_is_told():
    with pytest.raises(RatioError, match=r'Conv2d holds no attention .* Found: no attention'):
        apply_isr(nn.Conv2d(3, 3, 1), 2)


def test_the_former_name_of_the_argument_is_refused(segmentor):
    for function in (apply_isr, isr, report_isr):
        with pytest.raises(TypeError, match=r"argument 'ratio': it is isr_ratio"):
            function(segmentor, ratio=2)
    with isr(segmentor, isr_ratio=2):
        assert set(ratios(segmentor)) == {2}
    assert report_isr(segmentor, isr_ratio=2).isr_ratio == ISRRatio.parse(2)


def test_an_encoder_alone(image):
    model = EFT(MINI)
    apply_isr(model, 'optimal')
    assert ratios(model) == [2, 2, 1, 1, 1]


@pytest.mark.parametrize('ratio', [2, 'auto'])
@pytest.mark.parametrize('backbone', [None, dict(
    type='MixVisionTransformer', embed_dims=16, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
    sr_ratios=[8, 4, 2, 1])], ids=['EFT', 'MiT'])
@torch.no_grad()
def test_wrapped_models(backbone, segmentor, image, tmp_path, ratio):
    if backbone is not None:
        segmentor = MODELS.build(dict(segmentor_config(), backbone=backbone)).eval()
    with isr(segmentor, ratio):
        expected = segmentor(image)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0,
                                         world_size=1)
    try:
        for wrapper in (MMDistributedDataParallel(segmentor), SegTTAModel(module=segmentor)):
            with isr(wrapper, ratio):
                assert torch.equal(segmentor(image), expected)
            assert set(ratios(segmentor)) == {1}
            assert report_isr(wrapper, ratio).macs == report_isr(segmentor, ratio).macs
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def test_a_compiled_model_never_uses_an_old_graph(segmentor, image):
    expected = {}
    for ratio in ('none', '2', 'optimal'):
        with isr(segmentor, ratio):
            expected[ratio] = segmentor(image)
    segmentor.backbone = torch.compile(segmentor.backbone, backend='eager')
    segmentor.decode_head.forward = torch.compile(segmentor.decode_head.forward,
                                                  backend='eager')
    for ratio in ('none', '2', 'optimal', 'none', '2'):
        apply_isr(segmentor, ratio)
        torch.testing.assert_close(segmentor(image), expected[ratio], atol=1e-5, rtol=1e-5)
    assert count_macs(segmentor) == report_isr(segmentor, '2').macs[1]


def test_report(segmentor):
    report = report_isr(segmentor, 'optimal', (128, 128))
    assert set(ratios(segmentor)) == {1}
    assert [(stage.stage, stage.blocks, stage.pool, stage.keys) for stage in report.stages] == [
        ('encoder 1', 1, (8, 16), (16, 4)), ('encoder 2', 1, (4, 8), (16, 4)),
        ('encoder 3', 2, (2, 2), (16, 16)), ('encoder 4', 1, (1, 1), (16, 16)),
        ('decoder 2', 1, (4, 8), (16, 4)), ('decoder 3', 2, (2, 4), (16, 4)),
        ('decoder 4', 3, (1, 2), (16, 4))]
    assert '8 -> 16' in str(report)
    assert 'GMACs' in str(report)


def test_report_counts_what_attention_saves(segmentor):
    """By hand: attention costs 2 N M C, the key projection M C C."""
    before, after = report_isr(segmentor, '1-2', (128, 128)).macs
    levels = ((16 * 16, 32, 1), (8 * 8, 64, 2), (4 * 4, 128, 3))
    keys_before, keys_after = 16, 4
    saved = sum(blocks * (2 * queries * channels + channels ** 2) * (keys_before - keys_after)
                for queries, channels, blocks in levels)
    assert before - after == saved
