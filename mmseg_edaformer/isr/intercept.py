"""ISR on attention that knows nothing of it: keys and queries are reduced where they meet.

While an attention module's own forward runs, a ``TorchFunctionMode`` watches the calls that make an
attention: ``scaled_dot_product_attention``, ``multi_head_attention_forward``, or the product of
queries and keys, what is added to it, its softmax, and its product with the values. Keys, values,
biases and masks are reduced on the way in, and the results of reduced queries are spread on the way
out; everything else is the module's own code.

Source of the formula: `pooling`. Shapes: N keys before, M after; h heads, d channels of each.
"""
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat import is_exporting
from . import pooling
from .key_layout import Call, Window
from .pooling import Layout, OpenRatio, Ratio
from .reducers import MergedKeys, PooledKeys, PooledQueries, PresentKeys
from .reduction import Record, Reduction, count_tokens, is_recording, record
from .scores import ADDS, ATTENTION, MIXES, RESHAPES, SOFTMAX, ReducedScores


class Interception(ReducedScores):
    """Reduces the attention of one forward pass of one module, called with these arguments."""

    def __init__(self, module: nn.Module, reduction: Reduction, args: tuple[Any, ...],
                 kwargs: dict[str, Any]) -> None:
        super().__init__(module)
        self.reduction = reduction
        self.call = Call(module, args, kwargs, reduction.owners)
        self.seen: list[int] = []  # numbers of keys that were left alone
        self.reduced: tuple[int, int] | None = None
        self.isr_ratio: Ratio = 1
        self.kept = ''
        self.queries_reduced: tuple[int, int] | None = None
        self.query_ratio: Ratio = 1
        self.queries_kept = ''
        # Projected from reduced tokens: keys and values stand in their first rows.
        self.projected = False
        self.spent = False
        self.pooled: tuple[Tensor | None, Tensor | None] = None, None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if name == 'unflatten':  # which torch.compile cannot trace within a mode
            func, args, kwargs = Tensor.reshape, _unflattened(*args, **kwargs), {}
            name = 'reshape'
        args, kwargs = _positional(args, kwargs)
        under_way = self.pool
        followed = any(self.follows(arg) for arg in (*args, *kwargs.values()))
        if followed and name in _SHAPES:
            out = func(*args, **kwargs)
            if self.pool is None:
                return out
            if isinstance(out, torch.Size):  # the module's code may count its keys and queries
                return torch.Size(self.expected(out))
            if name == 'size' and isinstance(out, int):
                return self.expected(args[0].shape)[next(iter((*args[1:], *kwargs.values())))]
            if isinstance(out, Tensor):
                self.follow(out)
            return out
        if followed and not self.bears(name, *args):
            fewer = 'keys' if self.query_pool is None else 'queries'
            raise self.fail(f'it uses {name} on its scores or weights, which ISR cannot repeat '
                            f'with fewer {fewer}. {self.remedy}')
        out = self._call(func, name, args, kwargs)
        if self.pool is not None and isinstance(out, Tensor) and (
                followed or self.pool is not under_way):
            self.follow(out)
        return out

    def _call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...],
              kwargs: dict[str, Any]) -> Any:
        """Call a function, with whatever it takes of the keys reduced."""
        if name in ATTENTION:
            return getattr(self, ATTENTION[name])(func, *args, **kwargs)
        if name == 'linear' and self.reduction.rule.projections:
            return self._linear(func, *args, **kwargs)
        if name in MIXES and self._mixes(*args, **kwargs):
            return self._mix_heads(func, *args, **kwargs)
        if name in _MAPS:
            out = func(*args, **kwargs)
            self.call.maps.append((out.shape[-2], out.shape[-1]))
            return out
        if self.pool is not None:
            if name in RESHAPES:
                return func(*self._reshape(args), **kwargs)
            if name in ADDS:
                return func(*self._add(args, name == 'where'), **kwargs)
            if name in SOFTMAX:
                return self._softmax(func, *args, **kwargs)
        return func(*args, **kwargs)

    def finish(self) -> None:
        """Report what happened to the keys, once the forward has ended."""
        if self.reduced is None and self.reduction.rule.grid.spares(self.call):
            return
        if self.pool is not None:
            raise self.fail('its scores met no values that ISR recognises')
        if self.reduced is None:
            self.kept = (f'its {_listed(self.seen)} keys lie on no grid that ISR finds '
                         f'({_listed(self.reduction.rule.grid.find(self.call))})'
                         if self.seen else 'its forward ran no attention that ISR recognises')
            if self.reduction.setting.strict:
                raise self.fail(self.kept)
            if not is_recording() and not torch.compiler.is_compiling():
                warnings.warn(f'ISR leaves {type(self.module).__name__} as it is: {self.kept}',
                              stacklevel=3)
        if self.queries_kept and self.reduction.setting.strict:
            raise self.fail(self.queries_kept)
        record(self.module, Record(self.reduced or (0, 0), self.isr_ratio, self.kept,
                                   self.queries_reduced or (0, 0), self.query_ratio,
                                   self.queries_kept))

    def _find(self, keys: Tensor, queries: int | None = None) -> PooledKeys | None:
        """The pool for keys ... x N x d, if they lie on the grid and fewer are left.

        With a number of queries, it also finds their pool.
        """
        total = keys.shape[-2]
        layout = self._layout(total)
        if queries is not None:  # a projection to keys has none
            self.query_pool = None if layout is None else self._find_queries(queries)
        if layout is None:
            self.seen.append(total)
            return None
        self.single = layout.prefix
        setting = self.reduction.setting
        ratio = setting.multiplier(total)
        ratio, self.kept = self.reduction.rule.grid.fitting(self.call, ratio, setting.method)
        left = pooling.num_keys(layout, total, ratio)
        self.reduced, self.isr_ratio = (total, left), ratio
        is_open = isinstance(ratio, OpenRatio)  # then a question would be a guard
        if not is_open and left == total and (queries is None or self.query_pool is None):
            self.seen.append(total)
            return None
        if setting.method == 'bipartite' and left < total:
            weights = pooling.merging(keys, layout, ratio)
            self.reduced = (total, weights.shape[-1])
            return MergedKeys(weights)
        present = self.reduction.rule.grid.present(self.call)
        if present is not None:
            return PresentKeys(layout, ratio, setting.method, total, present)
        return PooledKeys(layout, ratio, setting.method, total)

    def _find_queries(self, total: int) -> PooledQueries | None:
        """The pool for this number of queries, if they lie on the grid and are to be reduced."""
        rule, setting = self.reduction.rule, self.reduction.setting
        ratio = setting.query_multiplier(total)
        self.queries_reduced, self.query_ratio, self.queries_kept = (total, total), 1, ''
        if ratio == 1:
            return None
        layout = self._layout(total)
        if not rule.queries:
            self.queries_kept = 'its queries are not known to be the tokens of a map'
        elif layout is None or layout.order is not None:
            self.queries_kept = f'its {total} queries lie on no grid that ISR finds row by row'
        elif rule.grid.present(self.call) is not None:
            self.queries_kept = 'some of its queries are padding'
        elif isinstance(rule.grid, Window) and any(side % ratio for side in layout.grids[0]):
            self.queries_kept = (f'cells of {ratio} do not fill its windows of '
                                 f'{_listed(layout.grids)}')
        else:
            ratio, self.queries_kept = rule.grid.fitting(self.call, ratio, 'average')
        if self.queries_kept or layout is None:
            return None
        pool = PooledQueries(layout, ratio, total)
        self.queries_reduced, self.query_ratio = (total, pool.left), ratio
        return pool

    def _layout(self, total: int) -> Layout | None:
        """Where this number of keys or queries lies, if on a grid that the rule finds."""
        return self.call.layout(self.reduction.rule.grid, self._prefixes(), total, self._suffix())

    def _prefixes(self) -> tuple[int, ...]:
        """Possible numbers of single tokens in front of the grid."""
        prefix = self.reduction.rule.prefix
        if isinstance(prefix, tuple):
            counts = [part if isinstance(part, int) else
                      count_tokens(self.call.owners.get(f'@{part}'), part) for part in prefix]
            return tuple(itertools.accumulate(counts, initial=0))
        if prefix is None:
            return ()
        return (int(getattr(self.module, prefix)) if isinstance(prefix, str) else prefix,)

    def _suffix(self) -> int:
        suffix = self.reduction.rule.suffix
        if isinstance(suffix, int):
            return suffix
        return count_tokens(self.call.owners[f'@{suffix}'], suffix)

    def _linear(self, func: Callable[..., Tensor], input: Tensor, weight: Tensor,
                bias: Tensor | None = None) -> Tensor:
        """A projection to keys and values, applied to reduced tokens: averaging commutes with it.

        The module's code reshapes the output to the number of tokens from before, so the reduced
        ones fill the first rows, and the rest stays uninitialised and is never read.
        """
        name = next((name for name in self.reduction.rule.projections
                     if getattr(getattr(self.module, name, None), 'weight', None) is weight), None)
        pool, setting = None, self.reduction.setting
        if name is not None and all(map(self._plain, self.reduction.rule.projections)) and (
                setting.method == 'average') and (
                not isinstance(setting.isr_ratio, OpenRatio)) and isinstance(
                getattr(self.module, 'k_norm', None), (nn.Identity, type(None))):
            pool = self._find(input)
        if pool is None or isinstance(pool, PresentKeys):
            return func(input, weight, bias)
        self.projected = True
        queries = len(weight) // 3 if name == 'qkv' else 0
        weights, biases = weight.split([queries, len(weight) - queries]), (
            (None, None) if bias is None else bias.split([queries, len(weight) - queries]))
        if input is not self.pooled[0]:  # keys and values come from the same tokens
            self.pooled = input, pool.tokens(input)
        reduced = func(self.pooled[1], weights[1], biases[1])
        out = reduced.new_empty(*input.shape[:-1], len(weight))
        if queries:
            out[..., :queries] = func(input, weights[0], biases[0])
        out[..., :pool.left, queries:] = reduced
        return out

    def _plain(self, name: str) -> bool:
        """Whether a projection is a Linear layer and nothing else: no LoRA, no hook on it."""
        layer: Any = getattr(self.module, name, None)
        return layer is None or (type(layer).forward is nn.Linear.forward and not (
            layer._forward_hooks or layer._forward_pre_hooks or 'forward' in vars(layer)))

    def _tokens(self, pool: PooledKeys, x: Tensor) -> Tensor:
        """Keys or values, reduced unless they are already."""
        return x.narrow(-2, 0, pool.left) if self.projected else pool.tokens(x)

    def _spend(self) -> None:
        """Check that what was projected from reduced tokens serves only one attention."""
        if self.projected and self.spent:
            raise self.fail('it attends more than once, so its rule may name no projections')
        self.spent = True

    def _fused(self, func: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
               attn_mask: Tensor | None = None, dropout_p: float = 0., is_causal: bool = False,
               **kwargs: Any) -> Tensor:
        pool = None if is_causal else self._find(key, query.shape[-2])
        queries = self.query_pool
        if pool is not None:
            self._spend()
            key, value = self._tokens(pool, key), self._tokens(pool, value)
            if queries is not None:
                if attn_mask is not None and attn_mask.shape[-2] == query.shape[-2]:
                    attn_mask = queries.rows(attn_mask, seen=True)
                query = queries.tokens(query)
            attn_mask = pool.mask(attn_mask, query)
        out = func(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        return out if pool is None or queries is None else queries.spread(out)

    def _multi_head(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``F.multi_head_attention_forward``, reduced before its projections.

        Pooling commutes with them. The second result, the attention weights, becomes None.
        """
        call = {**dict(zip(_MULTI_HEAD, args)), **kwargs}
        query, key, value = (call[name] for name in ('query', 'key', 'value'))
        if call.get('is_causal') or query.dim() != 3:
            return func(*args, **kwargs)
        heads, length = call['num_heads'], query.shape[0]
        tokens = key.transpose(0, 1).unsqueeze(1)  # N B C -> B 1 N C
        pool = self._find(_projected_keys(call) if self.reduction.setting.method == 'bipartite'
                          else tokens, length)
        queries = self.query_pool
        if pool is None:
            return func(*args, **kwargs)
        call['key'] = pool.tokens(tokens).squeeze(1).transpose(0, 1)
        call['value'] = call['key'] if value is key else (
            pool.tokens(value.transpose(0, 1).unsqueeze(1)).squeeze(1).transpose(0, 1))
        masks = []  # each B or 1, h or 1, Nq or 1, M
        if (mask := call.get('attn_mask')) is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, heads))
            masks.append(pool.columns(mask if queries is None else queries.rows(mask)))
        if queries is not None:
            call['query'] = queries.tokens(query.transpose(0, 1)).transpose(0, 1)
            length = queries.left
        if (padding := call.get('key_padding_mask')) is not None:
            masks.append(pool.columns(padding[:, None, None]))
        if pool.uneven:
            masks.append(pool.log_counts(query.new_empty(1, 1, 1, 1)).reshape(-1, 1, 1, pool.left))
        call['key_padding_mask'], call['attn_mask'] = None, None
        if masks:
            mask = functools.reduce(torch.add, (
                torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -math.inf)
                if mask.dtype == torch.bool else mask for mask in masks))
            if is_exporting() and mask.shape[:3] == (1, 1, 1):
                # Graphs would spell a mask out for each query.
                call['key_padding_mask'] = mask[0, 0].expand(key.shape[1], -1)
            elif mask.shape[:2] == (1, 1):
                call['attn_mask'] = mask[0, 0].expand(length, -1)
            else:
                call['attn_mask'] = mask.expand(key.shape[1], heads, length, -1).flatten(0, 1)
        call['need_weights'] = False
        out, weights = func(**call)
        if queries is not None:
            out = queries.spread(out.transpose(0, 1)).transpose(0, 1)
        return out, weights

    def _product(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A matrix product: of queries and keys, of weights and values, or another."""
        *bias, left, right = args
        if self.pool is None:
            # What follows the scores of keys on no grid is their product with the values.
            pool = None if right.shape[-2] in self.seen else (
                self._find(right.transpose(-2, -1), left.shape[-2]))
            if pool is not None:
                self._begin(pool, right.shape[-1], left.shape[-2])
                right = self._tokens(pool, right.transpose(-2, -1)).transpose(-2, -1)
                left = left if self.query_pool is None else self.query_pool.tokens(left)
                bias = [self._beside(x, left, seen=False) for x in bias]
        elif left.shape[-1] == self.pool.left and right.shape[-2] == self.total:
            right, queries = self._values(right, left)
            out = func(*bias, left, right, **kwargs)
            return out if queries is None else queries.spread(out)
        elif left.shape[-1] == self.total and right.shape[-2] == self.pool.left:
            left, queries = self._values(left.transpose(-2, -1), right)
            out = func(*bias, left.transpose(-2, -1), right, **kwargs)
            return out if queries is None else (
                queries.spread(out.transpose(-2, -1)).transpose(-2, -1))
        return func(*bias, left, right, **kwargs)

    def _begin(self, pool: PooledKeys, total: int, queries: int) -> None:
        """Begin an explicit attention of so many queries to so many keys."""
        self.pool, self.total, self.normalised, self.queries = pool, total, False, queries
        self.rows = queries if self.query_pool is None else self.query_pool.left

    def _einsum(self, func: Callable[..., Tensor], equation: str, *operands: Any) -> Tensor:
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = tuple(operands[0])
        terms, _, result = equation.replace(' ', '').partition('->')
        names = terms.split(',')
        if len(operands) != 2 or not result or '.' in equation:
            return func(equation, *operands)
        left, right = operands
        if self.pool is None:
            # Keys are indexed by the last letter of the scores, and share one with the queries.
            letter, shared = result[-1], set(names[0]) & set(names[1]) - set(result)
            if letter in names[1] and letter not in names[0] and len(shared) == 1:
                order = [letter, *shared]
                keys = _to_end(right, [names[1].index(name) for name in order])
                queries = dict(zip(names[0], left.shape)).get(result[-2:-1])
                pool = None if keys.shape[-1] in self.seen else self._find(keys, queries)
                if pool is not None:
                    self._begin(pool, keys.shape[-2], queries or 0)
                    if self.query_pool is not None:
                        order_ = [names[0].index(letter) for letter in (result[-2], *shared)]
                        left = _from_end(self.query_pool.tokens(_to_end(left, order_)), order_)
                    right = _from_end(self._tokens(pool, keys),
                                      [names[1].index(name) for name in order])
        elif names[0][-1] in names[1] and left.shape[-1] == self.pool.left:
            axis = names[1].index(names[0][-1])
            if right.shape[axis] == self.total:
                other = next(i for i in reversed(range(right.dim())) if i != axis)
                values, query_pool = self._values(_to_end(right, [axis, other]), left)
                right = _from_end(values, [axis, other])
                out = func(equation, left, right)
                if query_pool is None:
                    return out
                row = result.index(names[0][-2])
                return query_pool.spread(out.movedim(row, -2)).movedim(-2, row)
        return func(equation, left, right)

    def _values(self, values: Tensor, weights: Tensor) -> tuple[Tensor, PooledQueries | None]:
        """Reduced values, ... x N x d, and the pool of the queries; ends an explicit attention."""
        assert self.pool is not None
        if not self.follows(weights):
            raise self.fail('what it does with its weights is hidden from ISR')
        pool, self.pool = self.pool, None
        queries, self.query_pool = self.query_pool, None
        if not self.normalised:
            raise self.fail('it weighs its values without a softmax that ISR knows')
        self._spend()
        return self._tokens(pool, values), queries


_MAPS = {'conv2d', 'avg_pool2d', 'max_pool2d', 'adaptive_avg_pool2d', 'adaptive_max_pool2d'}
_SHAPES = {'__get__', 'size', 'dim'}
_MULTI_HEAD = ('query', 'key', 'value', 'embed_dim_to_check', 'num_heads', 'in_proj_weight',
               'in_proj_bias', 'bias_k', 'bias_v', 'add_zero_attn', 'dropout_p', 'out_proj_weight',
               'out_proj_bias')


def _projected_keys(call: dict[str, Any]) -> Tensor:
    """Keys B x h x N x d of a call of ``F.multi_head_attention_forward``."""
    weight, bias, width = call['in_proj_weight'], call['in_proj_bias'], call['embed_dim_to_check']
    weight = call['k_proj_weight'] if weight is None else weight[width:2 * width]
    keys = F.linear(call['key'], weight, None if bias is None else bias[width:2 * width])
    return keys.unflatten(-1, (call['num_heads'], -1)).permute(1, 2, 0, 3)


def _positional(args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with the operands of torch's functions by position."""
    named = [name for name in ('input', 'batch1', 'batch2', 'mat2', 'other', 'exponent')
             if name in kwargs]
    return ((*args, *(kwargs[name] for name in named)),
            {name: value for name, value in kwargs.items() if name not in named})


def _to_end(x: Tensor, axes: list[int]) -> Tensor:
    return x.movedim(axes, list(range(-len(axes), 0)))


def _from_end(x: Tensor, axes: list[int]) -> Tensor:
    return x.movedim(list(range(-len(axes), 0)), axes)


def _unflattened(x: Tensor, dim: int, sizes: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Arguments of the reshape that ``unflatten`` is."""
    shape = list(x.shape)
    dim %= len(shape)
    return x, [*shape[:dim], *sizes, *shape[dim + 1:]]


def _listed(values: Iterable[Any]) -> str:
    return ', '.join('x'.join(map(str, value)) if isinstance(value, tuple) else str(value)
                     for value in dict.fromkeys(values)) or 'none'
