"""Inference spatial reduction on a model: apply, undo, and say what it did.

Source: arXiv 2407.17261, section 4. Pooling the keys further leaves the weights, the queries and
the output's size as they are, so it needs no training and can be undone at any time.
"""
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prettytable import PrettyTable
from torch import Tensor, nn

from ..analysis.cost import on_meta, trace_macs
from ..errors import RatioError
from .adapters import Attentions, ForeignLayer, Layer, find_attention
from .intercept import Record, Setting, recording
from .pooling import check_method
from .ratio import ISRRatio


def apply_isr(model: nn.Module, ratio: ISRRatio | int | str, *, method: str = 'average',
              crop_size: tuple[int, int] | None = None, strict: bool = False) -> None:
    """Pool the keys of a model further, from now on.

    The ratio counts from the training pools, so applying twice is applying once. A compiled model
    recompiles for a ratio that it has not seen; state dicts do not change.

    Args:
        model: Any model that holds attention which ISR knows: EFT and EDAFormerHead, transformers
            of mmseg, mmpretrain, timm and transformers, and what `register_isr` was told of;
            wrapped by DDP or test-time augmentation, or compiled, just as well.
        ratio: What `ISRRatio.parse` reads. A part that the model lacks is passed over. Stages of
            models of other libraries are runs of attention layers of the same width.
        method: How keys are reduced: one of `pooling.METHODS`.
        crop_size: Height and width in pixels of the training images, which the ratio ``auto``
            counts from; by default what `training_size` finds.
        strict: Attention that ISR does not know, or whose keys lie on no grid that it finds, is an
            error; otherwise `report_isr` names it.

    Raises:
        RatioError: The ratio does not fit, or the model has nothing to reduce; it is unchanged.
    """
    for layer, setting in _plan(model, ratio, method, crop_size, strict):
        layer.setting = setting


def remove_isr(model: nn.Module) -> None:
    """Give a model its training pools back, bit for bit."""
    for layer in _layers(find_attention(model)):
        layer.setting = Setting()


@contextmanager
def isr(model: nn.Module, ratio: ISRRatio | int | str, *, method: str = 'average',
        crop_size: tuple[int, int] | None = None, strict: bool = False) -> Iterator[None]:
    """Pool the keys of a model further within a ``with`` block, also if that ends in an error.

    Arguments are those of `apply_isr`.

    Raises:
        RatioError: As `apply_isr` does.
    """
    plan = _plan(model, ratio, method, crop_size, strict)
    before = [layer.setting for layer, _ in plan]
    try:
        for layer, setting in plan:
            layer.setting = setting
        yield
    finally:
        for (layer, _), setting in zip(plan, before):
            layer.setting = setting


def training_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model was trained on.

    The ``data_preprocessor.size`` of the segmentor within the model, or else 512x512.
    """
    for module in model.modules():
        size = getattr(getattr(module, 'data_preprocessor', None), 'size', None)
        if size is not None:
            return tuple(size)
    return 512, 512


def _layers(found: Attentions) -> list[Layer]:
    return [layer for part in found.parts for layers in part.stages.values() for layer in layers]


def _plan(model: nn.Module, ratio: ISRRatio | int | str, method: str,
          crop_size: tuple[int, int] | None, strict: bool) -> list[tuple[Layer, Setting]]:
    """Each attention layer with the setting that the ratio gives it."""
    ratio, method = ISRRatio.parse(ratio), check_method(method)
    found = find_attention(model)
    if not _layers(found):
        raise RatioError(f'isr_ratio {ratio}: {type(model).__name__} holds no attention that ISR '
                         f'can reduce. Found: {found}. If it has attention of your own, '
                         'register_isr makes it known')
    if strict and found.unknown:
        raise RatioError('ISR does not know all attention of this model: ' + '; '.join(
            f'{name}: {reason}' for name, reason in found.unknown.items()) +
            '. register_isr makes it known, or says that it has nothing to reduce')
    keys: dict[str, int] = {}
    if ratio.auto:
        trace = _Trace(model, crop_size or training_size(model))
        keys = {name: layer.keys[0] for name, layer in trace.layers.items() if layer.keys[0]}
    plan = []
    for part in found.parts:
        try:
            multipliers = ratio.for_stages(part.kind, len(part.stages))
        except RatioError as error:
            raise RatioError(f'{error}. Found: {found}') from None
        for layers, multiplier in zip(part.stages.values(), multipliers):
            plan += [(layer, Setting(multiplier, method, keys.get(layer.name), strict))
                     for layer in layers]
    return plan


@dataclass(frozen=True)
class StageReport:
    """One stage of an `ISRReport`: what is pooled into one key, and how many keys there are."""
    stage: str
    blocks: int
    pool: tuple[int, int]
    keys: tuple[int, int]


@dataclass(frozen=True)
class ISRReport:
    """What a ratio changes for one image size; pairs are before and after.

    ``untouched`` maps the name of each attention layer that keeps its keys, though the ratio would
    reduce it, to the reason.
    """
    ratio: ISRRatio
    input_size: tuple[int, int]
    stages: tuple[StageReport, ...]
    macs: tuple[int, int]
    untouched: dict[str, str]

    def __str__(self) -> str:
        table = PrettyTable(['stage', 'blocks', 'pool', 'keys'], align='l')
        for stage in self.stages:
            table.add_row([stage.stage, stage.blocks, _change(*stage.pool), _change(*stage.keys)])
        before, after = (macs / 1e9 for macs in self.macs)
        lines = [f'ISR {self.ratio} on {self.input_size[0]}x{self.input_size[1]} pixels:',
                 str(table), f'GMACs {before:.2f} -> {after:.2f} ({after / before - 1:+.1%})']
        if self.untouched:
            lines.append('not reduced:')
        for reason, count in Counter(self.untouched.values()).items():
            names = [name for name, why in self.untouched.items() if why == reason]
            lines.append(f'  {names[0]}{f" and {count - 1} more" if count > 1 else ""}: {reason}')
        return '\n'.join(lines)


def report_isr(model: nn.Module, ratio: ISRRatio | int | str,
               input_size: tuple[int, int] = (512, 512), *, method: str = 'average',
               crop_size: tuple[int, int] | None = None, strict: bool = False) -> ISRReport:
    """Find out what a ratio would change, without touching the model.

    One pass without and one with the ratio on the meta device, which computes nothing; a model
    that asks for values on the way runs on the CPU.

    Args:
        model: As for `apply_isr`.
        ratio: As for `apply_isr`.
        input_size: Height and width in pixels.
        method: As for `apply_isr`.
        crop_size: As for `apply_isr`.
        strict: As for `apply_isr`.

    Raises:
        RatioError: As `apply_isr` does, or the keys of no layer are reduced at this size.
    """
    plan = [(layer.name, setting)
            for layer, setting in _plan(model, ratio, method, crop_size, strict)]
    before = _Trace(model, input_size)
    after = _Trace(model, input_size, dict(plan))
    found = find_attention(model)
    stages = []
    untouched = {**found.irreducible, **found.unknown}
    for part in found.parts:
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
                                          (old.pool, new.pool), (old.keys[1], new.keys[1])))
    if not stages:
        raise RatioError(f'isr_ratio {ratio} reduces nothing in {type(model).__name__}: ' +
                         '; '.join(f'{name}: {reason}' for name, reason in untouched.items()))
    return ISRReport(ISRRatio.parse(ratio), input_size, tuple(stages), (before.macs, after.macs),
                     untouched)


@dataclass(frozen=True)
class _LayerTrace:
    """A layer in one pass: what is pooled into one key, keys before and after, or why neither."""
    pool: int = 1
    keys: tuple[int, int] = (0, 0)
    reason: str = ''


class _Trace:
    """One pass through a copy of a model, with settings by name of the layer, else without ISR."""

    def __init__(self, model: nn.Module, input_size: tuple[int, int],
                 settings: dict[str, Setting] | None = None) -> None:
        with on_meta(model) as shadow:
            layers = _layers(find_attention(shadow))
            names = [layer.name for layer in _layers(find_attention(model))]
            sizes: dict[nn.Module, tuple[int, int]] = {}

            def note_size(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                sizes[module] = (args[0].shape[2], args[0].shape[3])

            for name, layer in zip(names, layers):
                setting = (settings or {}).get(name, Setting())
                if isinstance(layer, ForeignLayer):
                    layer.watch(setting)
                else:
                    layer.setting = setting
                    layer.module.register_forward_pre_hook(note_size)
            with recording() as records:
                self.macs = trace_macs(shadow, input_size)
            self.layers = {name: self._layer(layer, records, sizes)
                           for name, layer in zip(names, layers)}

    @staticmethod
    def _layer(layer: Layer, records: dict[nn.Module, Record],
               sizes: dict[nn.Module, tuple[int, int]]) -> _LayerTrace:
        module: Any = layer.module
        if not isinstance(layer, ForeignLayer):
            if module not in sizes:
                return _LayerTrace(reason='it was not run')
            keys = module.num_keys(*sizes[module])
            return _LayerTrace(min(module.pool_size(*sizes[module])), (keys, keys))
        record = records.get(module, Record(reason='it was not run'))
        if record.keys is None:
            return _LayerTrace(keys=(0, 0), reason=record.reason)
        return _LayerTrace(record.ratio, record.keys, record.reason)


def _change(before: int, after: int) -> str:
    return f'{before} -> {after}' if before != after else str(before)
