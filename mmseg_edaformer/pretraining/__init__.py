"""Pretraining of the encoder on ImageNet; importing it registers what its configs name."""
from .image_crop import RandomResizedCrop
from .rand_augment import PackForDevice, augment_collate

__all__ = ['PackForDevice', 'RandomResizedCrop', 'augment_collate']
