"""Each rival against what its paper says, written as loops and as plain matrices."""
import math

import pytest
import torch
import torch.nn.functional as F
from mmseg.models.backbones.mit import EfficientMultiheadAttention
from mmseg.models.backbones.vit import VisionTransformer
from mmseg.registry import MODELS
from torch import nn

from benchmarks.token_merging import match, merge, unmerge
from benchmarks.ways import neighbours, todo, tome
from mmseg_edaformer.cost import count_macs
from mmseg_edaformer.models.attention import EmbeddingFreeAttention
from mmseg_edaformer.models.eft import EFT

TOLERANCE = 1e-5


def matched(tokens, merged, front=0, behind=0):
    """Token Merging in loops: for each token, N x d, the token whose group it is in."""
    places = list(range(front, len(tokens) - behind))
    left, right = places[::2], places[1::2]
    pairs = []
    for a in left:
        similar = [float(F.cosine_similarity(tokens[a], tokens[b], 0)) for b in right]
        best = max(range(len(right)), key=similar.__getitem__)
        pairs.append((similar[best], a, right[best]))
    into = list(range(len(tokens)))
    for _, a, b in sorted(pairs, reverse=True)[:merged]:
        into[a] = b
    return into


def grouped(into):
    """Means of groups, M x N, and the value of its group for each token, N x M."""
    roots = [i for i, group in enumerate(into) if group == i]
    member = torch.tensor([[float(group == root) for group in into] for root in roots])
    return member / member.sum(1, keepdim=True), member.T


def halved(grid, front=0, behind=0):
    """The same for cells of 2x2 of a map between single tokens."""
    rows, columns = grid
    cells = [(y // 2) * math.ceil(columns / 2) + x // 2 for y in range(rows)
             for x in range(columns)]
    owner = [*range(front), *(front + cell for cell in cells)]
    owner += range(max(owner) + 1, max(owner) + 1 + behind)
    return grouped([owner.index(cell) for cell in owner])


def kept(grid, step, front=0, behind=0):
    """Every so many rows and columns of a map, and the single tokens around it, M x N."""
    rows, columns = grid
    total = front + rows * columns + behind
    places = [front + y * columns + x for y in range(0, rows, step)
              for x in range(0, columns, step)]
    return torch.eye(total)[[*range(front), *places, *range(total - behind, total)]]


def matrices(rival, x, grid, front=0, behind=0):
    """What a rival does to queries and to keys: reduction of each, and how results are spread."""
    name, _, value = str(rival).partition(' ')
    same = torch.eye(len(x))
    if name == 'tome':
        count = len(x) - front - behind
        reduce, spread = grouped(matched(x, int(float(value) * count), front, behind))
        return reduce, reduce, spread
    if name == 'todo':
        return same, kept(grid, int(value), front, behind), same
    reduce, spread = halved(grid, front, behind)
    return reduce, reduce if value == 'q+k' else same, spread


def attention(queries, keys, values, heads):
    """Softmax attention of N x d to M x d."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (queries, keys, values))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def check(found, wanted):
    assert float((found - wanted).detach().abs().max()) < TOLERANCE


RIVALS = pytest.mark.parametrize('rival', [
    tome(0.3), tome(0.5), todo(2), todo(3), neighbours('q'), neighbours('q+k')], ids=str)
SIZES = pytest.mark.parametrize('grid', [(6, 8), (5, 7)], ids=str)


@pytest.mark.parametrize(('count', 'merged', 'front', 'behind'), [
    (12, 4, 0, 0), (13, 6, 0, 0), (15, 5, 1, 0), (15, 3, 0, 4), (16, 0, 1, 1)])
def test_matching_is_that_of_loops(count, merged, front, behind):
    tokens = torch.randn(3, count, 5)
    groups = match(tokens, merged, front, behind)
    assert int(groups.max()) == count - merged - 1
    small = merge(tokens, groups, count - merged)
    for x, own, means in zip(tokens, groups, small):
        into = matched(x, merged, front, behind)
        assert [own.tolist().index(group) for group in own] == [into.index(i) for i in into]
        reduce, spread = grouped(into)
        torch.testing.assert_close(means, reduce @ x)
        assert torch.equal(unmerge(means[None], own[None])[0], spread @ means)
    if not merged:
        assert torch.equal(small, tokens)


@RIVALS
@SIZES
@pytest.mark.parametrize('pool', [1, 2])
def test_embedding_free_attention(rival, grid, pool):
    """In EDAFormer, with the norm of its decoder, and with keys that it pools itself."""
    attn = EmbeddingFreeAttention(8, 2, pool, kv_norm=True).eval()
    nn.init.normal_(attn.kv_norm.weight)
    x = torch.randn(1, 8, *grid)
    pooled = F.avg_pool2d(x, pool)
    tokens, small = (maps.flatten(2)[0].T for maps in (x, pooled))
    reduce, own, spread = matrices(rival, tokens, grid)
    reduce_keys = own if pool == 1 else matrices(rival, small, tuple(pooled.shape[2:]))[1]
    keys = F.gelu(attn.kv_norm(((attn.kv.weight[:, :, 0, 0] @ (reduce_keys @ small).T).T
                                + attn.kv.bias).T[None, :, :, None]))[0, :, :, 0].T
    out = attention(reduce @ tokens, keys, keys, 2) @ attn.proj.weight.T + attn.proj.bias
    with torch.no_grad(), applied(rival, attn):
        found = attn(x)[0].flatten(1).T
    check(found, spread @ out)


def applied(rival, attn):
    """Apply a rival to one attention of EDAFormer, as the only layer of an encoder."""
    encoder = EFT(dict(embed_dims=[8], depths=[1], num_heads=[2], ffn_ratios=[1], pool_ratios=[1]),
                  out_indices=[0])
    encoder.stages[0].blocks[0].attn = attn
    return rival.applied(encoder)


@RIVALS
@SIZES
@pytest.mark.parametrize('reduction', [1, 2])
def test_segformer(rival, grid, reduction):
    attn = EfficientMultiheadAttention(8, 2, qkv_bias=True, sr_ratio=reduction).eval()
    tokens = torch.randn(grid[0] * grid[1], 8)
    small, size = tokens, grid
    if reduction > 1:
        maps = attn.sr(tokens.T.reshape(1, 8, *grid))
        small, size = attn.norm(maps.flatten(2)[0].T), tuple(maps.shape[2:])
    reduce, own, spread = matrices(rival, tokens, grid)
    own = own if reduction == 1 else matrices(rival, small, size)[1]
    out = project(attn.attn, reduce @ tokens, own @ small)
    with torch.no_grad(), rival.applied(nn.Sequential(attn)):
        found = attn(tokens[None], grid)[0]
    check(found - tokens, spread @ out)


def project(attn, queries, keys):
    """``nn.MultiheadAttention`` of N x d to M x d."""
    projected = [F.linear(x, weight, bias) for x, weight, bias in zip(
        (queries, keys, keys), attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3))]
    return attn.out_proj(attention(*projected, attn.num_heads))


@RIVALS
@pytest.mark.parametrize('token', [True, False])
def test_plain_vit(rival, token):
    """With a class token, and with Token Merging around the feed-forward network too."""
    model = VisionTransformer(img_size=(64, 80), patch_size=16, embed_dims=8, num_layers=1,
                              num_heads=2, with_cls_token=token, output_cls_token=False,
                              final_norm=True, out_indices=(0,))
    model.eval()  # which returns None
    for norm in (model.layers[0].ln1, model.layers[0].ln2):
        nn.init.normal_(norm.weight)
    image, front, seen = torch.randn(1, 3, 64, 80), int(token), []
    model.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0][0]))
    model.layers[0].register_forward_hook(lambda layer, args, out: seen.append(out[0]))
    with torch.no_grad(), rival.applied(model):
        model(image)
    layer, (x, found) = model.layers[0], seen
    normed = layer.ln1(x)
    reduce, own, spread = matrices(rival, normed, (4, 5), front)
    x = x + spread @ project(layer.attn.attn, reduce @ normed, own @ normed)
    normed, reduce, spread = layer.ln2(x), torch.eye(len(x)), torch.eye(len(x))
    if rival.merges:
        reduce, _, spread = matrices(rival, normed, (4, 5), front)
    x = x + spread @ layer.ffn.layers(reduce @ normed)
    check(found, x)


def segmenter():
    """A plain ViT with Segmenter's decoder, whose tokens for classes stand behind the patches."""
    vit = dict(embed_dims=48, num_layers=2, num_heads=4)
    return MODELS.build(dict(
        type='EncoderDecoder', train_cfg=dict(), test_cfg=dict(mode='whole'),
        backbone=dict(vit, type='VisionTransformer', img_size=(64, 64), patch_size=16,
                      out_indices=(1,), with_cls_token=False),
        decode_head=dict(type='SegmenterMaskTransformerHead', in_channels=48, channels=48,
                         num_classes=7, num_layers=2, num_heads=4, embed_dims=48))).eval()


def segformer():
    """A small SegFormer."""
    return MODELS.build(dict(
        type='EncoderDecoder', train_cfg=dict(), test_cfg=dict(mode='whole'),
        backbone=dict(type='MixVisionTransformer', embed_dims=8, num_layers=[1] * 4,
                      num_heads=[1, 2, 4, 8]),
        decode_head=dict(type='SegformerHead', in_channels=[8, 16, 32, 64], in_index=[0, 1, 2, 3],
                         channels=16, num_classes=7))).eval()


@pytest.mark.parametrize('make', [None, segmenter, segformer], ids=['eda', 'vit', 'mit'])
def test_whole_models(make, segmentor):
    """Every rival saves, and leaves the model as it was; those that do nothing change no bit."""
    model = segmentor if make is None else make()
    image = torch.randn(2, 3, 96, 128)
    before, macs = model(image), count_macs(model, (512, 512))
    state = repr(model)
    for rival in (todo(2), neighbours('q'), neighbours('q+k'), tome(0.5)):
        with rival.applied(model):
            reduced = model(image)
            assert (count_macs(model, (512, 512)) < macs) == (make is segmenter or
                                                             rival.name != 'tome 0.5')
        assert reduced.shape == before.shape
        assert not torch.equal(reduced, before)
        assert repr(model) == state
        assert torch.equal(model(image), before)
    for rival in (tome(0), todo(1)):
        with rival.applied(model):
            assert torch.equal(model(image), before)
