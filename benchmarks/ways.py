"""Published ways to spare attention in a trained model, as a `Bench` takes them.

Each reduces what an attention takes as keys and values, what it takes as queries, or both. They act
where ISR acts: in EFT and EDAFormerHead, and through ISR's `Interception` in other models whose
attention has neither a mask nor a bias.

Shapes: B batch, N tokens before, M after, d channels, h x w a map of tokens.
"""
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import FFN
from torch import Tensor, nn

from mmseg_edaformer.analysis.bench import Bench, InputScale, Way
from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import isr
from mmseg_edaformer.isr.intercept import Interception
from mmseg_edaformer.isr.patching import install, uninstall
from mmseg_edaformer.isr.pooling import METHODS, Layout, by_segment, cells, on_map, pool_map
from mmseg_edaformer.isr.reducers import PooledKeys, PooledQueries
from mmseg_edaformer.isr.reduction import Reduction, Setting
from mmseg_edaformer.isr.registry import ForeignLayer, find_attention
from mmseg_edaformer.models.layers import to_map, to_tokens

from .token_merging import match, merge, unmerge


class Reducer(PooledKeys, PooledQueries):
    """Reduces the keys of one attention, or its queries; this one leaves them as they are."""

    def __init__(self, layout: Layout, total: int) -> None:
        self.layout, self.total, self.left = layout, total, total
        self.grid, self.cells, self.uneven = None, (0, 0), False
        self.front, self.behind = layout.prefix, layout.sizes(total)[-1]

    def tokens(self, x: Tensor) -> Tensor:
        """Reduce ... x N x d to ... x M x d."""
        return x

    def spread(self, x: Tensor) -> Tensor:
        """Give the results of queries, ... x M x d, back to all of them, ... x N x d."""
        return x

    def columns(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        raise RatioError('the rivals of ISR are for attention without a mask or a bias')

    def rows(self, x: Tensor, seen: bool = False) -> Tensor:
        return self.columns(x)


class MergingReducer(Reducer):
    """Merges a share of the tokens; the first tensor that it reduces decides which."""

    def __init__(self, layout: Layout, total: int, share: float) -> None:
        super().__init__(layout, total)
        self.merged = int(share * (total - self.front - self.behind))
        self.left = total - self.merged
        self.groups: Any = None

    def tokens(self, x: Tensor) -> Tensor:
        if self.groups is None:  # heads are compared by their mean
            self.groups = match(x.mean(1) if x.dim() == 4 else x, self.merged, self.front,
                                self.behind)
        return self._each(x, lambda x: merge(x, self.groups, self.left))

    def spread(self, x: Tensor) -> Tensor:
        return self._each(x, lambda x: unmerge(x, self.groups))

    @staticmethod
    def _each(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        if x.dim() == 3:
            return change(x)
        merged = change(x.transpose(1, 2).flatten(2))  # B h N d -> B N (h d)
        return merged.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


class MapReducer(Reducer):
    """Changes the map alone; single tokens in front of it and behind it stay."""

    def __init__(self, layout: Layout, total: int, down: Callable[[Tensor], Tensor]) -> None:
        super().__init__(layout, total)
        self.down = down
        self.left = len(self.tokens(torch.empty(total, 1, device='meta')))

    def tokens(self, x: Tensor) -> Tensor:
        return by_segment(x, self.layout, lambda part, grid: on_map(part, grid, self.down))

    def spread(self, x: Tensor) -> Tensor:
        """Nearest neighbours, as SegFormer++ unmerges the means of 2x2."""
        [grid] = self.layout.grids
        return by_segment(x, Layout((cells(grid, 2),), self.front), lambda part, small: on_map(
            part, small, lambda maps: F.interpolate(maps, grid)))


Make = Callable[[Layout, int], Reducer]
"""Makes the reducer of so many tokens."""


@dataclass(frozen=True)
class Rival:
    """A way to spare attention.

    Attributes:
        name: What tables call it.
        keys: Makes what reduces keys and values, after the model's own spatial reduction.
        queries: Makes what reduces queries, before their projection if the model has one.
        merges: Whether queries and keys that are the same tokens are reduced alike, and so are the
            tokens of feed-forward networks that have no convolution.
    """
    name: str
    keys: Make = Reducer
    queries: Make = Reducer
    merges: bool = False

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Predict this way within the block; a rival that reduces nothing changes nothing."""
        parts = [] if self.keys is self.queries is Reducer else find_attention(model).parts
        changed: list[Any] = []
        try:
            for layer in [layer for part in parts for stage in part.stages.values()
                          for layer in stage]:
                changed.append(layer.module)
                if not isinstance(layer, ForeignLayer):
                    _change(layer.module, _attention, rival=self)
                    continue
                install(layer.module, Reduction(
                    Setting(method=self.name, strict=True), layer.rule, layer.owners,
                    interception=functools.partial(_Intercept, self)))
                block: Any = model.get_submodule(layer.name.rpartition('.')[0])
                if self.merges and isinstance(getattr(block, 'ffn', None), FFN):
                    changed.append(block.ffn)
                    _change(block.ffn, _network, rival=self, attention=layer.module)
            yield
        finally:
            for module in changed:
                uninstall(module)
                _restore(module)

    def reducers(self, keys: Layout, total: int, queries: Layout,
                 count: int) -> tuple[Reducer, Reducer]:
        """Return the reducers of an attention of ``count`` queries to ``total`` keys."""
        of_keys = self.keys(keys, total)
        return of_keys, of_keys if self.merges and keys == queries else self.queries(queries, count)


class _Intercept(Interception):
    """ISR's interception of an attention of another library, with the reducers of a rival."""

    def __init__(self, rival: Rival, *args: Any) -> None:
        super().__init__(*args)
        self.rival = rival

    def _find(self, keys: Tensor, queries: int | None = None) -> PooledKeys | None:
        total = keys.shape[-2]
        layout = self._layout(total)
        if layout is None or queries is None:
            self.seen.append(total)
            return None
        own = self._layout(queries) if self.reduction.rule.queries else None
        pool, of_queries = self.rival.reducers(layout, total, own or layout, queries)
        self.query_pool = None if own is None else of_queries
        vars(self.module)['rival_layout'] = layout
        self.single, self.reduced = layout.prefix, (total, pool.left)
        return pool


def _change(module: Any, subclass: Callable[[Any], Any], **attributes: Any) -> None:
    """Turn a module into one of a subclass, with attributes that are none of its submodules."""
    module.__class__ = subclass(type(module))
    vars(module).update(attributes)


def _restore(module: Any) -> None:
    """Undo `_change`, and forget the layout of an attention."""
    if 'rival' in vars(module):
        module.__class__ = type(module).__base__
    for name in ('rival', 'attention', 'rival_layout'):
        vars(module).pop(name, None)


@functools.cache
def _attention(cls: Any) -> Any:
    """A subclass of an embedding-free attention that reduces as its ``rival`` says."""
    def attend(self: Any, x: Tensor, queries: Tensor) -> Tensor:
        grid = x.shape[2], x.shape[3]
        pooled = F.avg_pool2d(x, self.pool_size(*grid, 1))
        small = pooled.shape[2], pooled.shape[3]
        keys, own = self.rival.reducers(Layout((small,)), small[0] * small[1], Layout((grid,)),
                                        grid[0] * grid[1])
        kv = self.kv(_as_map(keys.tokens(_as_tokens(pooled))))
        kv = kv if self.kv_norm is None else F.gelu(self.kv_norm(kv))
        out = self.proj(self.attend_pooled(_as_map(own.tokens(_as_tokens(queries))), kv, grid))
        return to_map(own.spread(_as_tokens(out)).unflatten(1, grid))

    return type(cls.__name__, (cls,), dict(attend=attend))


@functools.cache
def _network(cls: Any) -> Any:
    """A subclass of a feed-forward network that merges what it takes, but not its residual."""
    def forward(self: Any, x: Tensor, identity: Tensor | None = None) -> Tensor:
        reducer = self.rival.queries(self.attention.rival_layout, x.shape[1])
        out = reducer.spread(cls.forward(self, reducer.tokens(x), identity=0.))
        return out + (x if identity is None else identity)

    return type(cls.__name__, (cls,), dict(forward=forward))


def _as_tokens(x: Tensor) -> Tensor:
    """View a map as a sequence: B d h w -> B N d."""
    return to_tokens(x).flatten(1, 2)


def _as_map(x: Tensor) -> Tensor:
    """View a sequence as a map of one column: B N d -> B d N 1."""
    return to_map(x.unsqueeze(2))


def tome(share: float) -> Rival:
    """Token Merging around each branch of a block, as Expedit compares with it (arXiv 2210.01035).

    x + unmerge(branch(merge(norm(x)))), where the branch is the attention or a feed-forward network
    without convolutions. Keys that the model reduces itself have a matching of their own.
    """
    if not 0 <= share <= 0.5:
        raise RatioError('it merges at most half of the tokens: give a share from 0 to 0.5')
    make: Make = functools.partial(MergingReducer, share=share) if share else Reducer
    return Rival(f'tome {share:g}', make, make, merges=True)


def todo(step: int) -> Rival:
    """ToDo (arXiv 2402.13573): keys and values of every so many rows and columns, all queries."""
    if step < 1:
        raise RatioError('give 1 or more')
    return Rival(f'todo {step}', Reducer if step == 1 else functools.partial(
        MapReducer, down=lambda maps: maps[..., ::step, ::step]))


def neighbours(tokens: str) -> Rival:
    """2D neighbour merging of SegFormer++ (arXiv 2405.14467): means of 2x2.

    Its 2x2 preset averages the queries, ``q``, before their projection, and gives the result back
    by nearest neighbours; ``q+k`` averages the keys too.
    """
    if tokens not in ('q', 'q+k'):
        raise RatioError('give q for queries, or q+k for queries and keys')
    half = functools.partial(MapReducer, down=lambda maps: pool_map(maps, 2, 'average'))
    return Rival(f'2x2 {tokens}', half if tokens == 'q+k' else Reducer, half)


@dataclass(frozen=True)
class ISRMethod:
    """ISR by another method than the mean of cells: ``bipartite 2``."""
    method: str
    ratio: int

    def __str__(self) -> str:
        return f'{self.method} {self.ratio}'

    def applied(self, model: nn.Module) -> Any:
        return isr(model, self.ratio, method=self.method)


WAYS: dict[str, tuple[Callable[[Any], Any], Callable[[str], Any]]] = {
    'tome': (tome, float), 'todo': (todo, int), '2x2': (neighbours, str),
    'scale': (InputScale, float),
    **{method: (functools.partial(ISRMethod, method), int) for method in METHODS[1:]}}
"""What makes a way from the value behind its name, and the type of that value."""


def read(bench: Bench, name: str) -> Way:
    """Return the way of a name: ``tome 0.3``, or a ratio such as ``2+q2``, checked on the model.

    Raises:
        RatioError: There is none of this name, or it does not fit the model.
    """
    kind, _, text = name.partition(' ')
    if kind not in WAYS:
        try:
            return bench.ratio(name)
        except RatioError as error:
            raise RatioError(f'{name}: neither a ratio ({error}) nor one of '
                             f'{", ".join(f"{kind} ..." for kind in WAYS)}') from error
    make, parse = WAYS[kind]
    try:
        way = make(parse(text))
        bench.gmacs(way)  # fail before the measurements if the model cannot take it
    except RatioError as error:
        raise RatioError(f'{name}: {error}') from error
    except ValueError as error:
        raise RatioError(f'{name}: give {kind} and a number of type {parse.__name__}') from error
    return way


def spare_weights(model: nn.Module) -> None:
    """Have each ``nn.MultiheadAttention`` compute no weights that nobody reads, as ISR does.

    Else what a rival saves would be mixed with what PyTorch's faster attention saves.
    """
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(lambda module, args, kwargs: (
                args, dict(kwargs, need_weights=False)), with_kwargs=True)
