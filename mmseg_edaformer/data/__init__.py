"""Data sets, and reading them."""
from .datasets import CamVidDataset, SyntheticDataset
from .image_crop import RandomResizedCrop
from .preprocessor import BatchPreProcessor, stack_collate
from .rand_augment import PackForDevice, augment_collate
from .shards import ShardedImages
from .skipping import SkippedFilesHook
from .transforms import LoadSegImage, LoadSegLabels, RandomSegCrop, SegResize

__all__ = ['BatchPreProcessor', 'CamVidDataset', 'LoadSegImage', 'LoadSegLabels', 'PackForDevice',
           'RandomResizedCrop', 'RandomSegCrop', 'SegResize', 'ShardedImages', 'SkippedFilesHook',
           'SyntheticDataset', 'augment_collate', 'stack_collate']
