"""Running models: checks, checkpoints, progress, and runs that survive."""
from .checkpoint_hook import SafeCheckpointHook, find_checkpoint
from .checkpoint_loading import CheckWeightsHook, load_checkpoint, load_from_file
from .convert import BackboneWeightsHook
from .isr_hook import ISRHook
from .loop import ExactTrainLoop
from .nonfinite import FiniteLossHook
from .preemption import PreemptionHook
from .progress import ProgressHook, QuietRunner

__all__ = ['BackboneWeightsHook', 'CheckWeightsHook', 'ExactTrainLoop',
           'FiniteLossHook', 'ISRHook', 'PreemptionHook', 'ProgressHook', 'QuietRunner',
           'SafeCheckpointHook', 'find_checkpoint', 'load_checkpoint', 'load_from_file']
