"""What a command line shows of the errors that a user can mend."""
import errno
import io
import sys

import pytest

from mmseg_edaformer.errors import DataError, clear_errors


@pytest.mark.parametrize(('error', 'shown'), [
    (DataError('mask a.png holds 7'), 'error: mask a.png holds 7'),
    (OSError(errno.ENOSPC, 'No space left on device'),
     'error: [Errno 28] No space left on device: free some space, or write elsewhere'),
    (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'none.json'),
     "error: [Errno 2] No such file or directory: 'none.json'"),
    (KeyboardInterrupt(), 'interrupted'),
    (UnicodeEncodeError('ascii', 'Größe', 2, 3, 'not in range(128)'), "error: 'Größe' cannot be "
     'used, because the locale here knows ASCII alone: export PYTHONUTF8=1, or LC_ALL=C.UTF-8'),
])
def test_one_line_and_exit_code_1(error, shown):
    with pytest.raises(SystemExit) as caught, clear_errors():
        raise error
    assert caught.value.code == shown  # Python prints a text and ends with exit code 1


@pytest.mark.parametrize('error', [TypeError('a defect'), KeyError('key'), OSError('odd')])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)), clear_errors():
        raise error


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), 'ascii', write_through=True)
    monkeypatch.setattr(sys, 'stdout', terminal)
    with clear_errors():
        print('Straße \udcff')
    assert terminal.buffer.getvalue() == b'Stra\\xdfe \\udcff\n'
