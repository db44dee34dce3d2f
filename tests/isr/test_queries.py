"""Fewer queries: means of cells, alignment, and what the report and the errors say."""
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import nn

from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import (
    ISRRatio,
    QueryRatio,
    apply_isr,
    isr,
    register_isr,
    remove_isr,
    report_isr,
)
from mmseg_edaformer.isr.pooling import pool_queries, spread_queries
from mmseg_edaformer.models.attention import EmbeddedAttention, EmbeddingFreeAttention

from .check import first
from .oracle import query_matrices


@pytest.mark.parametrize('grid', [(12, 16), (13, 18), (14, 23), (5, 3)], ids=str)
@pytest.mark.parametrize('side', [2, 3, 4])
def test_a_ramp_comes_back_inside(grid, side):
    """The centres of cells stay where they are, also beside a ragged border."""
    rows, columns = (torch.arange(length, dtype=torch.float32) for length in grid)
    ramp = (3 * rows[:, None] + 2 * columns)[None, None]
    cell = min(side, grid[0]), min(side, grid[1])
    found = spread_queries(pool_queries(ramp, cell), cell, grid)
    assert found.shape == ramp.shape
    mean, back = query_matrices(grid, side, 0, ramp.numel())
    torch.testing.assert_close(found.flatten(), back @ mean @ ramp.flatten())
    inner = [slice(cell[axis] // 2, max(1, grid[axis] // cell[axis] * cell[axis] - cell[axis] // 2 -
                                        cell[axis] * (grid[axis] % cell[axis] > 0)))
             for axis in (0, 1)]
    assert grid == (5, 3) or ramp[..., inner[0], inner[1]].numel()
    torch.testing.assert_close(found[..., inner[0], inner[1]], ramp[..., inner[0], inner[1]])


def plain(layer, x, side):
    """What a layer computes for a map, by matrices for every query and head."""
    grid = tuple(x.shape[2:])
    mean, back = query_matrices(grid, side, 0, grid[0] * grid[1])
    kv = layer.pooled(x)
    q, k, v = (x, kv, kv) if type(layer) is EmbeddingFreeAttention else (
        layer.query(x), layer.key(kv), layer.value(kv))
    q, k, v = (t.flatten(2).unflatten(1, (layer.num_heads, -1)).mT for t in (q, k, v))
    scores = mean @ q @ k.mT / q.shape[-1] ** 0.5
    out = scores.softmax(-1) @ v  # N h Mq d
    out = layer.proj(out.mT.flatten(1, 2)[..., None])[..., 0]
    return (out @ back.T).unflatten(2, grid)


@pytest.mark.parametrize('ratio', [1, 2])
@pytest.mark.parametrize(('grid', 'side'), [((12, 16), 2), ((13, 18), 4), ((9, 7), 3)], ids=str)
@pytest.mark.parametrize('attention', [EmbeddingFreeAttention, EmbeddedAttention])
def test_edaformers_attention(attention, grid, side, ratio):
    torch.manual_seed(0)
    layer = attention(16, 2, 2, kv_norm=True)
    x = torch.randn(2, 16, *grid).to(memory_format=torch.channels_last)
    layer.isr_ratio, layer.query_ratio = ratio, side
    expected = plain(layer, x, side)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # by compiled code, where there is a compiler
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_comes_back_bit_for_bit(segmentor):
    x = torch.randn(1, 3, 70, 101)
    before, state = segmentor(x), copy.deepcopy(segmentor.state_dict())
    apply_isr(segmentor, 2, query_ratio='2211-222')
    reduced = segmentor(x)
    assert not torch.equal(reduced, before)
    assert reduced.shape == before.shape
    with isr(segmentor, 'none'):
        assert torch.equal(segmentor(x), before)
    assert torch.equal(copy.deepcopy(segmentor)(x), reduced)
    remove_isr(segmentor)
    assert torch.equal(segmentor(x), before)
    assert all(torch.equal(value, state[name]) for name, value in segmentor.state_dict().items())
    apply_isr(segmentor, '2+q2211-222')
    assert torch.equal(segmentor(x), reduced)


def test_the_report_counts_queries(segmentor):
    report = report_isr(segmentor, 'none', (64, 128), query_ratio='2111-112')
    assert [(stage.query_pool, stage.queries) for stage in report.stages] == [
        ((1, 2), (512, 128)), ((1, 1), (128, 128)), ((1, 1), (32, 32)), ((1, 1), (8, 8)),
        ((1, 1), (128, 128)), ((1, 1), (32, 32)), ((1, 2), (8, 2))]
    assert report.macs[1] < report.macs[0]
    assert str(report).startswith('ISR none+q2111-112 on 64x128 pixels')
    assert '512 -> 128' in str(report)


@torch.no_grad()
def test_auto_keeps_the_number_of_queries(segmentor):
    report = report_isr(segmentor, 'none', (128, 192), query_ratio='auto', crop_size=(64, 96))
    assert {stage.query_pool for stage in report.stages} == {(1, 2)}
    x = torch.randn(1, 3, 64, 96)
    before = segmentor(x)
    with isr(segmentor, 'auto', query_ratio='auto', crop_size=(64, 96)):
        assert torch.equal(segmentor(x), before)


def test_gradients_flow(segmentor):
    with isr(segmentor, 2, query_ratio=2):
        segmentor(torch.randn(1, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in segmentor.parameters())
    assert segmentor.backbone.stages[0].blocks[0].attn.kv.weight.grad.abs().max() > 0


@torch.no_grad()
def test_a_small_map_shrinks_the_cells_with_one_warning(segmentor):
    apply_isr(segmentor, 1, query_ratio=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        segmentor(torch.randn(1, 3, 64, 64))
    texts = [str(warning.message) for warning in caught]
    assert sum('smaller than the cells of its queries' in text for text in texts) == 1


class Cross(nn.Module):
    """Attention of a few queries to a map."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 1, 16, 8))

    def forward(self, x, hw):
        return F.scaled_dot_product_attention(self.queries, x, x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Cross()

    def forward(self, image):
        x = F.avg_pool2d(image, 16).repeat(1, 3, 1, 1)[:, :8]
        return self.attn(x.flatten(2).mT[:, None], x.shape[2:])


@torch.no_grad()
def test_queries_are_left_alone_unless_they_are_known():
    """As many queries as the map has tokens prove nothing."""
    net, image = Net().eval(), torch.randn(1, 3, 64, 64)
    register_isr(Cross, grid='hw')
    with pytest.raises(RatioError, match=r'query_ratio 2: Net holds no attention whose queries'):
        apply_isr(net, 1, query_ratio=2)
    before = net(image)
    register_isr(Cross, grid='hw', queries=True)
    with isr(net, 1, query_ratio=2):
        assert not torch.equal(first(net(image)), first(before))


@torch.no_grad()
def test_what_cannot_be_averaged_is_named():
    """Padding in the windows of Twins is no token; MViT takes its class token's scores apart."""
    twins = MODELS.build(dict(
        type='SVT', in_channels=3, embed_dims=[8, 16], num_heads=[1, 2], patch_sizes=[4, 2],
        strides=[4, 2], mlp_ratios=[2, 2], sr_ratios=[4, 2], depths=[2, 2], windiow_sizes=[8, 8],
        out_indices=(0, 1), norm_after_stage=False))
    report = report_isr(twins.eval(), 2, (136, 200), query_ratio=2)
    assert {reason.partition(': ')[2] for reason in report.untouched_queries.values()} == {
        'some of its queries are padding'}
    with isr(twins, 2, query_ratio=2, strict=True), pytest.raises(
            RatioError, match='some of its queries are padding'):
        twins(torch.randn(1, 3, 136, 200))
    pytest.importorskip('timm')
    from .test_timm import mvit
    model = mvit((96, 96), 0, cls=True).eval()
    apply_isr(model, 1, query_ratio=2)
    with pytest.raises(RatioError, match=r'MultiScaleAttention .*Leave query_ratio at none'):
        model(torch.randn(1, 3, 96, 96))


def test_the_grammar():
    for text in ('none+q2', '2+q4', 'optimal+q2211-222', 'auto+qauto', '2,2,1,1-2,2,12+q3'):
        ratio = ISRRatio.parse(text)
        assert ISRRatio.parse(str(ratio)) == ratio
    assert ISRRatio.parse('2+qnone') == ISRRatio.parse(2) == ISRRatio.parse('2+q2').with_queries(1)
    assert ISRRatio.parse(2).with_queries('2') == ISRRatio.parse('2+q2')
    assert ISRRatio.parse('2+q2').with_queries(None).queries == QueryRatio.parse(2)
    assert ISRRatio.parse_encoder('2211+q2111').queries == QueryRatio.parse('2111-111')
    for text, says in {'2+q': "cannot parse query_ratio ''", '2+q0': 'query_ratio 0 is not',
                       'none+qoptimal': "cannot parse query_ratio 'optimal'"}.items():
        with pytest.raises(RatioError, match=says):
            ISRRatio.parse(text)
    with pytest.raises(RatioError, match='cannot parse query_ratio'):
        ISRRatio.parse_encoder('2211+q')
