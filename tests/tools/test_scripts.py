"""The shell scripts hand everything on, and refuse what is incomplete."""
import os
import signal
import subprocess
import time

import pytest

from tests.conftest import ROOT


@pytest.fixture
def shell(tmp_path):
    """Run a script with a srun and a python that print their arguments."""
    for name in ('srun', 'python'):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@"\n')
        (tmp_path / name).chmod(0o755)

    def call(script, *arguments, python=None, wait=True, **env):
        if python is not None:
            (tmp_path / 'python').write_text(f'#!/bin/sh\n{python}\n')
        process = subprocess.Popen(
            ['bash', str(ROOT / 'tools' / script), *arguments], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={'PATH': f'{tmp_path}:{os.environ["PATH"]}', **env})
        if not wait:
            return process
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    return call


def test_dist_train(shell):
    words = shell('dist_train.sh', 'a config.py', '4', '--amp', NNODES='2', NODE_RANK='1',
                  MASTER_ADDR='10.0.0.1', PORT='1234').stdout.splitlines()
    assert words == ['python', '-m', 'torch.distributed.run', '--nnodes', '2', '--node_rank', '1',
                     '--nproc_per_node', '4', '--master_addr', '10.0.0.1', '--master_port', '1234',
                     '--max_restarts', '3', f'{ROOT}/tools/train.py', 'a config.py', '--launcher',
                     'pytorch', '--amp']


@pytest.mark.parametrize('code', [0, 3])
def test_dist_train_ends_as_its_launcher(shell, code):
    assert shell('dist_train.sh', 'c.py', '1', python=f'exit {code}').returncode == code


def test_dist_train_hands_a_signal_on(shell, tmp_path):
    """SIGUSR1, which torchrun does not know, arrives as SIGTERM; the exit code says it."""
    waiting = 'trap "echo told; exit 1" TERM; touch ready; while true; do sleep 0.05; done'
    process = shell('dist_train.sh', 'c.py', '1', python=waiting, wait=False)
    while not (tmp_path / 'ready').exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=20)
    assert output == 'told\n'
    assert process.returncode == 75
    assert 'resume with --resume' in errors


def test_dist_test(shell):
    words = shell('dist_test.sh', 'c.py', 'w.pth', '2', '--isr-ratio', '2').stdout.splitlines()
    assert words[3:12] == ['--nnodes', '1', '--node_rank', '0', '--nproc_per_node', '2',
                           '--master_addr', '127.0.0.1', '--master_port']
    assert words[13:] == [f'{ROOT}/tools/test.py', 'c.py', 'w.pth', '--launcher', 'pytorch',
                          '--isr-ratio', '2']


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
