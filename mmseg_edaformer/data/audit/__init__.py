"""What is wrong with a data set, found without training: every image and every mask is looked at.

Of a classification data set it is every image in the folders of its classes, or in its list.
`audit` looks at all of a config's data sets, `check_samples` at a few masks before a training.
"""
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import list_dir_or_file
from mmengine.logging import print_log
from mmengine.registry import init_default_scope
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from ...errors import ConfigError, DataError
from ...pretraining.folders import check_library, is_classifier
from ..shards import class_folders
from ..transforms import IGNORED, LoadSegLabels
from . import files as audit_files
from .files import Facts, File
from .rules import (
    CHECKS,
    OF_ALL,
    Finding,
    Part,
    check_classes,
    compare_splits,
    find_duplicates,
    judge_part,
)

_SAMPLES = 16, 128, 1024  # so many masks are looked at before a run, until a finding is certain


@dataclass
class Audit:
    """All that `audit` found."""

    parts: list[Part]
    findings: list[Finding]
    facts: dict[File, Facts]
    files_read: int

    def count(self, level: str) -> int:
        """Number of findings of a level."""
        return sum(finding.level == level for finding in self.findings)


def inner_datasets(cfg: Any, key: str = 'dataset') -> Iterator[tuple[str, Any]]:
    """The data sets within wrappers such as ConcatDataset and RepeatDataset, and where they are."""
    if cfg.get('datasets'):
        for index, each in enumerate(cfg['datasets']):
            yield from inner_datasets(each, f'{key}.datasets.{index}')
    elif 'dataset' in cfg:
        yield from inner_datasets(cfg['dataset'], f'{key}.dataset')
    else:
        yield key, cfg


def audit(cfg: Config, splits: Sequence[str] = ('train', 'val', 'test'), *,
          workers: int | None = None, cache: Path | None = None, fresh: bool = False,
          guard: Callable[[Sequence[Part]], None] = lambda parts: None,
          advance: Callable[[int, int], None] = lambda done, total: None) -> Audit:
    """Look at every file of the data sets of a config.

    Args:
        cfg: Any config of mmsegmentation, or of a classifier of mmpretrain.
        splits: Those whose dataloaders are looked at, where the config has them.
        workers: As for `audit_files.examine_files`, like ``cache``, ``fresh`` and ``advance``.
        guard: Called with the data sets before any file is read or written.

    Raises:
        ConfigError: A data set cannot be built from the config, or mmpretrain is not there for it.
        DataError: A process was killed, or a list of images is none.
    """
    if is_classifier(cfg):
        check_library()
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    heads = dict(_heads(cfg))
    parts: list[Part] = []
    found: list[Finding] = []
    for split in splits:
        inner = list(inner_datasets((cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}))
        for index, (key, dataset_cfg) in enumerate(inner):
            name = split if len(inner) == 1 else f'{split}[{index}]'
            if not dataset_cfg:
                continue
            part = _part(name, split, f'{split}_dataloader.{key}', dataset_cfg, heads, found)
            if part is None:
                continue
            twin = next((other for other in parts if 'train' not in (split, other.split)
                         and other.split != split and _same(part, other)), None)
            if twin is not None:
                part.same_as = twin.name
                found = [finding for finding in found if finding.split != name]
            parts.append(part)
    guard(parts)
    facts, read = audit_files.examine_files(
        [(kind, path) for part in parts for pair in part.pairs
         for kind, path in zip(('image', 'mask'), pair) if path is not None],
        workers=workers, cache=cache, fresh=fresh, advance=advance)
    for part in parts:
        if part.same_as is None:
            found += judge_part(part, facts)
            found += check_classes(part, heads)
        else:
            twin = next(other for other in parts if other.name == part.same_as)
            part.counts, part.unlabelled, part.raw = twin.counts, twin.unlabelled, twin.raw
            part.verdicts = twin.verdicts
    own = [part for part in parts if part.same_as is None]
    found += compare_splits(own)
    found += find_duplicates(own, facts)
    found.sort(key=lambda finding: finding.level)
    return Audit(parts, found, facts, read)


def check_samples(cfg: Config, split: str, dataset: BaseSegDataset, *, alone: bool = True) -> None:
    """Look at a few masks of a data set, evenly spread, before a run, and warn of what is wrong.

    What is an error only if it holds for all masks is looked for in up to 1,024 of them, as long as
    no mask speaks against it.

    Args:
        cfg: The config of the run.
        split: Name for messages.
        dataset: Built, if with ``lazy_init``; not changed.
        alone: Whether the split has no other data set, in which labels could be that it lacks.

    Raises:
        DataError: A finding is an error. It is a warning instead for bad files where the pipeline
            has a ``skip_list``, and for what holds for all masks of a test set or of one data set
            of several.
    """
    if _is_remote(dataset):
        return
    pairs, loader = _pairs(dataset), _loader(dataset, dict(_heads(cfg)))
    if not pairs:
        raise DataError(f'the {split} set: no images: {dataset.ann_file}. What to do: '
                        f'{CHECKS["no images"][1]}')
    if not dataset.data_prefix.get('seg_map_path'):
        return
    facts: dict[File, Facts] = {}
    for count in _SAMPLES:
        part = Part(split, split, '', dataset, loader, _ignored(cfg))
        part.pairs = [pairs[i] for i in sorted(
            {*np.linspace(0, len(pairs) - 1, count).astype(int)})]
        for image, mask in part.pairs:
            for file in (('image', image), ('mask', mask or '')):
                if file not in facts:
                    facts[file] = (audit_files.header(image) if file[0] == 'image' else
                                   audit_files.examine(*file))
        findings = judge_part(part, facts)
        if not any(finding.check in OF_ALL for finding in findings):
            break
    for finding in findings:
        name, note = finding.items[0]
        text = (f'the {split} set: {finding.check}: {name}{": " if note else ""}{note}'
                f' ({len(finding.items)} of {len(part.pairs)} looked at). What to do: '
                f'{CHECKS[finding.check][1]}; tools/check_data.py looks at all')
        harmless = ((split == 'test' or not alone) if finding.check in OF_ALL else
                    _skips(dataset))
        if finding.level == 'error' and not harmless:
            raise DataError(text)
        print_log(text, logger='current', level=30)


def _skips(dataset: BaseSegDataset) -> bool:
    """Whether the run is to go on without bad files."""
    return any(getattr(step, 'skip_list', None) for step in dataset.pipeline.transforms)


def _part(name: str, split: str, key: str, dataset_cfg: Any, heads: dict[str, Any],
          found: list[Finding]) -> Part | None:
    """Build a data set and list its pairs, or say why not."""
    root = dataset_cfg.get('data_root') or '.'
    if '://' not in root and not os.path.isdir(root):
        found.append(Finding(name, 'folder missing', ((root, f'from {os.getcwd()}'),)))
        return None
    try:
        dataset = DATASETS.build({**dataset_cfg, 'lazy_init': True})
    except (AssertionError, ValueError) as error:
        raise ConfigError(f'{key} cannot be built: {error}') from error
    # Those of mmpretrain that read folders or a list.
    classifies = getattr(dataset, 'with_label', False) and hasattr(dataset, 'is_valid_file')
    if not (classifies or isinstance(dataset, BaseSegDataset)) or _is_remote(dataset):
        found.append(Finding(name, 'not audited', ((type(dataset).__name__, ''),)))
        return None
    part = Part(name, split, key, dataset, _loader(dataset, heads),
                {value['ignore_index'] for value in heads.values()} |
                {getattr(dataset, 'ignore_index', IGNORED)}, targets=[] if classifies else None)
    folders = [path for kind in ('img_path', 'seg_map_path')
               if (path := dataset.data_prefix.get(kind)) is not None]
    missing = [path for path in folders if path and not os.path.isdir(path)]
    if dataset.ann_file and not os.path.exists(dataset.ann_file):
        missing.append(dataset.ann_file)
    if missing:
        found.append(Finding(name, 'folder missing', tuple((path, '') for path in missing)))
        return part
    try:
        _list(part, folders, found)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        found.append(Finding(name, 'link loop', tuple(
            (path, '') for folder in folders for path in _find_loops(folder)) or (
                (str(error.filename), ''),)))
    return part


def _find_loops(folder: str) -> Iterator[str]:
    """The links in a folder that lead to themselves or to a folder that they are in."""
    for where, folders, files in os.walk(folder):
        for path in (os.path.join(where, name) for name in sorted(folders + files)):
            if os.path.islink(path):
                target, place = os.path.realpath(path), os.path.realpath(where)
                if os.path.islink(target) or os.path.commonpath([target, place]) == target:
                    yield path


def _list(part: Part, folders: Sequence[str], found: list[Finding]) -> None:
    """List the pairs of a data set, and the files that have no partner or are passed over."""
    name, dataset = part.name, part.dataset
    if part.targets is not None:
        _list_classes(part, found)
        return
    part.pairs = _pairs(dataset)
    if not part.pairs:
        found.append(Finding(name, 'no images', (
            (dataset.ann_file or f'{folders[0]}/*{dataset.img_suffix}', ''),)))
    if len(folders) > 1 and (not dataset.ann_file or os.path.isdir(dataset.ann_file)):
        partners = {os.path.normpath(mask) for _, mask in part.pairs if mask}
        alone = sorted({os.path.join(folders[1], mask) for mask in list_dir_or_file(
            folders[1], list_dir=False, suffix=dataset.seg_map_suffix, recursive=True)
            if os.path.normpath(os.path.join(folders[1], mask)) not in partners})
        if alone:
            found.append(Finding(name, 'image missing', tuple(
                (mask, 'a mask without an image') for mask in alone)))
    if dataset._indices is not None or type(dataset).filter_data is not BaseSegDataset.filter_data:
        dataset.serialize_data = False
        dataset.full_init()
        part.pairs = [(info['img_path'], info.get('seg_map_path')) for info in dataset.data_list]


def _list_classes(part: Part, found: list[Finding]) -> None:
    """List the images and their classes as mmpretrain does, and the files that it passes over."""
    dataset, passed, targets = part.dataset, [], part.targets
    assert targets is not None
    if dataset.ann_file:
        try:
            infos = dataset.load_data_list()
        except ValueError as error:
            raise DataError(f'{dataset.ann_file} is no list of images and the numbers of their '
                            f'classes, a line for each: {error}') from error
        part.pairs = [(info['img_path'], None) for info in infos]
        targets += [info['gt_label'] for info in infos]
    else:
        part.folders = tuple(class_folders(dataset.img_prefix))
        for number, folder in enumerate((*part.folders, '')):
            where = os.path.join(dataset.img_prefix, folder)
            for file in sorted(list_dir_or_file(where, list_dir=False, recursive=bool(folder))):
                if folder and dataset.is_valid_file(file):
                    part.pairs.append((os.path.join(where, file), None))
                    targets.append(number)
                else:
                    passed.append((os.path.join(where, file), '' if folder else
                                   'not in the folder of a class'))
    if passed:
        found.append(Finding(part.name, 'passed over', tuple(passed)))
    if not part.pairs:
        found.append(Finding(part.name, 'no images', (
            (dataset.ann_file or os.path.join(dataset.img_prefix, '<class>/<image>'), ''),)))


def _pairs(dataset: BaseSegDataset) -> list[tuple[str, str | None]]:
    try:
        return [(info['img_path'], info.get('seg_map_path')) for info in dataset.load_data_list()]
    except UnicodeDecodeError as error:
        raise DataError(f'{dataset.ann_file} is not a text file in UTF-8: {error}') from error


def _is_remote(dataset: BaseDataset) -> bool:
    backend = (getattr(dataset, 'backend_args', None) or {}).get('backend', 'local')
    return backend != 'local' or any('://' in (path or '') for path in
                                     (*dataset.data_prefix.values(), dataset.ann_file))


def _loader(dataset: BaseDataset, heads: dict[str, Any]) -> LoadSegLabels:
    """A loader of masks as the pipeline has it, which knows the number of classes."""
    step = next((step for step in dataset.pipeline.transforms if isinstance(step, LoadSegLabels)),
                None)
    classes = dataset.metainfo.get('classes')
    known = [step and step.num_classes, classes and len(classes),
             *(head['num_classes'] for head in heads.values())]
    loader = LoadSegLabels(num_classes=next(filter(None, known), None))
    loader.reduce_zero_label = step.reduce_zero_label if step else None
    return loader


def _heads(cfg: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Number of classes and ignored label of all heads, and where the config has them.

    A classifier's head, its loss and its preprocessor each have the number.
    """
    model = cfg.get('model') or {}
    path = 'model'
    while 'module' in model:  # test-time augmentation wraps it
        model, path = model['module'], f'{path}.module'
    for kind in (('head', 'head.loss', 'data_preprocessor') if is_classifier(cfg) else
                 ('decode_head', 'auxiliary_head')):
        heads: Any = model
        for step in kind.split('.'):
            heads = (heads.get(step) if isinstance(heads, dict) else None) or []
        several = isinstance(heads, (list, tuple))
        for index, head in enumerate(heads if several else [heads]):
            yield (f'{path}.{kind}.{index}' if several else f'{path}.{kind}',
                   dict(num_classes=head.get('num_classes'),
                        ignore_index=head.get('ignore_index', IGNORED)))


def _ignored(cfg: Config) -> set[int]:
    return {head['ignore_index'] for _, head in _heads(cfg)}


def _same(part: Part, other: Part) -> bool:
    return (part.pairs == other.pairs and part.classes == other.classes
            and part.dataset.data_prefix == other.dataset.data_prefix
            and part.targets == other.targets
            and (part.targets is not None or bool((part.table() == other.table()).all())))
