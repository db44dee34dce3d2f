"""Scores and weights of an attention that is written out, with fewer keys and queries than it has.

Between the product of queries and keys and the product with the values, a module's own code scales,
shifts, masks, reshapes and mixes. Each of these functions either does the same with fewer, or is
given arguments that are reduced too, or is an error that names the module.
"""
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import RatioError
from . import pooling
from .pooling import Grid
from .reducers import PooledKeys, PooledQueries

ATTENTION = {'scaled_dot_product_attention': '_fused',
             'multi_head_attention_forward': '_multi_head', 'einsum': '_einsum',
             **dict.fromkeys(('matmul', '__matmul__', 'bmm', 'baddbmm'), '_product')}
"""Functions that meet keys or values, and the methods of `Interception` that run them."""
MIXES = {'linear', 'conv2d'}
RESHAPES = {'view', 'reshape'}
SOFTMAX = {'softmax'}
ADDS = {'add', 'add_', '__add__', '__radd__', '__iadd__', 'sub', '__sub__', 'masked_fill',
        'masked_fill_', 'where'}
_SCALES = {'mul', 'mul_', '__mul__', '__rmul__', '__imul__', 'div', 'div_', '__truediv__',
           '__itruediv__'}
_PRODUCTS = {*_SCALES, 'matmul', '__matmul__', 'bmm', 'baddbmm', 'einsum'}
_BEARS = {*ATTENTION, *MIXES, *RESHAPES, *SOFTMAX, *ADDS, *_SCALES, 'dropout', 'permute',
          'transpose', 'flatten', 'unsqueeze', 'squeeze', 'expand', 'contiguous', 'clone', 'to',
          'type', 'type_as', 'float', 'half', 'bfloat16'}


class ReducedScores(TorchFunctionMode):
    """What a forward does with its scores and weights while their keys are reduced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.total = 0  # keys before
        self.queries = 0  # queries before
        self.rows = 0  # queries after
        self.single = 0  # tokens in front of the grid
        self.unfolded = False  # scores end with the rows and columns of the keys
        self.normalised = False  # the softmax is done
        self.pool: PooledKeys | None = None  # of the attention under way, if any
        self.query_pool: PooledQueries | None = None
        self.scores: list[Any] = []

    def follow(self, out: Tensor) -> None:
        """Remember scores or weights: weakly, or what leads to them would stay in memory."""
        self.scores.append(out if torch.compiler.is_compiling() else weakref.ref(out))

    def fail(self, why: str) -> RatioError:
        """The error that names the module."""
        return RatioError(f'{type(self.module).__name__} cannot be reduced: {why}')

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Name the module if its own code fails with fewer keys."""
        try:
            yield
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if self.pool is None or isinstance(error, RatioError):
                raise
            needed = f'{self.queries} queries, not {self.rows}' if (
                self.pool.left == self.total) else f'{self.total} keys, not {self.pool.left}'
            raise self.fail(f'what it does with its scores needs all {needed} ({error}). '
                            f'{self.remedy}') from error

    @property
    def remedy(self) -> str:
        """What to do about a module that cannot be reduced."""
        return 'Leave query_ratio at none' if self.query_pool is not None else (
            'register_isr(..., irreducible=...) leaves it alone')

    def expected(self, shape: Sequence[int]) -> list[int]:
        """The shape that scores or weights of this shape have in the module's own code."""
        sizes = list(shape)
        if self.pool is not None and sizes[-1:] == [self.pool.left]:
            sizes[-1] = self.total
        if self.query_pool is not None and sizes[-2:-1] == [self.rows]:
            sizes[-2] = self.queries
        return sizes

    def follows(self, x: Any) -> bool:
        """Whether this is, or is made from, the scores or the weights of an attention."""
        if isinstance(x, (list, tuple)):
            return any(self.follows(part) for part in x)
        return isinstance(x, Tensor) and any(
            (scores() if isinstance(scores, weakref.ref) else scores) is x
            for scores in self.scores)

    def bears(self, name: str, *args: Any) -> bool:
        """Whether a function does the same to scores or weights of fewer keys and queries.

        Scores may be scaled, shifted, mixed over heads and cut. Weights, which a cell has in place
        of all its members, may be scaled and mixed, but nothing else may be added to them.
        """
        if self.pool is None:
            return False
        if name == 'conv2d':  # over heads
            return tuple(args[1].shape[-2:]) == (1, 1)
        if self.query_pool is not None and name in ('__getitem__', '__setitem__') and (
                args[0][args[1]].shape[-2:-1] != (self.rows,)):
            return False
        if self.normalised and name in ('__getitem__', '__setitem__'):
            return name == '__getitem__' and args[0][args[1]].shape[-1] == self.pool.left
        if self.normalised and name in ADDS:
            return all(self.follows(arg) for arg in args)
        if name in _PRODUCTS and sum(self.follows(arg) for arg in args) > 1:
            return False
        if name in ('max', 'amax'):  # of each query, or a floor that nothing reaches
            if len(args) > 1 and isinstance(args[1], Tensor):
                return args[1].numel() == 1 and bool(args[1] <= pooling.MASKED)
            return not self.normalised and (len(args) < 2 or args[1] in (-1, args[0].dim() - 1))
        if name in ('__getitem__', '__setitem__'):
            return self._spares_cells(*args[:2])
        if not self.normalised and self.rows == self.pool.left and name == 'transpose':
            return args[0].dim() - 1 not in [axis % args[0].dim() for axis in args[1:3]]
        return name in _BEARS

    def _spares_cells(self, x: Tensor, index: Any) -> bool:
        """Whether an index takes all cells of the keys, or only single tokens in front."""
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

    def _softmax(self, func: Callable[..., Tensor], scores: Tensor, *args: Any,
                 **kwargs: Any) -> Tensor:
        assert self.pool is not None
        if scores.shape[-1] == self.pool.left:
            dim = args[0] if args else kwargs.get('dim')
            if dim not in (-1, scores.dim() - 1):
                raise self.fail(f'its softmax is over dimension {dim} of its scores, not over its '
                                'keys')
            self.normalised = True
            if self.pool.uneven:
                scores = scores + self.pool.log_counts(scores)
        return func(scores, *args, **kwargs)

    def _mixes(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Whether a linear map or a convolution is one over the heads of the weights."""
        if self.pool is None or not self.normalised:
            return False
        keys = (self.rows, self.pool.left)
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

    def _add(self, args: tuple[Any, ...], seen: bool) -> list[Any]:
        """Arguments of an elementwise function, with what meets the scores reduced like them.

        ``seen`` says that True in a mask is a key that is seen.
        """
        assert self.pool is not None
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.dim()]
        if self.unfolded and any(_ends_with(x, self.pool.cells) for x in tensors):
            # A bias in two parts, for the rows of the keys and for their columns (MViTv2).
            return [self._sides(arg) if isinstance(arg, Tensor) and arg.dim() > 1 and
                    not self.follows(arg) else arg for arg in args]
        scores = next((x for x in tensors if x.shape[-1] == self.pool.left), None)
        if scores is not None:
            return [self._beside(arg, scores, seen) if isinstance(arg, Tensor) and arg.dim() and
                    not self.follows(arg) else arg for arg in args]
        if self.single and any(x.shape[-1] == self.pool.left - self.single for x in tensors):
            # The scores behind the single tokens in front (RegionViT).
            return [self._behind(arg) if isinstance(arg, Tensor) and arg.dim() and
                    arg.shape[-1] == self.total - self.single else arg for arg in args]
        return list(args)

    def _beside(self, x: Tensor, scores: Tensor, seen: bool) -> Tensor:
        """Reduce the keys and the queries of what meets the scores."""
        assert self.pool is not None
        if self.query_pool is not None and x.shape[-2:-1] == (self.queries,):
            x = self.query_pool.rows(x, seen)
        if x.shape[-1] != self.total or self.pool.left == self.total:
            return x
        flip = seen and x.dtype == torch.bool
        return ~self.pool.columns(~x, scores) if flip else self.pool.columns(x, scores)

    def _sides(self, x: Tensor) -> Tensor:
        """Reduce a part of a bias ... x query rows x query columns x key rows x key columns."""
        assert self.pool is not None
        if self.query_pool is not None and x.dim() > 3:
            sizes = x.shape[-4:-2]
            if tuple(sizes) != self.query_pool.layout.grids[0]:
                raise self.fail(f'its bias is for {sizes[0]}x{sizes[1]} queries')
            tokens = self.query_pool.tokens(x.flatten(-2).flatten(-3, -2))
            x = tokens.reshape(*x.shape[:-4], *self.query_pool.cells, *x.shape[-2:])
        return x if _ends_with(x, self.pool.cells) else self.pool.sides(x)

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
        queries, rows = self.queries, self.rows
        if x.shape[-1] == pool.left and shape[-1] == self.total and x.shape[-2:-1] == (rows,):
            shape[-1] = pool.left
            if shape[-2:-1] == [queries]:
                shape[-2] = rows
        elif pool.grid is not None:
            if x.shape[-1] == math.prod(pool.cells) and tuple(shape[-2:]) == pool.grid:
                shape[-2:] = pool.cells
                if self.query_pool is not None:
                    if tuple(shape[-4:-2]) != self.query_pool.layout.grids[0]:
                        raise self.fail(f'it unfolds its scores to {shape}')
                    shape[-4:-2] = self.query_pool.cells
                self.unfolded = True
            elif _ends_with(x, pool.cells) and shape[-1] == pool.grid[0] * pool.grid[1]:
                shape[-1] = math.prod(pool.cells)
                if shape[-2:-1] == [queries]:
                    shape[-2] = rows
                self.unfolded = False
        return [x, *shape]


def _ends_with(x: Tensor, sizes: Grid) -> bool:
    return x.dim() > 1 and (x.shape[-2], x.shape[-1]) == sizes
