"""ISR on attention written out in every way there is, against the oracle."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import Arguments, apply_isr, register_isr, remove_isr

from .check import check_adapter, first

WIDTH, HEADS, WINDOWS = 16, 2, 3


class Explicit(nn.Module):
    """Self-attention over B x N x C tokens on an h x w grid, in one of the `WAYS`."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.table = nn.Parameter(torch.randn(HEADS, 200, 200))

    def forward(self, x, hw):
        query, key, value = (part.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)
                             for part in self.qkv(x).chunk(3, -1))
        return WAYS[self.way](self, query, key, value).transpose(1, 2).flatten(2)

    def bias(self, scores):
        return self.table[:, :scores.shape[-2], :scores.shape[-2]]


def bmm(biased):
    def attend(attn, query, key, value):
        flat = [part.flatten(0, 1) for part in (query, key, value)]
        if biased:
            bias = attn.bias(query).repeat(len(query), 1, 1)
            scores = torch.baddbmm(bias, flat[0], flat[1].transpose(1, 2), alpha=0.5)
        else:
            scores = torch.bmm(flat[0], flat[1].transpose(1, 2))
        return torch.bmm(nn.Softmax(-1)(scores), flat[2]).reshape(query.shape)
    return attend


def einsum_transposed(attn, query, key, value):
    query, key, value = (part.transpose(-2, -1) for part in (query, key, value))
    weights = F.softmax(torch.einsum('b h c m, b h c n -> b h m n', query, key), dim=3)
    return torch.einsum('b h m n, b h c n -> b h c m', weights, value).transpose(-2, -1)


def added_in_place(attn, query, key, value):
    scores = query @ key.mT
    scores *= 0.5
    scores += attn.bias(scores)
    return scores.softmax(-1) @ value


def windows(attn, query, key, value):
    """Scores split by windows for a mask of their own, then joined again."""
    batch, keys = len(query), key.shape[-2]
    scores = query @ key.transpose(-2, -1) + attn.bias(query)
    mask = torch.linspace(0, 1, WINDOWS * keys).view(WINDOWS, keys, 1).expand(-1, -1, keys)
    mask = mask * torch.linspace(-2, 2, keys)
    scores = scores.view(batch // WINDOWS, WINDOWS, HEADS, keys, keys) + mask[:, None]
    return scores.view(-1, HEADS, keys, keys).softmax(-1) @ value


def token_in_front(attn, query, key, value):
    scores = query @ key.transpose(-2, -1)
    scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:] + attn.bias(scores)[:, 1:, 1:]
    return scores.softmax(-1) @ value


def mixed_values(attn, query, key, value):
    """Convolutions and reshapes of the values between the softmax and their product."""
    weights = (query @ key.transpose(-2, -1)).softmax(-1)
    flat = value.transpose(1, 2).reshape(len(value), -1, WIDTH)
    local = F.conv2d(flat.transpose(1, 2).unsqueeze(-1), torch.ones(WIDTH, 1, 1, 1), None,
                     groups=WIDTH).squeeze(-1).view(len(value), HEADS, -1, value.shape[-2])
    return weights @ (value + local.transpose(-2, -1))


def counted(attn, query, key, value):
    """Code that counts its keys by its scores finds as many as before."""
    scores = torch.matmul(input=query, other=key.transpose(-2, -1))
    if scores.shape[-1] != key.shape[-2] or scores.size(-1) != key.shape[-2]:
        raise ValueError(f'scores of {key.shape[-2]} keys wanted')
    bias = attn.bias(query)[..., :scores.shape[-1]] / scores.size()[-1]
    return (scores + bias).softmax(-1) @ value


EXACT = {
    'at': lambda _, q, k, v: (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v,
    'matmul': lambda attn, q, k, v: torch.matmul(F.dropout(F.softmax(
        torch.matmul(q, k.transpose(-2, -1)) / 2, dim=-1), 0.1, attn.training), v),
    'method': lambda _, q, k, v: q.matmul(k.mT).div(2).softmax(-1).matmul(v),
    'bmm': bmm(False), 'baddbmm': bmm(True), 'einsum transposed': einsum_transposed,
    'einsum': lambda _, q, k, v: torch.einsum(
        'bhij, bhjd -> bhid', torch.einsum('bhid,bhjd->bhij', q, k).softmax(-1), v),
    'fused': lambda attn, q, k, v: F.scaled_dot_product_attention(q, k, v, attn.bias(q), scale=0.7),
    'added': lambda attn, q, k, v: nn.Softmax(dim=-1)(q @ k.mT + attn.bias(q).unsqueeze(0)) @ v,
    'added in place': added_in_place,
    'torch': lambda attn, q, k, v: torch.softmax(
        torch.add(attn.bias(q), q @ k.mT), dim=-1, dtype=torch.float32) @ v,
    'windows': windows, 'token in front': token_in_front,
    'twice': lambda _, q, k, v: ((q @ k.mT).softmax(-1) @ v @ k.mT).softmax(-1) @ v,
    'values first': lambda _, q, k, v: (v.mT @ (q @ k.mT).softmax(-1).transpose(-2, -1)).mT,
    'mixed values': mixed_values, 'counted': counted,
}


def masked(how):
    """Masks of whole cells, so that the oracle needs no rule for masks."""
    def attend(attn, query, key, value):
        mask = (torch.arange(72).view(6, 12) % 12 < 6).flatten()
        if how == 'fused':
            return F.scaled_dot_product_attention(query, key, value, ~mask.expand(72, 72))
        scores = query @ key.transpose(-2, -1)
        if how == 'where':
            scores = torch.where(mask, torch.finfo(scores.dtype).min, scores)
        else:
            scores = getattr(scores, how)(mask, -math.inf)
        return scores.softmax(-1) @ value
    return attend


MASKED = {f'masked by {how}': masked(how) for how in ('masked_fill', 'masked_fill_', 'where',
                                                      'fused')}


def less_maximum(attn, query, key, value):
    """The maximum of all queries, not of each."""
    scores = query @ key.mT
    return (scores / scores.amax(-2, keepdim=True)).softmax(-1) @ value


def by_hand(attn, query, key, value):
    scores = (query.unsqueeze(-2) * key.unsqueeze(-3)).sum(-1)
    return (scores.softmax(-1).unsqueeze(-1) * value.unsqueeze(-3)).sum(-2)


def marked(attn, query, key, value):
    scores = query @ key.mT
    scores[..., 3] = 5.
    return scores.softmax(-1) @ value


def levelled(attn, query, key, value):
    """All keys get one weight, also those that stand for more tokens than others."""
    weights = (query @ key.mT).softmax(-1)
    weights[:, :1] = 0.01
    return weights @ value


def sparse(attn, query, key, value):
    scores = query @ key.mT
    least = torch.topk(input=scores, k=4, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, -math.inf).softmax(-1) @ value


def chosen(attn, query, key, value):
    """EViT: tokens are chosen by the weights that the first one gives them."""
    weights = (query @ key.mT).softmax(-1)
    out = weights @ value
    return out[:, :, weights[:, :, 0].mean((0, 1)).topk(3).indices]


REFUSED = {
    'own softmax': (lambda _, q, k, v: (q @ k.mT).exp() @ v, 'uses exp on its scores'),
    'product': (lambda attn, q, k, v: (q @ k.mT * attn.bias(q)).softmax(-1) @ v, 'needs all'),
    'unnormalised': (lambda _, q, k, v: q @ k.mT @ v, 'without a softmax'),
    # ResT: the mean and the variance of the weights are those over all keys.
    'normalised': (lambda _, q, k, v: F.instance_norm((q @ k.mT).softmax(-1)) @ v,
                   'uses instance_norm'),
    'convolved': (lambda _, q, k, v: F.conv2d((q @ k.mT).softmax(-1), torch.ones(
        HEADS, HEADS, 3, 3), padding=1) @ v, 'uses conv2d'),
    'added last': (lambda _, q, k, v: ((q @ k.mT).softmax(-1) + torch.ones(v.shape[-2])) @ v,
                   'uses add'),
    'chosen': (chosen, 'uses __getitem__'),
    'squared': (lambda _, q, k, v: ((scores := q @ k.mT) * scores).softmax(-1) @ v, 'uses mul'),
    'shifted': (lambda _, q, k, v: ((q @ k.mT).softmax(-1) + 0.01) @ v, 'uses add'),
    'less maximum': (less_maximum, 'uses amax'),
    'marked': (marked, 'uses __setitem__'),
    'sparse': (sparse, 'uses topk'), 'levelled': (levelled, 'uses __setitem__'),
    'hidden': (lambda _, q, k, v: torch.vmap(lambda x: x * x)((q @ k.mT).softmax(-1)) @ v,
               'cannot be reduced'),
    'keys first': (lambda _, q, k, v: (k @ q.mT).softmax(-2).mT @ v, 'softmax'),
    'by hand': (by_hand, 'no attention that ISR recognises'),
    'outside': (lambda _, q, k, v: (q[:, :, :5] @ k[:, :, :5].mT).softmax(-1) @ v[:, :, :5],
                'its 5 keys lie on no grid'),
}
WAYS = {**EXACT, **MASKED, **{way: attend for way, (attend, _) in REFUSED.items()}}


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.tokens = int(way == 'token in front')
        self.embed, self.attn = nn.Conv2d(3, WIDTH, 4, 4), Explicit(way)
        register_isr(Explicit, grid=Arguments(('hw',)), prefix=self.tokens)

    def forward(self, image):
        x = self.embed(image)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens[:, :self.tokens], tokens], 1)
        return self.attn(tokens, tuple(x.shape[-2:]))


@pytest.mark.parametrize('way', EXACT)
def test_exact(way):
    for number, size in enumerate([(24, 48), (28, 40)]):
        torch.manual_seed(0)
        model = Net(way)
        check_adapter(model, torch.randn(WINDOWS, 3, *size), [(size[0] // 4, size[1] // 4)],
                      prefix=model.tokens, expected=1, compiled=number == 0)


@pytest.mark.parametrize('way', MASKED)
def test_masks(way):
    check_adapter(Net(way), torch.randn(2, 3, 24, 48), [(6, 12)], expected=1, compiled=False,
                  masked=-1e30)


@pytest.mark.parametrize(('way', 'reason'), [(way, why) for way, (_, why) in REFUSED.items()])
def test_never_wrong_in_silence(way, reason):
    """What ISR does not recognise is an error, or left as it is with a reason."""
    model, image = Net(way).eval(), torch.randn(1, 3, 28, 40)
    before = first(model(image))
    apply_isr(model, 2, strict=True)
    with pytest.raises(RatioError, match=reason):
        model(image)
    apply_isr(model, 2)
    if way in ('by hand', 'outside'):
        with pytest.warns(UserWarning, match=reason):
            assert torch.equal(first(model(image)), before)
    remove_isr(model)
    assert torch.equal(first(model(image)), before)
