"""Images of a classification data set in a few large files instead of a million small ones.

On network file systems opening a file costs more than reading a photograph. `write_shards` packs
folders into tar files as WebDataset has them, and notes in an index where each image lies;
`ShardedImages` reads any of them by one read at a known place of an open file. The images keep the
order and the numbers that mmpretrain gives them in folders, so that a run draws the same from both
and resumes exactly, from either.
"""
import errno
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.fileio import BaseStorageBackend, register_backend
from mmengine.registry import DATASETS

from ..errors import DataError
from ..files import remove_partial_files, replacing
from .transforms import MAX_PIXELS, read_picture

SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')
"""What mmpretrain takes for images, in either case."""

INDEX = 'index.npz'
IMAGES = 10_000
"""Images of a shard, about 1 GB of ImageNet's."""

_VERSION = 1
_ROW = np.dtype([('shard', '<u4'), ('label', '<u4'), ('offset', '<u8'), ('length', '<u8'),
                 ('crc', '<u4'), ('name', '<u8'), ('chars', '<u4')])
_PLACE = re.compile(r'shards://(.+?\.tar)#(\d+)\+(\d+)\+([0-9a-f]{8})/.+', re.DOTALL)
_OPEN = 256  # shards that a process holds open; 1,024 files is a common limit
_READERS = 16  # threads: what opening files on a network costs is waiting
_BATCH = 256
_AGAIN = 'copy the shards again, or remove them and run tools/prepare_data.py shards'

_Advance = Callable[[int, int], None]
_File = tuple[str, str, int]  # path below the folder of the classes, name in a shard, class


def class_folders(root: str | Path) -> list[str]:
    """The folders of a split, in the order that numbers the classes."""
    if not os.path.isdir(root):
        return []
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())


@dataclass(frozen=True)
class ShardIndex(Sequence[dict[str, Any]]):
    """Where the images of a split lie: 40 bytes for each, and its name.

    As a sequence it holds what mmengine's data sets know of an image, made when asked for: the
    arrays are shared by forked workers.

    Attributes:
        folder: Absolute path of the folder of the shards.
        classes: Names of the classes in the order of their numbers.
        sizes: Bytes of each shard.
        made: How the images were spread over the shards: ``seed`` and ``images`` of each shard.
        rows: One record per image: ``shard``, ``label``, ``offset`` and ``length`` in bytes,
            ``crc`` (CRC32), and ``name`` and ``chars``: start and length in ``names``.
        names: All names below the folder of their class, as bytes.
    """

    folder: str
    classes: list[str]
    sizes: list[int]
    made: dict[str, int]
    rows: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index])
        shard, label, offset, length, crc, start, chars = self.rows[index].item()
        name = os.fsdecode(self.names[start:start + chars].tobytes())
        return dict(img_path=f'shards://{self.folder}/{_shard(shard)}#{offset}+{length}+{crc:08x}/'
                             f'{self.classes[label]}/{name}', gt_label=label)


def read_index(folder: str | Path) -> ShardIndex:
    """Read the index of a split and see that its shards are there, as long as they were made.

    Raises:
        DataError: The index or a shard is missing, cut or not what it was.
    """
    folder = os.path.abspath(folder)
    path = os.path.join(folder, INDEX)
    if not os.path.isfile(path):
        raise DataError(f'{folder} holds no shards, there is no {INDEX} in it, which is written '
                        'last: make them with tools/prepare_data.py shards (again, if it was '
                        'interrupted), or correct data_root and data_prefix')
    try:
        with np.load(path, allow_pickle=False) as content:
            about = json.loads(content['about'].tobytes())
            rows, names = content['rows'], content['names']
        version = about.pop('version')
        index = ShardIndex(folder, rows=rows, names=names, **about)
        sound = version == _VERSION and _is_sound(index)
    except Exception as error:  # damaged files raise anything
        raise DataError(f'{path} is damaged ({error}): {_AGAIN}') from error
    if not sound:
        raise DataError(f'{path} is damaged, or of another version of this package: {_AGAIN}')
    missing, changed = [], []
    for number, size in enumerate(index.sizes):
        shard = os.path.join(folder, _shard(number))
        if not os.path.isfile(shard):
            missing.append(_shard(number))
        elif os.path.getsize(shard) != size:
            changed.append(f'{_shard(number)} with {os.path.getsize(shard):,} bytes instead of '
                           f'{size:,}')
    for wrong, what in ((missing, 'missing'), (changed, 'cut or replaced')):
        if wrong:
            raise DataError(f'{len(wrong)} of {len(index.sizes)} shards in {folder} '
                            f'{"are" if len(wrong) > 1 else "is"} {what}, such as {wrong[0]}: '
                            f'{_AGAIN}')
    return index


def _is_sound(index: ShardIndex) -> bool:
    """Whether all that an index says lies within the shards, the classes and the names."""
    rows, sizes = index.rows, np.array(index.sizes, np.uint64)
    if rows.dtype != _ROW or rows.ndim != 1 or not len(rows) or index.names.dtype != np.uint8 or (
            rows['shard'].max() >= len(sizes) or rows['label'].max() >= len(index.classes)):
        return False
    ends, total = sizes[rows['shard']], len(index.names)
    return bool((rows['offset'] <= ends).all() and (rows['length'] <= ends - rows['offset']).all()
                and (rows['name'] <= total).all() and (rows['chars'] <= total - rows['name']).all())


@DATASETS.register_module()
class ShardedImages(BaseDataset):
    """The images of shards, in the order and with the numbers that folders give them.

    It stands in mmengine's registry, so that any config finds it, and needs no mmpretrain itself.

    Args:
        data_root: Folder of the splits.
        data_prefix: Folder of the shards below it, such as ``train``.
        metainfo: See mmengine's BaseDataset; ``classes`` are those of the index otherwise.
        indices: Only so many of the images, or these.
        pipeline: Transforms; they read ``img_path`` through mmengine's fileio.
        test_mode: See mmengine's BaseDataset, like the rest.

    Raises:
        DataError: See `read_index`.
    """

    def __init__(self, data_root: str = '', data_prefix: str | dict[str, str] = '',
                 metainfo: dict[str, Any] | None = None,
                 indices: int | Sequence[int] | None = None, pipeline: Sequence[Any] = (),
                 test_mode: bool = False, lazy_init: bool = False,
                 max_refetch: int = 1000) -> None:
        prefix = dict(img_path=data_prefix) if isinstance(data_prefix, str) else data_prefix
        # The index is small as it is.
        super().__init__(metainfo=metainfo, data_root=data_root, data_prefix=prefix,
                         indices=indices, serialize_data=False, pipeline=list(pipeline),
                         test_mode=test_mode, lazy_init=lazy_init, max_refetch=max_refetch)

    def load_data_list(self) -> ShardIndex:  # type: ignore[override]
        """Read and check the index."""
        index = read_index(self.data_prefix['img_path'])
        self._metainfo.setdefault('classes', tuple(index.classes))
        return index

    @property
    def CLASSES(self) -> tuple[str, ...] | None:
        """Names of the classes; mmpretrain's hooks ask for it."""
        return self._metainfo.get('classes')

    def get_cat_ids(self, idx: int) -> list[int]:
        """The class of an image; ClassBalancedDataset asks for it."""
        return [self.get_data_info(idx)['gt_label']]


class _Shard:
    """An open file. Reads at a place move nothing, so forked processes and threads can share it."""

    def __init__(self, path: str) -> None:
        self.handle = os.open(path, os.O_RDONLY | getattr(os, 'O_CLOEXEC', 0))

    def __del__(self) -> None:
        if hasattr(self, 'handle'):
            os.close(self.handle)

    def read(self, offset: int, length: int) -> bytes:
        """Read as much as there is, in one call but for what a network may cut short."""
        content = os.pread(self.handle, length, offset)
        while len(content) < length:
            more = os.pread(self.handle, length - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content


_open = lru_cache(_OPEN)(_Shard)


@register_backend('shards', prefixes='shards')
class ShardBackend(BaseStorageBackend):
    """Reads ``shards://<path>.tar#<offset>+<length>+<CRC32>/<name>`` for mmengine's fileio.

    The name is for people: what is read is so many bytes at that place of the file.

    Raises:
        DataError: The address means nothing, the image is too large, the file ends before it, or
            its bytes are not those that were packed.
        OSError: As from any read.
    """

    def get(self, filepath: str) -> bytes:
        """The bytes of an image as they were in its file."""
        place = _PLACE.fullmatch(str(filepath))
        if place is None:
            raise DataError(f'{filepath} is no place in a shard')
        path, offset, length = place[1], int(place[2]), int(place[3])
        if length > 4 * MAX_PIXELS:
            raise DataError(f'image {filepath} has {length} bytes, too many for {MAX_PIXELS} '
                            'pixels: replace it or remove it, and make the shards again')
        content = _open(path).read(offset, length)
        if len(content) < length:
            raise DataError(f'image cannot be read: {filepath}: the shard ends before it does: '
                            f'{_AGAIN}')
        if zlib.crc32(content) != int(place[4], 16):
            raise DataError(f'image cannot be read: {filepath}: its bytes are not those that were '
                            f'packed (CRC32), the shard is damaged or was replaced: {_AGAIN}')
        return content

    def get_text(self, filepath: str, encoding: str = 'utf-8') -> str:
        """The same as text."""
        return self.get(filepath).decode(encoding)


def write_shards(source: str | Path, target: str | Path, *, images: int = IMAGES, seed: int = 0,
                 advance: _Advance = lambda done, total: None) -> ShardIndex:
    """Pack one folder per class into shards that mix the classes, and write their index.

    Each image becomes ``<class>/<name>.<suffix>``, with its bytes as they are, and
    ``<class>/<name>.cls``, the number of its class; dots within a name become ``_``, since
    WebDataset ends a name at the first. Shards that an interrupted call has finished are kept,
    after a look at the names, sizes and times of their images. The index is written last.

    Args:
        source: Holds the folders of the classes; nothing in it is changed.
        target: Folder of the shards; it is made if missing, and must hold nothing else.
        images: So many in each shard but the last.
        seed: Chooses which ones.
        advance: Called now and then with the numbers of images done since and of all.

    Raises:
        DataError: There are no images, an image cannot be read, there is no room, or the target
            holds something else.
    """
    if images < 1 or seed < 0:
        raise DataError(f'images={images}, seed={seed}: ask for at least one image per shard and a '
                        'seed of 0 or more')
    folder, target = Path(source), Path(target)
    classes, files = _list(folder)
    rows = np.zeros(len(files), _ROW)
    rows['label'] = [label for _, _, label in files]
    names = [os.fsencode(name.partition('/')[2]) for _, name, _ in files]
    rows['chars'] = [len(name) for name in names]
    rows['name'][1:] = np.cumsum(rows['chars'].astype(np.uint64))[:-1]
    blob = np.frombuffer(b''.join(names), np.uint8)
    made = dict(seed=seed, images=images)
    parts = np.split(np.random.default_rng(seed).permutation(len(files)),
                     range(images, len(files), images))
    other = DataError(f'{target} holds other shards than those asked for (other images, number per '
                      'shard or seed): remove it, or choose another folder')
    if (target / INDEX).is_file():
        index = read_index(target)
        if (index.made, index.classes) != (made, classes) or not (
                np.array_equal(index.names, blob) and
                np.array_equal(index.rows[['label', 'name', 'chars']],
                               rows[['label', 'name', 'chars']])):
            raise other
        return index
    remove_partial_files(target)
    expected = {_shard(number) for number in range(len(parts))}
    left = sorted({path.name for path in target.iterdir()} - expected) if target.is_dir() else []
    if left:
        raise DataError(f'{target} holds {", ".join(left[:3])}: remove it, or choose another '
                        'folder')
    sizes: list[int] = []
    try:
        for number, part in enumerate(parts):
            path, chosen = target / _shard(number), [files[place] for place in part]
            resumed = path.exists()
            if not resumed:
                _write(path, folder, chosen, lambda done: advance(done, len(files)))
            found = _scan(path)
            if [(name, label) for name, label, *_ in found] != [each[1:] for each in chosen] or (
                    resumed and [each[2:4] for each in found] != _states(folder, chosen)):
                raise other
            for field, values in zip(('length', 'offset', 'crc'), list(zip(*found))[3:]):
                rows[field][part] = values
            rows['shard'][part] = number
            sizes.append(path.stat().st_size)
            if resumed:
                advance(len(part), len(files))
        about = dict(version=_VERSION, classes=classes, sizes=sizes, made=made)
        with replacing(target / INDEX) as partial:
            np.savez(partial, about=np.frombuffer(json.dumps(about).encode(), np.uint8), rows=rows,
                     names=blob)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f'no room for more shards in {target} ({error.strerror}): free some space '
                        f'and do it again, the {len(sizes)} of {len(parts)} that are done are kept'
                        ) from error
    return read_index(target)


def check_shards(index: ShardIndex, advance: _Advance = lambda done, total: None) -> None:
    """Read every image of the shards and compare it with its CRC32.

    Raises:
        DataError: An image is not what was packed; names the first ones.
    """
    wrong = []
    for place in np.lexsort((index.rows['offset'], index.rows['shard'])):  # as they lie
        address = index[place]['img_path']
        try:
            ShardBackend().get(address)
        except (DataError, OSError):
            wrong.append(address)
        advance(1, len(index))
    if wrong:
        raise DataError(f'{len(wrong):,} of {len(index):,} images in {index.folder} are not what '
                        f'was packed, such as {", ".join(wrong[:3])}: {_AGAIN}')


def _shard(number: int) -> str:
    return f'{number:06d}.tar'


def _list(folder: Path) -> tuple[list[str], list[_File]]:
    """The classes of a folder, and of each image its path in there, its name in a shard, its class.

    In mmpretrain's order.
    """
    classes = class_folders(folder)
    if not classes:
        raise DataError(f'{folder} has no folders, one per class, with images in them: give the '
                        'folder that holds train and val with --source')
    files: list[_File] = []
    taken: set[str] = set()
    for label, name in enumerate(classes):
        found = sorted(os.path.relpath(os.path.join(where, file), folder / name)
                       for where, _, inside in os.walk(folder / name, followlinks=True)
                       for file in inside
                       if file.lower().endswith(SUFFIXES) and not file.startswith('.'))
        if not found:
            raise DataError(f'{folder / name} has no image in it: unpack it again, or remove it')
        for file in found:
            path = PurePosixPath(name, Path(file).as_posix())
            key = stem = str(path.with_name(path.stem.replace('.', '_')))
            while key in taken:
                key = f'{stem}_{len(files)}'
                stem = key
            taken.add(key)
            files.append((str(path), key + path.suffix, label))
    return classes, files


def _write(path: Path, folder: Path, files: Sequence[_File],
           advance: Callable[[int], None]) -> None:
    """Write a shard; the same files give the same bytes."""
    def read(file: _File) -> tuple[bytes, int]:
        source = str(folder / file[0])
        return read_picture('image', source), int(os.stat(source).st_mtime)

    def add(name: str, content: bytes, mtime: int) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mtime = len(content), mtime
        handle.addfile(info, io.BytesIO(content))

    with replacing(path) as partial, ThreadPoolExecutor(_READERS) as pool, (
            tarfile.open(partial, 'w')) as handle:
        for start in range(0, len(files), _BATCH):
            batch = files[start:start + _BATCH]
            for (_, name, label), (content, mtime) in zip(batch, pool.map(read, batch)):
                add(name, content, mtime)
                add(f'{os.path.splitext(name)[0]}.cls', str(label).encode(), mtime)
            advance(len(batch))


def _scan(path: Path) -> list[tuple[str, int, int, int, int, int]]:
    """Of each image of a shard its name, class, time, length, offset and CRC32."""
    found = []
    try:
        with tarfile.open(path, 'r:') as handle:
            members = iter(handle)
            for image in members:
                content, label = (handle.extractfile(each).read()  # type: ignore[union-attr]
                                  for each in (image, next(members)))
                found.append((image.name, int(label), int(image.mtime), image.size,
                              image.offset_data, zlib.crc32(content)))
    except (tarfile.TarError, ValueError, AttributeError, StopIteration, EOFError) as error:
        raise DataError(f'{path} is not a whole shard ({error}): remove it') from error
    return found


def _states(folder: Path, files: Sequence[_File]) -> list[tuple[int, int]]:
    """Time and length of each file."""
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(os.stat, (folder / file for file, _, _ in files))
        return [(int(state.st_mtime), state.st_size) for state in found]
