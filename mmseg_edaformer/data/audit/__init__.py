"""Finds what is wrong with a data set without training, by looking at every image and mask.

In a classification data set these are the images in the folders of its classes, or in its list.
`audit` looks at all of a config's data sets, `check_samples` at a few masks before a training.
"""
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import list_dir_or_file
from mmengine.logging import print_log
from mmengine.registry import init_default_scope
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from ...errors import ConfigError, DataError
from ..classification import check_library, class_folders, is_classifier
from ..transforms import IGNORED
from .files import Facts, File, examine, examine_files, header
from .rules import (
    CHECKS,
    OF_ALL,
    Finding,
    Item,
    Part,
    check_classes,
    compare_splits,
    find_duplicates,
    gather,
    judge_part,
)

_SAMPLES = 16, 128, 1024  # masks that are looked at before a run, until a finding is certain


class Audit(NamedTuple):
    """Result of `audit`."""

    parts: list[Part]
    findings: list[Finding]
    facts: dict[File, Facts]


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
          workers: int | None = None, out: Path | None = None) -> Audit:
    """Look at every file of the data sets of a config.

    Args:
        cfg: Any config of mmsegmentation, or of a classifier of mmpretrain.
        splits: Splits to look at, where the config has them.
        workers: Number of processes; by default one for each core.
        out: Folder for the results, which must lie outside of the data.

    Raises:
        ConfigError: A data set cannot be built from the config, ``out`` lies within one, or
            mmpretrain is missing.
        DataError: A process was killed, or a list of images cannot be read.
    """
    if is_classifier(cfg):
        check_library()
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    heads = _heads(cfg)
    parts: list[Part] = []
    items: list[Item] = []
    looked_at: list[tuple[Any, Part]] = []
    for split in splits:
        inner = list(inner_datasets((cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}))
        for index, (key, dataset_cfg) in enumerate(inner):
            if not dataset_cfg:
                continue
            key, settings = f'{split}_dataloader.{key}', {**dataset_cfg, 'pipeline': None}
            twin = next((part for known, part in looked_at if known == settings and
                         part.split != split and 'train' not in (split, part.split)), None)
            if twin:
                twin.keys.append(key)
                continue
            name = split if len(inner) == 1 else f'{split}[{index}]'
            try:
                dataset = DATASETS.build({**dataset_cfg, 'lazy_init': True})
            except (AssertionError, ValueError) as error:
                raise ConfigError(f'{key} cannot be built: {error}') from error
            # Those of mmpretrain that read folders or a list.
            classifies = getattr(dataset, 'with_label', False) and hasattr(dataset, 'is_valid_file')
            if not (classifies or isinstance(dataset, BaseSegDataset)) or _is_remote(dataset):
                items.append((name, 'not audited', type(dataset).__name__, ''))
                continue
            parts.append(Part(name, split, [key], dataset, heads))
            looked_at.append((settings, parts[-1]))
            items += ((name, *item) for item in _list(parts[-1]))
    if out is not None:
        _check_output(parts, out)
    facts = examine_files([
        (kind, path) for part in parts for pair in part.pairs
        for kind, path in zip(('image', 'mask'), pair) if path is not None], workers)
    for part in parts:
        items += [*judge_part(part, facts), *check_classes(part, heads)]
    items += [*compare_splits(parts), *find_duplicates(parts, facts)]
    return Audit(parts, gather(items), facts)


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
    pairs = _pairs(dataset)
    if not pairs:
        raise DataError(f'the {split} set: no images: {dataset.ann_file}. What to do: '
                        f'{CHECKS["no images"][1]}')
    if not dataset.data_prefix.get('seg_map_path'):
        return
    facts: dict[File, Facts] = {}
    for count in _SAMPLES:
        part = Part(split, split, [], dataset, _heads(cfg))
        part.pairs = [pairs[i] for i in sorted(
            {*np.linspace(0, len(pairs) - 1, count).astype(int)})]
        for image, mask in part.pairs:
            if ('image', image) not in facts:
                facts['image', image] = header(image)
            if mask and ('mask', mask) not in facts:
                facts['mask', mask] = examine('mask', mask)
        findings = gather(judge_part(part, facts))
        if not any(finding.check in OF_ALL for finding in findings):
            break
    skips = any(getattr(step, 'skip_list', None) for step in dataset.pipeline.transforms)
    for finding in findings:
        name, note = finding.items[0]
        text = (f'the {split} set: {finding.check}: {name}{": " if note else ""}{note}'
                f' ({len(finding.items)} of {len(part.pairs)} looked at). What to do: '
                f'{finding.remedy}; tools/check_data.py looks at all')
        harmless = (split == 'test' or not alone) if finding.check in OF_ALL else skips
        if finding.level == 'error' and not harmless:
            raise DataError(text)
        print_log(text, logger='current', level=30)


def _check_output(parts: Sequence[Part], out: Path) -> None:
    """Check that what is written does not become part of the data.

    Raises:
        ConfigError: The folder lies within a data set, or a data set in what ``fix`` replaces.
    """
    for part in parts:
        root = part.dataset.data_root
        folders = _folders(part.dataset)
        if root and not Path.cwd().is_relative_to(Path(root).resolve()):
            folders.append(root)
        for folder in folders:
            if out.resolve().is_relative_to(Path(folder).resolve()):
                raise ConfigError(f'--out {out} lies within {folder or "."}, the folder of the '
                                  f'{part.name} set: choose a folder outside of the data')
            fixed = (out / 'fixed').resolve()
            if Path(folder).resolve().is_relative_to(fixed):
                raise ConfigError(f'the {part.name} set is in {fixed}, which this run would '
                                  'replace: choose another --out')


def _folders(dataset: BaseDataset) -> list[str]:
    """Return the folder of the images, and that of the masks if there is one."""
    return [path for kind in ('img_path', 'seg_map_path')
            if (path := dataset.data_prefix.get(kind)) is not None]


_Items = Iterator[tuple[str, str, str]]


def _list(part: Part) -> _Items:
    """List the pairs of a data set; yields checks that its folders or its list fail."""
    listed = part.dataset.ann_file
    missing = [path for path in _folders(part.dataset) if path and not os.path.isdir(path)]
    missing += [listed] if listed and not os.path.exists(listed) else []
    for path in missing:
        yield 'folder missing', path, f'from {os.getcwd()}'
    if missing:
        return
    try:
        yield from _list_classes(part) if part.classifies else _list_pairs(part)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        loops = [path for folder in _folders(part.dataset) for path in _find_loops(folder)]
        for path in loops or [str(error.filename)]:
            yield 'link loop', path, ''


def _find_loops(folder: str) -> Iterator[str]:
    """Yield the links in a folder that lead to themselves or to a folder that they are in."""
    for where, folders, files in os.walk(folder):
        for path in (os.path.join(where, name) for name in sorted(folders + files)):
            if os.path.islink(path):
                target, place = os.path.realpath(path), os.path.realpath(where)
                if os.path.islink(target) or os.path.commonpath([target, place]) == target:
                    yield path


def _list_pairs(part: Part) -> _Items:
    """List the pairs of a data set; yields masks without an image."""
    dataset, folders = part.dataset, _folders(part.dataset)
    part.pairs = _pairs(dataset)
    if not part.pairs:
        yield 'no images', dataset.ann_file or f'{folders[0]}/*{dataset.img_suffix}', ''
    if len(folders) > 1 and (not dataset.ann_file or os.path.isdir(dataset.ann_file)):
        partners = {os.path.normpath(mask) for _, mask in part.pairs if mask}
        for name in sorted(list_dir_or_file(folders[1], list_dir=False, recursive=True,
                                            suffix=dataset.seg_map_suffix)):
            mask = os.path.join(folders[1], name)
            if os.path.normpath(mask) not in partners:
                yield 'image missing', mask, 'a mask without an image'
    if dataset._indices is not None or type(dataset).filter_data is not BaseSegDataset.filter_data:
        dataset.serialize_data = False
        dataset.full_init()
        part.pairs = [(info['img_path'], info.get('seg_map_path')) for info in dataset.data_list]


def _list_classes(part: Part) -> _Items:
    """List the images and their classes as mmpretrain does; yields the files that it ignores."""
    dataset = part.dataset
    if dataset.ann_file:
        try:
            infos = dataset.load_data_list()
        except ValueError as error:
            raise DataError(f'{dataset.ann_file} is no list of images and the numbers of their '
                            f'classes, a line for each: {error}') from error
        part.pairs = [(info['img_path'], None) for info in infos]
        part.targets = [info['gt_label'] for info in infos]
    else:
        part.folders = tuple(class_folders(dataset.img_prefix))
        for number, folder in enumerate((*part.folders, '')):
            where = os.path.join(dataset.img_prefix, folder)
            for file in sorted(list_dir_or_file(where, list_dir=False, recursive=bool(folder))):
                path = os.path.join(where, file)
                if folder and dataset.is_valid_file(file):
                    part.pairs.append((path, None))
                    part.targets.append(number)
                else:
                    yield 'passed over', path, '' if folder else 'not in the folder of a class'
    if not part.pairs:
        wanted = os.path.join(dataset.img_prefix, '<class>/<image>')
        yield 'no images', dataset.ann_file or wanted, ''


def _pairs(dataset: BaseSegDataset) -> list[tuple[str, str | None]]:
    try:
        return [(info['img_path'], info.get('seg_map_path')) for info in dataset.load_data_list()]
    except UnicodeDecodeError as error:
        raise DataError(f'{dataset.ann_file} is not a text file in UTF-8: {error}') from error


def _is_remote(dataset: BaseDataset) -> bool:
    backend = (getattr(dataset, 'backend_args', None) or {}).get('backend', 'local')
    return backend != 'local' or any('://' in (path or '') for path in
                                     (*dataset.data_prefix.values(), dataset.ann_file))


def _heads(cfg: Config) -> dict[str, dict[str, Any]]:
    """Return the number of classes and the ignored label of all heads, by their config keys.

    A classifier's head, its loss and its preprocessor each have the number.
    """
    model, path = cfg.get('model') or {}, 'model'
    while 'module' in model:  # test-time augmentation wraps it
        model, path = model['module'], f'{path}.module'
    if is_classifier(cfg):
        head = model.get('head') or {}
        heads = {'head': head, 'head.loss': head.get('loss'),
                 'data_preprocessor': model.get('data_preprocessor')}
    else:
        heads = {kind: model.get(kind) for kind in ('decode_head', 'auxiliary_head')}
    for kind, head in list(heads.items()):
        if isinstance(head, (list, tuple)):
            del heads[kind]
            heads.update({f'{kind}.{index}': one for index, one in enumerate(head)})
    return {f'{path}.{kind}': dict(num_classes=head.get('num_classes'),
                                   ignore_index=head.get('ignore_index', IGNORED))
            for kind, head in heads.items() if head}
