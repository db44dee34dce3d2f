"""EDAFormer for mmsegmentation: EFT, the all-attention decoder, and inference spatial reduction.

Names are loaded when they are asked for, so `apply_isr` and the others of `mmseg_edaformer.isr`
need torch alone. Once this package is imported, mmsegmentation's registries know its networks, data
sets, transforms and hooks; it replaces none of theirs.
"""
import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import compat, registration

__version__ = '0.1.0'

if TYPE_CHECKING:
    from .data import CamVidDataset, SyntheticDataset
    from .engine import CheckWeightsHook, ISRHook, ProgressHook
    from .isr import ISRRatio, apply_isr, isr, register_isr, remove_isr, report_isr
    from .models import EFT, EDAFormerHead
    from .predict.segmenter import Segmenter

_HOMES = {
    'isr': ('ISRRatio', 'apply_isr', 'isr', 'register_isr', 'remove_isr', 'report_isr'),
    'models': ('EFT', 'EDAFormerHead'),
    'data': ('CamVidDataset', 'SyntheticDataset'),
    'engine': ('CheckWeightsHook', 'ISRHook', 'ProgressHook'),
    'predict.segmenter': ('Segmenter',)}

__all__ = ['EFT', 'CamVidDataset', 'CheckWeightsHook', 'EDAFormerHead', 'ISRHook', 'ISRRatio',
           'ProgressHook', 'Segmenter', 'SyntheticDataset', 'apply_isr', 'isr', 'register_isr',
           'remove_isr', 'report_isr']


class _Package(ModuleType):
    """This package, in which ``isr`` is the context manager and not the subpackage of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'isr' and isinstance(value, ModuleType):  # the import system names subpackages
            value = value.isr
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if home != 'isr':
        compat.check_environment()
    value = getattr(importlib.import_module(f'.{home}', __name__), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
compat.prepare_imports()
registration.announce()
