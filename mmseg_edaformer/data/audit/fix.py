"""Mended copies of what an audit found, beside the data and never in it."""
import io
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import ConfigError
from ...files import write_file
from ..transforms import IGNORED
from . import Audit
from .files import examine
from .rules import CHECKS, Part, judge

_LOSSLESS = {'.png': 'PNG', '.bmp': 'BMP', '.tif': 'TIFF', '.tiff': 'TIFF'}
_MENDABLE = ('image turned by EXIF', 'mask of colours', 'palette of other indices',
             'mask of 0 and 255', 'more than 8 bits')


@dataclass
class Fixed:
    """What `fix` made of one data set.

    Attributes:
        folder: Holds ``images`` and ``masks``; what needed no mending is a link there.
        mended: Files written, and what was wrong with them.
        left_out: Files of pairs that cannot be mended, and why.
        options: What makes the config read the folder, for ``--cfg-options``.
    """

    part: str
    folder: Path
    mended: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    options: list[str] = field(default_factory=list)


class _Unmendable(Exception):
    """Says why."""


def check_output(parts: Sequence[Part], out: Path) -> None:
    """See that what is written does not become part of the data.

    Raises:
        ConfigError: The folder lies within a data set, or a data set in what ``fix`` replaces.
    """
    real, fixed = out.resolve(), (out / 'fixed').resolve()
    if not fixed.is_relative_to(real):
        raise ConfigError(f'{out / "fixed"} is a link that leads out of {out}: remove it')
    for part in parts:
        folders = [part.dataset.data_prefix.get(kind) for kind in ('img_path', 'seg_map_path')]
        root = part.dataset.data_root
        if root and not Path.cwd().is_relative_to(Path(root).resolve()):
            folders.append(root)
        for folder in folders:
            if folder is None:
                continue
            if real.is_relative_to(Path(folder).resolve()):
                raise ConfigError(f'--out {out} lies within {folder or "."}, where the {part.name} '
                                  'set is: choose a folder outside of the data')
            if Path(folder).resolve().is_relative_to(fixed):
                raise ConfigError(f'the {part.name} set is in {fixed}, which this run would '
                                  'replace: choose another --out')


def fix(audit: Audit, out: Path) -> list[Fixed]:
    """Write data sets in which everything that can be mended safely is mended.

    Args:
        audit: What was found.
        out: The folder ``fixed`` in it gets a folder for each data set with something to mend.

    Returns:
        What was done for each of them; the originals are as before.

    Raises:
        ConfigError: As `check_output`, or there is something foreign where it would write.
    """
    check_output(audit.parts, out)
    done = []
    for part in audit.parts:
        if part.same_as is None and any(
                check in _MENDABLE for checks in part.verdicts.values() for check in checks):
            done.append(_fix_part(part, out / 'fixed' / part.name))
    for part in audit.parts:
        twin = next((one for one in done if one.part == part.same_as), None)
        if twin is not None:
            twin.options += _options(part, twin.folder)
    return done


def _fix_part(part: Part, folder: Path) -> Fixed:
    if folder.is_symlink() or folder.is_file() or (
            folder.is_dir() and {*os.listdir(folder)} - {'images', 'masks'}):
        raise ConfigError(f'{folder} holds what --fix did not write: move it away')
    if folder.is_dir():
        shutil.rmtree(folder)
    fixed = Fixed(part.name, folder, options=_options(part, folder))
    prefix = part.dataset.data_prefix
    for image, mask in dict.fromkeys(part.pairs):
        checks = part.verdicts[image, mask]
        targets = []
        for path, kind, name in ((image, 'img_path', 'images'), (mask, 'seg_map_path', 'masks')):
            if path is not None:
                inside = os.path.normpath(os.path.relpath(path, prefix[kind] or '.'))
                targets.append((path, folder / name / inside))
                if inside.startswith('..') or os.path.isabs(inside):
                    fixed.left_out.append((path, f'lies outside of {prefix[kind]}'))
                    break
        else:
            try:
                contents = [_mend_image(image, checks),
                            *([] if mask is None else [_mend_mask(part, mask, checks)])]
            except _Unmendable as error:
                fixed.left_out.append((image if 'image' in str(error) else mask or image,
                                       str(error)))
                continue
            for (path, target), content in zip(targets, contents):
                target.parent.mkdir(parents=True, exist_ok=True)
                if content is None:
                    _link(path, target)
                else:
                    write_file(target, content)
            wrong = _judge_again(part, [target for _, target in targets]) if any(contents) else None
            if wrong:
                for _, target in targets:
                    target.unlink()
                fixed.left_out.append((mask or image, f'still {wrong} after mending'))
                continue
            fixed.mended += [(path, ', '.join(c for c in checks if c in _MENDABLE))
                             for (path, _), content in zip(targets, contents) if content]
    return fixed


def _judge_again(part: Part, targets: list[Path]) -> str | None:
    image = examine('image', str(targets[0]))
    mask = examine('mask', str(targets[1])) if len(targets) > 1 else None
    return next((check for check, _, _ in judge(part, image, mask)
                 if CHECKS[check][0] == 'error'), None)


def _mend_image(path: str, checks: list[str]) -> bytes | None:
    """The file without the note of how the camera was held, the pixels as they are."""
    for check in ('image missing', 'image unreadable', 'sizes differ'):
        if check in checks:
            raise _Unmendable('image and mask differ in size' if check == 'sizes differ' else check)
    if 'image turned by EXIF' not in checks:
        return None
    content = Path(path).read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        if image.format in ('PNG', 'BMP', 'TIFF'):
            buffer = io.BytesIO()
            Image.fromarray(np.asarray(image.convert('RGB') if image.mode == 'P' else image)
                            ).save(buffer, image.format)
            return buffer.getvalue()
        turn = image.getexif()[0x0112]
        pixels = image.tobytes()
    for order in '<>':  # the entry of the tag in the file: number, type short, count 1, value
        old, new = (struct.pack(f'{order}HHIH', 0x0112, 3, 1, value) for value in (turn, 1))
        if content.count(old) == 1:
            content = content.replace(old, new)
            with Image.open(io.BytesIO(content)) as image:
                if image.getexif().get(0x0112) == 1 and image.tobytes() == pixels:
                    return content
    raise _Unmendable('image cannot be rid of its EXIF without loss: save it as PNG')


def _mend_mask(part: Part, path: str, checks: list[str]) -> bytes | None:
    """The mask as indices in 8 bits, as an encoded file."""
    for check in ('mask missing', 'mask unreadable', 'label out of range'):
        if check in checks:
            raise _Unmendable(check)
    if not {*checks} & {*_MENDABLE[1:]}:
        return None
    if 'mask of 0 and 255' in checks and (part.zero_is_no_label or len(part.classes) != 2):
        raise _Unmendable('mask of 0 and 255 needs two classes and reduce_zero_label=False')
    form = _LOSSLESS.get(os.path.splitext(path)[1].lower())
    if form is None:
        raise _Unmendable(f'mask cannot be saved without loss as {os.path.splitext(path)[1]}')
    with Image.open(path) as image:
        if {*checks} & {'mask of colours', 'palette of other indices'}:
            labels = _from_colours(part, image)
        else:
            labels = np.asarray(image)
    if 'mask of 0 and 255' in checks:
        labels = np.where(labels == 255, 1, labels)
    buffer = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


def _from_colours(part: Part, image: Image.Image) -> np.ndarray:
    """Labels as they are stored, from the colours of the data set."""
    if 'A' in image.mode and np.asarray(image.getchannel('A')).min() < 255:
        raise _Unmendable('mask of colours that are transparent')
    table, palette = part.table(), [tuple(c) for c in part.dataset.metainfo['palette']]
    if len({*palette}) < len(palette):
        raise _Unmendable('mask of colours, of which two classes share one')
    colours = np.asarray(image.convert('RGB'))
    labels = np.zeros(colours.shape[:2], np.uint8)
    todo = np.ones(colours.shape[:2], bool)
    for index, colour in enumerate(palette):
        stored = np.flatnonzero(table == index)
        here = (colours == colour).all(-1)
        if here.any() and not len(stored):
            raise _Unmendable(f'mask of colours: no stored label stands for {part.classes[index]}')
        if here.any():
            labels[here] = stored[0]
            todo &= ~here
    if image.mode == 'P':  # what had no label keeps none
        unlabelled = table[np.asarray(image)] == IGNORED
        labels[unlabelled & todo] = IGNORED
        todo &= ~unlabelled
    if todo.any():
        colour = colours[todo][0].tolist()
        raise _Unmendable(f'mask of colours, of which {colour} is none of a class')
    return labels


def _link(path: str, target: Path) -> None:
    if target.is_symlink():  # two names of one file; a copy would go through the link
        return
    try:
        target.symlink_to(os.path.abspath(path))
    except OSError:  # Windows, and file systems without links
        shutil.copyfile(path, target)


def _options(part: Part, folder: Path) -> list[str]:
    values = {'data_root': folder.resolve(), 'data_prefix.img_path': 'images',
              **({'data_prefix.seg_map_path': 'masks'}
                 if part.dataset.data_prefix.get('seg_map_path') is not None else {}),
              **({'ann_file': ''} if part.dataset.ann_file else {})}
    return [f'{part.key}.{name}={value}' for name, value in values.items()]
