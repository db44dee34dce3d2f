"""What counts as wrong with a data set, from the facts of its files."""
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations

from ..transforms import IGNORED, LoadSegLabels
from .files import Facts, File

CHECKS = {
    'folder missing': ('error', 'set data_root and data_prefix, or link your data there'),
    'link loop': ('error', 'remove these links: the folders that hold them were not checked'),
    'no images': ('error', 'check data_prefix and img_suffix, or ann_file'),
    'image missing': ('error', 'add the images, or remove their names or their masks'),
    'mask missing': ('error', 'add the masks, or remove the images; check seg_map_suffix'),
    'image unreadable': ('error', 'replace or remove them'),
    'mask unreadable': ('error', 'replace or remove them'),
    'sizes differ': ('error', 'a mask must have the size of its image'),
    'image turned by EXIF': ('error', 'EXIF turns the images when they are read, but not their '
                             'masks: --fix writes copies without it'),
    'EXIF orientation': ('warning', 'EXIF turns these images when they are read: check whether '
                         'their masks fit'),
    'mask of colours': ('error', 'a mask must be one channel of class indices: --fix converts '
                        'colours of the palette'),
    'palette of other indices': ('warning', 'their colours are those of other classes of the data '
                                 'set: --fix goes by colour'),
    'mask of 0 and 255': ('error', '255 means no label, so the class stored as 255 is lost: '
                          'store its index instead, as --fix does for two classes'),
    'perhaps 0 and 255': ('warning', '255 means no label: if it is a class here, make it 1'),
    'label out of range': ('error', 'check the number of classes, reduce_zero_label and how the '
                           'masks or the list were made'),
    'more than 8 bits': ('warning', '16 bits wrap around in other tools: --fix converts them'),
    'no label': ('warning', 'nothing is learned from masks without a label'),
    'no label in any mask': ('error', 'nothing can be learned from this set or measured on it: '
                             'check how the masks were made, reduce_zero_label and ignore_index'),
    'reduce_zero_label': ('warning', 'check whether the data set needs it'),
    'class without images': ('error', 'add images, or remove its folder from all splits'),
    'passed over': ('warning', 'convert or move the files that belong to the data set'),
    'extreme size': ('warning', 'crops show little of them, and huge ones are slow to read'),
    'class never occurs': ('warning', 'its IoU or accuracy is undefined or 0'),
    'class not in train': ('warning', 'it is tested, but cannot be learned'),
    'number of classes': ('error', 'set num_classes of the model, or metainfo.classes'),
    'classes differ': ('error', 'all splits must have the classes of train, in its order'),
    'colours': ('warning', 'these classes look the same in every figure: change metainfo.palette'),
    'duplicate': ('warning', 'they count more than others'),
    'train image in val or test': ('warning', 'the figures come out too good: keep one of them'),
    'not audited': ('warning', 'only local images with masks, class folders or a list are checked'),
}
"""Level of each check, and what to do about its findings."""

OF_ALL = frozenset(('mask of 0 and 255', 'no label in any mask'))
"""Checks that fail only if all masks of a data set fail them."""

# A size is extreme when one side is more than this many times the other, or when width and height
# are this many times more or less than those of the median, by area.
_EXTREME = 8


Item = tuple[str, str, str, str]
"""A split ('train', or 'train[1]' for the second data set of it), a key of `CHECKS`, a file or
class that fails it, and a note."""


class Finding(NamedTuple):
    """All that fails one check in one split: files or classes, each with a note."""

    split: str
    check: str
    items: tuple[tuple[str, str], ...]

    @property
    def level(self) -> str:
        """'error' or 'warning'."""
        return CHECKS[self.check][0]

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return CHECKS[self.check][1]


def gather(items: Iterable[Item]) -> list[Finding]:
    """Group what the checks yield; errors come first."""
    groups: dict[tuple[str, str], dict[tuple[str, str], None]] = defaultdict(dict)
    for split, check, name, note in items:
        groups[split, check][name, note] = None
    return sorted((Finding(*key, tuple(named)) for key, named in groups.items()),
                  key=lambda finding: finding.level)


class Part:
    """One data set of a split, without its wrappers.

    Attributes:
        keys: Places in the config, such as 'train_dataloader.dataset'; several where the test set
            is that of validation.
        pairs: Images and their masks; None without a folder of masks.
        targets: Number of the class of each image of a classification data set.
        folders: Names of the folders that are the classes, if they are.
        zero_is_no_label: The value of reduce_zero_label that the pipeline will use.
        table: Class of each of the 256 values of a mask, `IGNORED`, or -1 if it is out of range.
        counts: Pixels of each class after reduce_zero_label and label_map, or images.
        unlabelled: Pixels without a label.
        raw: Pixels of each label as stored, or images.
        verdicts: Checks that each pair fails.
    """

    def __init__(self, name: str, split: str, keys: list[str], dataset: BaseDataset,
                 heads: dict[str, Any]) -> None:
        self.name, self.split, self.keys, self.dataset = name, split, keys, dataset
        self.classifies = not isinstance(dataset, BaseSegDataset)
        self.pairs: list[tuple[str, str | None]] = []
        self.targets: list[int] = []
        self.folders: tuple[str, ...] = ()
        self.counts = np.zeros(0, np.int64)
        self.unlabelled = 0
        self.raw: dict[int, int] = {}
        self.verdicts: dict[tuple[str, str | None], list[str]] = {}
        step = next((step for step in dataset.pipeline.transforms
                     if isinstance(step, LoadAnnotations)), None)
        known = [getattr(step, 'num_classes', None), len(dataset.metainfo.get('classes') or ()),
                 *(head['num_classes'] for head in heads.values())]
        self.num_classes: int | None = next(filter(None, known), None)
        if not self.classifies:
            labels = LoadSegLabels(step.reduce_zero_label if step else None)
            settings = dict(reduce_zero_label=dataset.reduce_zero_label,
                            label_map=dataset.label_map)
            self.zero_is_no_label = labels.zero_is_no_label(settings)
            table = labels.table(settings).astype(int)
            ignored = {IGNORED, dataset.ignore_index, *(
                head['ignore_index'] for head in heads.values())}
            self.table = np.where(np.isin(table, list(ignored)), IGNORED, np.where(
                table < (self.num_classes or IGNORED), table, -1))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes or of their folders; numbers where the data set has none."""
        names = self.folders or self.dataset.metainfo.get('classes')
        return tuple(names or map(str, range(self.num_classes or 0)))

    @property
    def zero_share(self) -> float:
        """Share of the pixels whose label is 0 as stored."""
        return self.raw.get(0, 0) / max(sum(self.raw.values()), 1)

    def label(self, value: float) -> int:
        """Return the entry of `table` for a stored value, which may be any number."""
        return int(self.table[int(value)]) if value in range(256) else -1


def judge(part: Part, image: str, mask: str | None, facts: dict[File, Facts],
          binary: bool = False) -> Iterator[tuple[str, str, str]]:
    """Check one pair; in a ``binary`` data set all masks hold 0 and 255 alone.

    Yields:
        A key of `CHECKS`, the image or the mask, and a note.
    """
    of_image = facts['image', image]
    if 'problem' in of_image:
        yield f'image {of_image["problem"]}', image, of_image['detail']
    if mask is None:
        return
    of_mask = facts['mask', mask]
    if 'problem' in of_mask:
        yield f'mask {of_mask["problem"]}', mask, of_mask['detail']
        return
    if 'problem' not in of_image:
        for check, note in _judge_sizes(part, of_image, of_mask['size']):
            yield check, image, note
    if 'values' not in of_mask:
        yield 'mask of colours', mask, f'{of_mask["channels"]} channels'
        return
    if binary:
        yield 'mask of 0 and 255', mask, ''
        return
    values = [value for value, _ in of_mask['values']]
    bad = [(value, n) for value, n in of_mask['values'] if part.label(value) < 0]
    if bad:
        few = ', '.join(f'{value:g}' for value, _ in bad[:5]) + (' ...' if bad[5:] else '')
        lossy = '; JPEG changes labels' if of_mask['format'] == 'JPEG' else ''
        yield 'label out of range', mask, f'{few} ({sum(n for _, n in bad):,} pixels{lossy})'
    elif of_mask['bits'] > 8:
        yield 'more than 8 bits', mask, f'{of_mask["bits"]} bits'
    if all(part.label(value) == IGNORED for value in values):
        yield 'no label', mask, f'only {", ".join(map(str, values[:3]))}'
    elif not bad and values == [0, 255] and len(part.classes) <= 2:
        yield 'perhaps 0 and 255', mask, ''
    if _colours_disagree(part, of_mask.get('palette', ())):
        yield 'palette of other indices', mask, ''


def _judge_sizes(part: Part, image: Facts, size: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Compare the size of an image as it is read with that of its mask."""
    stored, orientation = image['size'], image['orientation']
    colour = next((step.color_type for step in part.dataset.pipeline.transforms
                   if isinstance(step, LoadImageFromFile)), 'color')
    if 'ignore_orientation' in colour or colour == 'unchanged':
        orientation = 1
    upright = stored[::-1] if orientation >= 5 else stored
    if upright == size:
        if orientation != 1:
            yield 'EXIF orientation', f'EXIF orientation {orientation}'
    elif stored == size:
        yield ('image turned by EXIF',
               f'{_by(stored)} pixels like its mask, but read as {_by(upright)}')
    else:
        yield 'sizes differ', f'{_by(upright)} pixels as it is read, its mask {_by(size)}'


def _colours_disagree(part: Part, palette: Iterable[Sequence[int]]) -> bool:
    """Return whether a mask with a palette has the colours of the classes at other indices."""
    places = {tuple(colour): index for index, colour in enumerate(part.dataset.metainfo['palette'])}
    used = [(part.label(value), places.get(tuple(colour))) for value, *colour in palette
            if part.label(value) != IGNORED]
    return all(place is not None for _, place in used) and any(
        place != label for label, place in used)


def judge_part(part: Part, facts: dict[File, Facts]) -> Iterator[Item]:
    """Check all pairs of a data set, and count its labels."""
    values = [facts['mask', mask]['values'] for _, mask in part.pairs
              if mask is not None and 'values' in facts['mask', mask]]
    binary = {value for counted in values for value, _ in counted} == {0, 255}
    items = []
    for pair in part.pairs:
        found = [*judge(part, *pair, facts, binary)]
        part.verdicts[pair] = [check for check, _, _ in found]
        items += found
    # Labels of a test set may be withheld.
    unlabelled = part.split != 'test' and {
        path for check, path, _ in items if check == 'no label'} == {
            mask for _, mask in part.pairs}
    for check, path, note in items:
        in_all = unlabelled and check == 'no label'
        yield part.name, 'no label in any mask' if in_all else check, path, note
    if part.classifies:
        yield from _judge_classes(part, facts)
        return
    part.counts = np.zeros(len(part.classes), np.int64)
    for value, pixels in (pair for counted in values for pair in counted):
        part.raw[value] = part.raw.get(value, 0) + pixels
        label = part.label(value)
        if 0 <= label < len(part.classes):
            part.counts[label] += pixels
        elif label >= 0:
            part.unlabelled += pixels
    doubt = _doubt_zero(part) if values and not binary else None
    if doubt:
        yield part.name, 'reduce_zero_label', f'reduce_zero_label={part.zero_is_no_label}', doubt


def _judge_classes(part: Part, facts: dict[File, Facts]) -> Iterator[Item]:
    """Check sizes and classes of a classification data set, and count the images of each class."""
    sizes = [facts['image', image].get('size') for image, _ in part.pairs]
    median = np.median([size[0] * size[1] for size in sizes if size] or [0])
    part.raw = dict(Counter(part.targets))
    part.counts = np.array([part.raw.get(i, 0) for i in range(len(part.classes))], np.int64)
    for (image, _), size, number in zip(part.pairs, sizes, part.targets):
        if number not in range(len(part.classes)):
            yield part.name, 'label out of range', image, str(number)
        if size and (max(size) > _EXTREME * min(size) or not
                     median <= _EXTREME ** 2 * size[0] * size[1] <= _EXTREME ** 4 * median):
            yield (part.name, 'extreme size', image, f'{_by(size)} pixels, the area of the median '
                   f'is {_by([round(median ** 0.5)] * 2)}')
    for name, n in zip(part.folders, part.counts):
        if not n:
            folder = os.path.join(part.dataset.img_prefix, name)
            yield part.name, 'class without images', folder, ''


def _doubt_zero(part: Part) -> str | None:
    """Return why reduce_zero_label looks wrong, from the labels as stored."""
    classes = len(part.dataset.METAINFO.get('classes') or part.classes)
    highest = max((label for label in part.raw if label != IGNORED), default=0)
    share = part.zero_share
    if part.zero_is_no_label and share > (0.05 if highest < classes else 0.5):
        return (f'0 is no label then, and {share:.1%} of the pixels are lost; the labels go up to '
                f'{highest} for {classes} classes')
    if not part.zero_is_no_label and highest == classes:
        return (f'0 is a class then, with {share:.1%} of the pixels, but the labels go up to '
                f'{highest} for {classes} classes, as they do where 0 means no label')
    return None


def check_classes(part: Part, heads: dict[str, Any]) -> Iterator[Item]:
    """Compare the classes of a data set with the model's, and their colours with each other."""
    count, named = len(part.classes), part.dataset.metainfo.get('classes')
    if part.folders and named and len(named) != count:
        yield (part.name, 'number of classes', f'{part.keys[0]}.type={type(part.dataset).__name__}',
               f'has {len(named)} classes, there are {count} folders: CustomDataset takes any '
               'number')
    for key, head in heads.items():
        if head['num_classes'] not in (None, count) and (part.folders or named is not None):
            yield (part.name, 'number of classes', f'{key}.num_classes={head["num_classes"]}',
                   f'the data set has {count}')
    alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, colour in zip(part.classes, part.dataset.metainfo.get('palette') or ()):
        alike[tuple(colour)].append(name)
    for colour, names in alike.items():
        if len(names) > 1:
            yield part.name, 'colours', ', '.join(names), f'colour {colour}'


def compare_splits(parts: Sequence[Part]) -> Iterator[Item]:
    """Find classes that a whole split lacks, or only the training set."""
    train = [part for part in parts if part.split == 'train']
    differ = False
    for split in dict.fromkeys(part.split for part in parts):
        own = [part for part in parts if part.split == split]
        first = (train or own)[0]
        for part in own:
            if part.classes != first.classes:
                differ = True
                for name in sorted({*part.classes} ^ {*first.classes}):
                    where = first if name in first.classes else part
                    yield part.name, 'classes differ', name, f'only in {where.name}'
                if {*part.classes} == {*first.classes}:
                    yield (part.name, 'classes differ', ', '.join(part.classes[:5]),
                           'in another order')
        if differ or own[0].folders or not any(part.raw for part in own):
            continue  # an empty folder is an error of its own
        seen = np.sum([part.counts for part in own], axis=0)
        learned = seen
        if any(part.raw for part in train):
            learned = np.sum([part.counts for part in train], axis=0)
        for name, n, known in zip(own[0].classes, seen, learned):
            if not n:
                yield split, 'class never occurs', name, ''
            elif not known:
                unit = 'images' if own[0].classifies else 'pixels'
                yield split, 'class not in train', name, f'{n:,} {unit}'


def find_duplicates(parts: Sequence[Part], facts: dict[File, Facts]) -> Iterator[Item]:
    """Find images that are the same within a split, or in train and in another split."""
    first: dict[tuple[str, str], str] = {}
    for part in sorted(parts, key=lambda part: part.split != 'train'):
        for image, _ in part.pairs:
            pixels = facts['image', image].get('pixels')
            if pixels is None:
                continue
            twin = first.get((part.split, pixels))
            learned = first.get(('train', pixels))
            if twin is not None:
                yield part.split, 'duplicate', image, _likeness(image, twin)
            elif learned is not None:
                yield part.split, 'train image in val or test', image, _likeness(image, learned)
            first.setdefault((part.split, pixels), image)


def _likeness(image: str, other: str) -> str:
    if image == other:
        return 'the same path'
    same = os.path.realpath(image) == os.path.realpath(other)
    return f'is {other}' if same else f'the same pixels as {other}'


def _by(size: Sequence[int]) -> str:
    return f'{size[0]}x{size[1]}'
