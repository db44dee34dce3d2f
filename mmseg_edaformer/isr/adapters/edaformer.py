"""The networks of this package.

EFT and EDAFormerHead have an attention with an ``isr_ratio`` of its own, the paper's pooling; those
that are here for comparison are reduced as other libraries' are.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..intercept import Setting
from ..key_layout import OwnMaps
from ..registry import AttentionRule, Irreducible, Rule

_MODELS = 'mmseg_edaformer.models'

RULES: dict[str, Rule] = {
    f'{_MODELS}.lvt.RecursiveAtrousSelfAttention': AttentionRule(OwnMaps()),
    f'{_MODELS}.lvt.ConvolutionalSelfAttention': Irreducible(
        'it attends within 3x3 windows, by weights that depend on the query alone'),
    f'{_MODELS}.feedformer_head.LowLevelCrossAttention': AttentionRule(OwnMaps()),
}


@dataclass
class EmbeddingFreeLayer:
    """An attention layer of this package."""
    name: str
    module: Any

    @property
    def setting(self) -> Setting:
        return Setting(self.module.isr_ratio, self.module.isr_method, self.module.isr_keys)

    @setting.setter
    def setting(self, setting: Setting) -> None:
        self.module.isr_ratio, self.module.isr_method = setting.ratio, setting.method
        self.module.isr_keys = setting.keys


def find(name: str, module: Any) -> Iterator[tuple[str, dict[int, list[EmbeddingFreeLayer]]]]:
    """The kind of part that this module is, if any, and its attention layers by stage."""
    classes = {f'{cls.__module__}.{cls.__qualname__}' for cls in type(module).__mro__}
    prefix = f'{name}.' if name else ''
    if 'mmseg_edaformer.models.eft.EFT' in classes:
        yield 'encoder', _by_stage(f'{prefix}stages', range(1, len(module.stages) + 1),
                                   module.stages)
    elif 'mmseg_edaformer.models.edaformer_head.EDAFormerHead' in classes:
        yield 'decoder', _by_stage(f'{prefix}levels', (i + 1 for i in module.in_index),
                                   module.levels)


def _by_stage(prefix: str, numbers: Iterable[int],
              stages: nn.ModuleList) -> dict[int, list[EmbeddingFreeLayer]]:
    return {number: [EmbeddingFreeLayer(f'{prefix}.{index}.{name}', module)
                     for name, module in stage.named_modules() if hasattr(module, 'isr_ratio')]
            for index, (number, stage) in enumerate(zip(numbers, stages))}
