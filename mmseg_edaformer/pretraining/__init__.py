"""Pretraining of the encoder on ImageNet; importing it registers what its configs name."""
from .augmentation import PackForDevice, RandomResizedCrop, augment_collate

__all__ = ['PackForDevice', 'RandomResizedCrop', 'augment_collate']
