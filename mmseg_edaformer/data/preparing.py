"""Make sure that a data set lies where the configs look for it, with its masks converted."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mmseg_edaformer.errors import DataError

PNG_END = b'IEND\xaeB`\x82'
SHOWN = 3


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        images: Folder of the images, below the root.
        masks: Folder of the masks, below the root.
        official: How many pairs the published data set has; None where nothing is published.
    """

    name: str
    images: str
    masks: str
    official: int | None = None


@dataclass(frozen=True)
class Converter:
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


@dataclass(frozen=True)
class Layout:
    """Where the files of a data set lie, and where they come from.

    An image and its mask have the same name once folder and suffix are taken off.

    Attributes:
        name: Word for it on the command line.
        root: Folder that the configs expect.
        downloads: One line per archive: name, size, address, and what goes where below `{root}`.
        configs: Configs that train on it.
        converter: None where the published masks are used as they are.
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


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name='ade',
            title='ADE20K',
            root='data/ade/ADEChallengeData2016',
            image_suffix='.jpg',
            mask_suffix='.png',
            splits=(
                Split('train', 'images/training', 'annotations/training', 20210),
                Split('val', 'images/validation', 'annotations/validation', 2000),
            ),
            downloads=(
                'ADEChallengeData2016.zip (about 0.9 GB) from http://sceneparsing.csail.mit.edu: '
                'its folder ADEChallengeData2016 becomes {root}',
            ),
            configs=('configs/edaformer_t_ade.py', 'configs/edaformer_b_ade.py'),
        ),
        Layout(
            name='cityscapes',
            title='Cityscapes',
            root='data/cityscapes',
            image_suffix='_leftImg8bit.png',
            mask_suffix='_gtFine_labelTrainIds.png',
            splits=(
                Split('train', 'leftImg8bit/train', 'gtFine/train', 2975),
                Split('val', 'leftImg8bit/val', 'gtFine/val', 500),
            ),
            downloads=(
                'leftImg8bit_trainvaltest.zip (about 11 GB) from '
                'https://www.cityscapes-dataset.com/downloads (after login): '
                'its folder leftImg8bit goes into {root}',
                'gtFine_trainvaltest.zip (about 0.25 GB) from the same page: '
                'its folder gtFine goes into {root}',
            ),
            configs=('configs/edaformer_t_cityscapes.py', 'configs/edaformer_b_cityscapes.py'),
            converter=Converter(
                script='cityscapes.py',
                source='_gtFine_polygons.json',
                package='cityscapesscripts',
                folders=('gtFine/test',),
            ),
        ),
        Layout(
            name='cocostuff',
            title='COCO-Stuff 164k',
            root='data/coco_stuff164k',
            image_suffix='.jpg',
            mask_suffix='_labelTrainIds.png',
            splits=(
                Split('train', 'images/train2017', 'annotations/train2017', 118287),
                Split('val', 'images/val2017', 'annotations/val2017', 5000),
            ),
            downloads=(
                'train2017.zip (about 18 GB) from '
                'http://images.cocodataset.org/zips/train2017.zip: '
                'its folder train2017 goes into {root}/images',
                'val2017.zip (about 1 GB) from '
                'http://images.cocodataset.org/zips/val2017.zip: '
                'its folder val2017 goes into {root}/images',
                'stuffthingmaps_trainval2017.zip (about 0.7 GB) from '
                'http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/'
                'stuffthingmaps_trainval2017.zip: '
                'its folders train2017 and val2017 go into {root}/annotations',
            ),
            configs=('configs/edaformer_t_cocostuff.py', 'configs/edaformer_b_cocostuff.py'),
            converter=Converter(script='coco_stuff164k.py', source='.png', exact=123287),
        ),
        Layout(
            name='synthetic',
            title='Synthetic scenes',
            root='data/synthetic',
            image_suffix='.png',
            mask_suffix='.png',
            splits=(
                Split('train', 'images/training', 'annotations/training'),
                Split('val', 'images/validation', 'annotations/validation'),
            ),
            downloads=(
                'all of it, drawn by: python tools/prepare_data.py synthetic --root {root} '
                '(what was drawn once is drawn again after {root}/synthetic.json is removed)',
            ),
            configs=('configs/edaformer_t_synthetic.py',),
        ),
    )
}


@dataclass(frozen=True)
class Found:
    """The files of one split that are on disk, by name without folder and suffix.

    Attributes:
        cut: Those of the masks whose end is missing, because a conversion was interrupted.
        sources: Annotations from which masks can be made.
    """

    split: Split
    images: set[str]
    masks: set[str]
    cut: set[str]
    sources: set[str]

    @property
    def bare(self) -> set[str]:
        """Images without a usable mask."""
        return self.images - (self.masks - self.cut)

    @property
    def waiting(self) -> set[str]:
        """Images whose mask the converter can make."""
        return self.bare & self.sources


def survey(layout: Layout, root: Path) -> list[Found]:
    """List what a data set has on disk, one entry per split; absent folders count as empty."""
    found = []
    for split in layout.splits:
        folder = root / split.masks
        masks = _names(folder, layout.mask_suffix)
        cut: set[str] = set()
        sources: set[str] = set()
        if layout.converter:
            end = layout.converter.source
            cut = {name for name in masks if not _is_whole(folder / (name + layout.mask_suffix))}
            # COCO-Stuff: the masks end like the annotations they were made from.
            sources = {
                name
                for name in _names(folder, end)
                if not (name + end).endswith(layout.mask_suffix)
            }
        images = _names(root / split.images, layout.image_suffix)
        found.append(Found(split, images, masks, cut, sources))
    return found


def problems(layout: Layout, found: Sequence[Found]) -> list[str]:
    """Say what a conversion cannot mend: empty folders, and files without their partner.

    Returns:
        One line per problem, none for a sound data set.
    """
    lines = []
    for one in found:
        split = one.split
        if not one.images:
            lines.append(f'{split.name}: no *{layout.image_suffix} in {split.images}')
        if not one.masks | one.sources:
            suffix = layout.converter.source if layout.converter else layout.mask_suffix
            lines.append(f'{split.name}: no *{suffix} in {split.masks}')
        if not one.images or not one.masks | one.sources:
            continue
        for names, what, folder, suffix in (
            (one.bare - one.waiting, 'without a complete mask', split.images, layout.image_suffix),
            (one.masks - one.images, 'without an image', split.masks, layout.mask_suffix),
        ):
            if names:
                lines.append(f'{split.name}: {len(names):,} {what}: {_some(names, folder, suffix)}')
    return lines


def unconverted(layout: Layout, found: Sequence[Found]) -> list[str]:
    """Say which masks the converter has still to make, one line per split that lacks any."""
    return [
        f'{one.split.name}: {len(one.waiting):,} not converted: '
        f'{_some(one.waiting, one.split.masks, layout.mask_suffix)}'
        for one in found
        if one.waiting
    ]


def convert(layout: Layout, converter: Converter, root: Path, found: Sequence[Found]) -> None:
    """Run mmseg's converter, which makes all masks anew and writes next to the annotations.

    Raises:
        DataError: The converter, a package or an annotation that it needs is missing, or it failed.
    """
    spec = find_spec('mmseg')
    folders = (spec and spec.submodule_search_locations) or []
    scripts = [Path(at, '.mim/tools/dataset_converters', converter.script) for at in folders]
    script = next((path for path in scripts if path.is_file()), None)
    if not script:
        raise DataError(
            f'mmseg has no converter {converter.script} (looked for: '
            f'{", ".join(map(str, scripts)) or "the package mmseg"}). '
            'Install mmsegmentation 1.x from PyPI; the wheel has it.'
        )
    if converter.package and not find_spec(converter.package):
        raise DataError(
            f'converting {layout.title} needs the package {converter.package}, '
            f'which is not installed: pip install {converter.package}'
        )
    total = sum(len(one.sources) for one in found)
    if converter.exact not in (None, total):
        raise DataError(
            f'mmseg converts {layout.title} only as a whole, from {converter.exact:,} files '
            f'*{converter.source}; {", ".join(one.split.masks for one in found)} below {root} '
            f'hold {total:,}. Unpack all of them; to use fewer, remove images and '
            f'*{layout.mask_suffix} after the conversion.\n{_downloads(layout, root)}'
        )
    for folder in converter.folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    nproc = min(16, os.cpu_count() or 1)
    print(f'converting with {script.name} of mmseg, {nproc} at a time', flush=True)
    command = [sys.executable, str(script), str(root), '--nproc', str(nproc)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise DataError(
            f'{script.name} of mmseg stopped with exit code {done.returncode}; its own message is '
            f'above. Mend that, then run: {_command(layout, root)}'
        )


def prepare(layout: Layout, root: str | Path | None = None, *, check_only: bool = False) -> None:
    """Check a data set, convert its masks where some are missing, and say what to do next.

    The counts and the next step are printed.

    Args:
        root: Folder of the data set; by default the one that the configs expect.
        check_only: Report masks that are not converted instead of converting them.

    Raises:
        DataError: The data set is not ready; says what is missing, where, and what to do.
    """
    root = Path(root or layout.root)
    print(f'{layout.title} in {root}')
    found = survey(layout, root)
    _refuse(layout, root, problems(layout, found), found)
    lines = unconverted(layout, found)
    if lines and check_only:
        heading = f'{layout.title} in {root} is not converted:'
        raise DataError('\n  '.join([heading, *lines, f'run: {_command(layout, root)}']))
    if layout.converter and lines:
        convert(layout, layout.converter, root, found)
        found = survey(layout, root)
        _refuse(layout, root, problems(layout, found) + unconverted(layout, found), found)
    print(f'ready: use {" or ".join(layout.configs)}{_options(layout, root)}')


def _refuse(layout: Layout, root: Path, lines: Sequence[str], found: Sequence[Found]) -> None:
    """Print the counts, then raise if there is a line to complain about."""
    for one in found:
        count = f'  {one.split.name}: {len(one.images):,} images, {len(one.masks):,} masks'
        print(count + (f', {len(one.waiting):,} to convert' if one.waiting else ''))
        if one.images and one.split.official not in (None, len(one.images)):
            print(f'  warning: {one.split.name} has officially {one.split.official:,} images')
    if lines:
        heading = f'{layout.title} in {root} is not complete:'
        raise DataError('\n  '.join([heading, *lines]) + '\n' + _downloads(layout, root))


def _downloads(layout: Layout, root: Path) -> str:
    heading = 'what belongs there (nothing is downloaded for you):'
    return '\n  '.join([heading, *(line.format(root=root) for line in layout.downloads)])


def _is_default(layout: Layout, root: Path) -> bool:
    return root.resolve() == Path(layout.root).resolve()


def _command(layout: Layout, root: Path) -> str:
    place = '' if _is_default(layout, root) else f' --root {shlex.quote(str(root))}'
    return f'python tools/prepare_data.py {layout.name}{place}'


def _options(layout: Layout, root: Path) -> str:
    """Return what must follow a config for a root that is not the configs' own."""
    if _is_default(layout, root):
        return ''
    place = str(root.absolute())
    # mmengine drops spaces from the values of --cfg-options and reads lists into the others.
    if set(place) & set(' ,()[]\'"'):
        return (
            f' after: ln -s {shlex.quote(place)} {layout.root}\n'
            f'  (--cfg-options cannot carry this path)'
        )
    keys = (f'{part}_dataloader.dataset.data_root' for part in ('train', 'val', 'test'))
    return '\n  with --cfg-options ' + ' '.join(f'{key}={shlex.quote(place)}' for key in keys)


def _names(folder: Path, suffix: str) -> set[str]:
    """Return the files below a folder that end in a suffix, without it, hidden ones left out."""
    names: set[str] = set()
    for place, _, files in os.walk(folder, followlinks=True):
        inside = Path(place).relative_to(folder).as_posix()
        before = '' if inside == '.' else f'{inside}/'
        names.update(
            before + file.removesuffix(suffix)
            for file in files
            if file.endswith(suffix) and not file.startswith('.')
        )
    return names


def _is_whole(png: Path) -> bool:
    with png.open('rb') as file:
        file.seek(max(0, png.stat().st_size - len(PNG_END)))
        return file.read() == PNG_END


def _some(names: set[str], folder: str, suffix: str) -> str:
    shown = ', '.join(f'{folder}/{name}{suffix}' for name in sorted(names)[:SHOWN])
    return shown + (f' and {len(names) - SHOWN:,} more' if len(names) > SHOWN else '')
