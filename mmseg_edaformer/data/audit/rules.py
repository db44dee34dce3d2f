"""What counts as wrong with a data set, from the facts of its files."""
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset

from ...errors import shown
from ..transforms import IGNORED, LoadSegLabels
from .files import Facts, File

CHECKS = {
    'folder missing': ('error', 'set data_root and data_prefix, or link your data there'),
    'link loop': ('error', 'remove these links: the folders that hold them cannot be listed and '
                  'were not checked'),
    'no images': ('error', 'check data_prefix and img_suffix, or ann_file'),
    'image missing': ('error', 'add the images, or remove their names or their masks'),
    'mask missing': ('error', 'add the masks, or remove the images; check seg_map_suffix'),
    'image unreadable': ('error', 'replace or remove them'),
    'mask unreadable': ('error', 'replace or remove them'),
    'sizes differ': ('error', 'a mask must have the size of its image'),
    'image turned by EXIF': ('error', 'EXIF notes how the camera was held, which turns an image '
                             'when it is read, but not its mask: --fix writes copies without it'),
    'EXIF orientation': ('warning', 'these images are turned or mirrored when they are read, their '
                         'masks are not: check whether they fit'),
    'mask of colours': ('error', 'a mask must be one channel of class indices: --fix converts '
                        'colours of the palette'),
    'palette of other indices': ('warning', 'these masks have the colours of the data set at the '
                                 'indices of other classes: --fix goes by colour'),
    'mask of 0 and 255': ('error', '255 means no label, so the class stored as 255 is lost: '
                          'store its index instead, as --fix does for two classes'),
    'perhaps 0 and 255': ('warning', 'these masks hold only 0 and 255, others of the set do not. '
                          '255 means no label: if it is a class here, make it 1'),
    'label out of range': ('error', 'check the number of classes, reduce_zero_label and how the '
                           'masks or the list were made'),
    'more than 8 bits': ('warning', 'the labels fit, but 16 bits wrap around in other tools: --fix '
                         'converts them'),
    'no label': ('warning', 'nothing is learned from masks without a label'),
    'no label in any mask': ('error', 'nothing can be learned from this set or measured on it: '
                             'check how the masks were made, reduce_zero_label and ignore_index'),
    'reduce_zero_label': ('warning', 'check whether the data set needs it'),
    'class without images': ('error', 'add images, or remove its folder from all splits'),
    'passed over': ('warning', 'these files are ignored because of their suffix or their folder: '
                    'convert or move those that belong to the data set'),
    'extreme size': ('warning', 'crops show little of tiny and of long images, and huge ones are '
                     'slow to read: look at them'),
    'class never occurs': ('warning', 'its IoU or accuracy is undefined or 0'),
    'class not in train': ('warning', 'it is tested, but cannot be learned'),
    'number of classes': ('error', 'set num_classes of the model, or metainfo.classes'),
    'classes differ': ('error', 'all splits must have the classes of train, in its order'),
    'colours': ('warning', 'these classes look the same in every figure: change metainfo.palette'),
    'duplicate': ('warning', 'they count more than others'),
    'train image in val or test': ('warning', 'the figures come out too good: remove it from one '
                                   'of the splits'),
    'not audited': ('warning', 'only local files of images and masks are checked, and classes in '
                    'folders or a list'),
}
"""Level of each check, and what to do about its findings."""

OF_ALL = frozenset(('mask of 0 and 255', 'no label in any mask'))
"""Checks that fail only if all masks of a data set fail them."""

# A size is extreme when one side is more than this many times the other, or when width and height
# are this many times more or less than those of the median, by area.
_EXTREME = 8


@dataclass(frozen=True)
class Finding:
    """The result of one check of one data set.

    Attributes:
        split: 'train', 'val', 'test', or 'train[1]' for the second data set of a split.
        check: A key of `CHECKS`.
        items: Files or classes, each with a note.
    """

    split: str
    check: str
    items: tuple[tuple[str, str], ...]

    @property
    def level(self) -> str:
        """Its level in `CHECKS`."""
        return CHECKS[self.check][0]


@dataclass
class Part:
    """One data set of a split, without its wrappers.

    Attributes:
        name: Name as in `Finding.split`.
        keys: Places in the config, such as 'train_dataloader.dataset'; several where the test set
            is that of validation.
        pairs: Images and their masks; None without a folder of masks.
        targets: Number of the class of each image of a classification data set, otherwise None.
        folders: Names of the folders that are the classes, if they are.
        counts: Pixels of each class after reduce_zero_label and label_map; in a classification data
            set images, here and below.
        unlabelled: Pixels without a label.
        raw: Pixels of each label as stored.
        verdicts: Checks that each pair fails.
        settings: Its config without the pipeline.
    """

    name: str
    split: str
    keys: list[str]
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
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes or of their folders; numbers where the data set has none."""
        names = self.folders or self.dataset.metainfo.get('classes')
        return tuple(names or map(str, range(self.labels.num_classes or 0)))

    @property
    def zero_is_no_label(self) -> bool:
        """The value of reduce_zero_label that the pipeline will use."""
        return self.labels.zero_is_no_label(self._settings)

    @property
    def zero_share(self) -> float:
        """Share of the pixels whose label is 0 as stored."""
        return self.raw.get(0, 0) / max(sum(self.raw.values()), 1)

    @property
    def _settings(self) -> dict[str, Any]:
        return dict(reduce_zero_label=self.dataset.reduce_zero_label,
                    label_map=self.dataset.label_map)

    def table(self) -> np.ndarray:
        """Return the label of each of the 256 values of a mask; 255 is no label."""
        table = self.labels.table(self._settings)
        return np.where(np.isin(table, list(self.ignored)), IGNORED, table)


def judge(part: Part, image: Facts, mask: Facts | None, binary: bool = False
          ) -> Iterator[tuple[str, bool, str]]:
    """Check one pair; in a ``binary`` data set all masks hold 0 and 255 alone.

    Yields:
        A key of `CHECKS`, whether it is about the mask, and a note.
    """
    for facts, kind in ((image, 'image'), (mask, 'mask')):
        if facts and 'problem' in facts:
            missing = facts['problem'] == 'missing'
            yield (f'{kind} {facts["problem"]}', kind == 'mask', '' if missing else facts['detail'])
    if mask is None or 'problem' in mask:
        return
    if 'problem' not in image:
        yield from _judge_sizes(part, image, mask)
    if 'values' not in mask:
        yield 'mask of colours', True, f'{mask["channels"]} channels'
        return
    if binary:
        yield 'mask of 0 and 255', True, ''
        return
    table, labels = part.table(), [value for value, _ in mask['values']]
    bad = [(value, n) for value, n in mask['values'] if not _is_valid(part, table, value)]
    if bad:
        few = ', '.join(f'{value:g}' for value, _ in bad[:5]) + (' ...' if bad[5:] else '')
        lossy = '; JPEG changes labels' if mask['format'] == 'JPEG' else ''
        yield 'label out of range', True, f'{few} ({sum(n for _, n in bad):,} pixels{lossy})'
    elif mask['bits'] > 8:
        yield 'more than 8 bits', True, f'{mask["bits"]} bits'
    if not bad and all(table[int(value)] == IGNORED for value in labels):
        yield 'no label', True, f'only {", ".join(map(str, labels[:3]))}'
    elif labels == [0, 255] and len(part.classes) <= 2:
        yield 'perhaps 0 and 255', True, ''
    if _colours_disagree(part, table, mask):
        yield 'palette of other indices', True, ''


def _judge_sizes(part: Part, image: Facts, mask: Facts) -> Iterator[tuple[str, bool, str]]:
    stored, size, orientation = image['size'], mask['size'], image['orientation']
    colour = next((step.color_type for step in part.dataset.pipeline.transforms
                   if isinstance(step, LoadImageFromFile)), 'color')
    if orientation == 1 or 'ignore_orientation' in colour or colour == 'unchanged':
        if stored != size:
            yield 'sizes differ', False, f'{_by(stored)} pixels, its mask {_by(size)}'
        return
    upright = stored[::-1] if orientation >= 5 else stored
    if upright == size:
        yield 'EXIF orientation', False, f'EXIF orientation {orientation}'
    elif stored == size:
        yield ('image turned by EXIF', False,
               f'{_by(stored)} pixels like its mask, but read as {_by(upright)}')
    else:
        yield 'sizes differ', False, f'{_by(upright)} pixels as it is read, its mask {_by(size)}'


def _is_valid(part: Part, table: np.ndarray, value: float) -> bool:
    return value in range(256) and (table[int(value)] == IGNORED or
                                    int(table[int(value)]) < (part.labels.num_classes or IGNORED))


def _colours_disagree(part: Part, table: np.ndarray, mask: Facts) -> bool:
    """Return whether a mask with a palette has the colours of the classes at other indices."""
    places = {tuple(colour): index for index, colour in enumerate(part.dataset.metainfo['palette'])}
    used = [(int(table[v]), places.get((r, g, b))) for v, r, g, b in mask.get('palette', ())
            if table[v] != IGNORED]
    return bool(used) and all(place is not None for _, place in used) and any(
        place != label for label, place in used)


def judge_part(part: Part, facts: dict[File, Facts]) -> list[Finding]:
    """Check all pairs of a data set, and count its labels."""
    values = [facts['mask', mask]['values'] for _, mask in part.pairs
              if mask is not None and 'values' in facts['mask', mask]]
    binary = {value for counted in values for value, _ in counted} == {0, 255}
    items: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    for image, mask in part.pairs:
        checks = part.verdicts[image, mask] = []
        for check, of_mask, note in judge(
                part, facts['image', image], facts['mask', mask] if mask else None, binary):
            checks.append(check)
            items[check][(mask or '') if of_mask else image, note] = None
    if part.targets is not None:
        _judge_classes(part, part.targets, facts, items)
    else:
        _count_labels(part, values)
        # Labels of a test set may be withheld.
        if part.split != 'test' and values and len(items.get('no label', ())) == len(
                {mask for _, mask in part.pairs}):
            items['no label in any mask'] = items.pop('no label')
        doubt = _doubt_zero(part) if values and not binary else None
        if doubt:
            items['reduce_zero_label'][f'reduce_zero_label={part.zero_is_no_label}', doubt] = None
    return [Finding(part.name, check, tuple(named)) for check, named in items.items()]


def _count_labels(part: Part, values: Iterable[Sequence[tuple[int, int]]]) -> None:
    table, size = part.table(), len(part.classes)
    part.counts = np.zeros(size, np.int64)
    for value, pixels in itertools.chain.from_iterable(values):
        part.raw[value] = part.raw.get(value, 0) + pixels
        if _is_valid(part, table, value):
            label = int(table[int(value)])
            if label < size:
                part.counts[label] += pixels
            else:
                part.unlabelled += pixels


def _judge_classes(part: Part, targets: Sequence[int], facts: dict[File, Facts],
                   items: dict[str, dict[tuple[str, str], None]]) -> None:
    """Check sizes and classes of a classification data set, and count the images of each class."""
    sizes = [facts['image', image].get('size') for image, _ in part.pairs]
    median = np.median([size[0] * size[1] for size in sizes if size] or [0])
    part.raw = dict(Counter(targets))
    part.counts = np.array([part.raw.get(i, 0) for i in range(len(part.classes))], np.int64)
    for (image, _), size, number in zip(part.pairs, sizes, targets):
        if number not in range(len(part.classes)):
            part.verdicts[image, None].append('label out of range')
            items['label out of range'][image, str(number)] = None
        if size and (max(size) > _EXTREME * min(size) or not
                     median <= _EXTREME ** 2 * size[0] * size[1] <= _EXTREME ** 4 * median):
            items['extreme size'][image, f'{_by(size)} pixels, the area of the median is '
                                  f'{_by([round(median ** 0.5)] * 2)}'] = None
    for name, n in zip(part.folders, part.counts):
        if not n:
            items['class without images'][os.path.join(part.dataset.img_prefix, name), ''] = None


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


def check_classes(part: Part, heads: dict[str, Any]) -> list[Finding]:
    """Compare the classes of a data set with the model's, and their colours with each other."""
    classes, named = part.classes, part.dataset.metainfo.get('classes')
    wrong = tuple((f'{name}.num_classes={head["num_classes"]}', f'the data set has {len(classes)}')
                  for name, head in heads.items() if head['num_classes'] not in (None, len(classes))
                  and (part.folders or named is not None))
    if part.folders and named and len(named) != len(classes):
        wrong = ((f'{part.keys[0]}.type={type(part.dataset).__name__}',
                  f'has {len(named)} classes, there are {len(classes)} folders: CustomDataset '
                  'takes any number'), *wrong)
    same: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, colour in zip(classes, part.dataset.metainfo.get('palette') or ()):
        same[tuple(colour)].append(name)
    alike = tuple((', '.join(names), f'colour {colour}') for colour, names in same.items()
                  if len(names) > 1)
    return [Finding(part.name, check, items)
            for check, items in (('number of classes', wrong), ('colours', alike)) if items]


def compare_splits(parts: Sequence[Part]) -> list[Finding]:
    """Find classes that a whole split lacks, or only the training set."""
    findings: list[Finding] = []
    train = [part for part in parts if part.split == 'train']
    for split in dict.fromkeys(part.split for part in parts):
        own = [part for part in parts if part.split == split]
        first = (train or own)[0]
        for part in own:
            if part.classes != first.classes:
                findings.append(Finding(part.name, 'classes differ', tuple(
                    (name, f'only in {(first if name in first.classes else part).name}')
                    for name in sorted({*part.classes} ^ {*first.classes})) or (
                        (', '.join(part.classes[:5]), 'in another order'),)))
        if not any(part.raw for part in own) or own[0].folders or any(
                finding.check == 'classes differ' for finding in findings):
            continue  # an empty folder is an error of its own
        seen = np.sum([part.counts for part in own], axis=0)
        never = tuple((name, '') for name, n in zip(own[0].classes, seen) if not n)
        if never:
            findings.append(Finding(split, 'class never occurs', never))
        if split != 'train' and any(part.raw for part in train):
            unit = 'pixels' if own[0].targets is None else 'images'
            learned = np.sum([part.counts for part in train], axis=0)
            only = tuple((name, f'{n:,} {unit}') for name, n, known in
                         zip(own[0].classes, seen, learned) if n and not known)
            if only:
                findings.append(Finding(split, 'class not in train', only))
    return findings


def find_duplicates(parts: Sequence[Part], facts: dict[File, Facts]) -> list[Finding]:
    """Find images that are the same within a split, or in train and in another split."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for part in parts:
        for image, _ in part.pairs:
            if 'pixels' in facts['image', image]:
                groups[facts['image', image]['pixels']].append((part.split, image))
    items: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for group in groups.values():
        learned = next((image for split, image in group if split == 'train'), None)
        first: dict[str, str] = {}
        for split, image in group:
            if split in first:
                items[split, 'duplicate'].append((image, _likeness(image, first[split])))
            elif split != 'train' and learned is not None:
                items[split, 'train image in val or test'].append(
                    (image, 'the path is in both' if image == learned else
                     _likeness(image, learned)))
            first.setdefault(split, image)
    return [Finding(split, check, tuple(named)) for (split, check), named in items.items()]


def _likeness(image: str, other: str) -> str:
    if os.path.realpath(image) == os.path.realpath(other):
        return 'listed twice' if image == other else f'is {other}'
    return f'the same pixels as {other}'


def printable(text: str) -> str:
    """Replace the characters that would control a terminal."""
    return ''.join(ch if ch.isprintable() else '?' for ch in shown(text))


def _by(size: Sequence[int]) -> str:
    return f'{size[0]}x{size[1]}'
