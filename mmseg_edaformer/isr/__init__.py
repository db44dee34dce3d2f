"""Inference spatial reduction: one trained model, many costs. It needs torch alone."""
from .apply import ISRReport, apply_isr, isr, remove_isr, report_isr
from .key_layout import Arguments, InputMap, OwnMaps, Patches, Window
from .ratio import ISRRatio, QueryRatio
from .registry import register_isr

__all__ = ['Arguments', 'ISRRatio', 'ISRReport', 'InputMap', 'OwnMaps', 'Patches',
           'QueryRatio', 'Window', 'apply_isr', 'isr', 'register_isr', 'remove_isr', 'report_isr']
