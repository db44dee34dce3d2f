"""Run the tests that are marked ``gpu``: `make test-gpu`.

Without a GPU it says how many there are, and runs them with ``--fake-cuda`` only. Arguments are
those of pytest.
"""
import contextlib
import importlib.util
import io
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


class Count:
    """A plugin that counts the tests collected."""

    def pytest_collection_finish(self, session):
        self.tests = len(session.items)


def main(arguments):
    # Only files that hold such tests: others import what a GPU machine may not have.
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / 'tests').rglob('test_*.py'))
             if 'pytest.mark.gpu' in path.read_text()]
    os.chdir(ROOT)
    marks = 'gpu' if torch.cuda.is_available() else 'gpu and not soak'
    select = ['-q', '-m', marks, *files, *arguments]
    if not torch.cuda.is_available() and '--fake-cuda' not in arguments:
        count = Count()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = pytest.main(['--collect-only', *select], [count])
        if code:
            sys.exit(output.getvalue())
        print(f'No GPU is visible to torch {torch.__version__}: none of {count.tests} tests was '
              'run. With FAKE_CUDA=1 the CPU runs them in its place.')
        return 0
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # of the workers
    if importlib.util.find_spec('xdist') and '-n' not in arguments:
        select += ['-n', str(min(4, os.cpu_count() or 1))]
    if torch.cuda.is_available():
        print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}', flush=True)
    return pytest.main(['-rs', '--durations=10', *select])


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
