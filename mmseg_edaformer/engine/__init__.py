"""Running models: checks, checkpoints, progress, and runs that survive."""
from .backbone_weights import BackboneWeightsHook
from .checkpoint import CheckWeightsHook, load_from_file
from .evaluation import EvaluationHook
from .finite import FiniteLossHook
from .loop import ExactTrainLoop
from .preemption import PreemptionHook
from .progress import ProgressHook
from .saving import SafeCheckpointHook, find_checkpoint

__all__ = ['BackboneWeightsHook', 'CheckWeightsHook', 'EvaluationHook', 'ExactTrainLoop',
           'FiniteLossHook', 'PreemptionHook', 'ProgressHook', 'SafeCheckpointHook',
           'find_checkpoint', 'load_from_file']
