"""Data sets, and reading them."""
from ..pretraining.image_crop import RandomResizedCrop
from ..pretraining.rand_augment import PackForDevice, augment_collate
from .bad_files import SkippedFilesHook
from .datasets import CamVidDataset, SyntheticDataset
from .preprocessing import BatchPreProcessor, stack_collate
from .shards import ShardedImages
from .transforms import LoadSegImage, LoadSegLabels, RandomSegCrop, SegResize

__all__ = ['BatchPreProcessor', 'CamVidDataset', 'LoadSegImage', 'LoadSegLabels', 'PackForDevice',
           'RandomResizedCrop', 'RandomSegCrop', 'SegResize', 'ShardedImages', 'SkippedFilesHook',
           'SyntheticDataset', 'augment_collate', 'stack_collate']
