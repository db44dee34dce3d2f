"""Observe the attention layers of a network: the softmax of chosen queries, and the output.

A ``TorchFunctionMode`` sees the queries and keys that ``scaled_dot_product_attention`` and similar
functions receive, after ISR has reduced them, and computes the softmax of the chosen queries alone.
The network runs unchanged.
"""
import fnmatch
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError
from ..isr.pooling import Grid, Ratio, cells
from ..isr.reduction import Record, recording
from ..isr.registry import find_attention
from ..models.attention import EmbeddingFreeAttention

_UNSUPPORTED = 'its kind of attention is not supported'
_SINGLE = 9  # numbers of single tokens in front of a map that are tried: 0 to 8


@dataclass(frozen=True, eq=False)
class Attended:
    """What one attention layer did in one pass; rows and columns are pixels of the input."""
    weights: Tensor  # softmax of the query at each point, P points x h heads x M keys, float32
    single: int  # number of leading keys that have no place in the image, such as a class token
    cells: tuple[np.ndarray, np.ndarray]  # where the other keys' cells begin, and the last ends
    features: Tensor  # what the layer's forward returns, C x H x W, float32
    tokens: tuple[np.ndarray, np.ndarray]  # where the tokens of the features begin, the last ends

    @property
    def keys(self) -> int:
        """Return the number of keys."""
        return self.weights.shape[-1]

    def density(self) -> np.ndarray:
        """Return the attention per area, averaged over the heads: P x rows x columns of cells.

        1 is even attention. Dividing by the area makes cells of different sizes comparable.
        """
        rows, columns = (np.diff(edges) for edges in self.cells)
        areas = rows[:, None] * columns
        weights = self.weights.mean(1)[:, self.single:].numpy().reshape(-1, *areas.shape)
        return weights * (areas.sum() / areas)


def choose_layers(model: nn.Module, patterns: Sequence[str] = ()) -> dict[str, str]:
    """Return names of attention layers that match names or patterns such as ``decode_head.*``.

    Without patterns these are the last layers of each stage. The values describe where they are.

    Raises:
        ConfigError: No layer matches, or the model has no attention that is known.
    """
    layers = [(layer.name, f'{part.kind} {number}, layer {i} of {len(stage)}', i == len(stage))
              for part in find_attention(model).parts for number, stage in part.stages.items()
              for i, layer in enumerate(stage, 1)]
    if not layers:
        raise ConfigError(f'{type(model).__name__} has no attention that can be shown. Found: '
                          f'{find_attention(model)}')
    if not patterns:
        return {name: text for name, text, last in layers if last}
    texts = {name: text for name, text, _ in layers}
    chosen = []
    for pattern in patterns:
        matches = fnmatch.filter(texts, pattern)
        if not matches:
            raise ConfigError(f'no attention layer is called {pattern}. There are: '
                              f'{", ".join(texts)}')
        chosen += matches
    return {name: texts[name] for name in chosen}


def look(model: nn.Module, inputs: Tensor, layers: Iterable[str],
         points: Sequence[tuple[float, float]]) -> tuple[dict[str, Attended], dict[str, str]]:
    """Run an image through a model and observe some of its attention layers.

    The model and its outputs stay the same bit for bit.

    Args:
        model: A segmentor, or any module that takes an image, at the ISR ratio it is set to.
        inputs: One image as the network takes it, 1 x 3 x H x W.
        layers: Names of attention layers.
        points: Column and row of each query, in pixels of the inputs.

    Returns:
        Observations by name of the layer; and by name, the reasons why layers cannot be shown,
        because their attention is not over a map.
    """
    modules = dict(model.named_modules())
    watch = _Watch((inputs.shape[2], inputs.shape[3]), points)
    with ExitStack() as stack:
        for name in layers:
            watch.follow(name, modules[name], stack)
        records = stack.enter_context(recording())
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch)
        model(inputs)
    seen: dict[str, Attended] = {}
    reasons: dict[str, str] = {}
    for name in layers:
        try:
            seen[name] = watch.runs[name].result(records.get(modules[name]))
        except _NoMapError as error:
            reasons[name] = f'{type(modules[name]).__name__}: {error}'
    return seen, reasons


class _NoMapError(Exception):
    pass


@dataclass(frozen=True)
class _Place:
    """Where queries lie: ``single`` tokens, then a map of tokens of ``stride`` pixels."""
    grid: Grid
    single: int
    stride: int

    def index(self, point: tuple[float, float]) -> int:
        column, row = (min(int(at / self.stride), side - 1)
                       for at, side in zip(point, self.grid[::-1]))
        return self.single + row * self.grid[1] + column


@dataclass
class _Run:
    """What was seen of a layer during a pass."""
    module: nn.Module
    size: Grid  # of the image
    weights: Tensor | None = None
    place: _Place | None = None
    out: Any = None
    reason: str = 'its forward computed no attention'

    def result(self, record: Record | None) -> Attended:
        """Return what was observed; ``record`` is of ISR that acts from outside the layer."""
        if self.weights is None or self.place is None:
            raise _NoMapError(self.reason)
        weights, features = self.weights.cpu(), self.out
        if isinstance(features, (tuple, list)):
            features = features[0]
        # Averaged queries lie on a smaller map than the tokens that the layer is given.
        queries = record.queries[0] if record is not None else (
            math.prod(features.shape[2:]) if isinstance(self.module, EmbeddingFreeAttention) else 0)
        place = _find_place(self.size, queries) if queries else self.place
        if place is None:
            raise _NoMapError(f'its {queries} queries are not a map of the image')
        if isinstance(self.module, EmbeddingFreeAttention):
            single, pool = 0, self.module.pool_size(*place.grid)
            edges = [np.arange(side // step + 1) * step for side, step in zip(place.grid, pool)]
        else:
            single = place.single
            ratio, total = (record.isr_ratio, record.keys[0]) if (
                record is not None and record.keys[0]) else (1, weights.shape[-1])
            edges = _key_edges(place.grid, total - single, ratio, self.module)
        if single + math.prod(len(edge) - 1 for edge in edges) != weights.shape[-1]:
            raise _NoMapError(f'its {weights.shape[-1]} keys are not the cells of a map')
        rows, columns = (np.arange(side + 1) * place.stride for side in place.grid)
        return Attended(
            weights, single, (edges[0] * place.stride, edges[1] * place.stride),
            _as_map(features, place).float().cpu(), (rows, columns))


class _Watch(TorchFunctionMode):
    """Record the softmax of some queries in the attention of hooked layers."""

    def __init__(self, size: Grid, points: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        self.size, self.points = size, points
        self.runs: dict[str, _Run] = {}
        self.current: _Run | None = None

    def follow(self, name: str, module: nn.Module, stack: ExitStack) -> None:
        run = self.runs[name] = _Run(module, self.size)

        def enter(*_: Any) -> None:
            self.current, run.weights = run, None

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.current, run.out = None, out

        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave).remove)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        run = self.current
        name = getattr(func, '__name__', '').partition('.')[0]
        if run is not None and run.weights is None and name in _TAKEN:
            try:
                weights = getattr(self, _TAKEN[name])(run, out, *args, **kwargs)
                run.weights = weights[0].transpose(0, 1).float().clone()  # P x h x M
            except _NoMapError as error:
                run.reason = str(error)
        return out

    def _by_rows(self, run: _Run, out: Tensor, x: Tensor, kv: Tensor, num_heads: int) -> Tensor:
        q, k = (maps.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3) for maps in (x, kv))
        return self._fused(run, out, q, k, k)

    def _fused(self, run: _Run, out: Tensor, query: Tensor, key: Tensor, value: Tensor,
               attn_mask: Tensor | None = None, dropout_p: float = 0., is_causal: bool = False,
               scale: float | None = None, enable_gqa: bool = False) -> Tensor:
        if is_causal or enable_gqa:
            raise _NoMapError(_UNSUPPORTED)
        rows = self._rows(run, query.shape)
        q, k = query[..., rows, :].float(), key.float()
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if attn_mask is not None:
            mask = _rows_of(attn_mask, rows)
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else (
                scores + mask.float())
        return scores.softmax(-1)

    def _multi_head(self, run: _Run, out: Any, query: Tensor, key: Tensor, value: Tensor,
                    embed_dim_to_check: int, num_heads: int, *args: Any,
                    attn_mask: Tensor | None = None, is_causal: bool = False,
                    **kwargs: Any) -> Any:
        if query.dim() != 3 or is_causal:
            raise _NoMapError(_UNSUPPORTED)
        length, batch, _ = query.shape
        rows = self._rows(run, torch.Size((batch, num_heads, length, 1)))
        return F.multi_head_attention_forward(
            query[rows], key, value, embed_dim_to_check, num_heads, *args, **{
                **kwargs, 'attn_mask': None if attn_mask is None else _rows_of(attn_mask, rows),
                'need_weights': True, 'average_attn_weights': False})[1]

    def _explicit(self, run: _Run, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if out.dim() == 3:
            out = out[None]  # B h x Nq x M
        return out[..., self._rows(run, out.shape), :]

    def _rows(self, run: _Run, shape: torch.Size) -> list[int]:
        """Return the queries at the points; ``shape`` is that of all queries, 1 x h x Nq x d."""
        if len(shape) != 4 or shape[0] != 1:
            raise _NoMapError('its queries lie in windows or groups, not on one map')
        run.place = _find_place(self.size, shape[2])
        if run.place is None:
            raise _NoMapError(f'its {shape[2]} queries are not a map of the image')
        return [run.place.index(point) for point in self.points]


_TAKEN = {'attend_by_rows': '_by_rows', 'scaled_dot_product_attention': '_fused',
          'multi_head_attention_forward': '_multi_head', 'softmax': '_explicit'}


def _rows_of(mask: Tensor, rows: list[int]) -> Tensor:
    return mask[..., rows, :] if mask.shape[-2] > 1 else mask


def _find_place(size: Grid, queries: int) -> _Place | None:
    """Return the map of the image that has this number of queries.

    Strides of networks are powers of two, rounded up or down; patches may have other sizes.
    """
    longest = max(size)
    powers = [2 ** i for i in range(longest.bit_length() + 1)]
    for strides in (powers, [s for s in range(3, min(longest, 65)) if s not in powers]):
        for single, stride in itertools.product(range(_SINGLE), strides):
            for grid in (cells(size, stride), (size[0] // stride, size[1] // stride)):
                if grid[0] * grid[1] == queries - single and min(grid) > 0:
                    return _Place(grid, single, stride)
    return None


def _key_edges(grid: Grid, keys: int, ratio: Ratio, module: nn.Module) -> list[np.ndarray]:
    """Return the rows and columns of tokens at which the cells of keys begin, and the last ends.

    ``keys`` is their number before ISR. A network that reduces its keys itself does so by strided
    convolutions or pools, which drop what does not fill a step, or round up.
    """
    own = getattr(module, 'sr_ratio', None)
    steps = [step for step in (own, *range(1, max(grid) + 1)) if isinstance(step, int) and step > 0]
    for up in (False, True):
        for step in steps:
            lengths = [-(-side // step) if up else side // step for side in grid]
            if math.prod(lengths) == keys:
                edges = [np.minimum(np.arange(length + 1) * step, side)
                         for length, side in zip(lengths, grid)]
                return [np.unique(np.append(edge[::ratio], edge[-1])) for edge in edges]
    raise _NoMapError(f'its {keys} keys are not a map of its {grid[0]}x{grid[1]} tokens')


def _as_map(x: Any, place: _Place) -> Tensor:
    count = place.single + math.prod(place.grid)
    if isinstance(x, Tensor):
        x = x.detach()
        if x.dim() == 4 and x.shape[2:] == place.grid:
            return x[0]
        if x.dim() == 4 and x.shape[1:3] == place.grid:
            return x[0].permute(2, 0, 1)
        if x.dim() == 3 and count in x.shape[:2]:
            tokens = x[0] if x.shape[1] == count else x[:, 0]
            return tokens[place.single:].T.unflatten(1, place.grid)
    raise _NoMapError('its output is not a map of its tokens')
