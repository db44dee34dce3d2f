"""EFT and EDAFormerHead, whose attention has an ``isr_ratio`` of its own."""
from collections.abc import Iterable, Iterator

from torch import nn

from ...models import EFT, EDAFormerHead, EmbeddingFreeAttention


def find(module: nn.Module) -> Iterator[tuple[str, dict[int, list[EmbeddingFreeAttention]]]]:
    """The kind of part that this module is, if any, and its attention layers by stage."""
    if isinstance(module, EFT):
        yield 'encoder', _by_stage(range(1, len(module.stages) + 1), module.stages)
    elif isinstance(module, EDAFormerHead):
        yield 'decoder', _by_stage((index + 1 for index in module.in_index), module.levels)


def _by_stage(numbers: Iterable[int],
              stages: nn.ModuleList) -> dict[int, list[EmbeddingFreeAttention]]:
    return {number: [module for module in stage.modules()
                     if isinstance(module, EmbeddingFreeAttention)]
            for number, stage in zip(numbers, stages)}
