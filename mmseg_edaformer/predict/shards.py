"""Reading the images of shards: .tar as WebDataset has them, and .parquet.

Ray's reading tasks import this module, so it imports neither torch nor mmseg.
"""
import hashlib
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from ..files import shorten

SHARDS = frozenset({'.parquet', '.tar', '.tgz'})  # endings of the files that hold many images

_MOST_BYTES = 2 ** 30  # four for each pixel that an image may have
_ROWS = 16  # rows of a .parquet in memory at once


class Sample(NamedTuple):
    """An image to predict."""
    file: str  # the image, or the shard that holds it
    target: str  # the path of its mask below masks, without a suffix
    address: str  # the path, with a place in a shard after #
    content: bytes | None = None  # the encoded image, if it is from a shard
    reason: str = ''  # why it gets no mask

    def as_file(self, folder: str) -> str:
        """Return the path of the image, which is written to a folder if it is from a shard."""
        if self.content is None:
            return self.file
        path = Path(folder, hashlib.sha256(os.fsencode(self.target)).hexdigest())
        path.write_bytes(self.content)
        return str(path)


def is_shard(path: str | Path) -> bool:
    """Return whether a file holds many images."""
    return str(path).lower().endswith(('.tar.gz', *SHARDS))


def read_samples(source: Sample, column: str | None, endings: Set[str]) -> Iterator[Sample]:
    """Yield the images of a file, a shard or not, and the reasons for those that cannot be read.

    ``column`` is the one of a .parquet that holds the images, by default ``image``, or else the
    only one that can; for a .tar it is the ending of the images' names, in place of ``endings``.
    """
    if not is_shard(source.file):
        yield source
        return
    from pyarrow import ArrowException  # which is there where Ray Data is
    path, is_tar = source.file, not source.file.lower().endswith('.parquet')
    if not os.path.isfile(path):
        yield source._replace(reason=f'{path} is a broken link or no regular file: remove it')
        return
    if column is not None:
        endings = {'.' + column.lower().removeprefix('.')}
    taken: dict[str, str] = {}  # endings by stems
    try:
        for place, name, content in (
                _read_tar(path, endings) if is_tar else _read_parquet(path, column)):
            name = posixpath.normpath(name.lstrip('/'))
            stem, ending = posixpath.splitext(name)
            if taken.get(stem, ending) != ending:
                if is_tar and column is None:
                    raise DataError(f'the sample {stem} in {path} has {taken[stem][1:]} and '
                                    f'{ending[1:]}: select one with --column {ending[1:]}')
                stem = name  # a.jpg beside a.png
            address, reason = f'{path}#{place}', ''
            if content is None:
                reason = f'it holds no image, or one of more than {_MOST_BYTES} bytes'
            elif '\0' in stem or stem.split('/')[0] in ('.', '..'):
                reason = 'its name leads out of the folder of the results'
            elif stem in taken:
                reason = 'another image in this shard has the same name'
            taken.setdefault(stem, ending)
            target = posixpath.join(source.target, *map(shorten, stem.split('/')))
            yield (Sample(path, target, address, reason=f'{address}: {reason}') if reason else
                   Sample(path, target, address, content))
    except (OSError, EOFError, UnicodeError, zlib.error, tarfile.TarError, ArrowException) as error:
        yield source._replace(reason=f'{path} is damaged after {len(taken)} images '
                              f'({last_line(error)}): copy it again')
        return
    if not taken:
        yield source._replace(reason=f'{path} holds no image' + (
            f' that ends in {", ".join(sorted(endings))}: name the ending of its images with '
            '--column' if is_tar else ''))


def last_line(error: BaseException) -> str:
    """Return what an error of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _read_tar(path: str, endings: Set[str]) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield place, name and content of the images of a .tar."""
    with tarfile.open(path, 'r:*') as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # which would grow
            folder, name = posixpath.split(member.name)
            key, _, ending = name.partition('.')
            if member.isreg() and key and f'.{ending.lower()}' in endings:
                file = tar.extractfile(member) if member.size <= _MOST_BYTES else None
                yield (member.name, posixpath.join(folder, f'{key}.{ending.rpartition(".")[2]}'),
                       None if file is None else file.read())
        # tarfile takes whatever is no header for the end, and the end of the file too.
        tar.fileobj.seek(tar.offset)  # type: ignore[attr-defined]
        if tar.fileobj.read(512) != bytes(512):  # type: ignore[attr-defined]
            raise tarfile.ReadError('it has no end mark')


def _read_parquet(path: str, column: str | None) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield row, name and content of the images of a .parquet."""
    from pyarrow import parquet
    # Without a buffer a row group, which can be large, would be read as a whole. An open file,
    # since pyarrow takes no path that is not UTF-8.
    with open(path, 'rb') as raw, parquet.ParquetFile(
            raw, buffer_size=2 ** 20, pre_buffer=False) as file:
        name = _find_column(path, file.schema_arrow, column)
        row = 0
        for batch in file.iter_batches(_ROWS, columns=[name]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, dict):
                    value = dict(bytes=value)
                yield str(row), value.get('path') or f'{row:06}', value.get('bytes')
                row += 1


def _find_column(path: str, schema: Any, column: str | None) -> str:
    """Return the name of the column of the images, as bytes or as ``{bytes, path}``."""
    fitting = [field.name for field in schema if re.match(
        r'(large_)?binary|struct<.*bytes: (large_)?binary', str(field.type))]
    chosen = column or ('image' if 'image' in fitting else fitting[0] if len(fitting) == 1 else '')
    if chosen not in fitting:
        count = f'no column {column} of' if column else 'several columns of' if fitting else 'no'
        raise DataError(f'{path} has {count} encoded images, its columns are '
                        f'{", ".join(schema.names)}' +
                        (f': name one of {", ".join(fitting)} with --column' if fitting else ''))
    return chosen
