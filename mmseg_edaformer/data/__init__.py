"""Data sets, and reading them."""
from .datasets import CamVidDataset, SyntheticDataset
from .preprocessor import BatchPreProcessor, stack_collate
from .skipping import SkippedFilesHook
from .transforms import LoadSegImage, LoadSegLabels, RandomSegCrop, SegResize

__all__ = ['BatchPreProcessor', 'CamVidDataset', 'LoadSegImage', 'LoadSegLabels', 'RandomSegCrop',
           'SegResize', 'SkippedFilesHook', 'SyntheticDataset', 'stack_collate']
