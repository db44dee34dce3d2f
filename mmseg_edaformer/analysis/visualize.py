"""Pictures of what a network does: attention, its output features and labels at several ISR ratios.

Attention is taken where it is computed: a ``TorchFunctionMode`` looks at the queries and keys on
their way into ``scaled_dot_product_attention`` and its like, after ISR has reduced them, and
computes the softmax of those queries alone that are asked for. The network runs as it always does.
"""
import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from mmseg.registry import TRANSFORMS
from PIL import Image, ImageDraw, ImageFont
from prettytable import PrettyTable
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..data.transforms import IGNORED
from ..errors import ConfigError, DataError
from ..files import replacing
from ..isr import ISRRatio
from ..isr.adapters import Layer, find_attention
from ..isr.intercept import Record, recording
from ..isr.pooling import Grid, cells
from ..models.attention import EmbeddingFreeAttention
from ..predictor import (
    Segmentation,
    Segmenter,
    count_pixels,
    find_pictures,
    name_targets,
    writing,
)
from .benchmark import ratio_name, windows
from .cost import count_macs

_POINTS = 3
_PANEL = 300  # pixels: the longer side of a panel
_WIDEST = 2400  # pixels of all panels of a row
_LABEL, _BAR, _GAP = 210, 64, 10
_SINGLE = 9  # single tokens in front of a map that are looked for
_HEAT, _FEATURE = 'inferno', 'viridis'


@dataclass(frozen=True, eq=False)
class Attended:
    """What one attention layer did in one pass through the network.

    Attributes:
        weights: P points x h heads x M keys, float32: the softmax of the query at each point, of
            all heads. Each sums to 1.
        single: So many of the keys, in front, are tokens that lie nowhere, such as a class token.
        cells: Rows and columns of pixels of the network's input at which the cells of the other
            keys begin, and the last ends. What lies outside is no key.
        features: C x H x W, float32: what the layer gives, as its forward returns it.
        tokens: Rows and columns of pixels at which the tokens of the features begin.
    """
    weights: Tensor
    single: int
    cells: tuple[np.ndarray, np.ndarray]
    features: Tensor
    tokens: tuple[np.ndarray, np.ndarray]

    @property
    def keys(self) -> int:
        """How many keys the queries meet."""
        return self.weights.shape[-1]

    def density(self) -> np.ndarray:
        """Attention per area, mean of the heads: P x rows x columns of cells; 1 is even attention.

        So cells of different sizes compare: their attention is shared out over what they stand for.
        """
        rows, columns = (np.diff(edges) for edges in self.cells)
        areas = rows[:, None] * columns
        weights = self.weights.mean(1)[:, self.single:].numpy().reshape(-1, *areas.shape)
        return weights * (areas.sum() / areas)


def layer_names(model: nn.Module) -> dict[str, str]:
    """The attention layers of a model: their names, and where they are in words.

    Raises:
        ConfigError: There is none that is known.
    """
    names = {layer.name: text for layer, text, _ in _layers(model)}
    if not names:
        raise ConfigError(f'{type(model).__name__} holds no attention that can be shown. Found: '
                          f'{find_attention(model)}')
    return names


def choose_layers(model: nn.Module, wanted: Sequence[str] = ()) -> list[str]:
    """Names of attention layers: those that are wanted, else the last of each stage.

    Args:
        model: The model.
        wanted: Names, or patterns such as ``decode_head.*``.

    Raises:
        ConfigError: Nothing is called so, or there is no attention.
    """
    names = list(layer_names(model))
    if not wanted:
        return [layer.name for layer, _, last in _layers(model) if last]
    chosen = []
    for pattern in wanted:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ConfigError(f'no attention layer is called {pattern}. There are: '
                              f'{", ".join(names)}')
        chosen += found
    return list(dict.fromkeys(chosen))


def _layers(model: nn.Module) -> list[tuple[Layer, str, bool]]:
    """Each layer, where it is in words, and whether it is the last of its stage."""
    return [(layer, f'{part.kind} {number}, layer {i} of {len(stage)}', i == len(stage))
            for part in find_attention(model).parts for number, stage in part.stages.items()
            for i, layer in enumerate(stage, 1)]


def look(model: nn.Module, inputs: Tensor, layers: Sequence[str],
         points: Sequence[tuple[float, float]]) -> tuple[dict[str, Attended], dict[str, str]]:
    """Run an image through a model and note what some of its attention layers do.

    Nothing of the model is changed, and what it computes is the same bit for bit. Memory is that
    of the pass, the outputs of the layers, and the softmax of as many queries as there are points.

    Args:
        model: A segmentor, or any module that takes an image; at whatever ISR ratio it is set to.
        inputs: One image as the network takes it, 1 x 3 x H x W.
        layers: Names of attention layers of it.
        points: Column and row in pixels of the inputs.

    Returns:
        What was seen, by name of the layer; and why, of layers whose attention is not over a map.
    """
    found = {layer.name: layer.module for layer, _, _ in _layers(model)}
    watch = _Watch(_pair(inputs.shape[2:]), points)
    with ExitStack() as stack:
        for name in layers:
            for handle in watch.hooks(name, found[name]):
                stack.callback(handle.remove)
        records = stack.enter_context(recording())
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch)
        model(inputs)
    seen: dict[str, Attended] = {}
    reasons: dict[str, str] = {}
    for name in layers:
        record = records.get(found[name])
        try:
            seen[name] = watch.result(name, record)
        except _NoMapError as error:
            reasons[name] = f'{type(found[name]).__name__}: {error}'
    return seen, reasons


class _NoMapError(Exception):
    """Why the attention of a layer cannot be laid over a map."""


@dataclass
class _Run:
    """A layer in a pass, as far as it has come."""
    module: nn.Module
    weights: Tensor | None = None
    place: '_Place | None' = None
    out: Any = None
    reason: str = 'no attention was met in its forward'


@dataclass(frozen=True)
class _Place:
    """Where queries lie: ``single`` tokens, then a map of tokens of ``stride`` pixels."""
    grid: Grid
    single: int
    stride: tuple[float, float]

    def index(self, point: tuple[float, float]) -> int:
        """The query at a column and row of pixels."""
        column, row = (min(int(at / stride), side - 1) for at, stride, side in zip(
            point, self.stride[::-1], self.grid[::-1]))
        return self.single + row * self.grid[1] + column


class _Watch(TorchFunctionMode):
    """Notes the softmax of some queries in the attention of the layers that it is hooked into."""

    def __init__(self, size: Grid, points: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        self.size, self.points = size, points
        self.runs: dict[str, _Run] = {}
        self.current: _Run | None = None

    def hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Hook into a layer; gives handles that remove the hooks."""
        run = self.runs[name] = _Run(module)

        def enter(*_: Any) -> None:
            self.current, run.weights = run, None

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.current, run.out = None, out

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        run = self.current
        name = getattr(func, '__name__', '').partition('.')[0]
        if run is not None and run.weights is None and name in _TAKEN:
            try:
                run.weights = getattr(self, _TAKEN[name])(run, out, *args, **kwargs)
            except _NoMapError as error:
                run.reason = str(error)
        return out

    def result(self, name: str, record: Record | None) -> Attended:
        """What was seen of a layer, and of what ISR recorded where it acts from outside of it."""
        run = self.runs[name]
        place = run.place
        if run.weights is None or place is None:
            raise _NoMapError(run.reason)
        weights = run.weights.float().cpu()
        if isinstance(run.module, EmbeddingFreeAttention):
            single, pool = 0, run.module.pool_size(*place.grid)
            edges = [np.arange(side // step + 1) * step for side, step in zip(place.grid, pool)]
        else:
            single, ratio, total = place.single, 1, weights.shape[-1]
            if record is not None and record.keys is not None:
                ratio, total = record.ratio, record.keys[0]
            edges = _key_edges(place.grid, total - single, ratio, run.module)
        if single + math.prod(len(edge) - 1 for edge in edges) != weights.shape[-1]:
            raise _NoMapError(f'its {weights.shape[-1]} keys are no cells of a map')
        features = run.out[0] if isinstance(run.out, (tuple, list)) else run.out
        return Attended(
            weights, single, _pixels(edges, place.stride),
            _as_map(features, place).float().cpu(),
            _pixels([np.arange(side + 1) for side in place.grid], place.stride))

    def _by_rows(self, run: _Run, out: Tensor, x: Tensor, kv: Tensor, num_heads: int) -> Tensor:
        """Of `models.attention.attend_by_rows`."""
        q, k = (maps.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3) for maps in (x, kv))
        return self._fused(run, out, q, k, k)

    def _fused(self, run: _Run, out: Tensor, query: Tensor, key: Tensor, value: Tensor,
               attn_mask: Tensor | None = None, dropout_p: float = 0., is_causal: bool = False,
               scale: float | None = None, enable_gqa: bool = False) -> Tensor:
        if is_causal:
            raise _NoMapError('its attention is causal')
        rows = self._rows(run, query.shape)
        q, k = query[..., rows, :].float(), key.float()
        if enable_gqa:
            k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        return self._softmaxed(_masked(scores, attn_mask, rows))

    def _multi_head(self, run: _Run, out: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Of ``F.multi_head_attention_forward``, whose projections are within it."""
        call = {**dict(zip(_MULTI_HEAD, args)), **kwargs}
        query, key, heads, width = (call[name] for name in (
            'query', 'key', 'num_heads', 'embed_dim_to_check'))
        if query.dim() != 3 or call.get('is_causal') or call.get('bias_k') is not None or (
                call.get('add_zero_attn')):
            raise _NoMapError('its attention is of an unusual kind')
        weight, bias = call['in_proj_weight'], call['in_proj_bias']
        ways = (call['q_proj_weight'], call['k_proj_weight']) if weight is None else (
            weight[:width], weight[width:2 * width])
        biases = (None, None) if bias is None else (bias[:width], bias[width:2 * width])
        q, k = (F.linear(x, way, each).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
                for x, way, each in zip((query, key), ways, biases))  # N B C -> B h N d
        rows = self._rows(run, q.shape)
        q = q[..., rows, :].float()
        scores = q @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
        mask, padding = call.get('attn_mask'), call.get('key_padding_mask')
        if mask is not None:
            mask = mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads))
            scores = _masked(scores, ~mask if mask.dtype == torch.bool else mask, rows)
        if padding is not None:
            padding = padding[:, None, None]
            scores = _masked(scores, ~padding if padding.dtype == torch.bool else padding, None)
        return self._softmaxed(scores)

    def _explicit(self, run: _Run, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Of a softmax of scores that the module itself holds, ... x h x Nq x M."""
        if out.dim() not in (3, 4):
            raise _NoMapError('its scores are of an unusual shape')
        if out.dim() == 3:
            out = out[None]  # B h x Nq x M
        return self._heads_first(out[..., self._rows(run, out.shape), :].float())

    def _softmaxed(self, scores: Tensor) -> Tensor:
        return self._heads_first(scores.softmax(-1))

    @staticmethod
    def _heads_first(weights: Tensor) -> Tensor:
        """1 x h x P x M -> P x h x M."""
        return weights[0].transpose(0, 1).clone()

    def _rows(self, run: _Run, shape: torch.Size) -> list[int]:
        """The queries at the points, of queries 1 x h x Nq x d."""
        if len(shape) != 4 or shape[0] != 1:
            raise _NoMapError('its queries lie in windows or groups, not on one map')
        run.place = _find_place(self.size, shape[2])
        if run.place is None:
            raise _NoMapError(f'its {shape[2]} queries lie on no map of the image')
        return [run.place.index(point) for point in self.points]


_TAKEN = {'attend_by_rows': '_by_rows', 'scaled_dot_product_attention': '_fused',
          'multi_head_attention_forward': '_multi_head', 'softmax': '_explicit'}
_MULTI_HEAD = ('query', 'key', 'value', 'embed_dim_to_check', 'num_heads', 'in_proj_weight',
               'in_proj_bias', 'bias_k', 'bias_v', 'add_zero_attn', 'dropout_p', 'out_proj_weight',
               'out_proj_bias')


def _masked(scores: Tensor, mask: Tensor | None, rows: list[int] | None) -> Tensor:
    """Scores ... x P x M with the mask of these queries; where a boolean one is True they count."""
    if mask is None:
        return scores
    if rows is not None and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return scores + mask.float()


def _find_place(size: Grid, queries: int) -> _Place | None:
    """The map of the image that so many queries are: one token for some pixels each way.

    Strides of networks are powers of two, and convolutions round up or down; patches may have
    other sizes.
    """
    longest = max(size)
    powers = [2 ** i for i in range(longest.bit_length() + 1)]
    for strides in (powers, [s for s in range(3, min(longest, 65)) if s not in powers]):
        for single in range(_SINGLE):
            for stride in strides:
                for grid in (cells(size, stride), (size[0] // stride, size[1] // stride)):
                    if grid[0] * grid[1] == queries - single and min(grid) > 0:
                        return _Place(grid, single, (stride, stride))
    return None


def _key_edges(grid: Grid, keys: int, ratio: int, module: nn.Module) -> list[np.ndarray]:
    """Rows and columns of tokens at which the cells of keys begin, and the last ends.

    ``keys`` are those before ISR. A network that reduces its keys itself does so by strided
    convolutions or pools, which drop what does not fill a step, or by convolutions that round up.
    ISR makes cells of these keys.
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
    raise _NoMapError(f'its {keys} keys lie on no map of its {grid[0]}x{grid[1]} tokens')


def _pixels(edges: Sequence[np.ndarray], stride: tuple[float, float]
            ) -> tuple[np.ndarray, np.ndarray]:
    return edges[0] * stride[0], edges[1] * stride[1]


def _as_map(x: Any, place: _Place) -> Tensor:
    """What an attention layer gives as C x H x W: of maps, or of tokens with or without a batch."""
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
    raise _NoMapError('its output is no map of its tokens')


def _pair(shape: Sequence[int]) -> Grid:
    return int(shape[0]), int(shape[1])


# Features.

@dataclass(frozen=True, eq=False)
class Projection:
    """A view of features that several passes share: the first principal component of one of them.

    Attributes:
        mean: C, subtracted first.
        axis: C, the direction in which that pass varies most over its tokens; its largest entry is
            positive, so that the sign is always the same.
        size: Root mean square of the norm of its tokens, which differences are related to.
    """
    mean: Tensor
    axis: Tensor
    size: float

    @classmethod
    def of(cls, features: Tensor) -> 'Projection':
        """That of features C x H x W."""
        x = features.flatten(1).double()
        mean = x.mean(1)
        centred = x - mean[:, None]
        axis = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
        axis = axis * axis[axis.abs().argmax()].sign()
        return cls(mean, axis, float(x.square().sum(0).mean().sqrt()))

    def view(self, features: Tensor) -> np.ndarray:
        """Features C x H x W along the axis, H x W."""
        return torch.tensordot(self.axis, features.double() - self.mean[:, None, None],
                               1).numpy()

    def difference(self, features: Tensor, others: Tensor) -> np.ndarray:
        """Norm over the channels of the difference at each token, in ``size``, H x W."""
        return ((features.double() - others.double()).norm(dim=0) / (self.size or 1.)).numpy()


def relative_error(features: Tensor, reference: Tensor) -> float:
    """Norm of the difference of all features, relative to that of the reference."""
    size = float(reference.double().norm())
    return float((features.double() - reference.double()).norm()) / (size or 1.)


# One picture.

@dataclass(frozen=True, eq=False)
class Shot:
    """A picture at one ratio of a model.

    Attributes:
        title: The ratio, or the name of another model.
        found: What is predicted.
        gmacs: Billions of multiply-adds of that prediction.
        seen: By name of the layer, what its attention does.
    """
    title: str
    found: Segmentation
    gmacs: float
    seen: dict[str, Attended]


def visualize(segmenter: Segmenter, pictures: Sequence[str | Path], out: str | Path, *,
              ratios: Sequence[ISRRatio | int | str] = ('none', 'optimal'),
              others: Sequence[tuple[str, Segmenter]] = (), points: Sequence[str] = (),
              layers: Sequence[str] = (), labels: str | Path | None = None,
              reduce_zero_label: bool = False, say: Callable[[str], None] = print) -> list[Path]:
    """Draw sheets of what ISR does to pictures: attention, features and predictions.

    Args:
        segmenter: The model.
        pictures: Files, folders and patterns, see `find_pictures`.
        out: A folder, which gets ``NAME_attention.png``, ``NAME_features.png`` and
            ``NAME_predictions.png`` for each picture.
        ratios: What to compare; the first is what the others are compared with.
        others: Names of other models and the models, whose predictions are put beside.
        points: Of the queries, see `parse_point`; by default in the largest classes.
        layers: See `choose_layers`.
        labels: The mask of a single picture, or a folder of masks called as the pictures are:
            class indices, 255 where there is no label.
        reduce_zero_label: Whether in them 0 means no label and 1 the first class.
        say: Gets a text for each picture.

    Returns:
        The files that were written.

    Raises:
        DataError: A picture or a mask cannot be read, or two pictures have one name.
        ConfigError: A point, a layer or another model does not fit, or the folder cannot be
            written to.
        RatioError: A ratio means nothing, or there is nothing to reduce.
    """
    out = Path(out)
    wanted = list(dict.fromkeys(map(ISRRatio.parse, ratios)))
    files = name_targets([each for source in pictures for each in find_pictures(source)])
    named = choose_layers(segmenter.model, layers)
    for title, other in others:
        if other.classes != segmenter.classes:
            raise ConfigError(f'{title} predicts {len(other.classes)} classes that are not the '
                              f'{len(segmenter.classes)} of {segmenter.source}: side by side they '
                              'must be the same')
    if labels is not None and len(files) > 1 and not Path(labels).is_dir():
        raise ConfigError(f'labels {labels}: of several pictures, give the folder of their masks')
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    written = []
    for path, name in files.items():
        subject = _Subject(segmenter, path, points, wanted[0])
        truth = None if labels is None else _read_labels(
            Path(labels), path, subject.picture.shape[:2], len(segmenter.classes),
            reduce_zero_label)
        shots, reasons = _take(segmenter, subject, wanted, named, bool(layers))
        beside = [_predict(other, path, title) for title, other in others]
        sources = f'ISR: {segmenter.source}' + ''.join(
            f'. {title}: {other.source}' for title, other in others)
        sheets = dict(predictions=draw_predictions(subject, shots, beside, truth, sources))
        if shots[0].seen:
            texts = {layer: text for layer, text in layer_names(segmenter.model).items()
                     if layer in shots[0].seen}
            sheets = dict(attention=draw_attention(subject, shots, texts),
                          features=draw_features(subject, shots, texts)) | sheets
        say(_tables(subject, shots, beside))
        for reason in reasons.items():
            say('not drawn: {}: {}'.format(*reason))
        for kind, sheet in sheets.items():
            written.append(out / f'{name}_{kind}.png')
            with writing(out), replacing(written[-1]) as partial:
                sheet.save(partial)
    say('Written: ' + ', '.join(map(str, written)))
    return written


class _Subject:
    """A picture, and the points of it that are looked at.

    Attributes:
        picture: H x W x 3, BGR.
        inputs: What the network sees of it, 1 x 3 x h x w.
        points: Column and row of pixels of the picture.
        names: What the points are called.
        step: Rows and columns of pixels of the inputs to one of the picture.
    """

    def __init__(self, segmenter: Segmenter, path: Path, points: Sequence[str],
                 ratio: ISRRatio) -> None:
        self.path = path
        self.picture, self.inputs, size = _network_inputs(segmenter, path)
        height, width = self.picture.shape[:2]
        self.step = size[0] / height, size[1] / width
        with _ratio(segmenter, ratio):
            labels = segmenter(path).labels
        self.points = [parse_point(point, (height, width), path) for point in points] or (
            choose_points(labels))
        self.names = [f'point {i} at {x},{y}: {segmenter.classes[labels[y, x]]}'
                      for i, (x, y) in enumerate(self.points, 1)]

    def to_inputs(self, point: tuple[int, int]) -> tuple[float, float]:
        """Column and row of a pixel's middle in the inputs."""
        return (point[0] + 0.5) * self.step[1], (point[1] + 0.5) * self.step[0]


def parse_point(text: str, size: Grid, path: Path | str = 'the picture') -> tuple[int, int]:
    """A pixel, column and row, from ``120,80``, or from fractions of width and height, ``0.5,0.3``.

    Numbers with a decimal point are fractions.

    Args:
        text: The point.
        size: Height and width of the picture.
        path: What to call it.

    Raises:
        ConfigError: It is no point, or outside.
    """
    words = text.split(',')
    try:
        found = [float(word) * side if '.' in word else int(word)
                 for word, side in zip(words, size[::-1])]
    except ValueError:
        found = []
    if len(words) != 2 or len(found) != 2 or not all(map(math.isfinite, found)):
        raise ConfigError(f"point '{text}' is none: give column and row in pixels, 120,80, or as "
                          'fractions of width and height, 0.5,0.3')
    # The far edge, 1.0, is the last pixel.
    x, y = (side - 1 if '.' in word and at == side else math.floor(at)
            for word, at, side in zip(words, found, size[::-1]))
    if not (0 <= x < size[1] and 0 <= y < size[0]):
        raise ConfigError(f'point {text} lies outside of {path}, which has columns 0 to '
                          f'{size[1] - 1} and rows 0 to {size[0] - 1}')
    return x, y


def choose_points(labels: np.ndarray, count: int = _POINTS) -> list[tuple[int, int]]:
    """Points of a label map, column and row: the innermost of the largest classes.

    Where there are too few classes, those farthest from the others and from the border.
    """
    shares = np.bincount(labels.ravel())
    classes = [int(label) for label in np.argsort(-shares, kind='stable') if shares[label]]
    points: list[tuple[int, int]] = []
    for i in range(count):
        inside = labels == classes[i] if i < len(classes) else np.ones(labels.shape, bool)
        region = np.pad(inside.astype(np.uint8), 1)
        if i >= len(classes):
            for x, y in points:
                region[y + 1, x + 1] = 0
        depth = cv2.distanceTransform(region, cv2.DIST_L2, 5)[1:-1, 1:-1]
        y, x = divmod(int(depth.argmax()), depth.shape[1])
        points.append((x, y))
    return points


def _network_inputs(segmenter: Segmenter, path: Path) -> tuple[np.ndarray, Tensor, Grid]:
    """A picture, BGR; what the network sees of it; and its size there, without padding."""
    picture, data = segmenter._ready(path)
    model: Any = segmenter.model
    batch = model.data_preprocessor(
        dict(inputs=[data['inputs']], data_samples=[data['data_samples']]), False)
    return picture, batch['inputs'], _pair(data['inputs'].shape[1:])


def _take(segmenter: Segmenter, subject: _Subject, ratios: Sequence[ISRRatio],
          layers: Sequence[str], strict: bool) -> tuple[list[Shot], dict[str, str]]:
    """The picture at each ratio; and why, of layers that cannot be drawn."""
    shots = []
    reasons: dict[str, str] = {}
    at = [subject.to_inputs(point) for point in subject.points]
    for ratio in ratios:
        with _ratio(segmenter, ratio):
            seen, why = look(segmenter.model, subject.inputs, layers, at)
            shots.append(_predict(segmenter, subject.path, f'ISR {ratio_name(ratio)}', seen))
        reasons |= why
    if strict and reasons:
        raise ConfigError('this attention cannot be drawn: ' + '; '.join(
            f'{name}: {why}' for name, why in reasons.items()))
    for shot in shots:
        for name in reasons:
            shot.seen.pop(name, None)
    return shots, reasons


def _predict(segmenter: Segmenter, path: Path, title: str,
             seen: dict[str, Attended] | None = None) -> Shot:
    """A picture at the ratio that a segmenter is set to."""
    size = _pair(_network_inputs(segmenter, path)[1].shape[2:])
    views = windows(segmenter.model, size)
    view = len(range(size[0])[views[0][0]]), len(range(size[1])[views[0][1]])
    gmacs = len(views) * count_macs(segmenter.model, view) / 1e9
    return Shot(title, segmenter(path), gmacs, seen or {})


def _read_labels(labels: Path, path: Path, size: Grid, classes: int,
                 reduce_zero_label: bool) -> np.ndarray:
    """The labels of a picture, H x W.

    Raises:
        DataError: There are none, or they do not fit.
    """
    mask = labels
    if labels.is_dir():
        found = sorted(labels.glob(f'{path.stem}.*'))
        if len(found) != 1:
            raise DataError(f'{labels} holds {len(found)} masks called {path.stem}.*, not one')
        mask = found[0]
    step = TRANSFORMS.build(dict(type='LoadAnnotations', num_classes=classes))
    results = step(dict(img_path=str(path), seg_map_path=str(mask), ori_shape=size, seg_fields=[],
                        reduce_zero_label=reduce_zero_label))
    read: np.ndarray = results['gt_seg_map']
    return read


@contextmanager
def _ratio(segmenter: Segmenter, ratio: ISRRatio) -> Iterator[None]:
    """Set a segmenter to a ratio within the block."""
    before = segmenter.isr
    segmenter.isr = ratio
    try:
        yield
    finally:
        segmenter.isr = before


def _changed(shot: Shot, first: Shot) -> float:
    return float((shot.found.labels != first.found.labels).mean())


def _right(shot: Shot, truth: np.ndarray) -> float:
    """The share of the labelled pixels whose class is found."""
    known = truth != IGNORED
    return float((shot.found.labels == truth)[known].mean()) if known.any() else math.nan


def _tables(subject: _Subject, shots: Sequence[Shot], beside: Sequence[Shot]) -> str:
    """The figures of the sheets for a terminal."""
    first = shots[0]
    table = PrettyTable([f'{subject.path.name}', 'GMACs', 'other labels'], align='r')
    table.align[subject.path.name] = 'l'
    for shot in (*shots, *beside):
        table.add_row([shot.title, f'{shot.gmacs:.2f}',
                       '' if shot is first else f'{_changed(shot, first):.1%}'])
    lines = [*subject.names, str(table)]
    if first.seen:
        table = PrettyTable(['layer', *(shot.title for shot in shots)], align='r')
        table.align['layer'] = 'l'
        for name, before in first.seen.items():
            table.add_row([name, f'{before.keys} keys', *(
                f'{after.keys} keys, {relative_error(after.features, before.features):.1%}'
                for after in (shot.seen[name] for shot in shots[1:]))])
        if len(shots) > 1:
            lines.append(f'In percent: how far the output features are from {first.title}')
        lines.append(str(table))
    return '\n'.join(lines)


# Drawing. A sheet is made of pictures beside and below each other, so that nothing overlaps.

def draw_attention(subject: _Subject, shots: Sequence[Shot], texts: dict[str, str]
                   ) -> Image.Image:
    """Attention of each layer (rows) for each point and ratio (columns)."""
    size = _panel_size(subject, len(subject.points) * len(shots))
    width = len(shots) * (size[0] + _GAP) + _BAR
    rows = [_beside([_blank(_LABEL, 1), *(
        _text(name, width, 17) for name in subject.names)])]
    for name, text in texts.items():
        row = [_label(name, text)]
        for i, point in enumerate(subject.points):
            maps = [shot.seen[name].density()[i] for shot in shots]
            high = max(float(each.max()) for each in maps)
            group = []
            for shot, values in zip(shots, maps):
                seen = shot.seen[name]
                panel = _heat(subject, values, seen.cells, size, high)
                _cross(panel, subject, point)
                caption = f'{shot.title}: {seen.keys} keys, up to {values.max():.1f}'
                if seen.single:
                    caption += f', {seen.weights[i].mean(0)[:seen.single].sum():.0%} elsewhere'
                group.append(_below([panel, _text(caption, size[0])], 2))
            row.append(_beside([*group, _bar(_HEAT, '0', f'{high:.1f}', size[1])]))
        rows.append(_beside(row))
    return _sheet(
        f'Attention, {subject.path.name}',
        'Where the query at the cross looks: mean of the heads, for each area as a multiple of '
        'even attention, which is 1. The cells are those of the keys. One scale for the ratios of '
        'a point in a layer. Grey: no key.', rows)


def draw_features(subject: _Subject, shots: Sequence[Shot], texts: dict[str, str]) -> Image.Image:
    """What the attention of each layer (rows) gives at each ratio, and the difference."""
    columns = 2 * len(shots) - 1
    size = _panel_size(subject, columns)
    rows = []
    for name, text in texts.items():
        first = shots[0].seen[name]
        shared = Projection.of(first.features)
        views = [shared.view(shot.seen[name].features) for shot in shots]
        low, high = (float(at) for at in np.percentile(np.stack(views), (1, 99)))
        differences = [shared.difference(shot.seen[name].features, first.features)
                       for shot in shots[1:]]
        row = [_label(name, text)]
        for shot, values in zip(shots, views):
            panel = _plain(values, first.tokens, subject, size, _FEATURE, low, high)
            row.append(_below([panel, _text(shot.title, size[0])], 2))
        row.append(_bar(_FEATURE, f'{low:.2g}', f'{high:.2g}', size[1]))
        most = max((float(each.max()) for each in differences), default=0.)
        for shot, values in zip(shots[1:], differences):
            panel = _plain(values, first.tokens, subject, size, _HEAT, 0., most)
            error = relative_error(shot.seen[name].features, first.features)
            row.append(_below([panel, _text(f'{shot.title}: differs by {error:.1%}', size[0])], 2))
        if differences:
            row.append(_bar(_HEAT, '0', f'{most:.2g}', size[1]))
        rows.append(_beside(row))
    return _sheet(
        f'Output features of the attention, {subject.path.name}',
        f'Left: along the first principal component at {shots[0].title}, the same for all ratios. '
        f'Right: norm of the difference to {shots[0].title} at each token, 1 is the mean norm of '
        'its features. In percent: norm of the whole difference to that of the features.', rows)


def draw_predictions(subject: _Subject, shots: Sequence[Shot], beside: Sequence[Shot] = (),
                     truth: np.ndarray | None = None, note: str = '') -> Image.Image:
    """The picture, its labels if they are given, and what is predicted, with the classes."""
    first = shots[0]
    size = _panel_size(subject, 4, 440)
    panel = _photo(subject, size)
    for i, point in enumerate(subject.points, 1):
        _cross(panel, subject, point, str(i))
    blocks = [_below([panel, _text('\n'.join([subject.path.name, *subject.names]), size[0])], 4)]
    if truth is not None:
        labelled = Segmentation(np.where(truth == IGNORED, 0, truth), first.found.picture,
                                first.found.classes, first.found.palette)
        drawn = labelled.draw()
        drawn[truth == IGNORED] = 0
        blocks.append(_below([_resized(drawn, size), _text('ground truth; black: none', size[0])],
                             4))
    for shot in (*shots, *beside):
        lines = [shot.title, f'{shot.gmacs:.2f} GMACs']
        if shot in shots[1:]:
            lines[-1] += f' ({shot.gmacs / first.gmacs - 1:+.0%})'
        if shot is not first:
            lines.append(f'{_changed(shot, first):.1%} of the pixels differ from {first.title}')
        if truth is not None:
            lines.append(f'{_right(shot, truth):.1%} of the labelled pixels right')
        blocks.append(_below([_resized(shot.found.draw(), size), _text('\n'.join(lines), size[0])],
                             4))
    rows = [_beside(blocks[start:start + 4]) for start in range(0, len(blocks), 4)]
    counts = np.zeros(len(first.found.classes), int)
    for labels in (*(shot.found.labels for shot in (*shots, *beside)), *(
            [] if truth is None else [truth[truth != IGNORED][None]])):
        counts += count_pixels(labels, len(counts))
    rows.append(_legend([(first.found.classes[i], first.found.palette[i])
                         for i in np.argsort(-counts, kind='stable') if counts[i]],
                        max(row.width for row in rows)))
    return _sheet(f'Predictions, {subject.path.name}', note, rows)


def paint(values: np.ndarray, edges: tuple[np.ndarray, np.ndarray], size: Grid,
          step: tuple[float, float]) -> np.ndarray:
    """Cells as pixels: each has the value of the cell that its middle lies in, NaN outside of all.

    Args:
        values: Rows x columns of cells.
        edges: Where the rows and columns of cells begin, and the last ends, in pixels of the
            inputs.
        size: Height and width of the result.
        step: Pixels of the inputs to one of it, down and across.
    """
    where = [np.searchsorted(edge, (np.arange(side) + 0.5) * each, 'right') - 1
             for edge, side, each in zip(edges, size, step)]
    inside = [(at >= 0) & (at < count) for at, count in zip(where, values.shape)]
    rows, columns = (np.where(good, at, 0) for good, at in zip(inside, where))
    found: np.ndarray = np.where(inside[0][:, None] & inside[1],
                                 values[rows[:, None], columns].astype(float), np.nan)
    return found


def _panel_size(subject: _Subject, columns: int, longest: int = _PANEL) -> Grid:
    """Width and height of a panel."""
    height, width = subject.picture.shape[:2]
    scale = min(longest, max(160, _WIDEST // columns)) / max(height, width)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _step(subject: _Subject, size: Grid) -> tuple[float, float]:
    """Pixels of the inputs to one of a panel, down and across."""
    height, width = subject.picture.shape[:2]
    return subject.step[0] * height / size[1], subject.step[1] * width / size[0]


def _colours(values: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    """Values in the colours of a colour map, H x W x 3, uint8."""
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    colours: np.ndarray = matplotlib.colormaps[name](np.clip(share, 0, 1), bytes=True)[..., :3]
    return colours


def _heat(subject: _Subject, values: np.ndarray, edges: tuple[np.ndarray, np.ndarray], size: Grid,
          high: float) -> Image.Image:
    """Attention over the picture."""
    grey = np.array(_photo(subject, size).convert('L').convert('RGB'))
    painted = paint(values, edges, (size[1], size[0]), _step(subject, size))
    colours = _colours(painted, _HEAT, 0., high)
    mixed = (0.4 * grey + 0.6 * colours).round().astype(np.uint8)
    return Image.fromarray(np.where(np.isnan(painted)[..., None], grey, mixed))


def _plain(values: np.ndarray, edges: tuple[np.ndarray, np.ndarray], subject: _Subject, size: Grid,
           name: str, low: float, high: float) -> Image.Image:
    painted = paint(values, edges, (size[1], size[0]), _step(subject, size))
    return Image.fromarray(_colours(painted, name, low, high))


def _photo(subject: _Subject, size: Grid) -> Image.Image:
    return _resized(subject.picture, size)


def _resized(picture: np.ndarray, size: Grid) -> Image.Image:
    smaller = size[0] < picture.shape[1]
    way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return Image.fromarray(np.ascontiguousarray(cv2.resize(picture, size, interpolation=way)
                                                [..., ::-1]))


def _cross(panel: Image.Image, subject: _Subject, point: tuple[int, int], name: str = '') -> None:
    """Mark a point of the picture on a panel."""
    height, width = subject.picture.shape[:2]
    x, y = (point[0] + 0.5) * panel.width / width, (point[1] + 0.5) * panel.height / height
    pen = ImageDraw.Draw(panel)
    for line, colour in ((5, 'black'), (2, '#00e5ff')):
        reach = 8 + (line == 5)
        pen.line((x - reach, y, x + reach, y), colour, line)
        pen.line((x, y - reach, x, y + reach), colour, line)
    if name:
        left, up = x < panel.width - 24, y < panel.height - 24
        pen.text((x + (6 if left else -6), y + (5 if up else -5)), name, '#00e5ff', _font(16),
                 ('l' if left else 'r') + ('a' if up else 'd'), stroke_width=2,
                 stroke_fill='black')


def _font(size: float) -> Any:
    return ImageFont.load_default(size)


def _text(text: str, width: int, size: int = 14, colour: str = '#222222') -> Image.Image:
    """Lines of text, broken so that they fit the width."""
    font = _font(size)
    lines: list[str] = []
    for paragraph in text.split('\n'):
        lines.append('')
        for word in paragraph.split():
            joined = f'{lines[-1]} {word}'.strip()
            if lines[-1] and font.getlength(joined) > width:
                lines.append('')
                joined = word
            while font.getlength(joined) > width and len(joined) > 1:  # a word that is too long
                fits = next(n for n in range(len(joined) - 1, 0, -1)
                            if n == 1 or font.getlength(joined[:n]) <= width)
                lines[-1], joined = joined[:fits], joined[fits:]
                lines.append('')
            lines[-1] = joined
    step = round(1.35 * size)
    image = _blank(width, step * len(lines) + 2)
    pen = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        pen.text((0, i * step), line, colour, font)
    return image


def _label(name: str, text: str) -> Image.Image:
    """What a row of a layer is called."""
    return _below([_text(text, _LABEL, 15), _text(name, _LABEL, 12, '#777777')], 2)


def _bar(name: str, low: str, high: str, height: int) -> Image.Image:
    """A colour map with the values of its ends."""
    image = _blank(_BAR, height)
    shades = _colours(np.linspace(1, 0, height)[:, None].repeat(12, 1), name, 0., 1.)
    image.paste(Image.fromarray(shades), (0, 0))
    pen = ImageDraw.Draw(image)
    pen.text((16, 0), high, '#222222', _font(12))
    pen.text((16, height - 1), low, '#222222', _font(12), 'ld')
    return image


def _legend(classes: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> Image.Image:
    """Names of classes beside their colours, in columns."""
    font = _font(15)
    column = min(width, 50 + max(int(font.getlength(name)) for name, _ in classes))
    across = max(1, width // column)
    legend = _blank(width, -(-len(classes) // across) * 28)
    pen = ImageDraw.Draw(legend)
    for i, (name, colour) in enumerate(classes):
        x, y = i % across * column, i // across * 28
        pen.rectangle((x, y + 2, x + 26, y + 20), colour, (90, 90, 90))
        pen.text((x + 34, y + 11), name, '#222222', font, 'lm')
    return legend


def _blank(width: int, height: int) -> Image.Image:
    return Image.new('RGB', (width, height), 'white')


def _beside(images: Sequence[Image.Image], gap: int = _GAP) -> Image.Image:
    found = _blank(sum(image.width for image in images) + gap * (len(images) - 1),
                   max(image.height for image in images))
    x = 0
    for image in images:
        found.paste(image, (x, 0))
        x += image.width + gap
    return found


def _below(images: Sequence[Image.Image], gap: int = _GAP) -> Image.Image:
    found = _blank(max(image.width for image in images),
                   sum(image.height for image in images) + gap * (len(images) - 1))
    y = 0
    for image in images:
        found.paste(image, (0, y))
        y += image.height + gap
    return found


def _sheet(title: str, note: str, rows: Sequence[Image.Image]) -> Image.Image:
    width = max(row.width for row in rows)
    head = [_text(title, width, 24)] + ([_text(note, width, 15, '#555555')] if note else [])
    content = _below([*head, *rows], 14)
    found = _blank(content.width + 40, content.height + 40)
    found.paste(content, (20, 20))
    return found
