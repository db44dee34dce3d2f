"""The dial on a model: what it changes, what it leaves, what it refuses, and how to undo it."""
import copy
import warnings

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmseg.models import SegTTAModel
from mmseg.registry import MODELS
from torch import nn

from mmseg_edaformer import ISRRatio, apply_isr, isr, register_isr, remove_isr, report_isr
from mmseg_edaformer.cost import count_macs
from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import Window
from mmseg_edaformer.isr.registry import find_attention
from tests.conftest import segmentor_config

MIT = dict(type='MixVisionTransformer', embed_dims=8, num_layers=[1, 1, 2, 1],
           num_heads=[1, 2, 4, 8], sr_ratios=[8, 4, 2, 1])


@pytest.fixture
def image():
    return torch.randn(2, 3, 128, 128)


@pytest.fixture
def mit():
    return MODELS.build(MIT).eval()


@pytest.fixture(params=['segmentor', 'mit'])
def either(request):
    """A model of this package, and one of another library."""
    return request.getfixturevalue(request.param)


def ratios(model):
    """The multipliers of each stage."""
    return [{layer.setting.isr_ratio for layer in layers}
            for part in find_attention(model).parts for layers in part.stages.values()]


def test_a_block_restores_the_ratio_of_each_stage_also_after_an_error(either):
    """MiT has no decoder, whose part of the ratio is ignored."""
    outside = [{2}, {3}, {1}, {1}, {4}, {5}, {6}][:len(ratios(either))]
    apply_isr(either, '2311-456')
    with isr(either, 3):
        assert ratios(either) == [{3}] * len(outside)
        assert 'isr_ratio=3' in repr(either)
        with isr(either, 'none'):
            assert ratios(either) == [{1}] * len(outside)
        assert ratios(either) == [{3}] * len(outside)
    assert ratios(either) == outside
    with pytest.raises(ZeroDivisionError), isr(either, 4):
        raise ZeroDivisionError
    assert ratios(either) == outside
    remove_isr(either)
    assert ratios(either) == [{1}] * len(outside)


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


@pytest.mark.parametrize('ratio', ['22-222', '2211-22', 'nonsense', 0])
def test_a_ratio_that_does_not_fit_changes_nothing(segmentor, ratio):
    apply_isr(segmentor, 2)
    with pytest.raises(RatioError):
        apply_isr(segmentor, ratio)
    assert ratios(segmentor) == [{2}] * 7


def test_a_ratio_for_other_stages_lists_what_was_found(mit):
    with pytest.raises(RatioError, match=r'3 multipliers for the encoder, which has 4 stages.*'
                       r'Found: encoder stage 1: 1 x EfficientMultiheadAttention; .* stage 3: 2 x'):
        apply_isr(mit, '222-2')
    with pytest.raises(RatioError, match=r'Conv2d holds no attention .* Found: no attention'):
        apply_isr(nn.Conv2d(3, 3, 1), 2)
    assert not any('isr_reduction' in vars(module) for module in mit.modules())


def test_the_former_name_of_the_argument_is_refused(segmentor):
    for function in (apply_isr, isr, report_isr):
        with pytest.raises(TypeError, match=r"argument 'ratio': it is isr_ratio"):
            function(segmentor, ratio=2)
    with isr(segmentor, isr_ratio=2):
        assert ratios(segmentor) == [{2}] * 7
    assert report_isr(segmentor, isr_ratio=2).isr_ratio == ISRRatio.parse(2)


@pytest.mark.parametrize('ratio', [2, 'auto'])
@pytest.mark.parametrize('backbone', [None, dict(MIT, embed_dims=16)], ids=['EFT', 'MiT'])
@torch.no_grad()
def test_wrapped_models(backbone, segmentor, image, tmp_path, ratio):
    if backbone is not None:
        segmentor = MODELS.build(dict(segmentor_config(), backbone=backbone)).eval()
    with isr(segmentor, ratio):
        expected = segmentor(image)
    macs = report_isr(segmentor, ratio, (128, 128)).macs
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0,
                                         world_size=1)
    try:
        for wrapper in (MMDistributedDataParallel(segmentor), SegTTAModel(module=segmentor)):
            with isr(wrapper, ratio):
                assert torch.equal(segmentor(image), expected)
            assert set.union(*ratios(segmentor)) == {1}
            assert report_isr(wrapper, ratio, (128, 128)).macs == macs
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
    assert set.union(*ratios(segmentor)) == {1}
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


class StrangeAttention(nn.Module):
    """An attention that no table knows."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x, size):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Strange(nn.Module):
    """A network around it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.attention = StrangeAttention()

    def forward(self, x):
        x = self.stem(x)
        return self.attention(x.flatten(2).transpose(1, 2), x.shape[2:])


def test_unknown_attention_is_named_and_strictly_an_error(mit):
    with pytest.raises(RatioError, match=r'Found: attention: StrangeAttention is not known'):
        apply_isr(Strange(), 2)
    both = nn.ModuleDict(dict(mit=mit, strange=Strange()))
    apply_isr(both, 2)
    with pytest.raises(RatioError, match=r'strange\.attention: StrangeAttention is not known'):
        apply_isr(both, 2, strict=True)


def test_projections_run_on_what_is_left():
    """Costs by hand: the stem, q k v, and the two products of 35 queries with their keys."""
    model, image = Strange().eval(), torch.randn(1, 3, 40, 56)
    register_isr(StrangeAttention, grid='size')
    report = report_isr(model, 2, (40, 56))
    assert [(stage.stage, stage.keys) for stage in report.stages] == [('encoder 1', (35, 12))]
    stem, queries = 35 * 8 * 3 * 64, 35 * 8 * 8
    products = [2 * 35 * keys * 8 for keys in (35, 12)]
    assert report.macs == tuple(stem + 3 * queries + product for product in products)
    with isr(model, 2):
        expected = model(image)
    # A fused layer by another name than qkv makes keys and values alone, so this one is renamed.
    register_isr(StrangeAttention, grid='size', projections=('qkv',))
    with isr(model, 2):
        torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-5)
        assert count_macs(model, (40, 56)) == stem + queries + 12 * 8 * 16 + products[1]


def test_what_has_nothing_to_reduce_is_said_so(mit):
    register_isr(StrangeAttention, irreducible='it is strange')
    both = nn.Sequential(Strange(), nn.Identity())
    with pytest.raises(RatioError, match=r'Found: 0\.attention: StrangeAttention: it is strange'):
        apply_isr(both, 2, strict=True)
    with pytest.raises(RatioError, match='not both'):
        register_isr(StrangeAttention)


def test_keys_on_no_grid():
    model = Strange().eval()
    register_isr('StrangeAttention', grid=Window('window'))
    model.attention.window = 3
    apply_isr(model, 2)
    with pytest.warns(UserWarning, match=r'its 35 keys lie on no grid that ISR finds \(3x3\)'):
        model(torch.randn(1, 3, 40, 56))
    with pytest.raises(RatioError, match=r'reduces nothing in Strange: attention: .* 35 keys'):
        report_isr(model, 2, (40, 56))
    apply_isr(model, 2, strict=True)
    with pytest.raises(RatioError, match='StrangeAttention cannot be reduced'):
        model(torch.randn(1, 3, 40, 56))


def test_a_report_names_what_keeps_its_keys():
    model = MODELS.build(dict(type='SwinTransformer', embed_dims=24, depths=[2, 2, 1, 1],
                              num_heads=[1, 2, 3, 4]))
    text = str(report_isr(model, 3, (112, 112)))
    assert '49 -> 9' in text
    assert 'stages.0.blocks.1.attn.w_msa and 1 more: WindowMSA: cells of 3 would mix' in text


@torch.no_grad()
def test_auto_follows_the_size(mit):
    crop = torch.randn(1, 3, 64, 64)
    before = mit(crop)[-1]
    with isr(mit, 'auto', crop_size=(64, 64)):
        assert torch.equal(mit(crop)[-1], before)
    report = report_isr(mit, 'auto', (128, 192), crop_size=(64, 64))
    assert [(stage.pool, stage.keys) for stage in report.stages] == [((1, 2), (24, 6))] * 4


@torch.no_grad()
def test_compiled_whole(mit):
    """One graph, and never an old one."""
    image = torch.randn(1, 3, 64, 96)
    compiled = torch.compile(mit, fullgraph=True, backend='eager')
    for ratio in (1, 2, 1, 2):
        apply_isr(mit, ratio)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            expected = copy.deepcopy(mit)(image)[-1]
        torch.testing.assert_close(compiled(image)[-1], expected, atol=1e-5, rtol=1e-5)


class BrokenAttention(StrangeAttention):
    """One that torch.compile cannot take in one piece."""

    def forward(self, x, size):
        q, k, v = self.qkv(x).unflatten(-1, (3, 8)).unbind(-2)
        scores = q @ k.transpose(-2, -1)
        torch._dynamo.graph_break()
        return scores.softmax(-1) @ v


@torch.no_grad()
def test_a_graph_break_within_is_an_error_not_a_wrong_result():
    register_isr('StrangeAttention', grid='size')
    model = Strange().eval()
    model.attention = BrokenAttention()
    image = torch.randn(1, 3, 40, 56)
    compiled = torch.compile(model, backend='eager')
    torch.testing.assert_close(compiled(image), model(image))
    apply_isr(model, 2)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(image)
