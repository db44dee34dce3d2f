"""Exact ISR of any softmax attention, without a saving: another route to the same numbers.

Every softmax over keys gets the mean logit of each cell, plus log n, and its result is spread back
evenly over the members. Logits of queries are averaged by cell too, and the weights of cells are
interpolated back. The code that is tested shares nothing with it.
"""
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


def query_matrices(grid, side, prefix, total):
    """Means of cells with a repeated edge, Mq x Nq, and bilinear interpolation back, Nq x Mq."""
    def axis(length):
        cell = min(side, length)
        count = math.ceil(length / cell)
        mean, back = torch.zeros(count, length), torch.zeros(length, count)
        for step in range(count * cell):
            mean[step // cell, min(step, length - 1)] += 1 / cell
        for step in range(length):
            place = max((step + 0.5) / cell - 0.5, 0)
            first = min(int(place), count - 1)
            back[step, first] += 1 - (place - first)
            back[step, min(first + 1, count - 1)] += place - first
        return mean, back

    rows, columns = map(axis, grid)
    front, behind = torch.eye(prefix), torch.eye(total - prefix - math.prod(grid))
    return [torch.block_diag(front, torch.kron(y, x), behind) for y, x in zip(rows, columns)]


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
        queries: A function that gives the grid for a number of queries, or None, and the side of
            its cells.
    """

    def __init__(self, grid, ratio, prefix=0, order=None, masked=None, suffix=0,
                 queries=(lambda total: None, 1)):
        super().__init__()
        self.query_grid, self.side = queries
        self.averaged = 0
        self.grid, self.ratio, self.prefix = grid, ratio, prefix
        self.order, self.masked, self.suffix = order, masked, suffix
        self.hits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        explicit = {'scaled_dot_product_attention': self.attend,
                    'multi_head_attention_forward': self.multi_head}
        name = getattr(func, '__name__', '')
        if name == 'softmax':
            member = self.member(args[0].shape[-1])
            if member is not None:
                mean, back = self.query_cells(args[0])
                return back(weigh(mean(args[0]), member, masked=self.masked))
        return explicit.get(name, func)(*args, **kwargs or {})

    def member(self, total):
        """`membership` of this number of keys, or None where they lie on no grid."""
        grid = self.grid(total) if callable(self.grid) else self.grid
        if grid is None:
            return None
        left = total - self.suffix - tokens(grid)
        prefix = left if self.prefix is None else self.prefix
        if left < 0 or left != prefix:
            return None
        self.hits += 1
        member = membership(grid, self.ratio, prefix, total)
        if self.order is not None:
            member[self.order(grid)] = member.clone()
        return member

    def query_cells(self, scores):
        """Functions that average the rows of scores by cell, and that interpolate weights back."""
        total = scores.shape[-2]
        grid = self.query_grid(total)
        if grid is None or self.side == 1:
            return (lambda x: x), (lambda x: x)
        self.averaged += 1
        prefix = total - self.suffix - tokens(grid) if self.prefix is None else self.prefix
        return [matrix.to(scores).matmul for matrix in
                query_matrices(grid, self.side, prefix, total)]

    def attend(self, query, key, value, attn_mask=None, dropout_p=0., is_causal=False, scale=None,
               enable_gqa=False):
        """What ``scaled_dot_product_attention`` is defined to be."""
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        hidden = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            hidden = ~attn_mask
        elif attn_mask is not None:
            scores = scores + attn_mask
        member = self.member(scores.shape[-1])
        if member is None:
            return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value
        mean, back = self.query_cells(scores)
        return back(weigh(mean(scores), member, hidden, self.masked)) @ value

    def multi_head(self, query, key, value, embed_dim_to_check, num_heads, in_proj_weight,
                   in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight,
                   out_proj_bias, attn_mask=None, **kwargs):
        """``nn.MultiheadAttention``, N x B x C."""
        biases = [None] * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        projected = [F.linear(x, weight, bias).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
                     for x, weight, bias in zip((query, key, value), in_proj_weight.chunk(3),
                                                biases)]
        if attn_mask is not None:  # B h x Nq x N; torch has made -inf of what is hidden
            attn_mask = attn_mask.unflatten(0, (-1, num_heads)) == 0
        out = self.attend(*projected, attn_mask).permute(2, 0, 1, 3).flatten(2)
        return F.linear(out, out_proj_weight, out_proj_bias), None


def weigh(scores, member, hidden=None, masked=None):
    """The softmax of each cell's mean score and log of its size, spread over its members.

    Args:
        scores: ... x Nq x N.
        member: N x M, as `membership` gives it.
        hidden: True where a query does not see a key; a cell is hidden if all of its members are.
        masked: Keys whose score is at or below this are not there, for their query.
    """
    member = member.to(scores)
    there = (scores.new_ones(len(member)) if masked is None else (scores > masked).to(scores))
    n = there @ member
    means = scores.where(there > 0, 0) @ member / n.clamp(min=1) + n.log()
    if hidden is not None:
        means = means.masked_fill((~hidden).to(scores) @ member == 0, -math.inf)
    return means.softmax(-1) / n.clamp(min=1) @ member.T * there
