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
    """Self-attention over B x N x C tokens on an h x w grid, behind ``tokens`` single ones."""
    tokens = 0

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.table = nn.Parameter(torch.randn(HEADS, 200, 200))

    def forward(self, x, hw):
        query, key, value = (part.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)
                             for part in self.qkv(x).chunk(3, -1))
        return self.attend(query, key, value).transpose(1, 2).flatten(2)

    def bias(self, scores):
        return self.table[:, :scores.shape[-2], :scores.shape[-2]]


class At(Explicit):
    def attend(self, query, key, value):
        return (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value


class Matmul(Explicit):
    def attend(self, query, key, value):
        scores = torch.matmul(query, key.transpose(-2, -1))
        return torch.matmul(F.dropout(F.softmax(scores / 2, dim=-1), 0.1, self.training), value)


class Method(Explicit):
    def attend(self, query, key, value):
        return query.matmul(key.mT).div(2).softmax(-1).matmul(value)


class Bmm(Explicit):
    def attend(self, query, key, value):
        flat = [part.flatten(0, 1) for part in (query, key, value)]
        weights = torch.softmax(torch.bmm(flat[0], flat[1].transpose(1, 2)), -1)
        return torch.bmm(weights, flat[2]).reshape(query.shape)


class Baddbmm(Explicit):
    def attend(self, query, key, value):
        flat = [part.flatten(0, 1) for part in (query, key, value)]
        bias = self.bias(query).repeat(len(query), 1, 1)
        scores = torch.baddbmm(bias, flat[0], flat[1].transpose(1, 2), alpha=0.5)
        return torch.bmm(nn.Softmax(-1)(scores), flat[2]).reshape(query.shape)


class Einsum(Explicit):
    def attend(self, query, key, value):
        scores = torch.einsum('bhid,bhjd->bhij', query, key)
        return torch.einsum('bhij, bhjd -> bhid', scores.softmax(-1), value)


class EinsumTransposed(Explicit):
    def attend(self, query, key, value):
        query, key, value = (part.transpose(-2, -1) for part in (query, key, value))
        scores = torch.einsum('b h c m, b h c n -> b h m n', query, key)
        weights = F.softmax(scores, dim=3)
        return torch.einsum('b h m n, b h c n -> b h c m', weights, value).transpose(-2, -1)


class Fused(Explicit):
    def attend(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, self.bias(query), scale=0.7)


class Added(Explicit):
    def attend(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        return nn.Softmax(dim=-1)(scores + self.bias(scores).unsqueeze(0)) @ value


class AddedInPlace(Explicit):
    def attend(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        scores *= 0.5
        scores += self.bias(scores)
        return scores.softmax(-1) @ value


class Torch(Explicit):
    def attend(self, query, key, value):
        scores = torch.add(self.bias(query), query @ key.transpose(-2, -1))
        return torch.softmax(scores, dim=-1, dtype=torch.float32) @ value


class Windows(Explicit):
    """Scores split by windows for a mask of their own, then joined again."""
    def attend(self, query, key, value):
        batch, keys = len(query), key.shape[-2]
        scores = query @ key.transpose(-2, -1) + self.bias(query)
        mask = torch.linspace(0, 1, WINDOWS * keys).view(WINDOWS, keys, 1).expand(-1, -1, keys)
        mask = mask * torch.linspace(-2, 2, keys)
        scores = scores.view(batch // WINDOWS, WINDOWS, HEADS, keys, keys) + mask[:, None]
        return scores.view(-1, HEADS, keys, keys).softmax(-1) @ value


class TokenInFront(Explicit):
    tokens = 1

    def attend(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:] + self.bias(scores)[:, 1:, 1:]
        return scores.softmax(-1) @ value


class Twice(Explicit):
    def attend(self, query, key, value):
        once = (query @ key.transpose(-2, -1)).softmax(-1) @ value
        return (once @ key.transpose(-2, -1)).softmax(-1) @ value


class ValuesFirst(Explicit):
    def attend(self, query, key, value):
        weights = (query @ key.transpose(-2, -1)).softmax(-1)
        return (value.transpose(-2, -1) @ weights.transpose(-2, -1)).transpose(-2, -1)


class MixedValues(Explicit):
    """Convolutions and reshapes of the values between the softmax and their product."""
    def attend(self, query, key, value):
        weights = (query @ key.transpose(-2, -1)).softmax(-1)
        flat = value.transpose(1, 2).reshape(len(value), -1, WIDTH)
        local = F.conv2d(flat.transpose(1, 2).unsqueeze(-1), torch.ones(WIDTH, 1, 1, 1), None,
                         groups=WIDTH).squeeze(-1).view(len(value), HEADS, -1, value.shape[-2])
        return weights @ (value + local.transpose(-2, -1))


class Net(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.embed, self.attn = nn.Conv2d(3, WIDTH, 4, 4), cls()

    def forward(self, image):
        x = self.embed(image)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens[:, :self.attn.tokens], tokens], 1)
        return self.attn(tokens, tuple(x.shape[-2:]))


@pytest.fixture
def known():
    return lambda cls: register_isr(cls, grid=Arguments(('hw',)), prefix=cls.tokens)


class Counted(Explicit):
    """Code that counts its keys by its scores finds as many as before."""
    def attend(self, query, key, value):
        scores = torch.matmul(input=query, other=key.transpose(-2, -1))
        if scores.shape[-1] != key.shape[-2] or scores.size(-1) != key.shape[-2]:
            raise ValueError(f'scores of {key.shape[-2]} keys wanted')
        bias = self.bias(query)[..., :scores.shape[-1]] / scores.size()[-1]
        return (scores + bias).softmax(-1) @ value


class Squared(Explicit):
    def attend(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        return (scores * scores).softmax(-1) @ value


class Shifted(Explicit):
    def attend(self, query, key, value):
        return ((query @ key.transpose(-2, -1)).softmax(-1) + 0.01) @ value


class LessMaximum(Explicit):
    """Of all queries, not of each."""
    def attend(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        return (scores / scores.amax(-2, keepdim=True)).softmax(-1) @ value


class Marked(Explicit):
    def attend(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        scores[..., 3] = 5.
        return scores.softmax(-1) @ value


class Levelled(Explicit):
    """All keys get one weight, also those that stand for more tokens than others."""
    def attend(self, query, key, value):
        weights = (query @ key.transpose(-2, -1)).softmax(-1)
        weights[:, :1] = 0.01
        return weights @ value


class Sparse(Explicit):
    def attend(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        least = torch.topk(input=scores, k=4, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, -math.inf).softmax(-1) @ value


class Hidden(Explicit):
    """What is done with the weights cannot be seen."""
    def attend(self, query, key, value):
        weights = (query @ key.transpose(-2, -1)).softmax(-1)
        return torch.vmap(lambda x: x * x)(weights) @ value


@pytest.mark.parametrize('cls', [
    Counted, At, Matmul, Method, Bmm, Baddbmm, Einsum, EinsumTransposed, Fused, Added, AddedInPlace,
    Torch, Windows, TokenInFront, Twice, ValuesFirst, MixedValues], ids=lambda cls: cls.__name__)
def test_spellings(cls, known):
    known(cls)
    for number, size in enumerate([(24, 48), (28, 40)]):
        torch.manual_seed(0)
        check_adapter(Net(cls), torch.randn(WINDOWS, 3, *size), [(size[0] // 4, size[1] // 4)],
                      prefix=cls.tokens, expected=1, compiled=number == 0)


@pytest.mark.parametrize('method', ['masked_fill', 'masked_fill_', 'where', 'fused'])
def test_masks(method, known):
    """Whole cells are masked, so that the oracle needs no rule for masks."""
    class Masked(Explicit):
        def attend(self, query, key, value):
            mask = (torch.arange(72).view(6, 12) % 12 < 6).flatten()
            if method == 'fused':
                return F.scaled_dot_product_attention(query, key, value, ~mask.expand(72, 72))
            scores = query @ key.transpose(-2, -1)
            if method == 'where':
                scores = torch.where(mask, torch.finfo(scores.dtype).min, scores)
            else:
                scores = getattr(scores, method)(mask, -math.inf)
            return scores.softmax(-1) @ value

    known(Masked)
    check_adapter(Net(Masked), torch.randn(2, 3, 24, 48), [(6, 12)], expected=1, compiled=False,
                  pickled=False, masked=-1e30)


class OwnSoftmax(Explicit):
    def attend(self, query, key, value):
        scores = (query @ key.transpose(-2, -1)).exp()
        return scores / scores.sum(-1, keepdim=True) @ value


class Product(Explicit):
    def attend(self, query, key, value):
        scores = query @ key.transpose(-2, -1) * self.bias(query)
        return scores.softmax(-1) @ value


class Unnormalised(Explicit):
    def attend(self, query, key, value):
        return query @ key.transpose(-2, -1) @ value


class Normalised(Explicit):
    """ResT: the mean and the variance of the weights are those over all keys."""
    def attend(self, query, key, value):
        return F.instance_norm((query @ key.transpose(-2, -1)).softmax(-1)) @ value


class Convolved(Explicit):
    def attend(self, query, key, value):
        weights = (query @ key.transpose(-2, -1)).softmax(-1)
        return F.conv2d(weights, torch.ones(HEADS, HEADS, 3, 3), padding=1) @ value


class AddedLast(Explicit):
    def attend(self, query, key, value):
        weights = (query @ key.transpose(-2, -1)).softmax(-1)
        return (weights + torch.ones(value.shape[-2])) @ value


class Chosen(Explicit):
    """EViT: tokens are chosen by the weights that the first one gives them."""
    def attend(self, query, key, value):
        weights = (query @ key.transpose(-2, -1)).softmax(-1)
        out = weights @ value
        return out[:, :, weights[:, :, 0].mean((0, 1)).topk(3).indices]


class KeysFirst(Explicit):
    def attend(self, query, key, value):
        return (key @ query.transpose(-2, -1)).softmax(-2).transpose(-2, -1) @ value


class Hand(Explicit):
    def attend(self, query, key, value):
        scores = (query.unsqueeze(-2) * key.unsqueeze(-3)).sum(-1)
        return (scores.softmax(-1).unsqueeze(-1) * value.unsqueeze(-3)).sum(-2)


class Outside(Explicit):
    def attend(self, query, key, value):
        return (query[:, :, :5] @ key[:, :, :5].transpose(-2, -1)).softmax(-1) @ value[:, :, :5]


@pytest.mark.parametrize(('cls', 'reason'), [
    (OwnSoftmax, 'uses exp on its scores'), (Product, 'needs all'),
    (Unnormalised, 'without a softmax'), (Normalised, 'uses instance_norm'),
    (Convolved, 'uses conv2d'), (AddedLast, 'uses add'), (Chosen, 'uses __getitem__'),
    (Squared, 'uses mul'), (Shifted, 'uses add'), (LessMaximum, 'uses amax'),
    (Marked, 'uses __setitem__'), (Sparse, 'uses topk'),
    (Levelled, 'uses __setitem__'), (Hidden, 'cannot be reduced'),
    (KeysFirst, 'softmax'),
    (Hand, 'no attention that ISR recognises'), (Outside, 'its 5 keys lie on no grid')],
    ids=lambda value: getattr(value, '__name__', None))
def test_never_wrong_in_silence(cls, reason, known):
    """What ISR does not recognise is an error, or left as it is with a reason."""
    known(cls)
    model, image = Net(cls).eval(), torch.randn(1, 3, 28, 40)
    before = first(model(image))
    apply_isr(model, 2, strict=True)
    with pytest.raises(RatioError, match=reason):
        model(image)
    apply_isr(model, 2)
    if cls in (Hand, Outside):
        with pytest.warns(UserWarning, match=reason):
            assert torch.equal(first(model(image)), before)
    remove_isr(model)
    assert torch.equal(first(model(image)), before)
