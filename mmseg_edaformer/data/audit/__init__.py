"""Finds what is wrong with a data set without training, by looking at every image and mask.

In a classification data set these are the images in the folders of its classes, or in its list.
`audit` looks at all of a config's data sets, `check_samples` at a few masks before a training.
"""
import errno
import os
from collections.abc import Iterator, Sequence
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
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS

from ...errors import ConfigError, DataError
from ..classification import check_library, class_folders, is_classifier
from ..transforms import IGNORED, LoadSegLabels
from .files import Facts, File, examine, examine_files, header
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

_SAMPLES = 16, 128, 1024  # masks that are looked at before a run, until a finding is certain


@dataclass
class Audit:
    """Result of `audit`."""

    parts: list[Part]
    findings: list[Finding]
    facts: dict[File, Facts]
    files_read: int

    def count(self, level: str) -> int:
        """Return the number of findings of a level."""
        return sum(finding.level == level for finding in self.findings)


def inner_datasets(cfg: Any, key: str = 'dataset') -> Iterator[tuple[str, Any]]:
    """Yield the data sets within wrappers such as ConcatDataset and RepeatDataset, with keys."""
    if cfg.get('datasets'):
        for index, inner in enumerate(cfg['datasets']):
            yield from inner_datasets(inner, f'{key}.datasets.{index}')
    elif 'dataset' in cfg:
        yield from inner_datasets(cfg['dataset'], f'{key}.dataset')
    else:
        yield key, cfg


def audit(cfg: Config, splits: Sequence[str] = ('train', 'val', 'test'), *,
          workers: int | None = None, out: Path | None = None, fresh: bool = False) -> Audit:
    """Look at every file of the data sets of a config.

    Args:
        cfg: Any config of mmsegmentation, or of a classifier of mmpretrain.
        splits: Splits to look at, where the config has them.
        workers: Number of processes; by default one for each core.
        out: Folder for the cache, with which a second run reads only what has changed.
        fresh: Whether to read every file again.

    Raises:
        ConfigError: A data set cannot be built from the config, ``out`` lies within one, or
            mmpretrain is missing.
        DataError: A process was killed, or a list of images cannot be read.
    """
    if is_classifier(cfg):
        check_library()
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    heads = dict(_heads(cfg))
    parts: list[Part] = []
    findings: list[Finding] = []
    for split in splits:
        inner = list(inner_datasets((cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}))
        for index, (key, dataset_cfg) in enumerate(inner):
            name = split if len(inner) == 1 else f'{split}[{index}]'
            key, settings = f'{split}_dataloader.{key}', {**dataset_cfg, 'pipeline': None}
            twin = next((part for part in parts if 'train' not in (split, part.split)
                         and part.split != split and part.settings == settings), None)
            if twin:
                twin.keys.append(key)
            elif dataset_cfg:
                part, own = _part(name, split, key, dataset_cfg, heads)
                findings += own
                if part:
                    part.settings = settings
                    parts.append(part)
    if out is not None:
        _check_output(parts, out)
    facts, files_read = examine_files(
        [(kind, path) for part in parts for pair in part.pairs
         for kind, path in zip(('image', 'mask'), pair) if path is not None],
        workers=workers, cache=out and out / 'files.cache', fresh=fresh)
    for part in parts:
        findings += judge_part(part, facts) + check_classes(part, heads)
    findings += compare_splits(parts) + find_duplicates(parts, facts)
    findings.sort(key=lambda finding: finding.level)
    return Audit(parts, findings, facts, files_read)


def check_samples(cfg: Config, split: str, dataset: BaseSegDataset, *, alone: bool = True) -> None:
    """Look at a few masks of a data set, evenly spread, before a run, and warn of what is wrong.

    For checks that fail only if all masks fail them, up to 1,024 masks are looked at, until one
    passes.

    Args:
        cfg: The config of the run.
        split: Name of the split, for messages.
        dataset: Data set, built with ``lazy_init``; it is not changed.
        alone: Whether the split has no other data set, which could have labels that it lacks.

    Raises:
        DataError: A finding is an error. It is a warning instead for bad files where the pipeline
            has a ``skip_list``, and for what holds for all masks of a test set or of one data set
            of several.
    """
    if _is_remote(dataset):
        return
    pairs, labels = _pairs(dataset), _labels(dataset, dict(_heads(cfg)))
    if not pairs:
        raise DataError(f'the {split} set: no images: {dataset.ann_file}. What to do: '
                        f'{CHECKS["no images"][1]}')
    if not dataset.data_prefix.get('seg_map_path'):
        return
    ignored = {head['ignore_index'] for _, head in _heads(cfg)}
    facts: dict[File, Facts] = {}
    for count in _SAMPLES:
        part = Part(split, split, [], dataset, labels, ignored)
        part.pairs = [pairs[i] for i in sorted(
            {*np.linspace(0, len(pairs) - 1, count).astype(int)})]
        for image, mask in part.pairs:
            if ('image', image) not in facts:
                facts['image', image] = header(image)
            if mask and ('mask', mask) not in facts:
                facts['mask', mask] = examine('mask', mask)
        findings = judge_part(part, facts)
        if not any(finding.check in OF_ALL for finding in findings):
            break
    skips = any(getattr(step, 'skip_list', None) for step in dataset.pipeline.transforms)
    for finding in findings:
        name, note = finding.items[0]
        text = (f'the {split} set: {finding.check}: {name}{": " if note else ""}{note}'
                f' ({len(finding.items)} of {len(part.pairs)} looked at). What to do: '
                f'{CHECKS[finding.check][1]}; tools/check_data.py looks at all')
        harmless = (split == 'test' or not alone) if finding.check in OF_ALL else skips
        if finding.level == 'error' and not harmless:
            raise DataError(text)
        print_log(text, logger='current', level=30)


def _check_output(parts: Sequence[Part], out: Path) -> None:
    """Check that what is written does not become part of the data.

    Raises:
        ConfigError: The folder lies within a data set, or a data set in what ``fix`` replaces.
    """
    real, fixed = out.resolve(), (out / 'fixed').resolve()
    for part in parts:
        folders = [part.dataset.data_prefix.get(kind) for kind in ('img_path', 'seg_map_path')]
        root = part.dataset.data_root
        if root and not Path.cwd().is_relative_to(Path(root).resolve()):
            folders.append(root)
        for folder in folders:
            if folder is None:
                continue
            if real.is_relative_to(Path(folder).resolve()):
                raise ConfigError(f'--out {out} lies within {folder or "."}, the folder of the '
                                  f'{part.name} set: choose a folder outside of the data')
            if Path(folder).resolve().is_relative_to(fixed):
                raise ConfigError(f'the {part.name} set is in {fixed}, which this run would '
                                  'replace: choose another --out')


def _part(name: str, split: str, key: str, dataset_cfg: Any, heads: dict[str, Any]
          ) -> tuple[Part | None, list[Finding]]:
    """Build a data set and list its pairs; the findings say why if it cannot."""
    def finding(check: str, *items: tuple[str, str]) -> list[Finding]:
        return [Finding(name, check, items)]

    root = dataset_cfg.get('data_root') or '.'
    if '://' not in root and not os.path.isdir(root):
        return None, finding('folder missing', (root, f'from {os.getcwd()}'))
    try:
        dataset = DATASETS.build({**dataset_cfg, 'lazy_init': True})
    except (AssertionError, ValueError) as error:
        raise ConfigError(f'{key} cannot be built: {error}') from error
    # Those of mmpretrain that read folders or a list.
    classifies = getattr(dataset, 'with_label', False) and hasattr(dataset, 'is_valid_file')
    if not (classifies or isinstance(dataset, BaseSegDataset)) or _is_remote(dataset):
        return None, finding('not audited', (type(dataset).__name__, ''))
    part = Part(name, split, [key], dataset, _labels(dataset, heads),
                {value['ignore_index'] for value in heads.values()} |
                {getattr(dataset, 'ignore_index', IGNORED)}, targets=[] if classifies else None)
    folders = [path for kind in ('img_path', 'seg_map_path')
               if (path := dataset.data_prefix.get(kind)) is not None]
    missing = [path for path in folders if path and not os.path.isdir(path)]
    if dataset.ann_file and not os.path.exists(dataset.ann_file):
        missing.append(dataset.ann_file)
    if missing:
        return part, finding('folder missing', *((path, '') for path in missing))
    try:
        return part, [Finding(name, check, tuple(items)) for check, items in (
            _list_pairs(part, folders) if part.targets is None else
            _list_classes(part, part.targets)) if items]
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        loops = [(path, '') for folder in folders for path in _find_loops(folder)]
        return part, finding('link loop', *loops or [(str(error.filename), '')])


def _find_loops(folder: str) -> Iterator[str]:
    """Yield the links in a folder that lead to themselves or to a folder that they are in."""
    for where, folders, files in os.walk(folder):
        for path in (os.path.join(where, name) for name in sorted(folders + files)):
            if os.path.islink(path):
                target, place = os.path.realpath(path), os.path.realpath(where)
                if os.path.islink(target) or os.path.commonpath([target, place]) == target:
                    yield path


_Items = Iterator[tuple[str, list[tuple[str, str]]]]


def _list_pairs(part: Part, folders: Sequence[str]) -> _Items:
    """List the pairs of a data set, and yield masks without an image."""
    dataset = part.dataset
    part.pairs = _pairs(dataset)
    if not part.pairs:
        yield 'no images', [(dataset.ann_file or f'{folders[0]}/*{dataset.img_suffix}', '')]
    if len(folders) > 1 and (not dataset.ann_file or os.path.isdir(dataset.ann_file)):
        partners = {os.path.normpath(mask) for _, mask in part.pairs if mask}
        masks = sorted({os.path.join(folders[1], mask) for mask in list_dir_or_file(
            folders[1], list_dir=False, suffix=dataset.seg_map_suffix, recursive=True)})
        yield 'image missing', [(mask, 'a mask without an image') for mask in masks
                                if os.path.normpath(mask) not in partners]
    if dataset._indices is not None or type(dataset).filter_data is not BaseSegDataset.filter_data:
        dataset.serialize_data = False
        dataset.full_init()
        part.pairs = [(info['img_path'], info.get('seg_map_path')) for info in dataset.data_list]


def _list_classes(part: Part, targets: list[int]) -> _Items:
    """List the images and their classes as mmpretrain does, and yield the files it ignores."""
    dataset = part.dataset
    if dataset.ann_file:
        try:
            infos = dataset.load_data_list()
        except ValueError as error:
            raise DataError(f'{dataset.ann_file} is no list of images and the numbers of their '
                            f'classes, a line for each: {error}') from error
        part.pairs = [(info['img_path'], None) for info in infos]
        targets += [info['gt_label'] for info in infos]
    else:
        ignored = []
        part.folders = tuple(class_folders(dataset.img_prefix))
        for number, folder in enumerate((*part.folders, '')):
            where = os.path.join(dataset.img_prefix, folder)
            for file in sorted(list_dir_or_file(where, list_dir=False, recursive=bool(folder))):
                path = os.path.join(where, file)
                if folder and dataset.is_valid_file(file):
                    part.pairs.append((path, None))
                    targets.append(number)
                else:
                    ignored.append((path, '' if folder else 'not in the folder of a class'))
        yield 'passed over', ignored
    if not part.pairs:
        yield 'no images', [
            (dataset.ann_file or os.path.join(dataset.img_prefix, '<class>/<image>'), '')]


def _pairs(dataset: BaseSegDataset) -> list[tuple[str, str | None]]:
    try:
        return [(info['img_path'], info.get('seg_map_path')) for info in dataset.load_data_list()]
    except UnicodeDecodeError as error:
        raise DataError(f'{dataset.ann_file} is not a text file in UTF-8: {error}') from error


def _is_remote(dataset: BaseDataset) -> bool:
    backend = (getattr(dataset, 'backend_args', None) or {}).get('backend', 'local')
    return backend != 'local' or any('://' in (path or '') for path in
                                     (*dataset.data_prefix.values(), dataset.ann_file))


def _labels(dataset: BaseDataset, heads: dict[str, Any]) -> LoadSegLabels:
    """Return a loader with the settings of the pipeline's, which knows the number of classes."""
    step = next((step for step in dataset.pipeline.transforms
                 if isinstance(step, LoadAnnotations)), None)
    classes = dataset.metainfo.get('classes')
    known = [getattr(step, 'num_classes', None), classes and len(classes),
             *(head['num_classes'] for head in heads.values())]
    labels = LoadSegLabels(num_classes=next(filter(None, known), None))
    labels.reduce_zero_label = step.reduce_zero_label if step else None
    return labels


def _heads(cfg: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the number of classes and the ignored label of all heads, with their config keys.

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
