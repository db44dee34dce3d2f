"""Data sets and transforms; importing it registers them."""
from .bad_files import SkippedFilesHook
from .datasets import CamVidDataset, SyntheticDataset
from .preprocessing import BatchPreProcessor, stack_collate
from .transforms import LoadSegImage, LoadSegLabels, RandomSegCrop, SegResize

__all__ = ['BatchPreProcessor', 'CamVidDataset', 'LoadSegImage', 'LoadSegLabels', 'RandomSegCrop',
           'SegResize', 'SkippedFilesHook', 'SyntheticDataset', 'stack_collate']
