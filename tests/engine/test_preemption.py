"""A process whose peer is gone without a trace ends, and says why."""
import os
import re
import signal
import time

import pytest

from mmseg_edaformer.engine.preemption import Watchdog, is_lost_peer
from tests.processes import finish, free_port, in_child


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
