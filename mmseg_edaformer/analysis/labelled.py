"""Images beside masks, for any model that `Segmenter` takes: without a config and its data set."""
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.registry import TRANSFORMS
from PIL import Image

from ..errors import ConfigError, DataError, first_line
from ..files import write_file
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


def unpack_dataset(name: str, folder: Path) -> tuple[Path, Path]:
    """Write images and masks of a data set to two folders, encoded as they are, and return these.

    Args:
        name: A folder or a hub name that the library datasets loads: of its splits validation,
            test, or the only one. One of two columns of images is named after what it holds,
            such as label, mask or annotation.
        folder: Where images/ and masks/ are written, numbered. What they held of another data set
            goes; files that are the same stay untouched.

    Raises:
        UserError: The library is missing, or cannot load it, or its columns are others; or the
            folders hold other files.
    """
    try:
        datasets: Any = importlib.import_module('datasets')
    except ImportError as error:
        raise ConfigError(f'{name} needs the library datasets ({first_line(error)}): pip install '
                          'datasets') from error
    try:
        splits = datasets.get_dataset_split_names(name)
        split = next((known for known in ('validation', 'val', 'test') if known in splits),
                     splits[0] if len(splits) == 1 else None)
        rows = datasets.load_dataset(name, split=split) if split else None
    except Exception as error:  # of the network, of files that anyone may have written
        raise DataError(f'{name} is no data set that the library datasets loads '
                        f'({first_line(error)}): check the name and the network, or give a folder '
                        'of images and one of masks') from error
    if rows is None:
        raise DataError(f'{name} has the splits {", ".join(splits)}, and none is called validation '
                        'or test: give a folder of images and one of masks')
    columns = [column for column, kind in rows.features.items()
               if isinstance(kind, datasets.Image) or (
                   isinstance(kind, dict) and set(kind) == {'bytes', 'path'})]
    labels = [column for column in columns
              if any(word in column.lower() for word in ('label', 'mask', 'annot', 'seg'))]
    if len(columns) != 2 or len(labels) != 1:
        raise DataError(f'{name} has the columns {", ".join(rows.features)}, and not one of images '
                        'and one of masks, called label, mask, annotation or segmentation: give '
                        'them as two folders')
    for column in columns:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    places = folder / 'images', folder / 'masks'
    for place, column in zip(places, sorted(columns, key=labels.count)):
        place.mkdir(parents=True, exist_ok=True)
        old = set(place.iterdir())
        if any(not re.fullmatch(r'\d{6}\.\w+', path.name) for path in old):
            raise DataError(f'{place} holds files that are not of a data set: give another --out')
        for index, row in enumerate(rows.select_columns([column])):
            value = row[column]
            if value is None:
                raise DataError(f'row {index} of {name} has no {column}: give a folder of images '
                                'and one of masks')
            content = value['bytes'] or Path(value['path']).read_bytes()
            path = place / f'{index:06}{Path(value["path"] or "").suffix or ".png"}'
            if not path.is_file() or path.read_bytes() != content:
                write_file(path, content)
            old.discard(path)
        for path in old:
            path.unlink()
    return places


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
