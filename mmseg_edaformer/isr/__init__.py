"""Inference spatial reduction: one trained model, many costs."""
from .apply import ISRReport, apply_isr, isr, remove_isr, report_isr
from .hook import ISRHook
from .ratio import ISRRatio

__all__ = ['ISRHook', 'ISRRatio', 'ISRReport', 'apply_isr', 'isr', 'remove_isr', 'report_isr']
