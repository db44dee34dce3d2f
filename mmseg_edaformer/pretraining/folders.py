"""Pretraining the encoder as a classifier: what segmentation has no need of.

The network, its augmentations and its metric are mmpretrain's; this holds the checks before a run,
what makes shards of folders, and a small drawn data set in ImageNet's layout.
"""
import importlib
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from PIL import Image
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from .. import compat
from ..data.drawing import CLASSES as KINDS, draw_scene
from ..data.shards import (
    IMAGES,
    INDEX,
    SUFFIXES,
    ShardedImages,
    check_shards,
    class_folders,
    read_index,
    write_shards,
)
from ..errors import ConfigError, DataError
from ..files import write_file
from ..isr import ISRRatio

CROPS: tuple[str, ...] = ('bird', 'car', 'horizon', 'house', 'lamp', 'meadow', 'road', 'roadside',
                          'sky', 'tree')
"""The classes that `draw_crops` draws."""

# Shares of a window: at least and at most.
_STUFF: dict[str, dict[str, tuple[float, float]]] = {
    'sky': {'sky': (0.97, 1)}, 'meadow': {'meadow': (0.95, 1)}, 'road': {'road': (0.85, 1)},
    'horizon': {'sky': (0.3, 0.7), 'meadow': (0.3, 0.7)},
    'roadside': {'road': (0.3, 0.7), 'meadow': (0.3, 0.7)}}
# The least height or width of an object, and how much of a window other objects may cover.
_OBJECTS = {'bird': (10, 0.05), 'car': (24, 0.2), 'house': (32, 0.2), 'lamp': (32, 0.2),
            'tree': (32, 0.2)}
_SCENE = (256, 352)
_REVISION = 1  # raise it when the pictures change


@dataclass(frozen=True)
class Folders:
    """A data set in ImageNet's layout, ``{train,val}/<class>/<image>``, and where it comes from."""

    name: str
    title: str
    root: str
    classes: int
    source: str
    configs: tuple[str, ...]


FOLDERS = {each.name: each for each in (
    Folders('imagenet', 'ImageNet-1K', 'data/imagenet', 1000,
            'ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6 GB) from '
            'https://www.image-net.org (after login), unpacked to {root}/train/<wnid>/*.JPEG and '
            '{root}/val/<wnid>/*.JPEG, a thousand folders n01440764, ... in each',
            ('configs/eft_t_in1k.py', 'configs/eft_b_in1k.py')),
    Folders('crops', 'Crops of drawn scenes', 'data/crops', len(CROPS),
            'all of it, drawn by: python tools/prepare_data.py crops --root {root}',
            ('configs/eft_t_crops.py',)),
)}


def is_classifier(cfg: Config) -> bool:
    """Whether a config is one of mmpretrain's rather than of mmseg's."""
    return cfg.get('default_scope') == 'mmpretrain'


def check_library() -> None:
    """See that mmpretrain can be imported.

    Raises:
        ConfigError: It cannot; the message says why, and what installs it.
    """
    try:
        importlib.import_module('mmpretrain.models')
    except Exception as error:  # what it does not declare fails in many ways
        extra = 'pretrain-fork' if compat.installed_stack() == 'fork' else 'pretrain'
        raise ConfigError(
            f'this config needs mmpretrain, which cannot be imported here ({error}): '
            f'{compat.install_command(extra)}, or see what tools/doctor.py says of it') from error


def check_folders(split: str, dataset: Any, num_classes: int | None) -> list[str]:
    """See that a data set of folders or shards is there, with as many classes as the model.

    Args:
        split: For messages.
        dataset: `ShardedImages`, or one of mmpretrain's that are read from folders or from a list
            of files.
        num_classes: Those of the model.

    Returns:
        The names of the class folders; none where a list of files says what belongs to which.

    Raises:
        DataError: Folders, images or shards are missing, or a shard is cut.
        ConfigError: The model has another number of classes.
    """
    if isinstance(dataset, ShardedImages):
        index = dataset.load_data_list()
        _check_number(split, index.classes, f'as {index.folder} has them', num_classes)
        return index.classes
    root = getattr(dataset, 'img_prefix', None)
    if root is None or '://' in root:
        return []
    if dataset.ann_file:
        if not os.path.isfile(dataset.ann_file):
            raise DataError(f'the {split} set lacks its list of images: {dataset.ann_file}')
        return []
    folders = class_folders(root)
    if not folders and os.path.isfile(os.path.join(root, INDEX)):
        raise DataError(f'the {split} set is to be read from folders, and {root} holds shards: set '
                        f'{split}_dataloader.dataset.type=ShardedImages with --cfg-options')
    if not folders:
        raise DataError(
            f'the {split} set needs one folder per class in {root} (from '
            f'{os.getcwd()}), and there is none: set {split}_dataloader.dataset.data_root with '
            '--cfg-options, or link your data there; tools/prepare_data.py imagenet says what '
            'belongs where')
    _check_number(split, folders, f'the folders in {root}', num_classes,
                  'complete the folders, or ', ' and the type of the data sets to CustomDataset')
    empty = [name for name in folders if not next(_images(Path(root, name)), None)]
    if empty:
        raise DataError(f'the {split} set has no image in {len(empty)} of its {len(folders)} class '
                        f'folders in {root}, such as {empty[0]}: unpack them again')
    return folders


def _check_number(split: str, classes: Sequence[str], origin: str, expected: int | None,
                  before: str = '', after: str = '') -> None:
    """See that there are as many classes as the model has."""
    if expected is not None and len(classes) != expected:
        raise ConfigError(f'the {split} set has {len(classes)} classes, {origin}, the model '
                          f'{expected}: {before}set model.head.num_classes, '
                          'model.head.loss.num_classes and model.data_preprocessor.num_classes to '
                          f'{len(classes)}{after}')


def check_same_classes(found: dict[str, list[str]]) -> None:
    """See that the splits agree in their classes, whose numbers come from the folders' order.

    Args:
        found: The class folders of each split.

    Raises:
        DataError: They differ.
    """
    for (first, names), (second, others) in itertools.combinations(found.items(), 2):
        if names and others and names != others:
            alone = sorted(set(names) ^ set(others))
            raise DataError(f'the {first} and the {second} set have different class folders, such '
                            f'as {alone[0]}: name them alike, their order numbers the classes')


def _images(folder: Path) -> Iterator[str]:
    for _, _, names in os.walk(folder, followlinks=True):
        yield from (name for name in names if name.lower().endswith(SUFFIXES))


def encoder_ratio(text: str) -> ISRRatio:
    """Read the ISR ratio of a classifier, which has no decoder: ``2211`` is enough.

    Raises:
        RatioError: It means nothing.
    """
    numbers = text.strip()
    if '-' not in text and (',' in text or (len(numbers) > 2 and numbers.isdecimal())):
        text = f'{numbers}-111'
    ratio = ISRRatio.parse(text)
    return ratio if len(ratio.encoder) == 1 else ISRRatio(ratio.encoder, (1, 1, 1))


def prepare(folders: Folders, root: str | Path | None = None) -> None:
    """Check a classification data set and say what to do next.

    Raises:
        DataError: It is not ready; says what is missing, where, and what to do.
    """
    root = Path(root or folders.root)
    print(f'{folders.title} in {root}')
    found, wrong = {}, []
    for split in ('train', 'val'):
        found[split] = class_folders(root / split)
        counts = [sum(1 for _ in _images(root / split / name)) for name in found[split]]
        print(f'  {split}: {sum(counts):,} images in {len(counts):,} folders')
        if len(counts) != folders.classes:
            wrong.append(f'{split}: {len(counts):,} folders in {root / split}, instead of '
                         f'{folders.classes:,}')
        elif not all(counts):
            wrong.append(f'{split}: no image in {root / split / found[split][counts.index(0)]}')
    if wrong:
        raise DataError('\n  '.join([
            f'{folders.title} in {root} is not complete:', *wrong,
            'what belongs there (nothing is downloaded for you): ' +
            folders.source.format(root=root)]))
    check_same_classes(found)
    where = '' if root.resolve() == Path(folders.root).resolve() else (
        '\n  with --cfg-options ' + _options(('train', 'val', 'test'), data_root=root.absolute()))
    print(f'ready: use {" or ".join(folders.configs)}{where}')


def _options(splits: Iterable[str], **settings: Any) -> str:
    """Settings of the data sets, the same for all splits, as --cfg-options takes them."""
    return '\n  '.join(f'{split}_dataloader.dataset.{name}={shlex.quote(str(value))}'
                       for split in splits for name, value in settings.items())


def prepare_shards(source: str | Path, root: str | Path, *, images: int = IMAGES, seed: int = 0,
                   check_only: bool = False) -> None:
    """Pack a data set of folders into shards and say what to do next; see `write_shards`.

    Args:
        source: The data set in ImageNet's layout; ``train``, ``val`` or both of it.
        root: Where the shards go, a folder for each split.
        images: So many in each shard.
        seed: Chooses which ones.
        check_only: Write nothing, and read all images of the shards that are there.

    Raises:
        DataError: As from `write_shards` and `check_shards`, or the splits differ in their classes.
    """
    source, root = Path(source), Path(root)
    place = root if check_only else source
    splits = [split for split in ('train', 'val') if (place / split).is_dir()]
    if not splits:
        raise DataError(f'{place} has neither a folder train nor val (from {os.getcwd()}): give '
                        f'the right one with --{"root" if check_only else "source"}')
    if not check_only:
        if root.resolve().is_relative_to(source.resolve()):
            raise DataError(f'{root} lies in {source}, which is only read: choose another --root')
        check_same_classes({split: class_folders(source / split) for split in splits})
    print(f'Shards in {root}')
    found = {}
    for split in splits:
        with Progress(TextColumn(f'  {split}:'), BarColumn(), MofNCompleteColumn(),
                      TextColumn('images, left'), TimeRemainingColumn(), transient=True,
                      disable=not sys.stdout.isatty()) as progress:
            bar = progress.add_task('', total=None)

            def advance(done: int, total: int, progress: Progress = progress,
                        bar: TaskID = bar) -> None:
                progress.update(bar, advance=done, total=total)

            if check_only:
                index = read_index(root / split)
                check_shards(index, advance)
            else:
                index = write_shards(source / split, root / split, images=images, seed=seed,
                                     advance=advance)
        found[split] = index.classes
        print(f'  {split}: {len(index):,} images of {len(index.classes):,} classes in '
              f'{len(index.sizes):,} shard{"s" if len(index.sizes) > 1 else ""}, '
              f'{sum(index.sizes) / 1e6:,.0f} MB', flush=True)
    check_same_classes(found)
    used = [*splits, 'test'] if 'val' in splits else splits
    print('ready: use the config of the folders\n  with --cfg-options ' +
          _options(used, type='ShardedImages', data_root=root.absolute()))


def draw_crops(root: str | Path, *, train: int = 80, val: int = 20, size: int = 64,
               seed: int = 0) -> Path:
    """Draw a classification set of ten classes in ImageNet's layout, unless it is there already.

    The images are windows of the scenes that `mmseg_edaformer.data.drawing` draws: five kinds of
    objects, and five of ground and sky. What was asked for is recorded in ``crops.json``, which is
    written last. Each image depends on the seed, its split, class and number alone.

    Args:
        root: The folder; it is made if missing, and otherwise must hold what is asked for.
        train: Number of training images of each class.
        val: Number of validation images of each class.
        size: Height and width of each image in pixels.
        seed: Chooses the images.

    Returns:
        The folder.

    Raises:
        DataError: A number is too small, or the folder holds something else.
    """
    if min(train, val) < 1 or size < 32 or seed < 0:
        raise DataError(f'train={train}, val={val}, size={size}, seed={seed}: ask for at least one '
                        'image of each class, 32 pixels and a seed of 0 or more')
    root = Path(root)
    marker = root / 'crops.json'
    asked = dict(train=train, val=val, size=size, seed=seed, revision=_REVISION)
    record = json.dumps(asked, indent=2) + '\n'
    if marker.is_file() and marker.read_text(encoding='utf-8') == record:
        return root
    left = {entry.name for entry in root.iterdir()} - {'train', 'val'} if root.is_dir() else set()
    if left:
        raise DataError(f'{root} holds {", ".join(sorted(left)[:3])}: remove it, or choose another '
                        'folder')
    for split, (name, count) in enumerate((('train', train), ('val', val))):
        for label, kind in enumerate(CROPS):
            folder = root / name / kind
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng((seed, split, label, number))
                Image.fromarray(draw_crop(rng, kind, size)).save(folder / f'{number:05d}.png',
                                                                 compress_level=1)
    write_file(marker, record)
    return root


def draw_crop(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """Draw one image of a class of `CROPS`: size x size x 3 in RGB."""
    while True:
        image, label = draw_scene(rng, _SCENE)
        window = _stuff(rng, label, kind) if kind in _STUFF else _object(rng, label, kind)
        if window is not None:
            crop = image[window]
            shrinks = crop.shape[0] > size
            return cv2.resize(crop, (size, size),
                              interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _stuff(rng: np.random.Generator, label: np.ndarray, kind: str) -> tuple[slice, slice] | None:
    """A window with the shares of ground and sky that a class has, if chance finds one."""
    for _ in range(60):
        side = int(rng.integers(48, 129))
        window = _square(rng.uniform(0, label.shape[0]), rng.uniform(0, label.shape[1]), side,
                         label.shape)
        shares = _shares(label[window])
        if all(low <= shares[KINDS.index(name)] <= high
               for name, (low, high) in _STUFF[kind].items()) and (
                   sum(shares[KINDS.index(name)] for name in _STUFF[kind]) > 0.9):
            return window
    return None


def _object(rng: np.random.Generator, label: np.ndarray, kind: str) -> tuple[slice, slice] | None:
    """A window around one object, if there is one that others leave visible."""
    least, others = _OBJECTS[kind]
    number = KINDS.index(kind)
    _, _, boxes, _ = cv2.connectedComponentsWithStats((label == number).astype(np.uint8))
    for left, top, width, height, _ in rng.permutation(boxes[1:]):
        extent = max(width, height)
        side = round(max(extent * rng.uniform(1.1, 1.6), 24))
        if extent < least or side > min(label.shape):
            continue
        y, x = (rng.uniform(-0.1, 0.1, 2) * side) + (top + height / 2, left + width / 2)
        window = _square(y, x, side, label.shape)
        shares = _shares(label[window])
        if sum(shares[KINDS.index(name)] for name in _OBJECTS if name != kind) <= others:
            return window
    return None


def _square(y: float, x: float, side: int, shape: Sequence[int]) -> tuple[slice, slice]:
    """The square around a point, moved into the picture."""
    top, left = (int(np.clip(round(middle - side / 2), 0, whole - side))
                 for middle, whole in zip((y, x), shape))
    return slice(top, top + side), slice(left, left + side)


def _shares(label: np.ndarray) -> np.ndarray:
    return np.bincount(label.ravel(), minlength=len(KINDS)) / label.size
