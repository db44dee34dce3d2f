"""What a command line shows of the errors that a user can mend."""
import errno

import pytest

from mmseg_edaformer.errors import DataError, clear_errors


@pytest.mark.parametrize(('error', 'shown'), [
    (DataError('mask a.png holds 7'), 'error: mask a.png holds 7'),
    (OSError(errno.ENOSPC, 'No space left on device'),
     'error: [Errno 28] No space left on device: free some space, or write elsewhere'),
    (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'none.json'),
     "error: [Errno 2] No such file or directory: 'none.json'"),
    (KeyboardInterrupt(), 'interrupted'),
])
def test_one_line_and_exit_code_1(error, shown):
    with pytest.raises(SystemExit) as caught, clear_errors():
        raise error
    assert caught.value.code == shown  # Python prints a text and ends with exit code 1


@pytest.mark.parametrize('error', [TypeError('a defect'), KeyError('key'), OSError('odd')])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)), clear_errors():
        raise error
