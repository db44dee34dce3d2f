"""Data sets, and reading them."""
from .datasets import CamVidDataset, SyntheticDataset
from .preprocessor import BatchPreProcessor, stack_collate
from .transforms import LoadSegImage, LoadSegLabels, RandomSegCrop

__all__ = ['BatchPreProcessor', 'CamVidDataset', 'LoadSegImage', 'LoadSegLabels', 'RandomSegCrop',
           'SyntheticDataset', 'stack_collate']
