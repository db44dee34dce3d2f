"""EDAFormer for mmsegmentation: EFT, the all-attention decoder, and inference spatial reduction.

Importing it registers everything: the networks, the data sets and transforms, the hooks.
"""
from . import compat

__version__ = '0.1.0'

compat.provide_home()
compat.check_environment()
compat.stub_mmcv_ops()
compat.allow_mmengine_checkpoints()
compat.declare_torchvision_ops()
with compat.quiet_imports():
    from . import pretraining
    from .data import CamVidDataset, SyntheticDataset
    from .engine import CheckWeightsHook, ProgressHook
    from .isr import ISRHook, ISRRatio, apply_isr, isr, register_isr, remove_isr, report_isr
    from .models import EFT, EDAFormerHead
    from .predict.segmenter import Segmenter
compat.register_cpu_wrapper()
compat.find_newest_checkpoints()
compat.log_in_utf8()

__all__ = ['EFT', 'CamVidDataset', 'CheckWeightsHook', 'EDAFormerHead', 'ISRHook', 'ISRRatio',
           'ProgressHook', 'Segmenter', 'SyntheticDataset', 'apply_isr', 'isr', 'register_isr',
           'remove_isr', 'report_isr']
