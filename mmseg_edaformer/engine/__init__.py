"""Running models: checks, checkpoints, progress."""
from .checkpoint import CheckWeightsHook, load_from_file
from .progress import ProgressHook

__all__ = ['CheckWeightsHook', 'ProgressHook', 'load_from_file']
