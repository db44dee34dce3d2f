"""The shell scripts hand everything on, and refuse what is incomplete."""
import os
import subprocess

import pytest

from tests.conftest import ROOT


@pytest.fixture
def shell(tmp_path):
    """Run a script with a srun and a python that print their arguments."""
    for name in ('srun', 'python'):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@"\n')
        (tmp_path / name).chmod(0o755)

    def call(script, *arguments, **env):
        return subprocess.run(
            ['bash', str(ROOT / 'tools' / script), *arguments], cwd=tmp_path, text=True,
            capture_output=True, timeout=60,
            env={'PATH': f'{tmp_path}:{os.environ["PATH"]}', **env})
    return call


@pytest.mark.parametrize(('script', 'more'), [('slurm_train.sh', []), ('slurm_test.sh', ['w.pth'])])
def test_slurm(shell, script, more):
    words = shell(script, 'gpu', 'job', 'c.py', *more, '--tta', GPUS='16', GPUS_PER_NODE='8',
                  SRUN_ARGS='--time 1 --quiet').stdout.splitlines()
    tool = f'{ROOT}/tools/{script[6:-3]}.py'
    signal = ['--signal', 'USR1@120'] if script == 'slurm_train.sh' else []
    assert words == ['srun', '-p', 'gpu', '--job-name', 'job', '--gres', 'gpu:8', '--ntasks', '16',
                     '--ntasks-per-node', '8', '--cpus-per-task', '5', '--kill-on-bad-exit', '1',
                     *signal, '--time', '1', '--quiet', 'python', '-u', tool, 'c.py', *more,
                     '--tta', '--launcher', 'slurm']


@pytest.mark.parametrize('command', [
    ['dist_train.sh'], ['dist_train.sh', 'c.py'], ['dist_train.sh', 'c.py', '0'],
    ['dist_train.sh', 'c.py', '--amp'], ['dist_test.sh', 'c.py', 'w.pth'],
    ['slurm_train.sh', 'gpu', 'job'], ['slurm_test.sh', 'gpu', 'job', 'c.py']])
def test_what_is_incomplete_is_not_started(shell, command):
    done = shell(*command)
    assert done.returncode == 2
    assert 'usage: ' in done.stderr
    assert done.stdout == ''
