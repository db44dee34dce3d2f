"""A file is the old one or the new one, never half of it."""
import errno
import os
import stat

import pytest

from mmseg_edaformer.files import remove_partial_files, replacing, shorten, write_file


def test_written_whole(tmp_path):
    path = tmp_path / 'new' / 'a.json'
    write_file(path, 'ä')
    write_file(path, b'second')
    assert path.read_bytes() == b'second'
    assert [each.name for each in path.parent.iterdir()] == ['a.json']


def test_long_names(tmp_path):
    for name in 'n' * 251 + '.png', 'é' * 125 + '.jpg':
        write_file(tmp_path / name, name)
    assert len(os.listdir(tmp_path)) == 2
    names = [os.fsdecode(b'\xff' * 250), os.fsdecode(b'\xff' * 251), 'é' * 125, 'é' * 124 + 'è']
    short = [shorten(name, 200) for name in names]
    assert len({*short}) == 4
    assert all(len(os.fsencode(name)) <= 200 for name in short)
    assert shorten('é' * 100, 200) == 'é' * 100


def test_rights_are_those_of_any_new_file(tmp_path):
    (tmp_path / 'plain').touch()
    write_file(tmp_path / 'written', '')
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ('plain', 'written')}
    assert len(modes) == 1


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'a.bin'
    write_file(path, b'old')

    def fill_the_disk():
        with replacing(path) as partial:
            partial.write_bytes(b'ne')
            raise OSError(errno.ENOSPC, 'No space left on device')

    with pytest.raises(OSError, match='No space'):
        fill_the_disk()
    assert os.listdir(tmp_path) == ['a.bin']
    assert path.read_bytes() == b'old'


def test_what_a_killed_process_left_is_removed(tmp_path):
    write_file(tmp_path / 'a.pth', b'whole')
    with replacing(tmp_path / 'a.pth') as partial:
        partial.write_bytes(b'half')
        killed = partial.rename(partial.with_name(partial.name.replace(str(os.getpid()), '1')))
        partial.write_bytes(b'whole again')
    assert killed.exists()
    remove_partial_files(tmp_path)
    assert os.listdir(tmp_path) == ['a.pth']
