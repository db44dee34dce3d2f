"""Inference spatial reduction: one trained model, many costs."""
from .adapters import register_isr
from .apply import ISRReport, apply_isr, isr, remove_isr, report_isr
from .grids import Arguments, InputMap, OwnMaps, Patches, Window
from .hook import ISRHook
from .ratio import ISRRatio

__all__ = ['Arguments', 'ISRHook', 'ISRRatio', 'ISRReport', 'InputMap', 'OwnMaps', 'Patches',
           'Window', 'apply_isr', 'isr', 'register_isr', 'remove_isr', 'report_isr']
