"""Images beside masks, for any model that `Segmenter` takes: without a config and its data set."""
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.registry import TRANSFORMS
from PIL import Image

from ..errors import DataError
from ..isr.pooling import Grid
from ..predict.inputs import find_images
from ..predict.segmenter import Segmenter

IGNORED = 255


class LabelledImages:
    """A folder of images and one of masks with the same names, as a test set of a `Bench`."""

    def __init__(self, segmenter: Segmenter, images: str | Path, masks: str | Path,
                 reduce_zero_label: bool = False) -> None:
        self.segmenter, self.masks = segmenter, Path(masks)
        self.reduce_zero_label = reduce_zero_label
        self.files = [path for path, _ in find_images(images)]
        if len({Path(path).stem for path in self.files}) < len(self.files):
            raise DataError(f'{images} holds several images of one name, so their masks cannot be '
                            'told apart: rename them')

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, data = self.segmenter.load(self.files[index])
        labels = read_labels(self.masks, self.files[index], image.shape[:2],
                             len(self.segmenter.classes), self.reduce_zero_label)
        data['data_samples'].gt_sem_seg = PixelData(data=torch.from_numpy(labels)[None])
        return data


def read_labels(labels: Path, path: Path, size: Grid, classes: int,
                reduce_zero_label: bool) -> np.ndarray:
    """Read the labels of an image, H x W, from a mask or a folder of masks."""
    mask = labels
    if labels.is_dir():
        masks = sorted(labels.glob(f'{path.stem}.*'))
        if len(masks) != 1:
            raise DataError(f'{labels} holds {len(masks)} masks called {path.stem}.*, not one')
        mask = masks[0]
    load = TRANSFORMS.build(dict(type='LoadSegLabels', num_classes=classes))
    results = load(dict(img_path=str(path), seg_map_path=str(mask), ori_shape=size, seg_fields=[],
                        reduce_zero_label=reduce_zero_label))
    return np.asarray(results['gt_seg_map'])


def score(summary: dict[str, Any], out: str | Path, labels: str | Path,
          reduce_zero_label: bool = False) -> dict[str, Any]:
    """Return mIoU, pixel accuracy and each class's IoU, in percent, of the masks of a run.

    Args:
        summary: What `predict_images` returned.
        out: Its folder.
        labels: A mask, or a folder of masks with the names of the images.
        reduce_zero_label: Whether 0 in the masks means no label and 1 the first class.
    """
    names = list(summary['classes'])
    areas: Any = torch.zeros(4, len(names), dtype=torch.double)
    for place, entry in summary['images'].items():
        with Image.open(Path(out, entry['mask'])) as mask:
            predicted = np.asarray(mask).astype(np.int64)
        truth = read_labels(Path(labels), Path(out, place), predicted.shape, len(names),
                            reduce_zero_label)
        areas = areas + torch.stack(IoUMetric.intersect_and_union(
            torch.from_numpy(predicted), torch.from_numpy(truth.astype(np.int64)), len(names),
            IGNORED))
    shared, union, _, labelled = areas
    iou = 100 * shared / union
    return dict(mIoU=round(float(iou.nanmean()), 2),
                accuracy=round(float(100 * shared.sum() / labelled.sum()), 2),
                IoU={name: round(float(value), 2) for name, value in zip(names, iou)
                     if not value.isnan()})
