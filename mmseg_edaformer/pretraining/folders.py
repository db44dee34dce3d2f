"""Classification data sets in folders: where they lie, and checks before a run."""
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..data.classification import class_folders
from ..data.preparing import DOWNLOADS, options
from ..errors import ConfigError, DataError

# What mmpretrain takes for images, in either case.
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')


class Folders(NamedTuple):
    """A data set in ImageNet's layout, ``{train,val}/<class>/<image>``, and where it comes from."""

    name: str
    title: str
    root: str
    classes: int
    source: str
    configs: tuple[str, ...]


FOLDERS = {folders.name: folders for folders in (
    Folders('imagenet', 'ImageNet-1K', 'data/imagenet', 1000,
            'ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6 GB) from '
            'https://www.image-net.org (after login), unpacked to {root}/train/<wnid>/*.JPEG and '
            '{root}/val/<wnid>/*.JPEG, a thousand folders n01440764, ... in each',
            ('configs/eft_t_in1k.py', 'configs/eft_b_in1k.py')),
    Folders('crops', 'Crops of drawn scenes', 'data/crops', 10,
            'all of it, drawn by: python tools/prepare_data.py crops --root {root}',
            ('configs/eft_t_crops.py',)),
)}


def check_folders(split: str, dataset: Any, num_classes: int | None) -> list[str]:
    """Check that a data set of mmpretrain is there, with as many classes as the model.

    Returns:
        The names of the class folders; empty where a list of files names the classes.

    Raises:
        DataError: Folders or images are missing.
        ConfigError: The model has another number of classes.
    """
    root = getattr(dataset, 'img_prefix', None)
    if root is None or '://' in root:
        return []
    if dataset.ann_file:
        if os.path.isfile(dataset.ann_file):
            return []
        raise DataError(f'the list of images of the {split} set is missing: {dataset.ann_file}')
    folders = class_folders(root)
    if not folders:
        raise DataError(
            f'the {split} set needs one folder per class in {root} (from {os.getcwd()}), and there '
            f'is none: set {split}_dataloader.dataset.data_root with --cfg-options, or link your '
            'data there; tools/prepare_data.py imagenet says what belongs where')
    if num_classes is not None and len(folders) != num_classes:
        raise ConfigError(f'the {split} set has {len(folders)} classes, the folders in {root}, the '
                          f'model {num_classes}: complete the folders, or set '
                          'model.head.num_classes, model.head.loss.num_classes and '
                          f'model.data_preprocessor.num_classes to {len(folders)} and the type of '
                          'the data sets to CustomDataset')
    empty = [name for name in folders if not next(_images(Path(root, name)), None)]
    if empty:
        raise DataError(f'the {split} set has no image in {len(empty)} of its {len(folders)} class '
                        f'folders in {root}, such as {empty[0]}: unpack them again')
    return folders


def check_same_classes(splits: dict[str, list[str]]) -> None:
    """Check that the splits have the same class folders, whose order numbers the classes.

    Raises:
        DataError: They differ.
    """
    for (first, names), (second, others) in itertools.combinations(splits.items(), 2):
        alone = sorted({*names} ^ {*others})
        if names and others and alone:
            raise DataError(f'the {first} and the {second} set have different class folders, such '
                            f'as {alone[0]}: rename or complete them, their order numbers the '
                            'classes')


def prepare(folders: Folders, root: str | Path | None = None) -> None:
    """Check a classification data set, and print what to do next.

    Raises:
        DataError: It is not ready; says what is missing, where, and what to do.
    """
    root = Path(root or folders.root)
    print(f'{folders.title} in {root}')
    splits, wrong = {}, []
    for split in ('train', 'val'):
        splits[split] = class_folders(root / split)
        counts = [sum(1 for _ in _images(root / split / name)) for name in splits[split]]
        print(f'  {split}: {sum(counts):,} images in {len(counts):,} folders')
        if len(counts) != folders.classes:
            wrong.append(f'{split}: {len(counts):,} folders in {root / split}, instead of '
                         f'{folders.classes:,}')
        elif not all(counts):
            wrong.append(f'{split}: no image in {root / split / splits[split][counts.index(0)]}')
    if wrong:
        raise DataError('\n  '.join([f'{folders.title} in {root} is not complete:', *wrong]) +
                        f'\n{DOWNLOADS}\n  {folders.source.format(root=root)}')
    check_same_classes(splits)
    print(f'ready: use {" or ".join(folders.configs)}{options(folders.root, root)}')


def _images(folder: Path) -> Iterator[str]:
    for _, _, names in os.walk(folder, followlinks=True):
        yield from (name for name in names if name.lower().endswith(_SUFFIXES))
