"""Writing files so that a kill, a full disk or a lost machine leaves the old one or the new one."""
import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MARK = 'partial'


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a place to write to that becomes ``path`` when the block ends well.

    The place lies in the same folder and has the same suffix. It is flushed to the disk before it
    takes the name, and the folder after that, so that the name never stands for half a file. When
    the block fails, what it wrote is removed and ``path`` is as before.

    Raises:
        OSError: As from any write; ``path`` is as before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{shorten(path.stem, 200)}.{os.getpid()}.{_MARK}{path.suffix}')
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _flush(path.parent)


def write_file(path: str | Path, content: bytes | str) -> None:
    """Write a whole file, or nothing; text as UTF-8.

    Raises:
        OSError: As from any write; ``path`` is as before.
    """
    with replacing(path) as partial:
        if isinstance(content, str):  # which may name a file whose name is not UTF-8
            content = content.encode(errors='backslashreplace')
        partial.write_bytes(content)


def shorten(name: str, most: int = 235) -> str:
    """Cut a name of more bytes than ``most``, and end it in its hash: file systems allow 255."""
    raw = os.fsencode(name)
    if len(raw) <= most:
        return name
    return f'{raw[:most - 17].decode(errors="ignore")}~{hashlib.sha256(raw).hexdigest()[:16]}'


def remove_partial_files(folder: str | Path) -> None:
    """Remove what killed processes left half-written in a folder, not below it."""
    for path in Path(folder).glob(f'.*.{_MARK}*'):
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    if os.name == 'nt' and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDWR if os.name == 'nt' else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@functools.cache
def templates(folder: Path) -> Any:
    """Return the jinja2 environment of a folder; values in HTML are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    return Environment(loader=FileSystemLoader(folder), trim_blocks=True, lstrip_blocks=True,
                       undefined=StrictUndefined, autoescape=select_autoescape(
                           ['html', 'html.jinja'], default_for_string=False))
