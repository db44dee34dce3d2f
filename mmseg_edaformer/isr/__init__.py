"""Inference spatial reduction: one trained model, many costs."""
from .adapters import register_isr
from .apply import ISRReport, apply_isr, isr, remove_isr, report_isr
from .key_layout import Arguments, InputMap, OwnMaps, Patches, Window
from .ratio import ISRRatio

__all__ = ['Arguments', 'ISRRatio', 'ISRReport', 'InputMap', 'OwnMaps', 'Patches',
           'Window', 'apply_isr', 'isr', 'register_isr', 'remove_isr', 'report_isr']
