"""The networks of this package that are here for comparison.

EFT and EDAFormerHead need no table: their attention has an ``isr_ratio`` of its own.
"""
from ..key_layout import OwnMaps
from ..rules import AttentionRule, Irreducible, Rule

_COMPARISON = 'mmseg_edaformer.models.comparison'

RULES: dict[str, Rule] = {
    f'{_COMPARISON}.lvt.RecursiveAtrousSelfAttention': AttentionRule(OwnMaps()),
    f'{_COMPARISON}.lvt.ConvolutionalSelfAttention': Irreducible(
        'it attends within 3x3 windows, by weights that depend on the query alone'),
    f'{_COMPARISON}.feedformer_head.LowLevelCrossAttention': AttentionRule(OwnMaps()),
}
