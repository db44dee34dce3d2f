"""Fixed copies of the files of an audit, beside the data and never in it."""
import io
import os
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import ConfigError
from ...files import write_file
from ..transforms import IGNORED, ORIENTATION
from . import Audit
from .files import examine
from .rules import CHECKS, Part, judge

_LOSSLESS = {'.png': 'PNG', '.bmp': 'BMP', '.tif': 'TIFF', '.tiff': 'TIFF'}
_OF_IMAGE = 'image turned by EXIF'
_OF_MASK = {'mask of colours', 'palette of other indices', 'mask of 0 and 255', 'more than 8 bits'}
_FIXABLE = {*_OF_MASK, _OF_IMAGE}


@dataclass
class Fixed:
    """Result of `fix` for one data set.

    Attributes:
        folder: Folder with ``images`` and ``masks``; sound files are links there.
        options: Settings for ``--cfg-options`` that make the config read the folder.
        files: Files that were written, and what was wrong with them.
        left_out: Files of pairs that cannot be fixed, and why.
    """

    part: str
    folder: Path
    options: list[str]
    files: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


class _NotFixableError(Exception):
    """A file, and the reason why it cannot be fixed."""


def fix(audit: Audit, out: Path) -> list[Fixed]:
    """Write data sets in which everything that can be fixed safely is fixed.

    Args:
        audit: What was found, with the same ``out``.
        out: Folder whose subfolder ``fixed`` gets a folder for each data set that is fixed.

    Returns:
        What was done for each of them; the originals are as before.

    Raises:
        ConfigError: There is something foreign where it would write.
    """
    done = []
    for part in audit.parts:
        if not any({*checks} & _FIXABLE for checks in part.verdicts.values()):
            continue
        folder = out / 'fixed' / part.name
        if folder.is_symlink() or folder.is_file() or (
                folder.is_dir() and {*os.listdir(folder)} - {'images', 'masks'}):
            raise ConfigError(f'{folder} holds what --fix did not write: move it away')
        if folder.is_dir():
            shutil.rmtree(folder)
        fixed = Fixed(part.name, folder, _options(part, folder))
        for image, mask in dict.fromkeys(part.pairs):
            try:
                fixed.files += _fix_pair(part, image, mask, folder)
            except _NotFixableError as error:
                fixed.left_out.append(error.args)  # type: ignore[arg-type]
        done.append(fixed)
    return done


def _fix_pair(part: Part, image: str, mask: str | None, folder: Path) -> list[tuple[str, str]]:
    """Write or link a pair; the files that were written, and what was wrong with them."""
    checks = part.verdicts[image, mask]
    for check in checks:
        if CHECKS[check][0] == 'error' and check not in _FIXABLE:
            of_image = check.startswith('image') or check == 'sizes differ' or mask is None
            raise _NotFixableError(image if of_image else mask, check)
    files = []
    for path, kind, name, repair in ((image, 'img_path', 'images', _fix_image),
                                     (mask, 'seg_map_path', 'masks', _fix_mask)):
        if path is not None:
            source = part.dataset.data_prefix[kind] or '.'
            inside = os.path.normpath(os.path.relpath(path, source))
            if inside.startswith('..') or os.path.isabs(inside):
                raise _NotFixableError(path, f'lies outside of {source}')
            files.append((path, folder / name / inside, repair(part, path, checks)))
    new = [target for _, target, _ in files if not os.path.lexists(target)]
    for path, target, content in files:
        target.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            write_file(target, content)
        elif not target.is_symlink():  # two names of one file; a copy would go through the link
            try:
                target.symlink_to(os.path.abspath(path))
            except OSError:  # Windows, and file systems without links
                shutil.copyfile(path, target)
    if any(content for _, _, content in files):
        _check_pair(part, [(path, str(target)) for path, target, _ in files], new)
    wrong = ', '.join(check for check in checks if check in _FIXABLE)
    return [(path, wrong) for path, _, content in files if content]


def _check_pair(part: Part, files: list[tuple[str, str]], new: list[Path]) -> None:
    """Remove the ``new`` files of a pair, each with its source, that still fails a check."""
    kinds = [*zip(('image', 'mask'), (target for _, target in files))]
    mask = kinds[1][1] if len(kinds) > 1 else None
    found = judge(part, kinds[0][1], mask, {file: examine(*file) for file in kinds})
    wrong = next((check for check, _, _ in found if CHECKS[check][0] == 'error'), None)
    if wrong:
        for target in new:
            os.remove(target)
        raise _NotFixableError(files[-1][0], f'still {wrong} after fixing')


def _fix_image(part: Part, path: str, checks: list[str]) -> bytes | None:
    """Return the file without its EXIF orientation, the pixels as they are."""
    if _OF_IMAGE not in checks:
        return None
    content = Path(path).read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        if image.format in ('PNG', 'BMP', 'TIFF'):
            buffer = io.BytesIO()
            Image.fromarray(np.asarray(image.convert('RGB') if image.mode == 'P' else image)
                            ).save(buffer, image.format)
            return buffer.getvalue()
        orientation = image.getexif()[ORIENTATION]
        pixels = image.tobytes()
    for order in '<>':  # the entry of the tag in the file: number, type short, count 1, value
        old, new = (struct.pack(f'{order}HHIH', ORIENTATION, 3, 1, value)
                    for value in (orientation, 1))
        if content.count(old) == 1:
            content = content.replace(old, new)
            with Image.open(io.BytesIO(content)) as image:
                if image.getexif().get(ORIENTATION) == 1 and image.tobytes() == pixels:
                    return content
    raise _NotFixableError(path, 'EXIF cannot be removed without loss: save the image as PNG')


def _fix_mask(part: Part, path: str, checks: list[str]) -> bytes | None:
    """Return the mask as an encoded file of indices in 8 bits."""
    if not {*checks} & _OF_MASK:
        return None
    if 'mask of 0 and 255' in checks and (part.zero_is_no_label or len(part.classes) != 2):
        raise _NotFixableError(path, '0 and 255 need two classes and reduce_zero_label=False')
    suffix = os.path.splitext(path)[1]
    if suffix.lower() not in _LOSSLESS:
        raise _NotFixableError(path, f'a mask cannot be saved without loss as {suffix}')
    with Image.open(path) as image:
        labels = (_from_colours(part, path, image)
                  if {*checks} & {'mask of colours', 'palette of other indices'} else
                  np.asarray(image))
    if 'mask of 0 and 255' in checks:
        labels = np.where(labels == 255, 1, labels)
    buffer = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8)).save(buffer, _LOSSLESS[suffix.lower()])
    return buffer.getvalue()


def _from_colours(part: Part, path: str, image: Image.Image) -> np.ndarray:
    """Return the labels as they are stored, from the colours of the data set."""
    if 'A' in image.mode and np.asarray(image.getchannel('A')).min() < 255:
        raise _NotFixableError(path, 'its colours are transparent')
    table, palette = part.table, [tuple(c) for c in part.dataset.metainfo['palette']]
    if len({*palette}) < len(palette):
        raise _NotFixableError(path, 'two classes share a colour')
    colours = np.asarray(image.convert('RGB'))
    labels = np.zeros(colours.shape[:2], np.uint8)
    todo = np.ones(colours.shape[:2], bool)
    for index, colour in enumerate(palette):
        stored = np.flatnonzero(table == index)
        here = (colours == colour).all(-1)
        if here.any() and not len(stored):
            raise _NotFixableError(path, f'no stored label stands for {part.classes[index]}')
        if here.any():
            labels[here] = stored[0]
            todo &= ~here
    if image.mode == 'P':  # what had no label keeps none
        unlabelled = table[np.asarray(image)] == IGNORED
        labels[unlabelled & todo] = IGNORED
        todo &= ~unlabelled
    if todo.any():
        raise _NotFixableError(path, f'the colour {colours[todo][0].tolist()} belongs to no class')
    return labels


def _options(part: Part, folder: Path) -> list[str]:
    values = {'data_root': folder.resolve(), 'data_prefix.img_path': 'images'}
    if part.dataset.data_prefix.get('seg_map_path') is not None:
        values['data_prefix.seg_map_path'] = 'masks'
    if part.dataset.ann_file:
        values['ann_file'] = ''
    return [f'{key}.{name}={value}' for key in part.keys for name, value in values.items()]
