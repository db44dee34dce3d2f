"""What counts as wrong with a data set, from what `audit_files` found in its files."""
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset

from ..transforms import IGNORED, LoadSegImage, LoadSegLabels
from .files import Facts, File

CHECKS = {
    'folder missing': ('error', 'set data_root and data_prefix, or link your data there'),
    'link loop': ('error', 'remove these links: what lies beside them cannot be listed and was '
                  'not looked at'),
    'no images': ('error', 'see data_prefix and img_suffix, or ann_file'),
    'image missing': ('error', 'add the images, or remove their names or their masks'),
    'mask missing': ('error', 'add the masks, or remove the images; see seg_map_suffix'),
    'image unreadable': ('error', 'replace or remove them'),
    'mask unreadable': ('error', 'replace or remove them'),
    'sizes differ': ('error', 'a mask must have the size of its image'),
    'image turned by EXIF': ('error', 'cameras note how they were held, which turns an image when '
                             'it is read, but not its mask: --fix writes copies without the note'),
    'EXIF orientation': ('warning', 'these images are turned or mirrored when they are read, their '
                         'masks are not: look whether they fit'),
    'mask of colours': ('error', 'a mask must be one channel of class indices: --fix converts '
                        'colours of the palette'),
    'palette of other indices': ('warning', 'the colours of these masks are those of the data set, '
                                 'but not at the indices of its classes: --fix goes by colour'),
    'mask of 0 and 255': ('error', '255 means no label, so that the class stored as 255 is lost: '
                          'store its index instead, as --fix does for two classes'),
    'perhaps 0 and 255': ('warning', 'these masks hold 0 and 255 alone, others of the set do not. '
                          '255 means no label: if it is a class here, make it 1'),
    'label out of range': ('error', 'see the number of classes, reduce_zero_label and how the masks'
                           ' or the list were made'),
    'more than 8 bits': ('warning', 'the labels fit, but 16 bits wrap around in other tools: --fix '
                         'converts them'),
    'no label': ('warning', 'nothing is learned from masks without a label'),
    'no label in any mask': ('error', 'nothing can be learned from this set or measured on it: see '
                             'how the masks were made, reduce_zero_label and ignore_index'),
    'reduce_zero_label': ('warning', 'see whether it is set as the data set needs it'),
    'class without images': ('error', 'add images, or remove its folder from all splits'),
    'passed over': ('warning', 'by their ending or their place they are no images of the data set: '
                    'convert or move those that should be'),
    'extreme size': ('warning', 'of the tiny and of the long ones crops show little, and the huge '
                     'ones take long to read: look at them'),
    'class never occurs': ('warning', 'its IoU or accuracy is undefined or 0'),
    'class not in train': ('warning', 'it is asked for, but cannot be learned'),
    'number of classes': ('error', 'set num_classes of the model, or metainfo.classes'),
    'classes differ': ('error', 'all splits must have the classes of train, in its order'),
    'colours': ('warning', 'these classes look the same in every picture: see metainfo.palette'),
    'duplicate': ('warning', 'they count more than others'),
    'train image in val or test': ('warning', 'its figures come out too good: remove it from one '
                                   'of them'),
    'not audited': ('warning', 'only local files of images and masks are looked at, and classes in '
                    'folders or a list; shards by tools/prepare_data.py shards --check'),
}
"""Level of each check, and what to do about what it finds."""

OF_ALL = frozenset(('mask of 0 and 255', 'no label in any mask'))
"""Checks that find something only where it holds for all masks of a data set."""

EXTREME = 8
"""A size is extreme when one side is more than so many times the other, or the image more than so
many times longer and wider, or shorter and narrower, than the median of its data set, by area."""


@dataclass(frozen=True)
class Finding:
    """What a check found in one data set.

    Attributes:
        split: 'train', 'val', 'test', or 'train[1]' for the second data set of a split.
        check: A key of `CHECKS`.
        items: Files or classes, and what is to be said of each.
    """

    split: str
    check: str
    items: tuple[tuple[str, str], ...]

    @property
    def level(self) -> str:
        """'error' or 'warning'."""
        return CHECKS[self.check][0]


@dataclass
class Part:
    """One data set of a split, wrappers taken off.

    Attributes:
        name: As in `Finding`.
        key: Where the config has it, such as 'train_dataloader.dataset'.
        pairs: Images and their masks, None without a folder of masks.
        targets: For classification the number of the class of each image, otherwise None.
        folders: Names of the folders that are the classes, if they are.
        counts: Pixels of each class after reduce_zero_label and label_map; of a classification data
            set images, here and below.
        unlabelled: Pixels without a label.
        raw: Pixels of each label as stored.
        verdicts: Of each pair, the checks that found something.
        same_as: The part that holds the same files and was looked at in its place.
    """

    name: str
    split: str
    key: str
    dataset: BaseDataset
    labels: LoadSegLabels
    ignored: set[int]
    pairs: list[tuple[str, str | None]] = field(default_factory=list)
    targets: list[int] | None = None
    folders: tuple[str, ...] = ()
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    unlabelled: int = 0
    raw: dict[int, int] = field(default_factory=dict)
    verdicts: dict[tuple[str, str | None], list[str]] = field(default_factory=dict)
    same_as: str | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes or of their folders, numbers where the data set has none."""
        names = self.folders or self.dataset.metainfo.get('classes')
        return tuple(names or map(str, range(self.labels.num_classes or 0)))

    @property
    def zero_is_no_label(self) -> bool:
        """reduce_zero_label, as the pipeline will read it."""
        return self.labels._zero_is_no_label(_results(self.dataset))

    def table(self) -> np.ndarray:
        """What each of the 256 values of a mask becomes; 255 is no label."""
        table = self.labels._table(_results(self.dataset))
        return np.where(np.isin(table, list(self.ignored)), IGNORED, table)


def judge(part: Part, image: Facts, mask: Facts | None, binary: bool = False
          ) -> Iterator[tuple[str, bool, str]]:
    """What is wrong with one pair.

    Args:
        part: The data set.
        image: What `audit_files.examine` found, or `audit_files.header`.
        mask: The same.
        binary: Whether the masks of this data set hold 0 and 255 alone.

    Yields:
        A key of `CHECKS`, whether it is the mask that is meant, and what is to be said.
    """
    for facts, kind in ((image, 'image'), (mask, 'mask')):
        if facts and 'problem' in facts:
            if facts['problem'] == 'missing':
                yield f'{kind} missing', kind == 'mask', ''
            else:
                yield f'{kind} unreadable', kind == 'mask', facts['detail']
    if mask is None or 'problem' in mask:
        return
    if 'problem' not in image:
        yield from _judge_sizes(part, image, mask)
    if 'values' not in mask:
        yield 'mask of colours', True, f'{mask["channels"]} channels'
        return
    table, labels = part.table(), [value for value, _ in mask['values']]
    if binary:
        yield 'mask of 0 and 255', True, ''
        return
    bad = [(value, n) for value, n in mask['values'] if not _is_valid(part, table, value)]
    if bad:
        shown = ', '.join(f'{value:g}' for value, _ in bad[:5]) + (' ...' if bad[5:] else '')
        lossy = '; JPEG changes labels' if mask['format'] == 'JPEG' else ''
        yield 'label out of range', True, f'{shown} ({sum(n for _, n in bad):,} pixels{lossy})'
    elif mask['bits'] > 8:
        yield 'more than 8 bits', True, f'{mask["bits"]} bits'
    if not bad and all(table[int(value)] == IGNORED for value in labels):
        yield 'no label', True, f'{", ".join(map(str, labels[:3]))} alone'
    elif labels == [0, 255] and len(part.classes) <= 2:
        yield 'perhaps 0 and 255', True, ''
    if _colours_disagree(part, table, mask):
        yield 'palette of other indices', True, ''


def _judge_sizes(part: Part, image: Facts, mask: Facts) -> Iterator[tuple[str, bool, str]]:
    stored, size, turn = image['size'], mask['size'], image['orientation']
    if turn == 1 or not _obeys_exif(part.dataset):
        if stored != size:
            yield 'sizes differ', False, f'{_by(stored)} pixels, its mask {_by(size)}'
        return
    upright = stored[::-1] if turn >= 5 else stored
    if upright == size:
        yield 'EXIF orientation', False, f'EXIF orientation {turn}'
    elif stored == size:
        yield ('image turned by EXIF', False,
               f'{_by(stored)} pixels like its mask, but read as {_by(upright)}')
    else:
        yield 'sizes differ', False, f'{_by(upright)} pixels as it is read, its mask {_by(size)}'


def _obeys_exif(dataset: BaseDataset) -> bool:
    colour = next((step.color_type for step in dataset.pipeline.transforms
                   if isinstance(step, LoadSegImage)), 'color')
    return 'ignore_orientation' not in colour and colour != 'unchanged'


def _is_valid(part: Part, table: np.ndarray, value: float) -> bool:
    return value in range(256) and (table[int(value)] == IGNORED or
                                    int(table[int(value)]) < (part.labels.num_classes or IGNORED))


def _colours_disagree(part: Part, table: np.ndarray, mask: Facts) -> bool:
    """Whether a mask with a palette has the colours of the classes at other indices."""
    places = {tuple(colour): index for index, colour in enumerate(part.dataset.metainfo['palette'])}
    used = [(int(table[v]), places.get((r, g, b))) for v, r, g, b in mask.get('palette', ())
            if table[v] != IGNORED]
    return bool(used) and all(place is not None for _, place in used) and any(
        place != label for label, place in used)


def judge_part(part: Part, facts: dict[File, Facts]) -> list[Finding]:
    """Judge all pairs of a data set, and count its labels."""
    if part.targets is not None:
        return _judge_images(part, facts)
    values = [facts['mask', mask]['values'] for _, mask in part.pairs
              if mask is not None and 'values' in facts['mask', mask]]
    binary = {value for each in values for value, _ in each} == {0, 255}
    found: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    for image, mask in part.pairs:
        checks = part.verdicts[image, mask] = []
        for check, of_mask, note in judge(
                part, facts['image', image], facts['mask', mask] if mask else None, binary):
            checks.append(check)
            found[check][(mask or '') if of_mask else image, note] = None
    table, size = part.table(), len(part.classes)
    part.counts = np.zeros(size, np.int64)
    for each in values:
        for value, pixels in each:
            part.raw[value] = part.raw.get(value, 0) + pixels
            if _is_valid(part, table, value) and table[int(value)] < size:
                part.counts[table[int(value)]] += pixels
            elif _is_valid(part, table, value):
                part.unlabelled += pixels
    # Labels of a test set may be withheld.
    if part.split != 'test' and values and len(found.get('no label', ())) == len(
            {mask for _, mask in part.pairs}):
        found['no label in any mask'] = found.pop('no label')
    doubt = _doubt_zero(part) if values and not binary else None
    if doubt:
        found['reduce_zero_label'][f'reduce_zero_label={part.zero_is_no_label}', doubt] = None
    return [Finding(part.name, check, tuple(items)) for check, items in found.items()]


def _judge_images(part: Part, facts: dict[File, Facts]) -> list[Finding]:
    """Judge all images of a classification data set, and count those of each class."""
    found: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    sizes = [facts['image', image].get('size') for image, _ in part.pairs]
    middle = np.median([size[0] * size[1] for size in sizes if size] or [0])
    part.raw = dict(Counter(part.targets))
    part.counts = np.array([part.raw.get(i, 0) for i in range(len(part.classes))], np.int64)
    for (image, _), size, number in zip(part.pairs, sizes, part.targets or ()):
        checks = part.verdicts[image, None] = []
        for check, _, note in judge(part, facts['image', image], None):
            checks.append(check)
            found[check][image, note] = None
        if number not in range(len(part.classes)):
            checks.append('label out of range')
            found['label out of range'][image, str(number)] = None
        if size and (max(size) > EXTREME * min(size) or not
                     middle <= EXTREME ** 2 * size[0] * size[1] <= EXTREME ** 4 * middle):
            found['extreme size'][image, f'{_by(size)} pixels, the area of the median is '
                                  f'{_by([round(middle ** 0.5)] * 2)}'] = None
    for name, n in zip(part.folders, part.counts):
        if not n:
            found['class without images'][os.path.join(part.dataset.img_prefix, name), ''] = None
    return [Finding(part.name, check, tuple(items)) for check, items in found.items()]


def zero_share(part: Part) -> float:
    """Share of the pixels whose label is 0 as stored."""
    return part.raw.get(0, 0) / max(sum(part.raw.values()), 1)


def _doubt_zero(part: Part) -> str | None:
    """Why reduce_zero_label looks wrong, from the labels as stored."""
    classes = len(part.dataset.METAINFO.get('classes') or part.classes)
    highest = max((label for label in part.raw if label != IGNORED), default=0)
    share = zero_share(part)
    if part.zero_is_no_label and highest < classes and share > 0.05:
        return (f'0 is no label then, and {share:.1%} of the pixels are lost, but the labels go up '
                f'to {highest} for {classes} classes, as they do where 0 is a class')
    if part.zero_is_no_label and share > 0.5:
        return f'0 is no label then, and {share:.1%} of the pixels are lost'
    if not part.zero_is_no_label and highest == classes:
        return (f'0 is a class then, with {share:.1%} of the pixels, but the labels go up to '
                f'{highest} for {classes} classes, as they do where 0 means no label')
    return None


def check_classes(part: Part, heads: dict[str, Any]) -> list[Finding]:
    classes, named = part.classes, part.dataset.metainfo.get('classes')
    wrong = tuple((f'{name}.num_classes={head["num_classes"]}', f'the data set has {len(classes)}')
                  for name, head in heads.items() if head['num_classes'] not in (None, len(classes))
                  and (part.folders or named is not None))
    if part.folders and named and len(named) != len(classes):
        wrong = ((f'{part.key}.type={type(part.dataset).__name__}', f'has {len(named)} classes, '
                  f'there are {len(classes)} folders: CustomDataset takes any number'), *wrong)
    same: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, colour in zip(classes, part.dataset.metainfo.get('palette') or ()):
        same[tuple(colour)].append(name)
    alike = tuple((', '.join(names), f'colour {colour}') for colour, names in same.items()
                  if len(names) > 1)
    return [Finding(part.name, check, items)
            for check, items in (('number of classes', wrong), ('colours', alike)) if items]


def compare_splits(parts: Sequence[Part]) -> list[Finding]:
    """Classes that lack, in a split as a whole or only in the one to learn from."""
    found = []
    train = [part for part in parts if part.split == 'train']
    for split in dict.fromkeys(part.split for part in parts):
        own = [part for part in parts if part.split == split]
        for part in own:
            if part.classes != (train or own)[0].classes:
                first = (train or own)[0]
                found.append(Finding(part.name, 'classes differ', tuple(
                    (name, f'only in {(first if name in first.classes else part).name}')
                    for name in sorted({*part.classes} ^ {*first.classes})) or (
                        (', '.join(part.classes[:5]), 'in another order'),)))
        if not any(part.raw for part in own) or any(f.check == 'classes differ' for f in found):
            continue
        if own[0].folders:  # an empty one is an error of its own
            continue
        seen = _occurring(own)
        never = [name for name, n in zip(own[0].classes, seen) if not n]
        if never:
            found.append(Finding(split, 'class never occurs', tuple((name, '') for name in never)))
        if split != 'train' and any(part.raw for part in train):
            unit = 'pixels' if own[0].targets is None else 'images'
            only = [(name, f'{n:,} {unit}') for name, n, known in
                    zip(own[0].classes, seen, _occurring(train)) if n and not known]
            if only:
                found.append(Finding(split, 'class not in train', tuple(only)))
    return found


def _occurring(parts: Iterable[Part]) -> np.ndarray:
    return np.sum([part.counts for part in parts], axis=0)


def find_duplicates(parts: Sequence[Part], facts: dict[File, Facts]) -> list[Finding]:
    """Images that are the same picture, within a split and from train to the others."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for part in parts:
        for image, _ in part.pairs:
            if 'pixels' in facts['image', image]:
                groups[facts['image', image]['pixels']].append((part.split, image))
    twice, leaks = defaultdict(list), defaultdict(list)
    for group in groups.values():
        learned = next((image for split, image in group if split == 'train'), None)
        first: dict[str, str] = {}
        for split, image in group:
            if split in first:
                twice[split].append((image, _likeness(image, first[split], facts)))
            elif split != 'train' and learned is not None:
                leaks[split].append((image, 'the path is in both' if image == learned else
                                     _likeness(image, learned, facts)))
            first.setdefault(split, image)
    return [Finding(split, check, tuple(items)) for check, by_split in (
        ('duplicate', twice), ('train image in val or test', leaks))
        for split, items in by_split.items()]


def _likeness(image: str, other: str, facts: dict[File, Facts]) -> str:
    if os.path.realpath(image) == os.path.realpath(other):
        return 'listed twice' if image == other else f'is {other}'
    same = facts['image', image]['bytes'] == facts['image', other]['bytes']
    return f'{"the same file as" if same else "the same picture as"} {other}'


def _by(size: Sequence[int]) -> str:
    return f'{size[0]}x{size[1]}'


def _results(dataset: BaseDataset) -> dict[str, Any]:
    return dict(reduce_zero_label=dataset.reduce_zero_label, label_map=dataset.label_map)
