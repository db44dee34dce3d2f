"""Data sets that mmseg lacks."""
from typing import Any

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from . import drawing as synthetic


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid road scenes with SegNet's 11 classes: 367 training and 101 validation images.

    Masks hold 0-10, and 255 for void. Layout: ``images/{train,val}``, ``annotations/{train,val}``.
    """

    METAINFO = dict(
        classes=('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car',
                 'pedestrian', 'bicyclist'),
        palette=[[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [0, 0, 192],
                 [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0],
                 [0, 128, 192]])


@DATASETS.register_module()
class SyntheticDataset(BaseSegDataset):
    """The scenes that `mmseg_edaformer.data.drawing` draws, in ADE20K's layout."""

    METAINFO = dict(classes=synthetic.CLASSES, palette=synthetic.PALETTE)

    def __init__(self, img_suffix: str = '.png', seg_map_suffix: str = '.png',
                 **kwargs: Any) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)
