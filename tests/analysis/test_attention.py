"""What is observed of attention layers is what they compute."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from mmseg_edaformer import register_isr
from mmseg_edaformer.analysis.attention import choose_layers, look
from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.isr import isr

SIZE = (72, 104)  # ragged cells in most layers
POINTS = [(3., 5.), (60.5, 40.2), (103.9, 71.9)]


@pytest.fixture(scope='module', params=['segmenter', 'other'])
def model(request):
    return request.getfixturevalue(request.param).model


def image():
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def inputs_of(model, names, x):
    """What each layer is called with, and what it returns, by hooks."""
    calls, outs = {}, {}

    def note(name, args, out):
        calls[name], outs[name] = args, out

    handles = [model.get_submodule(name).register_forward_hook(
        lambda _, *args, name=name: note(name, *args)) for name in names]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return calls, outs


def edaformer_softmax(module, args, ratio):
    """The whole softmax, h x N x M, of embedding-free attention; rows and columns of its map."""
    x = args[0]
    kernel = [min(module.pool_ratio * ratio, side) for side in x.shape[2:]]
    pooled = module.kv(F.avg_pool2d(x, kernel))
    if module.kv_norm is not None:
        pooled = F.gelu(module.kv_norm(pooled))
    heads, dim = module.num_heads, x.shape[1] // module.num_heads
    q, k = (each[0].reshape(heads, dim, -1) for each in (x, pooled))
    return (torch.einsum('hdn,hdm->hnm', q, k) / math.sqrt(dim)).softmax(-1), x.shape[2:]


def segformer_softmax(module, args, ratio):
    """The same of mmseg's spatial reduction attention, whose cells may be ragged."""
    tokens, (rows, columns) = args[0], args[1]
    keys = tokens
    sides = rows, columns
    if module.sr_ratio > 1:
        maps = module.sr(tokens.transpose(1, 2).reshape(1, -1, rows, columns))
        sides = maps.shape[2:]
        keys = module.norm(maps.flatten(2).transpose(1, 2))
    width = tokens.shape[-1]
    heads = module.num_heads
    weight, bias = module.attn.in_proj_weight, module.attn.in_proj_bias
    q, k = tokens[0] @ weight[:width].T + bias[:width], keys[0] @ weight[width:2 * width].T + (
        bias[width:2 * width])
    k = k.reshape(*sides, width)
    cells = [k[y:y + ratio, x:x + ratio].reshape(-1, width)
             for y in range(0, sides[0], ratio) for x in range(0, sides[1], ratio)]
    k = torch.stack([cell.mean(0) for cell in cells])
    counts = torch.tensor([float(len(cell)) for cell in cells])
    q, k = (each.reshape(len(each), heads, -1).transpose(0, 1) for each in (q, k))
    scores = q @ k.transpose(1, 2) / math.sqrt(width // heads)
    return (scores + counts.log()).softmax(-1), (rows, columns)


@pytest.mark.filterwarnings('ignore:a feature map is smaller')
@pytest.mark.parametrize('ratio', [1, 2, 3])
def test_attention_is_that_of_a_plain_softmax(model, ratio):
    oracle = edaformer_softmax if 'EFT' in type(model.backbone).__name__ else segformer_softmax
    names = list(choose_layers(model, ['*']))
    with isr(model, ratio):
        calls, outs = inputs_of(model, names, image())
        seen, reasons = look(model, image(), names, POINTS)
    assert not reasons
    assert list(seen) == names
    modules = dict(model.named_modules())
    for name, found in seen.items():
        with torch.no_grad():
            softmax, grid = oracle(modules[name], calls[name], ratio)
        stride = 2 ** math.ceil(math.log2(SIZE[0] / grid[0]))
        for point, weights in zip(POINTS, found.weights, strict=True):
            index = int(point[1] / stride) * grid[1] + int(point[0] / stride)
            assert weights.shape == softmax[:, index].shape
            assert torch.allclose(weights, softmax[:, index], atol=1e-5)
        assert torch.allclose(found.weights.sum(-1), torch.ones(3, softmax.shape[0]), atol=1e-5)
        # Shared out over the area, it is 1 on average.
        rows, columns = (np.diff(edges) for edges in found.cells)
        areas = rows[:, None] * columns
        assert np.allclose((found.density() * areas).sum((1, 2)) / areas.sum(), 1, atol=1e-5)
        # The features are what a hook sees, as a map.
        out = outs[name][0]
        plain = out if out.dim() == 3 else out.T.reshape(-1, *grid)
        assert torch.equal(found.features, plain)
        assert [len(edges) - 1 for edges in found.tokens] == list(grid)
        # Trained pools drop tokens that fill no cell, ISR's cells do not.
        for edges, side in zip(found.cells, grid):
            if oracle is edaformer_softmax:
                pool = min(modules[name].pool_ratio * ratio, side)
                wanted = [i * pool for i in range(side // pool + 1)]
            else:
                pool = modules[name].sr_ratio
                wanted = [i * pool for i in range(side // pool + 1)]
                wanted = sorted({*wanted[::ratio], wanted[-1]})
            assert (edges / stride).tolist() == wanted


def test_averaged_queries_are_looked_at_on_the_whole_map(model):
    names = list(choose_layers(model, ['*']))
    with isr(model, 2):
        plain, _ = look(model, image(), names, POINTS)
    with isr(model, 2, query_ratio=2):
        seen, reasons = look(model, image(), names, POINTS)
    assert not reasons
    for name, found in seen.items():
        assert found.features.shape == plain[name].features.shape
        assert found.weights.shape[-1] == 1 or not torch.equal(found.weights, plain[name].weights)
        torch.testing.assert_close(found.weights.sum(-1), torch.ones(found.weights.shape[:2]))
        for edges, expected in zip((*found.cells, *found.tokens),
                                   (*plain[name].cells, *plain[name].tokens), strict=True):
            assert np.array_equal(edges, expected)


def test_looking_changes_nothing_and_leaves_nothing(model):
    names = list(choose_layers(model, ['*']))
    before = [(type(module), set(vars(module))) for module in model.modules()]
    got = []
    for ratio in 1, 2:
        with isr(model, ratio), torch.no_grad():
            wanted = model(image())
            handle = model.register_forward_hook(lambda _, args, out: got.append(out))
            look(model, image(), names, POINTS)
            handle.remove()
            assert torch.equal(got.pop(), wanted)
            assert torch.equal(model(image()), wanted)
    assert before == [(type(module), set(vars(module))) for module in model.modules()]
    with pytest.raises(RuntimeError):
        look(model, image()[:, :1], names, POINTS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not _get_current_function_mode_stack()


class Fused(nn.Module):
    """Attention behind a class token, with a mask, by the fused operator or spelt out."""

    def __init__(self, explicit=False):
        super().__init__()
        self.qkv, self.explicit = nn.Linear(16, 48), explicit
        self.bias = nn.Parameter(torch.randn(1, 1, 25, 25))

    def forward(self, x, size):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.explicit:
            out = (q @ k.transpose(-2, -1) * 0.7 + self.bias).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, self.bias, scale=0.7)
        return out.transpose(1, 2).flatten(2)

    def softmax(self, x):
        q, k, _ = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return torch.softmax(torch.einsum('bhnd,bhmd->bhnm', q, k) * 0.7 + self.bias, -1)[0]


class Windows(Fused):
    """The same in four windows."""

    def forward(self, x, size):
        q, k, v = self.qkv(x[:, 1:]).unflatten(1, (4, 6)).unflatten(-1, (3, 16)).unbind(-2)
        out = F.scaled_dot_product_attention(*(each[0][:, None] for each in (q, k, v)))
        return torch.cat([x[:, :1], out[:, 0].flatten(0, 1)[None]], 1)


class Net(nn.Module):

    def __init__(self, attention):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 16, 16, 16), attention

    def forward(self, image):
        x = self.stem(image)
        tokens = torch.cat([x.mean((2, 3))[:, None], x.flatten(2).transpose(1, 2)], 1)
        return self.attn(tokens, tuple(x.shape[2:]))


@pytest.mark.parametrize('explicit', [False, True])
def test_other_attention_with_masks_and_single_tokens(explicit):
    register_isr(Fused, grid='size', prefix=1)
    net, x = Net(Fused(explicit)).eval(), torch.randn(1, 3, 64, 96)
    calls, outs = inputs_of(net, ['attn'], x)
    seen, _ = look(net, x, ['attn'], [(33., 20.)])
    found = seen['attn']
    with torch.no_grad():
        wanted = net.attn.softmax(calls['attn'][0])
    assert torch.allclose(found.weights[0], wanted[:, 1 + 1 * 6 + 2], atol=1e-6)
    assert found.single == 1
    assert found.density().shape == (1, 4, 6)
    assert torch.equal(found.features, outs['attn'][0, 1:].T.reshape(16, 4, 6))


def test_what_lies_on_no_map_is_told():
    register_isr(Windows, grid='size', prefix=1)
    net = Net(Windows())
    seen, reasons = look(net, torch.randn(1, 3, 64, 96), ['attn'], POINTS)
    assert not seen
    assert reasons == {'attn': 'Windows: its queries lie in windows or groups, not on one map'}


def test_choosing_layers(other):
    assert list(choose_layers(other.model)) == [f'backbone.layers.{i}.1.0.attn' for i in range(4)]
    with pytest.raises(ConfigError, match='Conv2d has no attention that can be shown'):
        choose_layers(nn.Conv2d(1, 1, 1))
