"""Inference spatial reduction on a model: apply it, undo it, and report what it changes.

Source: arXiv 2407.17261, section 4. Pooling keys further, and queries, leaves the weights and the
output's size as they are, so it needs no training and can be undone at any time.
"""
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from ..cost import Inputs, on_meta, trace_macs, unwrap
from ..errors import ExampleError, RatioError, UserError
from .pooling import Ratio, check_method
from .probe import locate
from .ratio import NONE, ISRRatio, QueryRatio
from .reduction import Record, Setting, recording
from .registry import Attentions, ForeignLayer, Layer, find_attention
from .rules import AttentionRule

P = ParamSpec('P')
T = TypeVar('T')


def _names_isr_ratio(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function refuse ``ratio=``, the former name of ``isr_ratio``, by name."""
    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if 'ratio' in kwargs:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument 'ratio': "
                            'it is isr_ratio')
        return function(*args, **kwargs)

    return checked


@_names_isr_ratio
def apply_isr(model: nn.Module, isr_ratio: ISRRatio | int | str, *,
              query_ratio: QueryRatio | int | str | None = None, method: str = 'average',
              crop_size: tuple[int, int] | None = None, strict: bool = False,
              example_inputs: Inputs | Tensor | None = None) -> None:
    """Pool the keys of a model further, and its queries, from now on.

    The ratio counts from the training pools, so applying twice is applying once. A compiled model
    recompiles for a ratio that it has not seen; state dicts do not change.

    Args:
        model: A model with attention that ISR knows: EFT and EDAFormerHead, transformers of mmseg,
            mmpretrain, timm, torchvision and transformers, research code, and what `register_isr`
            added. It may be compiled, or wrapped by DDP or test-time augmentation.
        isr_ratio: A value for `ISRRatio.parse`. A part that the model lacks is ignored. In models
            of other libraries, a stage is a run of attention layers of the same width.
        query_ratio: A value for `QueryRatio.parse`: sides of the cells whose queries are averaged.
            The result for a cell is spread over its tokens, bilinear. The default is that of
            ``isr_ratio``, which may be ``2+q2``.
        method: How keys are reduced, one of `pooling.METHODS`.
        crop_size: Height and width in pixels of the training images, from which ``auto`` counts; by
            default what `training_size` finds.
        strict: Raise an error for attention that ISR does not know, whose keys lie on no grid that
            it finds, or that does not run in the model's first forward. Otherwise `report_isr`
            names the first two, and the third is a warning.
        example_inputs: What the model is called with, if that is not one image: a tensor, a tuple
            of arguments, or a dictionary of them. ``auto`` resizes their images to the crop size,
            and `locate` runs the model on them if attention is known only by its class's name.

    Raises:
        RatioError: The ratio does not fit, or the model has nothing to reduce. The model is
            unchanged.
    """
    plan = _plan(model, isr_ratio, query_ratio, method, crop_size, strict, example_inputs)
    _set(model, plan, strict)


def remove_isr(model: nn.Module) -> None:
    """Give a model its training pools back, bit for bit."""
    layers = (*_layers(find_attention(model)), *_left_over(model, ()))
    _set(model, [(layer, Setting()) for layer in layers], False)


def _left_over(model: nn.Module, known: Collection[nn.Module]) -> list[ForeignLayer]:
    """Layers that were reduced by a rule that has changed since, or from a module further out."""
    return [ForeignLayer(name, module, reduction.rule, reduction.owners)
            for name, module in model.named_modules()
            if (reduction := vars(module).get('isr_reduction')) and module not in known]


@_names_isr_ratio
@contextmanager
def isr(model: nn.Module, isr_ratio: ISRRatio | int | str, *,
        query_ratio: QueryRatio | int | str | None = None, method: str = 'average',
        crop_size: tuple[int, int] | None = None, strict: bool = False,
        example_inputs: Inputs | Tensor | None = None) -> Iterator[None]:
    """Reduce a model as `apply_isr` does within a ``with`` block, and restore what was before.

    Arguments and errors are those of `apply_isr`.
    """
    plan = _plan(model, isr_ratio, query_ratio, method, crop_size, strict, example_inputs)
    before = [(layer, layer.setting) for layer, _ in plan]
    try:
        _set(model, plan, strict)
        yield
    finally:
        _set(model, before, strict)


def training_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the training images: ``data_preprocessor.size``, or else 512, 512."""
    for module in model.modules():
        size = getattr(getattr(module, 'data_preprocessor', None), 'size', None)
        if size is not None:
            return tuple(size)
    return 512, 512


def _layers(attentions: Attentions) -> list[Layer]:
    return [layer for part in attentions.parts for layers in part.stages.values()
            for layer in layers]


class _FirstForward:
    """A forward hook that reports reduced layers that did not run in a model's first forward."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict

    def __call__(self, model: nn.Module, args: Any, out: Any) -> None:
        if torch.compiler.is_compiling():
            return
        _set(model, [], False)
        idle = [f'{name} ({type(module).__name__})' for name, module in model.named_modules()
                if not getattr(vars(module).get('isr_reduction'), 'ran', True)]
        if not idle:
            return
        message = (f'ISR changes nothing in {len(idle)} attention layers that '
                   f'{type(model).__name__} did not run, or whose parts it calls itself: '
                   f'{", ".join(idle[:3])}{", ..." if len(idle) > 3 else ""}')
        if self.strict:
            raise RatioError(message)
        warnings.warn(message, stacklevel=2)


def _set(model: nn.Module, plan: list[tuple[Layer, Setting]], strict: bool) -> None:
    """Set the layers, and check the model's next forward if one of them has not run yet."""
    for layer, setting in plan:
        layer.setting = setting
    model = unwrap(getattr(model, '_orig_mod', model))
    for number, hook in list(model._forward_hooks.items()):
        if isinstance(hook, _FirstForward):
            del model._forward_hooks[number]
    if any(not getattr(vars(layer.module).get('isr_reduction'), 'ran', True) for layer, _ in plan):
        model.register_forward_hook(_FirstForward(strict))


_located: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""What `locate` found out about each model."""


def find_located(model: nn.Module, inputs: Inputs | None = None) -> Attentions:
    """All attention of a model, with the tokens around its maps located where no table tells."""
    attentions = find_attention(model)
    unclear = [layer for layer in _layers(attentions)
               if isinstance(layer, ForeignLayer) and layer.rule.prefix is None]
    places = _located.get(model, {})
    if unclear and (inputs is not None or any(layer.name not in places for layer in unclear)):
        places = _located[model] = locate(model, inputs)
    for layer in unclear:
        place = places[layer.name]
        if isinstance(place, str):
            attentions.refuse(layer, place)
        elif isinstance(place, AttentionRule):
            layer.rule = place
        else:
            # The keys were located, not the queries.
            layer.rule = replace(layer.rule, prefix=place[0], suffix=place[1], queries=False)
    return attentions


def _sized(inputs: Inputs | None, size: tuple[int, int]) -> Inputs | tuple[int, int]:
    """The inputs with their images resized; the size itself if there are no inputs."""
    if inputs is None:
        return size
    return tree_map_only(Tensor, lambda x: F.interpolate(x, size) if x.dim() == 4 else x, inputs)


def _plan(model: nn.Module, isr_ratio: ISRRatio | int | str,
          query_ratio: QueryRatio | int | str | None, method: str,
          crop_size: tuple[int, int] | None, strict: bool,
          inputs: Inputs | Tensor | None) -> list[tuple[Layer, Setting]]:
    """Each attention layer with the setting that the ratios give it."""
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    ratio = ISRRatio.parse(isr_ratio).with_queries(query_ratio)
    cells = ratio.queries
    check_method(method)
    attentions = find_located(model, inputs)
    if not _layers(attentions):
        raise RatioError(f'isr_ratio {ratio}: {type(model).__name__} holds no attention that ISR '
                         f'can reduce. Found: {attentions}. If it has attention of your own, '
                         'register_isr adds it')
    if str(cells) != NONE and all(isinstance(layer, ForeignLayer) and not layer.rule.queries
                                  for layer in _layers(attentions)):
        raise RatioError(f'query_ratio {cells}: {type(model).__name__} holds no attention '
                         'whose queries are known to be the tokens of a map. '
                         'register_isr(..., queries=True) declares attention of your own')
    if strict and attentions.unknown:
        raise RatioError('ISR does not know all attention of this model: ' + '; '.join(
            f'{name}: {reason}' for name, reason in attentions.unknown.items()) +
            '. register_isr adds it, or declares that it has nothing to reduce')
    keys: dict[str, int] = {}
    queries: dict[str, int] = {}
    if ratio.auto or cells.auto:
        trace = _Trace(model, attentions, _sized(inputs, crop_size or training_size(model)))
        for name, layer in trace.layers.items():
            if ratio.auto and layer.keys[0]:
                keys[name] = layer.keys[0]
            if cells.auto and layer.queries[0]:
                queries[name] = layer.queries[0]
    plan = []
    for part in attentions.parts:
        try:
            multipliers, sides = (dial.for_stages(part.kind, len(part.stages))
                                  for dial in (ratio, cells))
        except RatioError as error:
            raise RatioError(f'{error}. Found: {attentions}') from None
        for layers, multiplier, side in zip(part.stages.values(), multipliers, sides):
            plan += [(layer, Setting(multiplier, method, keys.get(layer.name), strict, side,
                                     queries.get(layer.name))) for layer in layers]
    left = _left_over(model, {layer.module for layer, _ in plan})
    return plan + [(layer, Setting()) for layer in left]


@dataclass(frozen=True)
class StageReport:
    """One stage of an `ISRReport`; pairs are before and after.

    ``pool`` is the pool of the keys, ``query_pool`` the side of the cells of queries.
    """
    stage: str
    blocks: int
    pool: tuple[Ratio, Ratio]
    keys: tuple[int, int]
    query_pool: tuple[Ratio, Ratio]
    queries: tuple[int, int]


@dataclass(frozen=True)
class ISRReport:
    """What a ratio changes at one image size; pairs are before and after.

    ``untouched`` maps the name of each attention layer that keeps its keys against the ratio to the
    reason; ``untouched_queries`` does the same for those that keep their queries alone.
    """
    isr_ratio: ISRRatio
    input_size: tuple[int, int]
    stages: tuple[StageReport, ...]
    macs: tuple[int, int]
    untouched: dict[str, str]
    untouched_queries: dict[str, str]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ('stage', 'blocks', 'pool', 'keys', 'query pool', 'queries'), *(
            (stage.stage, str(stage.blocks), _change(*stage.pool), _change(*stage.keys),
             _change(*stage.query_pool), _change(*stage.queries)) for stage in self.stages)]
        if str(self.isr_ratio.queries) == NONE:
            rows = [row[:4] for row in rows]
        before, after = (macs / 1e9 for macs in self.macs)
        lines = [f'ISR {self.isr_ratio} on {self.input_size[0]}x{self.input_size[1]} pixels:',
                 _table(rows), f'GMACs {before:.2f} -> {after:.2f} ({after / before - 1:+.1%})']
        for title, untouched in (('not reduced:', self.untouched),
                                 ('queries not reduced:', self.untouched_queries)):
            lines += [title] if untouched else []
            for reason, count in Counter(untouched.values()).items():
                name = next(name for name, why in untouched.items() if why == reason)
                lines.append(f'  {name}{f" and {count - 1} more" if count > 1 else ""}: {reason}')
        return '\n'.join(lines)


@_names_isr_ratio
def report_isr(model: nn.Module, isr_ratio: ISRRatio | int | str,
               input_size: tuple[int, int] | int | None = None, *,
               query_ratio: QueryRatio | int | str | None = None, method: str = 'average',
               crop_size: tuple[int, int] | None = None, strict: bool = False,
               example_inputs: Inputs | Tensor | None = None) -> ISRReport:
    """Find out what a ratio would change, without touching the model.

    The model passes once without and once with the ratio on the meta device, which computes
    nothing. A model that asks for values on the way runs on its own device.

    Args:
        model: The model, and the other arguments, are those of `apply_isr`.
        input_size: Height and width in pixels, or one number for a square; by default the size of
            the example, or 512, 512.

    Raises:
        RatioError: `apply_isr` would fail, or the ratio reduces no layer at this size.
        ExampleError: The model does not run on the inputs.
    """
    example = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    plan = {layer.name: setting for layer, setting in _plan(
        model, isr_ratio, query_ratio, method, crop_size, strict, example)}
    if input_size is None:
        size = next(((x.shape[-2], x.shape[-1]) for x in tree_leaves(example)
                     if isinstance(x, Tensor) and x.dim() > 2), (512, 512))
    else:
        size = (input_size, input_size) if isinstance(input_size, int) else input_size
    inputs = example if example is not None and input_size is None else _sized(example, size)
    attentions = find_located(model)
    before = _Trace(model, attentions, inputs)
    after = _Trace(model, attentions, inputs, plan)
    stages = []
    untouched_queries: dict[str, str] = {}
    untouched = {**attentions.irreducible, **attentions.unknown}
    for part in attentions.parts:
        for number, layers in part.stages.items():
            untouched |= {layer.name: f'{type(layer.module).__name__}: {reason}'
                          for layer in layers if (reason := after.layers[layer.name].reason)}
            # Blocks of a stage may differ: shifted windows keep their keys at some ratios.
            layers = [layer for layer in layers if after.layers[layer.name].keys[0]]
            if layers:
                names = sorted((layer.name for layer in layers),
                               key=lambda name: after.layers[name].keys[1])
                old, new = before.layers[names[0]], after.layers[names[0]]
                stages.append(StageReport(f'{part.kind} {number}', len(layers),
                                          (old.isr_ratio, new.isr_ratio),
                                          (old.keys[1], new.keys[1]),
                                          (old.query_ratio, new.query_ratio),
                                          (old.queries[1], new.queries[1])))
            untouched_queries |= {layer.name: f'{type(layer.module).__name__}: {reason}'
                                  for layer in layers
                                  if (reason := after.layers[layer.name].queries_reason)}
    if not stages:
        raise RatioError(f'isr_ratio {isr_ratio} reduces nothing in {type(model).__name__}: ' +
                         '; '.join(f'{name}: {reason}' for name, reason in untouched.items()))
    return ISRReport(ISRRatio.parse(isr_ratio).with_queries(query_ratio), size, tuple(stages),
                     (before.macs, after.macs), untouched, untouched_queries)


class _Trace:
    """One pass through a copy of a model, with settings by layer name, or else without ISR."""

    def __init__(self, model: nn.Module, attentions: Attentions, inputs: Inputs | tuple[int, int],
                 settings: dict[str, Setting] | None = None) -> None:
        wanted = {layer.name: layer for layer in _layers(attentions)}
        with on_meta(model) as shadow:
            _set(shadow, [], False)
            layers = {original.name: layer for original, layer in zip(
                _layers(find_attention(model)), _layers(find_attention(shadow)))
                if original.name in wanted}
            sizes: dict[nn.Module, tuple[int, int]] = {}

            def note_size(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                sizes[module] = (args[0].shape[2], args[0].shape[3])

            for name, layer in layers.items():
                setting = (settings or {}).get(name, Setting())
                if isinstance(layer, ForeignLayer):
                    layer.rule = cast(ForeignLayer, wanted[name]).rule
                    layer.watch(setting)
                else:
                    layer.setting = setting
                    layer.module.register_forward_pre_hook(note_size)
            with recording() as records:
                self.macs = self._macs(shadow, inputs)
            self.layers = {name: self._record(layer, records, sizes)
                           for name, layer in layers.items()}

    @staticmethod
    def _macs(shadow: nn.Module, inputs: Inputs | tuple[int, int]) -> int:
        try:
            return trace_macs(shadow, inputs)
        except UserError:
            raise
        except Exception as error:  # of whatever model this is
            given = 'x'.join(map(str, inputs)) + ' pixels' if isinstance(
                inputs, tuple) and isinstance(inputs[0], int) else 'its example_inputs'
            raise ExampleError(
                f'{type(shadow).__name__} does not run on {given} ({type(error).__name__}: {error})'
                ': give an input_size or crop_size that it takes, or example_inputs') from error

    @staticmethod
    def _record(layer: Layer, records: dict[nn.Module, Record],
               sizes: dict[nn.Module, tuple[int, int]]) -> Record:
        """What the pass did in a layer; in EFT's, the ratio of the record is its whole pool."""
        module: Any = layer.module
        if module in sizes:
            size = sizes[module]
            keys, cell = module.num_keys(*size), module.query_cell(*size)
            return Record(
                (keys, keys), min(module.pool_size(*size)), queries=(
                    math.prod(size), math.prod(-(-s // c) for s, c in zip(size, cell))),
                query_ratio=min(cell))
        return records.get(module, Record(reason='it was not run'))


def _change(before: Ratio, after: Ratio) -> str:
    return f'{before} -> {after}' if before != after else str(before)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows under a header, framed; no library, because ISR needs torch alone."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = '+'.join(['', *('-' * (width + 2) for width in widths), ''])
    header, *body = ('| ' + ' | '.join(map(str.ljust, row, widths)) + ' |' for row in rows)
    return '\n'.join([line, header, line, *body, line])
