"""Inference spatial reduction on a model: apply, undo, and say what it did.

Source: arXiv 2407.17261, section 4. Pooling the keys further leaves the weights, the queries and
the output's size as they are, so it needs no training and can be undone at any time.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prettytable import PrettyTable
from torch import Tensor, nn

from ..analysis.cost import on_meta, trace_macs
from ..errors import RatioError
from ..models.attention import EmbeddingFreeAttention
from .adapters import find_parts
from .ratio import ISRRatio


def apply_isr(model: nn.Module, ratio: ISRRatio | int | str, *,
              crop_size: tuple[int, int] | None = None) -> None:
    """Pool the keys of a model further, from now on.

    The ratio counts from the training pools, so applying twice is applying once. A compiled model
    recompiles for a ratio that it has not seen; state dicts do not change.

    Args:
        model: Any model that holds an EFT or an EDAFormerHead; wrapped by DDP or test-time
            augmentation, or compiled, just as well.
        ratio: What `ISRRatio.parse` reads. A part that the model lacks is passed over.
        crop_size: Height and width in pixels of the training images, which the ratio ``auto``
            counts from; by default what `training_size` finds.

    Raises:
        RatioError: The ratio does not fit, or the model has nothing to reduce; it is unchanged.
    """
    for layer, setting in _plan(model, ratio, crop_size):
        layer.isr_ratio, layer.isr_keys = setting


def remove_isr(model: nn.Module) -> None:
    """Give a model its training pools back, bit for bit."""
    apply_isr(model, 1)


@contextmanager
def isr(model: nn.Module, ratio: ISRRatio | int | str, *,
        crop_size: tuple[int, int] | None = None) -> Iterator[None]:
    """Pool the keys of a model further within a ``with`` block, also if that ends in an error.

    Arguments are those of `apply_isr`.

    Raises:
        RatioError: As `apply_isr` does.
    """
    plan = _plan(model, ratio, crop_size)
    before = [(layer.isr_ratio, layer.isr_keys) for layer, _ in plan]
    try:
        for layer, setting in plan:
            layer.isr_ratio, layer.isr_keys = setting
        yield
    finally:
        for (layer, _), setting in zip(plan, before):
            layer.isr_ratio, layer.isr_keys = setting


def training_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model was trained on.

    The ``data_preprocessor.size`` of the segmentor within the model, or else 512x512.
    """
    for module in model.modules():
        size = getattr(getattr(module, 'data_preprocessor', None), 'size', None)
        if size is not None:
            return tuple(size)
    return 512, 512


def _plan(model: nn.Module, ratio: ISRRatio | int | str, crop_size: tuple[int, int] | None
          ) -> list[tuple[EmbeddingFreeAttention, tuple[int, int | None]]]:
    """Each attention layer with the ``isr_ratio`` and ``isr_keys`` that the ratio gives it."""
    ratio = ISRRatio.parse(ratio)
    crop_size = crop_size or training_size(model)
    plan = [(layer, (multiplier, layer.num_keys(*part.map_size(number, crop_size), multiplier=1)
                     if ratio.auto else None))
            for part in find_parts(model)
            for (number, layers), multiplier in zip(part.stages.items(),
                                                    ratio.for_stages(part.kind, len(part.stages)))
            for layer in layers]
    if not plan:
        raise RatioError(f'isr_ratio {ratio}: {type(model).__name__} holds no attention that ISR '
                         'can reduce. It acts on EFT and EDAFormerHead')
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
    """What a ratio changes for one image size; pairs are before and after."""
    ratio: ISRRatio
    input_size: tuple[int, int]
    stages: tuple[StageReport, ...]
    macs: tuple[int, int]

    def __str__(self) -> str:
        table = PrettyTable(['stage', 'blocks', 'pool', 'keys'], align='l')
        for stage in self.stages:
            table.add_row([stage.stage, stage.blocks, _change(*stage.pool), _change(*stage.keys)])
        before, after = (macs / 1e9 for macs in self.macs)
        return (f'ISR {self.ratio} on {self.input_size[0]}x{self.input_size[1]} pixels:\n{table}\n'
                f'GMACs {before:.2f} -> {after:.2f} ({after / before - 1:+.1%})')


def report_isr(model: nn.Module, ratio: ISRRatio | int | str,
               input_size: tuple[int, int] = (512, 512), *,
               crop_size: tuple[int, int] | None = None) -> ISRReport:
    """Find out what a ratio would change, without touching the model or computing anything.

    Args:
        model: As for `apply_isr`.
        ratio: As for `apply_isr`.
        input_size: Height and width in pixels.
        crop_size: As for `apply_isr`.

    Raises:
        RatioError: As `apply_isr` does.
    """
    with on_meta(model) as shadow:
        remove_isr(shadow)
        macs, before = _trace(shadow, input_size)
        apply_isr(shadow, ratio, crop_size=crop_size)
        macs_after, after = _trace(shadow, input_size)
    stages = tuple(StageReport(name, blocks, (pool, after[name][1]), (keys, after[name][2]))
                   for name, (blocks, pool, keys) in before.items())
    return ISRReport(ISRRatio.parse(ratio), input_size, stages, (macs, macs_after))


def _trace(shadow: nn.Module,
           input_size: tuple[int, int]) -> tuple[int, dict[str, tuple[int, int, int]]]:
    """Cost of a model on the meta device; blocks, pool and number of keys of each stage."""
    sizes: dict[nn.Module, tuple[int, int]] = {}
    stages = {f'{part.kind} {number}': layers for part in find_parts(shadow)
              for number, layers in part.stages.items() if layers}

    def note_size(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        height, width = args[0].shape[2:]
        sizes[layer] = (height, width)

    handles = [layer.register_forward_pre_hook(note_size)
               for layers in stages.values() for layer in layers]
    macs = trace_macs(shadow, input_size)
    for handle in handles:
        handle.remove()
    return macs, {name: (len(layers), min(layers[0].pool_size(*sizes[layers[0]])),
                         layers[0].num_keys(*sizes[layers[0]])) for name, layers in stages.items()}


def _change(before: int, after: int) -> str:
    return f'{before} -> {after}' if before != after else str(before)
