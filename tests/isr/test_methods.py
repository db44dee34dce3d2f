"""The ways to reduce keys, on an attention of our own, against attention written out."""
import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import nn

from mmseg_edaformer.isr import apply_isr, isr, register_isr
from mmseg_edaformer.isr.pooling import METHODS, Layout, counts, merging, pool_tokens
from mmseg_edaformer.models import EmbeddingFreeAttention

TOLERANCES = dict(cpu=dict(atol=1e-5, rtol=1e-4), cuda=dict(atol=1e-4, rtol=1e-4))


class ToyMixer(nn.Module):
    """Attention over a map, with a class token in front and a bias for every key."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(12, 36)
        self.bias = nn.Parameter(torch.randn(3, 36))

    def project(self, x):
        return self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)

    def forward(self, x, hw):
        q, k, v = self.project(x)
        bias = self.bias[:, None, :k.shape[-2]]
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, bias.expand(3, q.shape[-2], -1)[None])
        else:
            out = (q @ k.mT * 4 ** -0.5 + bias).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)


@pytest.fixture(autouse=True)
def _known():
    register_isr(ToyMixer, grid='hw', prefix=1)


def reduction(keys, layout, ratio, method):
    """Functions that reduce keys and average over their members; the log of their number."""
    if method == 'bipartite':
        weights = merging(keys, layout, ratio)  # B 1 N M
        return (lambda x: weights.mT @ x,) * 2 + ((weights > 0).sum(-2, keepdim=True).log(),)
    return (lambda x: pool_tokens(x, layout, ratio, method), lambda x: pool_tokens(
        x, layout, ratio), counts(layout, keys.shape[-2], ratio, keys.device).log())


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('ratio', [2, 3])
@pytest.mark.parametrize('grid', [(4, 6), pytest.param((5, 7), marks=pytest.mark.gpu)], ids=str)
@torch.no_grad()
def test_it_is_the_formula(fused, method, ratio, grid, device):
    mixer = ToyMixer(fused).to(device).eval()
    x = torch.randn(2, 1 + grid[0] * grid[1], 12).to(device)
    before = mixer(x, grid)
    with isr(mixer, ratio, method=method):
        out = mixer(x, grid)
    q, k, v = mixer.project(x)
    reduce, mean, logs = reduction(k, Layout((grid,), 1), ratio, method)
    bias = mean(mixer.bias[None, :, :x.shape[1], None]).mT
    expected = ((q @ reduce(k).mT / 2 + bias + logs).softmax(-1) @ reduce(v)).transpose(1, 2)
    torch.testing.assert_close(out, expected.flatten(2), **TOLERANCES[device.type])
    assert (out - before).abs().max() > 1e-3
    assert torch.equal(mixer(x, grid), before)


@pytest.mark.parametrize('method', METHODS)
@torch.no_grad()
def test_a_ratio_of_one_is_the_model_whatever_the_method(method):
    mixer = ToyMixer(True).eval()
    x = torch.randn(2, 25, 12)
    before = mixer(x, (4, 6))
    apply_isr(mixer, 1, method=method)
    assert type(mixer) is ToyMixer
    assert torch.equal(mixer(x, (4, 6)), before)


@torch.no_grad()
def test_methods_on_shifted_windows():
    """Windows cut the batch in another place; those that are shifted keep their keys."""
    model = MODELS.build(dict(type='SwinTransformer', embed_dims=24, depths=[2, 1, 1, 1],
                              num_heads=[1, 2, 3, 4]))
    model.eval()  # returns None
    image = torch.randn(1, 3, 100, 120)
    before = model(image)[-1]
    outputs = []
    for method in METHODS:
        with isr(model, 2, method=method):
            outputs.append(model(image)[-1])
    assert all(torch.isfinite(out).all() for out in outputs)
    assert len({out.sum().item() for out in (before, *outputs)}) == 5, 'each is another one'


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('method', METHODS)
@torch.no_grad()
def test_multi_head_attention_of_torch(method, masked):
    """Reduced before the projections, which is the same but for the maximum."""
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
            nn.init.normal_(self.attention.in_proj_bias)

        def forward(self, x, hw, mask=None):
            return self.attention(x, x, x, attn_mask=mask)[0]

    register_isr(Outer, grid='hw')
    outer, x = Outer().eval(), torch.randn(2, 35, 12)
    mask = (torch.rand(35, 35) < 0.7 * masked).fill_diagonal_(False)
    with isr(outer, 2, method=method):
        out = outer(x, (5, 7), mask if masked else None)

    def project(x, part):
        weights, biases = outer.attention.in_proj_weight, outer.attention.in_proj_bias
        return F.linear(x, weights.chunk(3)[part], biases.chunk(3)[part]).unflatten(
            -1, (3, 4)).transpose(1, 2)

    reduce, mean, logs = reduction(project(x, 1), Layout(((5, 7),)), 2, method)
    keys = reduce(x.unsqueeze(1)).squeeze(1)
    scores = project(x, 0) @ project(keys, 1).mT / 2 + logs
    scores = scores.masked_fill(mean((~mask).float().mT).mT == 0, -torch.inf)
    expected = (scores.softmax(-1) @ project(keys, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, outer.attention.out_proj(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('size', [(128, 128), (88, 136)], ids=str)
@pytest.mark.gpu
@pytest.mark.parametrize('method', METHODS[1:])
@torch.no_grad()
def test_embedding_free_attention(method, size, device):
    """Beyond the training pool, by another method; against plain matrices."""
    attention = EmbeddingFreeAttention(24, 3, 4, kv_norm=True).to(device).eval()
    nn.init.normal_(attention.kv.weight, 0, 0.5)
    x = torch.randn(2, 24, size[0] // 4, size[1] // 4).to(
        device, memory_format=torch.channels_last)
    before = attention(x)
    attention.isr_method = method
    torch.testing.assert_close(attention(x), before, atol=1e-6, rtol=1e-5)
    attention.isr_ratio = 2
    maps = F.avg_pool2d(x, 4)
    layout = Layout((tuple(maps.shape[2:]),))
    merged = method == 'bipartite'
    if not merged:
        maps = pool_tokens(maps.flatten(2).mT, layout, 2, method).mT.unsqueeze(-1)
    kv = F.gelu(attention.kv_norm(attention.kv(maps))).flatten(2).mT
    kv = kv.unflatten(-1, (3, 8)).transpose(1, 2)
    logs = 0
    if merged:
        reduce, _, logs = reduction(kv, layout, 2, method)
        kv = reduce(kv)
    q = x.flatten(2).mT.unflatten(-1, (3, 8)).transpose(1, 2)
    out = (q @ kv.mT * 8 ** -0.5 + logs).softmax(-1) @ kv
    expected = attention.proj(out.transpose(1, 2).flatten(2).mT.unflatten(2, x.shape[2:]))
    torch.testing.assert_close(attention(x), expected, **TOLERANCES[device.type])
    assert attention.num_keys(*x.shape[2:]) == kv.shape[-2]
    assert (attention(x) - before).abs().max() > 1e-3
