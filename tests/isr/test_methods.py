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
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(3, 36))

    def project(self, x):
        return [linear(x).unflatten(-1, (3, 4)).transpose(1, 2)
                for linear in (self.q, self.k, self.v)]

    def forward(self, x, hw):
        q, k, v = self.project(x)
        bias = self.bias[:, None, :k.shape[-2]]
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, bias.expand(3, q.shape[-2], -1)[None])
        else:
            out = ((q @ k.transpose(-2, -1)) * 4 ** -0.5 + bias).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)


@pytest.fixture(autouse=True)
def _known():
    register_isr(ToyMixer, grid='hw', prefix=1)


def reference(mixer, x, grid, ratio, method):
    """The formula of `pooling`, with matrices."""
    layout = Layout((grid,), 1)
    q, k, v = mixer.project(x)
    total = k.shape[-2]
    bias = mixer.bias[None, :, :total]
    if method == 'bipartite':
        weights = merging(k, layout, ratio)  # B 1 N M
        n = (weights > 0).sum(-2).float()
        k, v = (weights.transpose(-2, -1) @ t for t in (k, v))
        bias = (bias.unsqueeze(2) @ weights).squeeze(2)
    else:
        n = counts(layout, total, ratio, x.device)
        k, v = (pool_tokens(t, layout, ratio, method) for t in (k, v))
        bias = pool_tokens(bias.unsqueeze(-1), layout, ratio).squeeze(-1)
    scores = q @ k.transpose(-2, -1) / 2 + bias.unsqueeze(2) + (
        n.log() if n.dim() == 1 else n.log().unsqueeze(-2))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


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
    torch.testing.assert_close(out, reference(mixer, x, grid, ratio, method),
                               **TOLERANCES[device.type])
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
    attention = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    nn.init.normal_(attention.in_proj_bias)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x, hw, mask=None):
            return self.attention(x, x, x, attn_mask=mask)[0]

    register_isr(Outer, grid='hw')
    outer = Outer()
    x, layout = torch.randn(2, 35, 12), Layout(((5, 7),))
    mask = torch.rand(35, 35) < 0.7 if masked else None
    if masked:
        mask.fill_diagonal_(False)
    with isr(outer, 2, method=method):
        out = outer(x, (5, 7), mask)

    def split(t, part):
        return nn.functional.linear(t, attention.in_proj_weight.chunk(3)[part],
                                    attention.in_proj_bias.chunk(3)[part]
                                    ).unflatten(-1, (3, 4)).transpose(1, 2)

    if method == 'bipartite':
        weights = merging(split(x, 1), layout, 2)
        keys = weights.squeeze(1).transpose(-2, -1) @ x
        member = (weights > 0).float()
        logs = member.sum(-2, keepdim=True).log()
        free = (~mask).float() @ member if masked else None
    else:
        keys = pool_tokens(x, layout, 2, method)
        logs = counts(layout, 35, 2).log()
        free = pool_tokens((~mask).float().unsqueeze(-1), layout, 2).squeeze(-1) if masked else None
    scores = split(x, 0) @ split(keys, 1).transpose(-2, -1) / 2 + logs
    if masked:
        scores = scores.masked_fill(free == 0, -torch.inf)
    expected = attention.out_proj((scores.softmax(-1) @ split(keys, 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


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
    grid = maps.shape[2:]
    if method != 'bipartite':
        tokens = pool_tokens(maps.flatten(2).transpose(1, 2), Layout((tuple(grid),)), 2, method)
        maps = tokens.transpose(1, 2).unsqueeze(-1)
    kv = F.gelu(attention.kv_norm(attention.kv(maps))).flatten(2).transpose(1, 2)
    kv = kv.unflatten(-1, (3, 8)).transpose(1, 2)
    logs = torch.zeros(())
    if method == 'bipartite':
        weights = merging(kv, Layout((tuple(grid),)), 2)
        kv = weights.transpose(-2, -1) @ kv
        logs = (weights > 0).sum(-2, keepdim=True).log()
    q = x.flatten(2).transpose(1, 2).unflatten(-1, (3, 8)).transpose(1, 2)
    out = (q @ kv.transpose(-2, -1) * 8 ** -0.5 + logs).softmax(-1) @ kv
    expected = attention.proj(out.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(
        2, x.shape[2:]))
    torch.testing.assert_close(attention(x), expected, **TOLERANCES[device.type])
    assert attention.num_keys(*x.shape[2:]) == kv.shape[-2]
    assert (attention(x) - before).abs().max() > 1e-3
