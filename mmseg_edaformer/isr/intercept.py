"""ISR on attention that knows nothing of it: keys are reduced where they meet the queries.

While an attention module's own forward runs, a ``TorchFunctionMode`` watches the calls that make an
attention: ``scaled_dot_product_attention``, ``multi_head_attention_forward``, or the product of
queries and keys, what is added to it, its softmax, and its product with the values. Keys, values,
biases and masks are reduced on the way in; everything else is the module's own code. That is why no
forward is copied, why norms, rotations and convolutions on keys and values see them whole, and why
it works for any module whose keys lie on a grid.

Source of the formula: `pooling`. Shapes: N keys before, M after; h heads, d channels of each.
"""
import functools
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import RatioError
from . import pooling
from .key_layout import Call
from .pooling import Grid
from .reducers import MergedKeys, PooledKeys, PresentKeys
from .registry import AttentionRule


@dataclass(frozen=True)
class Setting:
    """What is asked of an attention layer; that of a trained model is the default.

    ``keys`` is a number of keys to stay near, whatever the size of the map, or None; ``strict``
    makes it an error that the keys lie on no grid.
    """
    ratio: int = 1
    method: str = 'average'
    keys: int | None = None
    strict: bool = False

    @property
    def off(self) -> bool:
        return self.ratio == 1 and self.keys is None

    def multiplier(self, total: int) -> int:
        """The ratio for this number of keys; steps as `EmbeddingFreeAttention.multiplier` does."""
        ratio = self.ratio
        if self.keys is not None:
            while total > self.keys * ratio * (ratio + 1):
                ratio += 1
        return ratio


@dataclass
class Reduction:
    """What a reduced module carries besides its weights.

    Not a submodule: ``owners`` are modules elsewhere in the model that the grid is read from, and
    under ``@name`` one around the module that has an attribute of that name. ``ran`` says whether
    the module's forward was called since.
    """
    setting: Setting
    rule: AttentionRule
    owners: dict[str, nn.Module]
    ran: bool = False

    def recorded(self) -> list[nn.Module]:
        """The modules whose maps are recorded."""
        return [owner for name, owner in self.owners.items()
                if self.rule.grid.recorded and not name.startswith('@')]


@dataclass
class Record:
    """What one forward pass did in a module: keys before and after, or why nothing was done."""
    keys: tuple[int, int] | None = None
    ratio: int = 1
    reason: str = ''


_records: dict[nn.Module, Record] | None = None


@contextmanager
def recording() -> Iterator[dict[nn.Module, Record]]:
    """Collect a `Record` for each reduced module that runs within the block."""
    global _records
    _records = {}
    try:
        yield _records
    finally:
        _records = None


class Interception(TorchFunctionMode):
    """Reduces the attention of one forward pass of one module.

    Args:
        module: The attention module.
        reduction: How to reduce it.
        args: Positional arguments of its forward.
        kwargs: The others.
    """

    def __init__(self, module: nn.Module, reduction: Reduction, args: tuple[Any, ...],
                 kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.reduction = reduction
        self.call = Call(module, args, kwargs, reduction.owners)
        self.seen: list[int] = []
        self.reduced: tuple[int, int] | None = None
        self.ratio = 1
        self.kept = ''
        # Of the explicit attention under way, if any.
        self.total = 0
        self.unfolded = False  # scores end with the rows and columns of the keys
        self.queries = 0
        self.single = 0
        self.pool: PooledKeys | None = None
        self.normalised = False
        self.scores: list[Any] = []
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
        followed = any(self._follows(arg) for arg in (*args, *kwargs.values()))
        if followed and name in _SHAPES:
            out = func(*args, **kwargs)
            if self.pool is None:
                return out
            if isinstance(out, torch.Size) and out and out[-1] == self.pool.left:
                return torch.Size((*out[:-1], self.total))  # the module's code may count its keys
            if name == 'size' and isinstance(out, int) and out == self.pool.left and (
                    next(iter((*args[1:], *kwargs.values())), None) in (-1, args[0].dim() - 1)):
                return self.total
            if isinstance(out, Tensor):
                self.scores.append(out if torch.compiler.is_compiling() else weakref.ref(out))
            return out
        if followed and not self._bears(name, *args):
            raise RatioError(f'{type(self.module).__name__} cannot be reduced: it uses {name} on '
                             'its scores or weights, which ISR cannot repeat with fewer keys. '
                             'register_isr tells that it is irreducible')
        out = self._call(func, name, args, kwargs)
        if self.pool is not None and isinstance(out, Tensor) and (
                followed or self.pool is not under_way):
            # Weakly, or all that leads to the weights would stay in memory.
            self.scores.append(out if torch.compiler.is_compiling() else weakref.ref(out))
        return out

    def _call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...],
              kwargs: dict[str, Any]) -> Any:
        """A function with what concerns the keys reduced."""
        if name in _ATTENTION:
            return getattr(self, _ATTENTION[name])(func, *args, **kwargs)
        if name == 'linear' and self.reduction.rule.projections:
            return self._linear(func, *args, **kwargs)
        if name in _MIXES and self._mixes(*args, **kwargs):
            return self._mix_heads(func, *args, **kwargs)
        if name in _MAPS:
            out = func(*args, **kwargs)
            self.call.maps.append((out.shape[-2], out.shape[-1]))
            return out
        if self.pool is not None:
            if name in _RESHAPES:
                return func(*self._reshape(args), **kwargs)
            if name in _ADDS:
                return func(*self._add(args), **kwargs)
            if name in SOFTMAX:
                return self._softmax(func, *args, **kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Name the module if its own code cannot go on with fewer keys."""
        try:
            yield
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if self.pool is None or isinstance(error, RatioError):
                raise
            raise RatioError(
                f'{type(self.module).__name__} cannot be reduced: what it does with its scores '
                f'needs all {self.total} keys, not {self.pool.left} ({error}). register_isr tells '
                'that it is irreducible') from error

    def _follows(self, x: Any) -> bool:
        """Whether this is the scores or the weights of an attention, or is made from them."""
        if isinstance(x, (list, tuple)):
            return any(self._follows(part) for part in x)
        return isinstance(x, Tensor) and any(
            (scores() if isinstance(scores, weakref.ref) else scores) is x
            for scores in self.scores)

    def _bears(self, name: str, *args: Any) -> bool:
        """Whether a function does the same to scores or weights of fewer keys.

        Scores may be scaled, shifted, mixed over heads and cut. Weights, which a cell has in place
        of all its members, may be scaled and mixed, but nothing else may be added to them.
        """
        if self.pool is None:
            return False
        if name == 'conv2d':  # over heads
            return tuple(args[1].shape[-2:]) == (1, 1)
        if self.normalised and name in ('__getitem__', '__setitem__'):
            return name == '__getitem__' and args[0][args[1]].shape[-1] == self.pool.left
        if self.normalised and name in _ADDS:
            return all(self._follows(arg) for arg in args)
        if name in _PRODUCTS and sum(self._follows(arg) for arg in args) > 1:
            return False
        if name in ('max', 'amax'):  # of each query, or a floor that nothing reaches
            if len(args) > 1 and isinstance(args[1], Tensor):
                return args[1].numel() == 1 and bool(args[1] <= pooling.MASKED)
            return not self.normalised and (len(args) < 2 or args[1] in (-1, args[0].dim() - 1))
        if name in ('__getitem__', '__setitem__'):
            return self._spares_cells(*args[:2])
        if not self.normalised and self.queries == self.pool.left and name == 'transpose':
            return args[0].dim() - 1 not in [axis % args[0].dim() for axis in args[1:3]]
        return name in _BEARS or name in _ADDS

    def _spares_cells(self, x: Tensor, index: Any) -> bool:
        """Whether an index takes all cells of the keys, or single tokens in front alone."""
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, Tensor) for part in index):
            return False
        if not any(part is Ellipsis for part in index) and len(index) - index.count(None) < x.dim():
            return True
        last = index[-1]
        if isinstance(last, int):
            return 0 <= last < self.single
        return last is Ellipsis or (isinstance(last, slice) and last.step is None and (
            last.start or 0) in (0, self.single) and last.stop in (
                None, *((self.single,) if not last.start and self.single else ())))

    def finish(self) -> None:
        """Say what became of the keys: called when the forward has ended."""
        if self.reduced is None and self.reduction.rule.grid.spares(self.call):
            return
        if self.pool is not None:
            raise RatioError(f'{type(self.module).__name__} cannot be reduced: its scores met no '
                             'values that ISR recognises')
        if self.reduced is None:
            self.kept = (f'its {_listed(self.seen)} keys lie on no grid that ISR finds '
                         f'({_listed(self.reduction.rule.grid.find(self.call))})'
                         if self.seen else 'its forward ran no attention that ISR recognises')
            if self.reduction.setting.strict:
                raise RatioError(f'{type(self.module).__name__} cannot be reduced: {self.kept}')
            if _records is None and not torch.compiler.is_compiling():
                warnings.warn(f'ISR leaves {type(self.module).__name__} as it is: {self.kept}',
                              stacklevel=3)
        if _records is not None:
            _records[self.module] = Record(self.reduced, self.ratio, self.kept)

    def _find(self, keys: Tensor) -> PooledKeys | None:
        """The pool for keys ... x N x d, if they lie on the grid and there is something to do."""
        total = keys.shape[-2]
        layout = self.call.layout(self.reduction.rule.grid, self._prefixes(), total,
                                  self._suffix())
        if layout is None:
            self.seen.append(total)
            return None
        self.single = layout.prefix
        setting = self.reduction.setting
        ratio = setting.multiplier(total)
        ratio, self.kept = self.reduction.rule.grid.fitting(self.call, ratio, setting.method)
        left = pooling.num_keys(layout, total, ratio)
        self.reduced, self.ratio = (total, left), ratio
        if left == total:
            self.seen.append(total)
            return None
        if setting.method == 'bipartite':
            weights = pooling.merging(keys, layout, ratio)
            self.reduced = (total, weights.shape[-1])
            return MergedKeys(weights)
        present = self.reduction.rule.grid.present(self.call)
        if present is not None:
            return PresentKeys(layout, ratio, setting.method, total, present)
        return PooledKeys(layout, ratio, setting.method, total)

    def _prefixes(self) -> tuple[int, ...]:
        """How many single tokens may stand in front of the grid."""
        prefix = self.reduction.rule.prefix
        if isinstance(prefix, tuple):
            counts = [part if isinstance(part, int) else
                      _count(self.call.owners.get(f'@{part}'), part) for part in prefix]
            return tuple(itertools.accumulate(counts, initial=0))
        if prefix is None:
            return ()
        return (int(getattr(self.module, prefix)) if isinstance(prefix, str) else prefix,)

    def _suffix(self) -> int:
        suffix = self.reduction.rule.suffix
        if isinstance(suffix, int):
            return suffix
        return _count(self.call.owners[f'@{suffix}'], suffix)

    def _linear(self, func: Callable[..., Tensor], input: Tensor, weight: Tensor,
                bias: Tensor | None = None) -> Tensor:
        """A projection to keys and values, of reduced tokens: averaging commutes with it.

        The module's code reshapes its output with the number of tokens from before, so the reduced
        ones are put into the first rows, and the rest is left as it comes and never read.
        """
        name = next((name for name in self.reduction.rule.projections
                     if getattr(getattr(self.module, name, None), 'weight', None) is weight), None)
        pool = None
        if name is not None and all(map(self._plain, self.reduction.rule.projections)) and (
                self.reduction.setting.method == 'average') and isinstance(
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
        """See that what was projected from reduced tokens serves one attention alone."""
        if self.projected and self.spent:
            raise RatioError(f'{type(self.module).__name__} cannot be reduced: it attends more '
                             'than once, so its rule may name no projections')
        self.spent = True

    def _fused(self, func: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
               attn_mask: Tensor | None = None, dropout_p: float = 0., is_causal: bool = False,
               **kwargs: Any) -> Tensor:
        pool = None if is_causal else self._find(key)
        if pool is not None:
            self._spend()
            key, value = self._tokens(pool, key), self._tokens(pool, value)
            attn_mask = pool.mask(attn_mask, query)
        return func(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)

    def _multi_head(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``F.multi_head_attention_forward``: before the projections, which commute with pooling.

        Its second result, the attention weights, becomes None.
        """
        call = {**dict(zip(_MULTI_HEAD, args)), **kwargs}
        query, key, value = (call[name] for name in ('query', 'key', 'value'))
        if call.get('is_causal') or query.dim() != 3:
            return func(*args, **kwargs)
        heads, length = call['num_heads'], query.shape[0]
        tokens = key.transpose(0, 1).unsqueeze(1)  # N B C -> B 1 N C
        pool = self._find(_projected_keys(call) if self.reduction.setting.method == 'bipartite'
                          else tokens)
        if pool is None:
            return func(*args, **kwargs)
        call['key'] = pool.tokens(tokens).squeeze(1).transpose(0, 1)
        call['value'] = call['key'] if value is key else (
            pool.tokens(value.transpose(0, 1).unsqueeze(1)).squeeze(1).transpose(0, 1))
        masks = []  # each B or 1, h or 1, Nq or 1, M
        if (mask := call.get('attn_mask')) is not None:
            masks.append(pool.columns(mask[None, None] if mask.dim() == 2 else
                                      mask.unflatten(0, (-1, heads))))
        if (padding := call.get('key_padding_mask')) is not None:
            masks.append(pool.columns(padding[:, None, None]))
        if pool.uneven:
            masks.append(pool.log_counts(query.new_empty(1, 1, 1, 1)).reshape(-1, 1, 1, pool.left))
        call['key_padding_mask'], call['attn_mask'] = None, None
        if masks:
            mask = functools.reduce(torch.add, (
                torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -math.inf)
                if mask.dtype == torch.bool else mask for mask in masks))
            call['attn_mask'] = (mask[0, 0].expand(length, -1) if mask.shape[:2] == (1, 1) else
                                 mask.expand(key.shape[1], heads, length, -1).flatten(0, 1))
        call['need_weights'] = False
        return func(**call)

    def _product(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A matrix product: of queries and keys, of weights and values, or another."""
        *bias, left, right = args
        if self.pool is None:
            # What follows the scores of keys on no grid is their product with the values.
            pool = None if right.shape[-2] in self.seen else (
                self._find(right.transpose(-2, -1)))
            if pool is not None:
                self.pool, self.total, self.normalised = pool, right.shape[-1], False
                self.queries = left.shape[-2]
                right = self._tokens(pool, right.transpose(-2, -1)).transpose(-2, -1)
                bias = [pool.columns(bias[0])] if bias and bias[0].shape[-1] == self.total else bias
        elif left.shape[-1] == self.pool.left and right.shape[-2] == self.total:
            right = self._values(right, left)
        elif left.shape[-1] == self.total and right.shape[-2] == self.pool.left:
            left = self._values(left.transpose(-2, -1), right).transpose(-2, -1)
        return func(*bias, left, right, **kwargs)

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
                pool = None if keys.shape[-1] in self.seen else self._find(keys)
                if pool is not None:
                    self.pool, self.total, self.normalised = pool, keys.shape[-2], False
                    self.queries = dict(zip(names[0], left.shape)).get(result[-2:-1], 0)
                    right = _from_end(self._tokens(pool, keys),
                                      [names[1].index(name) for name in order])
        elif names[0][-1] in names[1] and left.shape[-1] == self.pool.left:
            axis = names[1].index(names[0][-1])
            if right.shape[axis] == self.total:
                other = next(i for i in reversed(range(right.dim())) if i != axis)
                right = _from_end(self._values(_to_end(right, [axis, other]), left),
                                  [axis, other])
        return func(equation, left, right)

    def _values(self, values: Tensor, weights: Tensor) -> Tensor:
        """Reduced values, ... x N x d; ends the explicit attention under way."""
        assert self.pool is not None
        if not self._follows(weights):
            raise RatioError(f'{type(self.module).__name__} cannot be reduced: what it does with '
                             'its weights is hidden from ISR')
        pool, self.pool = self.pool, None
        if not self.normalised:
            raise RatioError(f'{type(self.module).__name__} cannot be reduced: it weighs its '
                             'values without a softmax that ISR knows')
        self._spend()
        return self._tokens(pool, values)

    def _softmax(self, func: Callable[..., Tensor], scores: Tensor, *args: Any,
                 **kwargs: Any) -> Tensor:
        assert self.pool is not None
        if scores.shape[-1] == self.pool.left:
            dim = args[0] if args else kwargs.get('dim')
            if dim not in (-1, scores.dim() - 1):
                raise RatioError(f'{type(self.module).__name__} cannot be reduced: its softmax is '
                                 f'over dimension {dim} of its scores, not over its keys')
            self.normalised = True
            if self.pool.uneven:
                scores = scores + self.pool.log_counts(scores)
        return func(scores, *args, **kwargs)

    def _mixes(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Whether a linear map or a convolution is one over the heads of the weights."""
        if self.pool is None or not self.normalised:
            return False
        keys = (self.queries, self.pool.left)
        if weight.dim() == 4:
            return input.shape[-2:] == keys and weight.shape[-2:] == (1, 1)
        return input.shape[-3:-1] == keys

    def _mix_heads(self, func: Callable[..., Tensor], input: Tensor, weight: Tensor,
                   bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """A map over the heads of the weights: each of the n keys of a cell gets the bias.

        Linear, ... x M x h (CaiT), or a convolution, h x Nq x M (EfficientFormerV2).
        """
        assert self.pool is not None
        last = weight.dim() == 4
        if bias is None:
            return func(input, weight, bias, *args, **kwargs)
        counts = self.pool.log_counts(input if last else input.transpose(-2, -1)).exp()
        bias = bias.view(-1, 1, 1) * counts if last else counts.unsqueeze(-1) * bias
        return func(input, weight, None, *args, **kwargs) + bias

    def _add(self, args: tuple[Any, ...]) -> list[Any]:
        """Arguments of an elementwise function with what meets the scores reduced as they are."""
        assert self.pool is not None
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.dim()]
        if self.unfolded and any(_ends_with(x, self.pool.cells) for x in tensors):
            # A bias in two parts, for the rows of the keys and for their columns (MViTv2).
            return [self.pool.sides(arg) if isinstance(arg, Tensor) and arg.dim() > 1 and
                    not _ends_with(arg, self.pool.cells) else arg for arg in args]
        scores = next((x for x in tensors if x.shape[-1] == self.pool.left), None)
        if scores is not None:
            return [self.pool.columns(arg, scores) if isinstance(arg, Tensor) and arg.dim() and
                    arg.shape[-1] == self.total else arg for arg in args]
        if self.single and any(x.shape[-1] == self.pool.left - self.single for x in tensors):
            # Of the scores without those of the single tokens in front (RegionViT).
            return [self._behind(arg) if isinstance(arg, Tensor) and arg.dim() and
                    arg.shape[-1] == self.total - self.single else arg for arg in args]
        return list(args)

    def _behind(self, x: Tensor) -> Tensor:
        """Reduce what is added to the scores behind the single tokens in front."""
        assert self.pool is not None
        return self.pool.columns(F.pad(x, (self.single, 0)))[..., self.single:]

    def _reshape(self, args: tuple[Any, ...]) -> list[Any]:
        """Arguments of a reshape with the number of keys set to what is left of them."""
        assert self.pool is not None
        x, shape = args[0], list(args[1:])
        if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)):
            shape = list(shape[0])
        pool = self.pool
        if not shape or isinstance(shape[0], torch.dtype):
            return list(args)
        if x.shape[-1] == pool.left and shape[-1] == self.total and (
                x.shape[-2:-1] == (self.queries,)):
            shape[-1] = pool.left
        elif pool.grid is not None:
            rows, columns = pool.cells
            if x.shape[-1] == rows * columns and tuple(shape[-2:]) == pool.grid:
                shape[-2:] = rows, columns
                self.unfolded = True
            elif _ends_with(x, pool.cells) and shape[-1] == pool.grid[0] * pool.grid[1]:
                shape[-1] = rows * columns
                self.unfolded = False
        return [x, *shape]


_ATTENTION = {'scaled_dot_product_attention': '_fused',
              'multi_head_attention_forward': '_multi_head', 'einsum': '_einsum',
              **dict.fromkeys(('matmul', '__matmul__', 'bmm', 'baddbmm'), '_product')}
_MAPS = {'conv2d', 'avg_pool2d', 'max_pool2d', 'adaptive_avg_pool2d', 'adaptive_max_pool2d'}
_MIXES = {'linear', 'conv2d'}
_RESHAPES = {'view', 'reshape'}
SOFTMAX = {'softmax'}
_ADDS = {'add', 'add_', '__add__', '__radd__', '__iadd__', 'sub', '__sub__', 'masked_fill',
         'masked_fill_', 'where'}
_SHAPES = {'__get__', 'size', 'dim'}
_PRODUCTS = {'mul', 'mul_', '__mul__', '__rmul__', '__imul__', 'div', 'div_', '__truediv__',
             '__itruediv__', 'matmul', '__matmul__', 'bmm', 'baddbmm', 'einsum'}
_BEARS = {*_ATTENTION, *_MIXES, *_RESHAPES, *SOFTMAX, 'dropout', 'mul', 'mul_', '__mul__',
          '__rmul__', '__imul__', 'div', 'div_', '__truediv__', '__itruediv__', 'permute',
          'transpose', 'flatten', 'unsqueeze', 'squeeze', 'expand', 'contiguous', 'clone', 'to',
          'type', 'type_as', 'float', 'half', 'bfloat16'}
_MULTI_HEAD = ('query', 'key', 'value', 'embed_dim_to_check', 'num_heads', 'in_proj_weight',
               'in_proj_bias', 'bias_k', 'bias_v', 'add_zero_attn', 'dropout_p', 'out_proj_weight',
               'out_proj_bias')


def resolve(module: nn.Module, path: str) -> tuple[bool, Any]:
    """Whether there is something at a path of attributes below a module, and what."""
    value: Any = module
    for key in path.split('.'):
        if not hasattr(value, key):
            return False, None
        value = getattr(value, key)
    return True, value


def _count(module: nn.Module | None, path: str) -> int:
    """Tokens that a module declares at a path: a number, or n tokens as 1 x n x C, n x C or C."""
    value = module and resolve(module, path)[1]
    if isinstance(value, Tensor):
        return value.shape[-2] if value.dim() > 1 else 1
    return int(value or 0)


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


def _ends_with(x: Tensor, sizes: Grid) -> bool:
    return x.dim() > 1 and (x.shape[-2], x.shape[-1]) == sizes


def _listed(values: Iterable[Any]) -> str:
    return ', '.join('x'.join(map(str, value)) if isinstance(value, tuple) else str(value)
                     for value in dict.fromkeys(values)) or 'none'
