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
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import RatioError
from . import pooling
from .grids import Call, GridSource
from .pooling import Grid, Layout


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

    def multiplier(self, layout: Layout, total: int) -> int:
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
    under ``@name`` one around the module that has an attribute of that name.
    """
    setting: Setting
    grid: GridSource
    prefix: int | str | None
    suffix: int | str = 0
    owners: dict[str, nn.Module] = field(default_factory=dict)
    projections: tuple[str, ...] = ()

    def recorded(self) -> list[nn.Module]:
        """The modules whose maps are recorded."""
        return [owner for name, owner in self.owners.items()
                if self.grid.recorded and not name.startswith('@')]


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
        self.queries = 0
        self.single = 0
        self.pool: Pool | None = None
        self.normalised = False
        # Projected from reduced tokens: keys and values stand in their first rows.
        self.projected = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if name in _ATTENTION:
            return getattr(self, _ATTENTION[name])(func, *args, **kwargs)
        if name == 'linear' and self.reduction.projections:
            return self._linear(func, *args, **kwargs)
        if self.pool is not None and self.normalised and name in _MIXES:
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
            if name in _SOFTMAX:
                return self._softmax(func, *args, **kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Name the module if its own code cannot go on with fewer keys."""
        try:
            yield
        except RuntimeError as error:
            if self.pool is None or isinstance(error, RatioError):
                raise
            raise RatioError(
                f'{type(self.module).__name__} cannot be reduced: what it does with its scores '
                f'needs all {self.total} keys, not {self.pool.left} ({error}). register_isr tells '
                'that it is irreducible') from error

    def finish(self) -> None:
        """Say what became of the keys: called when the forward has ended."""
        if self.reduced is None and self.reduction.grid.spares(self.call):
            return
        if self.reduced is None:
            self.kept = (f'its {_listed(self.seen)} keys lie on no grid that ISR finds '
                         f'({_listed(self.call.grids(self.reduction.grid))})'
                         if self.seen else 'its forward ran no attention that ISR recognises')
            if self.reduction.setting.strict:
                raise RatioError(f'{type(self.module).__name__} cannot be reduced: {self.kept}')
            if _records is None and not torch.compiler.is_compiling():
                warnings.warn(f'ISR leaves {type(self.module).__name__} as it is: {self.kept}',
                              stacklevel=3)
        if _records is not None:
            _records[self.module] = Record(self.reduced, self.ratio, self.kept)

    def _find(self, keys: Tensor) -> 'Pool | None':
        """The pool for keys ... x N x d, if they lie on the grid and there is something to do."""
        total = keys.shape[-2]
        layout = self.call.layout(self.reduction.grid, self._prefix(), total,
                                  self._suffix())
        if layout is None:
            self.seen.append(total)
            return None
        self.single = layout.prefix
        setting = self.reduction.setting
        ratio = setting.multiplier(layout, total)
        ratio, self.kept = self.reduction.grid.fitting(
            self.call, ratio, setting.method)
        left = pooling.num_keys(layout, total, ratio)
        self.reduced, self.ratio = (total, left), ratio
        if left == total:
            self.seen.append(total)
            return None
        if setting.method == 'bipartite':
            weights = pooling.merging(keys, layout, ratio)
            self.reduced = (total, weights.shape[-1])
            return MergedKeys(weights)
        present = self.reduction.grid.present(self.call)
        if present is not None:
            return PresentKeys(layout, ratio, setting.method, total, present)
        return PooledKeys(layout, ratio, setting.method, total)

    def _prefix(self) -> int | None:
        prefix = self.reduction.prefix
        return int(getattr(self.module, prefix)) if isinstance(prefix, str) else prefix

    def _suffix(self) -> int:
        suffix = self.reduction.suffix
        if isinstance(suffix, int):
            return suffix
        return int(getattr(self.call.owners[f'@{suffix}'], suffix))

    def _linear(self, func: Callable[..., Tensor], input: Tensor, weight: Tensor,
                bias: Tensor | None = None) -> Tensor:
        """A projection to keys and values, of reduced tokens: averaging commutes with it.

        The module's code reshapes its output with the number of tokens from before, so the reduced
        ones are put into the first rows, and the rest is left as it comes and never read.
        """
        name = next((name for name in self.reduction.projections
                     if getattr(self.module, name).weight is weight), None)
        pool = None
        if name is not None and self.reduction.setting.method == 'average' and isinstance(
                getattr(self.module, 'k_norm', None), (nn.Identity, type(None))):
            pool = self._find(input)
        if pool is None:
            return func(input, weight, bias)
        self.projected = True
        queries = len(weight) // 3 if name == 'qkv' else 0
        weights, biases = weight.split([queries, len(weight) - queries]), (
            (None, None) if bias is None else bias.split([queries, len(weight) - queries]))
        reduced = func(pool.tokens(input), weights[1], biases[1])
        out = reduced.new_empty(*input.shape[:-1], len(weight))
        if queries:
            out[..., :queries] = func(input, weights[0], biases[0])
        out[..., :pool.left, queries:] = reduced
        return out

    def _tokens(self, pool: 'Pool', x: Tensor) -> Tensor:
        """Keys or values, reduced unless they are already."""
        return x.narrow(-2, 0, pool.left) if self.projected else pool.tokens(x)

    def _fused(self, func: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
               attn_mask: Tensor | None = None, dropout_p: float = 0., is_causal: bool = False,
               **kwargs: Any) -> Tensor:
        pool = None if is_causal else self._find(key)
        if pool is not None:
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
            right = self._values(right)
        elif left.shape[-1] == self.total and right.shape[-2] == self.pool.left:
            left = self._values(left.transpose(-2, -1)).transpose(-2, -1)
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
                right = _from_end(self._values(_to_end(right, [axis, other])), [axis, other])
        return func(equation, left, right)

    def _values(self, values: Tensor) -> Tensor:
        """Reduced values, ... x N x d; ends the explicit attention under way."""
        assert self.pool is not None
        pool, self.pool = self.pool, None
        if pool.uneven and not self.normalised:
            raise RatioError(f'{type(self.module).__name__} weighs its values without a softmax '
                             'that ISR knows, so cells of different sizes cannot be weighed right')
        return self._tokens(pool, values)

    def _softmax(self, func: Callable[..., Tensor], scores: Tensor, *args: Any,
                 **kwargs: Any) -> Tensor:
        assert self.pool is not None
        if scores.shape[-1] == self.pool.left:
            self.normalised = True
            if self.pool.uneven:
                scores = scores + self.pool.log_counts(scores)
        return func(scores, *args, **kwargs)

    def _mix_heads(self, func: Callable[..., Tensor], x: Tensor, weight: Tensor,
                   bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """A map over the heads of the weights: each of the n keys of a cell gets the bias.

        Linear, ... x M x h (CaiT), or a convolution, h x Nq x M (EfficientFormerV2).
        """
        assert self.pool is not None
        last = weight.dim() == 4
        if bias is None or x.shape[-1 if last else -2] != self.pool.left:
            return func(x, weight, bias, *args, **kwargs)
        counts = self.pool.log_counts(x if last else x.transpose(-2, -1)).exp()
        bias = bias.view(-1, 1, 1) * counts if last else counts.unsqueeze(-1) * bias
        return func(x, weight, None, *args, **kwargs) + bias

    def _add(self, args: tuple[Any, ...]) -> list[Any]:
        """Arguments of an elementwise function with what meets the scores reduced as they are."""
        assert self.pool is not None
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.dim()]
        scores = next((x for x in tensors if x.shape[-1] == self.pool.left), None)
        if scores is not None:
            return [self.pool.columns(arg, scores) if isinstance(arg, Tensor) and arg.dim() and
                    arg.shape[-1] == self.total else arg for arg in args]
        if self.single and any(x.shape[-1] == self.pool.left - self.single for x in tensors):
            # Of the scores without those of the single tokens in front (RegionViT).
            return [self._behind(arg) if isinstance(arg, Tensor) and arg.dim() and
                    arg.shape[-1] == self.total - self.single else arg for arg in args]
        grid = self.pool.grid
        if grid is None or not any(_ends_with(x, self.pool.cells) for x in tensors):
            return list(args)
        # A bias in two parts, for the rows of the keys and for their columns (MViTv2).
        return [self.pool.sides(arg) if isinstance(arg, Tensor) and arg.dim() > 1 and
                not _ends_with(arg, self.pool.cells) else arg for arg in args]

    def _behind(self, x: Tensor) -> Tensor:
        """Reduce what is added to the scores behind the single tokens in front."""
        assert self.pool is not None
        return self.pool.columns(F.pad(x, (self.single, 0)))[..., self.single:]

    def _reshape(self, args: tuple[Any, ...]) -> list[Any]:
        """Arguments of a reshape with the number of keys set to what is left of them."""
        assert self.pool is not None
        x, *shape = args
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
            elif _ends_with(x, pool.cells) and shape[-1] == pool.grid[0] * pool.grid[1]:
                shape[-1] = rows * columns
        return [x, *shape]


class PooledKeys:
    """Cells of a fixed layout: the same for every batch element and head."""

    def __init__(self, layout: Layout, ratio: int, method: str, total: int) -> None:
        self.layout, self.ratio, self.method, self.total = layout, ratio, method, total
        self.left = pooling.num_keys(layout, total, ratio)
        self.grid: Grid | None = layout.grids[0] if len(layout.grids) == 1 else None
        self.cells: Grid = pooling.cells(layout.grids[0], ratio)
        # Even cells weigh alike, so that log n cancels and no mask costs a fast kernel.
        sizes = layout.sizes(total)
        self.uneven = sizes[0] + sizes[-1] > 0 or any(
            side % ratio for grid in layout.grids for side in grid)

    def tokens(self, x: Tensor) -> Tensor:
        return pooling.pool_tokens(x, self.layout, self.ratio, self.method)

    def columns(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        pool = pooling.pool_mask if x.dtype == torch.bool else pooling.pool_bias
        return pool(x, self.layout, self.ratio)

    def sides(self, x: Tensor) -> Tensor:
        """A bias for the rows of the keys, ... x h x 1, or for the columns, ... x 1 x w."""
        assert self.grid is not None
        rows, columns = self.grid
        if x.shape[-2] == rows and rows != 1:
            x = pooling.pool_bias(x.transpose(-2, -1), Layout(((rows, 1),)),
                                  self.ratio).transpose(-2, -1)
        if x.shape[-1] == columns and columns != 1:
            x = pooling.pool_bias(x, Layout(((columns, 1),)), self.ratio)
        return x

    def log_counts(self, scores: Tensor) -> Tensor:
        return pooling.counts(self.layout, self.total, self.ratio,
                              scores.device).log().to(scores.dtype)

    def mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The mask of ``scaled_dot_product_attention``, where True means that a key is seen."""
        if mask is not None and mask.shape[-1] == self.total:
            mask = ~self.columns(~mask, query) if mask.dtype == torch.bool else (
                self.columns(mask, query))
        if not self.uneven:
            return mask
        logs = self.log_counts(query)
        if mask is None:
            return logs.expand(*query.shape[:-1], -1)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
        return mask + logs


class PresentKeys(PooledKeys):
    """Cells that average the tokens among their members, and padding only where they have none.

    ``present`` is ... x h x N. What sees no padding gets exact means; padding itself, as a query,
    does not.
    """

    def __init__(self, layout: Layout, ratio: int, method: str, total: int,
                 present: Tensor) -> None:
        super().__init__(layout, ratio, method, total)
        self.present = present
        self.share = super().tokens(present.unsqueeze(-1)).squeeze(-1)  # ... x h x M
        self.uneven = True

    def tokens(self, x: Tensor) -> Tensor:
        return self._mean(x, self.present.unsqueeze(-1), self.share.unsqueeze(-1))

    def columns(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        if x.dtype == torch.bool:
            return super().columns(x, scores)
        return self._mean(x.unsqueeze(-1), self.present[..., None, :, None],
                          self.share[..., None, :, None]).squeeze(-1)

    def log_counts(self, scores: Tensor) -> Tensor:
        counts = pooling.counts(self.layout, self.total, self.ratio, scores.device)
        share = torch.where(self.share > 0, self.share, 1)
        return (share * counts).log().to(scores.dtype).unsqueeze(-2)

    def _mean(self, x: Tensor, present: Tensor, share: Tensor) -> Tensor:
        present, share = present.to(x.dtype), share.to(x.dtype)
        mean = super().tokens(x * present) / share.clamp(min=1e-6)
        return torch.where(share > 0, mean, super().tokens(x))


class MergedKeys(PooledKeys):
    """Merged tokens, other ones for each batch element: `pooling.merging`."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights  # B 1 N M
        self.total, self.left = weights.shape[-2:]
        self.grid = None
        self.cells = (0, 0)
        self.uneven = True

    def tokens(self, x: Tensor) -> Tensor:
        return self.weights.transpose(-2, -1).to(x.dtype) @ x

    def columns(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        weights = self._like(x if scores is None else scores)
        if x.dtype == torch.bool:
            return ((~x).to(weights.dtype) @ (weights > 0).to(weights.dtype)) == 0
        masked = x <= pooling.MASKED
        free = (~masked).to(x.dtype) @ weights
        mean = x.masked_fill(masked, 0) @ weights / free.clamp(min=1e-6)
        return torch.where(free > 0, mean, torch.finfo(x.dtype).min)

    def log_counts(self, scores: Tensor) -> Tensor:
        # A column holds 1 / n for each of its n members.
        counts = (self._like(scores) > 0).sum(-2, keepdim=True)
        return counts.log().to(scores.dtype)

    def _like(self, scores: Tensor) -> Tensor:
        """The weights for scores ... x h x Nq x M, which may split the batch."""
        weights = self.weights.to(scores.dtype)
        return weights.reshape(*scores.shape[:-3], 1, self.total, self.left) if (
            scores.dim() > 4) else weights


Pool = PooledKeys

_ATTENTION = {'scaled_dot_product_attention': '_fused',
              'multi_head_attention_forward': '_multi_head', 'einsum': '_einsum',
              **dict.fromkeys(('matmul', '__matmul__', 'bmm', 'baddbmm'), '_product')}
_MAPS = {'conv2d', 'avg_pool2d', 'max_pool2d', 'adaptive_avg_pool2d', 'adaptive_max_pool2d'}
_MIXES = {'linear', 'conv2d'}
_RESHAPES = {'view', 'reshape'}
_SOFTMAX = {'softmax'}
_ADDS = {'add', 'add_', '__add__', '__radd__', '__iadd__', 'sub', '__sub__', 'masked_fill',
         'masked_fill_', 'where'}
_MULTI_HEAD = ('query', 'key', 'value', 'embed_dim_to_check', 'num_heads', 'in_proj_weight',
               'in_proj_bias', 'bias_k', 'bias_v', 'add_zero_attn', 'dropout_p', 'out_proj_weight',
               'out_proj_bias')


def install(module: nn.Module, reduction: Reduction) -> None:
    """Reduce a module's keys from now on: its class becomes a subclass that intercepts."""
    vars(module)['isr_reduction'] = reduction
    cls: Any = type(module)
    if hasattr(cls, 'isr_original'):
        return
    module.__class__ = _subclass(cls, _forward_reduced)
    for owner in reduction.recorded():
        vars(owner)['isr_users'] = vars(owner).get('isr_users', 0) + 1
        if vars(owner)['isr_users'] == 1:
            owner.__class__ = _subclass(type(owner), _forward_recorded)


def uninstall(module: nn.Module) -> None:
    """Give a module, and what was recorded for it alone, their own classes back."""
    reduction = module.__dict__.pop('isr_reduction', None)
    if reduction is None:
        return
    module.__class__ = getattr(type(module), 'isr_original', type(module))
    for owner in reduction.recorded():
        owner.__dict__['isr_users'] -= 1
        if owner.__dict__['isr_users'] == 0:
            owner.__dict__.pop('isr_grids', None)
            del owner.__dict__['isr_users']
            owner.__class__ = getattr(type(owner), 'isr_original', type(owner))


def _forward_reduced(original: Any, module: Any, args: tuple[Any, ...],
                     kwargs: dict[str, Any]) -> Any:
    interception = Interception(module, module.isr_reduction, args, kwargs)
    if torch.compiler.is_compiling():
        with interception:
            out = original.forward(module, *args, **kwargs)
    else:
        with interception, interception.explained():
            out = original.forward(module, *args, **kwargs)
    interception.finish()
    return out


def _forward_recorded(original: Any, module: Any, args: tuple[Any, ...],
                      kwargs: dict[str, Any]) -> Any:
    out = original.forward(module, *args, **kwargs)
    module.isr_grids = list(_maps(out))
    return out


def _maps(output: Any) -> Iterator[Grid]:
    """Sizes of all maps within an output, of whatever containers it is made."""
    if isinstance(output, Tensor):
        if output.dim() == 4:
            yield output.shape[-2], output.shape[-1]
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _maps(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _maps(value)


@functools.cache
def _subclass(cls: Any, run: Callable[..., Any]) -> type[nn.Module]:
    """A subclass whose forward is ``run``; under the same name, so that libraries know it."""
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(cls, self, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # The subclass cannot be imported, so pickle and copy are told how it is made.
        _, arguments, *state = cls.__reduce_ex__(self, protocol)
        return _restore, (cls, run, *arguments[1:]), *state

    def extra_repr(self: nn.Module) -> str:
        reduction = self.__dict__.get('isr_reduction')
        own = cls.extra_repr(self)
        return ', '.join(filter(None, (own, reduction and f'isr_ratio={reduction.setting.ratio}')))

    return type(cls.__name__, (cls,), {
        '__module__': cls.__module__, '__qualname__': cls.__qualname__, '__doc__': cls.__doc__,
        'forward': forward, '__reduce_ex__': reduce, 'extra_repr': extra_repr, 'isr_original': cls,
        'isr_parameters': tuple(inspect.signature(cls.forward).parameters)[1:]})


def _restore(cls: Any, run: Callable[..., Any], *args: Any) -> nn.Module:
    subclass = _subclass(cls, run)
    return subclass.__new__(subclass, *args)


def _projected_keys(call: dict[str, Any]) -> Tensor:
    """Keys B x h x N x d of a call of ``F.multi_head_attention_forward``."""
    weight, bias, width = call['in_proj_weight'], call['in_proj_bias'], call['embed_dim_to_check']
    weight = call['k_proj_weight'] if weight is None else weight[width:2 * width]
    keys = F.linear(call['key'], weight, None if bias is None else bias[width:2 * width])
    return keys.unflatten(-1, (call['num_heads'], -1)).permute(1, 2, 0, 3)


def _to_end(x: Tensor, axes: list[int]) -> Tensor:
    return x.movedim(axes, list(range(-len(axes), 0)))


def _from_end(x: Tensor, axes: list[int]) -> Tensor:
    return x.movedim(list(range(-len(axes), 0)), axes)


def _ends_with(x: Tensor, sizes: Grid) -> bool:
    return x.dim() > 1 and (x.shape[-2], x.shape[-1]) == sizes


def _listed(values: Iterable[Any]) -> str:
    return ', '.join('x'.join(map(str, value)) if isinstance(value, tuple) else str(value)
                     for value in dict.fromkeys(values)) or 'none'
