"""Check that a data set lies where the configs look for it, with its masks converted."""
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import mmseg

from ..errors import DataError

_CONVERTERS = Path(mmseg.__file__).parent / '.mim/tools/dataset_converters'
DOWNLOADS = 'what belongs there (nothing is downloaded for you):'


class Split(NamedTuple):
    """Folders of one part of a data set, and the number of pairs if it is published."""

    name: str
    images: str
    masks: str
    official: int | None = None


class Converter(NamedTuple):
    """A script of mmseg that turns the published annotations into masks of training labels.

    Attributes:
        script: File name below mmseg's `tools/dataset_converters`.
        source: Suffix of the annotations that it reads; they lie next to the masks.
        package: Package that it imports although mmseg does not require it.
        exact: Number of annotations without which it refuses to start.
        folders: Folders, below the root, that it lists at the end and that may be absent.
    """

    script: str
    source: str
    package: str | None = None
    exact: int | None = None
    folders: tuple[str, ...] = ()


class Layout(NamedTuple):
    """Where the files of a data set lie, and where they come from.

    An image and its mask have the same name once folder and suffix are taken off.

    Attributes:
        name: Name on the command line.
        root: Folder that the configs expect.
        downloads: One line per archive: name, size, address, and what goes where below `{root}`.
        configs: Configs that train on it.
        converter: Script for the masks; None where the published ones are used as they are.
    """

    name: str
    title: str
    root: str
    image_suffix: str
    mask_suffix: str
    splits: tuple[Split, ...]
    downloads: tuple[str, ...]
    configs: tuple[str, ...]
    converter: Converter | None = None


def _ade_splits(train: int | None = None, val: int | None = None) -> tuple[Split, ...]:
    return (Split('train', 'images/training', 'annotations/training', train),
            Split('val', 'images/validation', 'annotations/validation', val))


LAYOUTS = {layout.name: layout for layout in (
    Layout(
        'ade', 'ADE20K', 'data/ade/ADEChallengeData2016', '.jpg', '.png',
        _ade_splits(20210, 2000),
        downloads=(
            'ADEChallengeData2016.zip (about 0.9 GB) from http://sceneparsing.csail.mit.edu: '
            'its folder ADEChallengeData2016 becomes {root}',),
        configs=('configs/edaformer_t_ade.py', 'configs/edaformer_b_ade.py')),
    Layout(
        'cityscapes', 'Cityscapes', 'data/cityscapes', '_leftImg8bit.png',
        '_gtFine_labelTrainIds.png',
        splits=(Split('train', 'leftImg8bit/train', 'gtFine/train', 2975),
                Split('val', 'leftImg8bit/val', 'gtFine/val', 500)),
        downloads=(
            'leftImg8bit_trainvaltest.zip (about 11 GB) from '
            'https://www.cityscapes-dataset.com/downloads (after login): '
            'its folder leftImg8bit goes into {root}',
            'gtFine_trainvaltest.zip (about 0.25 GB) from the same page: '
            'its folder gtFine goes into {root}'),
        configs=('configs/edaformer_t_cityscapes.py', 'configs/edaformer_b_cityscapes.py'),
        converter=Converter('cityscapes.py', '_gtFine_polygons.json',
                            package='cityscapesscripts', folders=('gtFine/test',))),
    Layout(
        'cocostuff', 'COCO-Stuff 164k', 'data/coco_stuff164k', '.jpg', '_labelTrainIds.png',
        splits=(Split('train', 'images/train2017', 'annotations/train2017', 118287),
                Split('val', 'images/val2017', 'annotations/val2017', 5000)),
        downloads=(
            'train2017.zip (about 18 GB) from http://images.cocodataset.org/zips/train2017.zip: '
            'its folder train2017 goes into {root}/images',
            'val2017.zip (about 1 GB) from http://images.cocodataset.org/zips/val2017.zip: '
            'its folder val2017 goes into {root}/images',
            'stuffthingmaps_trainval2017.zip (about 0.7 GB) from '
            'http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/'
            'stuffthingmaps_trainval2017.zip: '
            'its folders train2017 and val2017 go into {root}/annotations'),
        configs=('configs/edaformer_t_cocostuff.py', 'configs/edaformer_b_cocostuff.py'),
        converter=Converter('coco_stuff164k.py', '.png', exact=123287)),
    Layout(
        'synthetic', 'Synthetic scenes', 'data/synthetic', '.png', '.png',
        _ade_splits(),
        downloads=(
            'all of it, drawn by: python tools/prepare_data.py synthetic --root {root} '
            '(remove {root}/synthetic.json to draw it again)',),
        configs=('configs/edaformer_t_synthetic.py',)),
)}


def prepare(layout: Layout, root: str | Path | None = None, *, check_only: bool = False) -> None:
    """Check a data set, convert its masks where some are missing, and print what to do next.

    Args:
        layout: The data set.
        root: Folder of the data set; by default the one that the configs expect.
        check_only: Report masks that are not converted instead of converting them.

    Raises:
        DataError: The data set is not ready; says what is missing, where, and what to do.
    """
    root = Path(root or layout.root)
    print(f'{layout.title} in {root}')
    lines, annotations = _check(layout, root)
    if lines and check_only:
        raise DataError('\n  '.join([f'{layout.title} in {root} is not converted:', *lines,
                                     f'run: {_command(layout, root)}']))
    if layout.converter and lines:
        _convert(layout, layout.converter, root, annotations)
        _check(layout, root, converted=True)
    print(f'ready: use {" or ".join(layout.configs)}{options(layout.root, root)}')


def options(default: str, root: Path) -> str:
    """Return what must follow the name of a config whose data is not in its default folder."""
    if root.resolve() == Path(default).resolve():
        return ''
    place = str(root.absolute())
    if not fits_options(root):
        return (f' after: ln -s {shlex.quote(place)} {default}\n'
                '  (--cfg-options cannot carry this path)')
    return '\n  with --cfg-options ' + ' '.join(
        f'{split}_dataloader.dataset.data_root={shlex.quote(place)}'
        for split in ('train', 'val', 'test'))


def fits_options(path: Path) -> bool:
    """Return whether --cfg-options can carry a path: mmengine drops spaces and reads lists."""
    return not set(str(path.absolute())) & set(' ,()[]\'"')


def _check(layout: Layout, root: Path, *, converted: bool = False) -> tuple[list[str], int]:
    """Print what is there; return a line for each split to convert, and the annotations' number."""
    problems, to_convert, annotations = [], [], 0
    for split in layout.splits:
        images = _names(root / split.images, layout.image_suffix)
        masks = whole = _names(root / split.masks, layout.mask_suffix)
        sources: set[str] = set()
        end = layout.mask_suffix
        if layout.converter:
            end = layout.converter.source
            whole = {name for name in masks
                     if _is_whole(root / split.masks / (name + layout.mask_suffix))}
            # COCO-Stuff: the masks end like the annotations they were made from.
            sources = {name for name in _names(root / split.masks, end)
                       if not (name + end).endswith(layout.mask_suffix)}
            annotations += len(sources)
        waiting = (images - whole) & sources
        print(f'  {split.name}: {len(images):,} images, {len(masks):,} masks'
              f'{f", {len(waiting):,} to convert" if waiting else ""}')
        if images and split.official not in (None, len(images)):
            print(f'  warning: {split.name} has officially {split.official:,} images')
        if not images:
            problems.append(f'{split.name}: no *{layout.image_suffix} in {split.images}')
        if not masks | sources:
            problems.append(f'{split.name}: no *{end} in {split.masks}')
        if images and masks | sources:
            problems += _some(split, images - whole - sources, 'without a complete mask',
                              split.images, layout.image_suffix)
            problems += _some(split, masks - images, 'without an image', split.masks,
                              layout.mask_suffix)
        to_convert += _some(split, waiting, 'not converted', split.masks, layout.mask_suffix)
    if converted:
        problems += to_convert
    if problems:
        heading = f'{layout.title} in {root} is not complete:'
        raise DataError('\n  '.join([heading, *problems]) + '\n' + _downloads(layout, root))
    return to_convert, annotations


def _convert(layout: Layout, converter: Converter, root: Path, annotations: int) -> None:
    """Run mmseg's converter, which makes all masks again and writes next to the annotations."""
    script = _CONVERTERS / converter.script
    if not script.is_file():
        raise DataError(f'mmseg has no converter {script}: install mmsegmentation 1.x from PyPI, '
                        'whose wheel has it')
    if converter.package and not find_spec(converter.package):
        raise DataError(f'converting {layout.title} needs the package {converter.package}, which '
                        f'is not installed: pip install {converter.package}')
    if converter.exact not in (None, annotations):
        folders = ', '.join(split.masks for split in layout.splits)
        raise DataError(
            f'mmseg converts {layout.title} only as a whole, from {converter.exact:,} files '
            f'*{converter.source}; {folders} below {root} hold {annotations:,}. Unpack '
            f'all of them; to use fewer, remove images and *{layout.mask_suffix} after the '
            'conversion.\n'
            f'{_downloads(layout, root)}')
    for folder in converter.folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    nproc = min(16, os.cpu_count() or 1)
    print(f'converting with {script.name} of mmseg, {nproc} at a time', flush=True)
    command = [sys.executable, str(script), str(root), '--nproc', str(nproc)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise DataError(f'{script.name} of mmseg stopped with exit code {done.returncode}; its own '
                        f'message is above. Fix that, then run: {_command(layout, root)}')


def _downloads(layout: Layout, root: Path) -> str:
    return '\n  '.join([DOWNLOADS, *(line.format(root=root) for line in layout.downloads)])


def _command(layout: Layout, root: Path) -> str:
    is_default = root.resolve() == Path(layout.root).resolve()
    place = '' if is_default else f' --root {shlex.quote(str(root))}'
    return f'python tools/prepare_data.py {layout.name}{place}'


def _names(folder: Path, suffix: str) -> set[str]:
    """Return the files below a folder that end in a suffix, without it; no hidden ones."""
    names: set[str] = set()
    for place, _, files in os.walk(folder, followlinks=True):
        inside = Path(place).relative_to(folder).as_posix()
        before = '' if inside == '.' else f'{inside}/'
        names.update(before + file.removesuffix(suffix) for file in files
                     if file.endswith(suffix) and not file.startswith('.'))
    return names


def _is_whole(png: Path) -> bool:
    with png.open('rb') as file:
        file.seek(max(0, png.stat().st_size - 8))
        return file.read() == b'IEND\xaeB`\x82'


def _some(split: Split, names: set[str], lack: str, folder: str, suffix: str) -> list[str]:
    """Return one line that names a few of the files, none if there are no files."""
    shown = ', '.join(f'{folder}/{name}{suffix}' for name in sorted(names)[:3])
    more = f' and {len(names) - 3:,} more' if len(names) > 3 else ''
    return [f'{split.name}: {len(names):,} {lack}: {shown}{more}'] if names else []
