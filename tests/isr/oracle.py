"""Exact ISR of any softmax attention, without a saving: another route to the same numbers.

Every softmax over keys gets the mean logit of each cell, plus log n, and its result is spread back
evenly over the members. The code that is tested shares nothing with it.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def membership(grid, ratio, prefix, total):
    """N x M: which key belongs to which cell; single tokens are cells of their own."""
    owner = [*range(prefix)]
    for rows, columns in maps(grid):
        first = max(owner, default=-1) + 1
        owner += [first + (y // ratio) * math.ceil(columns / ratio) + x // ratio
                  for y in range(rows) for x in range(columns)]
    owner += range(max(owner, default=-1) + 1, max(owner, default=-1) + 1 + total - len(owner))
    matrix = torch.zeros(total, max(owner) + 1)
    matrix[torch.arange(total), torch.tensor(owner)] = 1
    return matrix


def maps(grid):
    """The maps of a grid: one (h, w), or several behind each other."""
    return [grid] if isinstance(grid[0], int) else grid


def tokens(grid):
    """Number of tokens of a grid."""
    return sum(rows * columns for rows, columns in maps(grid))


class Oracle(TorchFunctionMode):
    """Reduces every softmax whose last axis has prefix + h w + rest entries.

    Args:
        grid: h and w of the keys, or a list of such for maps behind each other; or a function that
            gives the grid for a number of keys, or None.
        ratio: Side of the cells.
        prefix: Single tokens in front; None if that is all that the grid leaves over.
        order: A function that gives, for a grid, the number among the keys of each of its tokens.
        suffix: Single tokens behind.
        masked: Keys whose score is at or below this are not there, for their query.
    """

    def __init__(self, grid, ratio, prefix=0, order=None, masked=None, suffix=0):
        super().__init__()
        self.grid, self.ratio, self.prefix = grid, ratio, prefix
        self.order, self.masked, self.suffix = order, masked, suffix
        self.hits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, '__name__', '')
        if name == 'scaled_dot_product_attention':
            # The explicit form, so that its softmax is seen below.
            with self:
                return explicit(*args, **kwargs)
        if name == 'multi_head_attention_forward':
            kwargs['need_weights'] = True
            names = ('query', 'key', 'value', 'embed_dim_to_check', 'num_heads', 'in_proj_weight',
                     'in_proj_bias', 'bias_k', 'bias_v', 'add_zero_attn', 'dropout_p',
                     'out_proj_weight', 'out_proj_bias')
            with self:
                return multi_head(**{**dict(zip(names, args)), **kwargs})
        if name == 'softmax':
            scores = args[0]
            total = scores.shape[-1]
            grid = self.grid(total) if callable(self.grid) else self.grid
            if grid is not None:
                left = total - self.suffix - tokens(grid)
                prefix = left if self.prefix is None else self.prefix
                if 0 <= prefix <= left and (self.prefix is None or left == prefix):
                    self.hits += 1
                    member = membership(grid, self.ratio, prefix, total).to(scores)
                    if self.order is not None:
                        member[self.order(grid)] = member.clone()
                    if self.masked is not None:
                        there = (scores > self.masked).to(scores)
                        n = there @ member
                        mean = scores.where(there > 0, 0) @ member / n.clamp(min=1)
                        weights = func(mean + n.log(), *args[1:], **kwargs)
                        return weights / n.clamp(min=1) @ member.T * there
                    n = member.sum(0)
                    weights = func(scores @ (member / n) + n.log(), *args[1:], **kwargs)
                    return weights @ (member / n).T
        return func(*args, **kwargs)


def explicit(query, key, value, attn_mask=None, dropout_p=0., is_causal=False, scale=None,
             enable_gqa=False):
    """What ``scaled_dot_product_attention`` is defined to be."""
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = (scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool
                  else scores + attn_mask)
    return scores.softmax(-1) @ value


def multi_head(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
               bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, **kwargs):
    """``nn.MultiheadAttention`` without masks, N x B x C."""
    def split(x):
        return x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)  # N B C -> B h N d

    biases = [None] * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    projected = [split(F.linear(x, weight, bias)) for x, weight, bias in zip(
        (query, key, value), in_proj_weight.chunk(3), biases)]
    out = explicit(*projected).permute(2, 0, 1, 3).flatten(2)
    return F.linear(out, out_proj_weight, out_proj_bias), None


def within(layers, oracles):
    """Run some modules under an oracle each; returns a function that undoes it."""
    def wrapped(forward, oracle, *args, **kwargs):
        with oracle:
            return forward(*args, **kwargs)

    for layer, oracle in zip(layers, oracles):
        layer.forward = functools.partial(wrapped, layer.forward, oracle)

    def undo():
        for layer in layers:
            del layer.forward
    return undo
