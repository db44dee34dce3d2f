"""A run that is told to stop before it trains, and one whose peer is gone without a trace."""
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from mmseg_edaformer.engine import checks, run_config
from mmseg_edaformer.engine.preemption import EXIT_PREEMPTED, Watchdog, is_lost_peer
from tests.conftest import ROOT
from tests.processes import finish, free_port, in_child


def test_told_to_stop_while_it_imports():
    process = subprocess.Popen([sys.executable, 'tools/train.py', 'none.py'], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE)
    while not caught(process.pid) >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == EXIT_PREEMPTED
    assert said == ('SIGTERM: stopped while it was not training, so nothing is lost; resume with '
                    '--resume\n')


def caught(pid):
    """The signals that a process has taken, as bits."""
    return int(re.search(r'SigCgt:\s*(\w+)', Path(f'/proc/{pid}/status').read_text())[1], 16)


@pytest.mark.parametrize(('launcher', 'variable'), [
    ('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM_WORLD_RANK')])
@pytest.mark.parametrize('rank', [0, 1])
def test_the_first_process_warns_for_all(tmp_path, launcher, variable, rank):
    def warn():
        os.environ[variable] = str(rank)
        run_config.load_config(f'{ROOT}/configs/edaformer_t_synthetic.py', launcher=launcher)
        checks._warn('first')
        warnings.showwarning = lambda message, *_: print(message)  # pytest keeps them
        warnings.warn('second', stacklevel=1)

    assert finish(in_child(warn, log=tmp_path / 'log')) == 0
    log = (tmp_path / 'log').read_text()
    assert [word in log for word in ('first', 'second')] == [rank == 0] * 2


def watch(rank, port):
    """A rank that waits for ever, as in a collective on a GPU."""
    import torch.distributed as dist
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank),
                      WORLD_SIZE='3')
    dist.init_process_group('gloo')
    Watchdog(patience=3).start()
    time.sleep(60)


@pytest.mark.parametrize(('number', 'victim', 'who'), [
    (signal.SIGSTOP, 1, 'rank 1'),
    (signal.SIGKILL, 0, '(rank 0|the process that started this run)')])
def test_a_peer_that_is_gone(tmp_path, number, victim, who):
    port = free_port()
    pids = [in_child(watch, rank, port, log=tmp_path / str(rank)) for rank in range(3)]
    time.sleep(3)
    start = time.monotonic()
    os.kill(pids[victim], number)
    codes = [finish(pid) for rank, pid in enumerate(pids) if rank != victim]
    assert time.monotonic() - start < 15
    assert codes == [1, 1]
    if number == signal.SIGSTOP:
        os.kill(pids[victim], signal.SIGKILL)
    assert finish(pids[victim]) == -signal.SIGKILL
    left = sorted({0, 1, 2} - {victim})
    found = [re.search(rf'error: rank {rank} ends: (.+) gave no sign of life for 3 s',
                       (tmp_path / str(rank)).read_text())[1] for rank in left]
    # The first to end names the victim; the second may notice the first before.
    assert any(re.fullmatch(who, name) for name in found), found
    assert all(re.fullmatch(f'{who}|rank {other}', name)
               for name, other in zip(found, left[::-1])), found


def test_what_says_that_a_peer_is_gone(monkeypatch):
    error = RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]')
    assert not is_lost_peer(error)  # there are no peers
    monkeypatch.setattr('mmseg_edaformer.engine.preemption.is_distributed', lambda: True)
    assert is_lost_peer(error)
    assert not is_lost_peer(RuntimeError('mat1 and mat2 shapes cannot be multiplied'))


def test_told_to_stop_while_it_checks(tmp_path):
    def main():
        run_config.load_config = lambda *_, **__: os.kill(os.getpid(), signal.SIGUSR1)
        sys.argv = ['tools/train.py', f'{ROOT}/configs/edaformer_t_ade.py']
        runpy.run_path(f'{ROOT}/tools/train.py', run_name='__main__')

    assert finish(in_child(main, log=tmp_path / 'log')) == EXIT_PREEMPTED
    assert 'SIGUSR1: stopped' in (tmp_path / 'log').read_text()
