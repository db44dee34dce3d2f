"""Runs that end when they are told to, all processes together, and that notice a lost one."""
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.dist import all_gather_object, is_distributed
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .checkpoint_hook import SafeCheckpointHook

EXIT_PREEMPTED = 75
"""Exit code of a run that was told to stop and can be resumed: EX_TEMPFAIL of sysexits.h."""

_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name)]

GRACE = 60
"""Seconds that the processes which read data live on after SIGTERM."""


class Preempted(Exception):
    """The run was told to stop, and its state is saved."""


class LostPeer(Exception):
    """Another process of a distributed run ended, or cannot be reached."""


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Save and stop after the step at hand when SIGTERM or SIGUSR1 comes, as Slurm sends them.

    All ranks agree after every step, over a process group of their own on the CPU, so one that got
    no signal stops at the same step, and one whose peer is gone fails instead of waiting in a
    collective on a GPU.

    Raises:
        Preempted: The run is to end; the checkpoint is written.
        LostPeer: A peer is gone.
    """

    priority = 'LOWEST'  # after the checkpoints

    def __init__(self) -> None:
        self.signal: int | None = None
        self.main = os.getpid()
        self.group: Any = None
        self.device = 'cpu'
        self.together = True
        self.handlers: dict[int, Any] = {}

    def before_run(self, runner: Runner) -> None:
        """Take the signals, before there are processes that read data: these inherit it."""
        if threading.current_thread() is threading.main_thread():  # no other may take signals
            self.handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        if is_distributed():
            try:
                self.group = dist.new_group(backend='gloo')
            except RuntimeError as error:  # alike on all ranks: the host has no such address
                runner.logger.warning(f'The processes agree on the GPU, which costs a wait per '
                                      f'step, since gloo cannot connect them ({error}): set '
                                      'GLOO_SOCKET_IFNAME to the network interface')
                self.group, self.device = dist.group.WORLD, get_device()

    def before_val(self, runner: Runner) -> None:
        """See whether all ranks have the same number of batches, and so can agree after each."""
        lengths = all_gather_object(len(runner.val_dataloader))
        self.together = len(set(lengths)) == 1

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict[str, Any] | None = None) -> None:
        """Stop here if any rank was told to."""
        self._stop_if_told(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                       outputs: Sequence[Any] | None = None) -> None:
        """Stop here if any rank was told to; the resumed run validates anew."""
        if self.together:
            self._stop_if_told(runner, runner.iter)

    def after_run(self, runner: Runner) -> None:
        """Give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.main:
            self.signal = number
        else:
            # A process that reads data, forked from this one: the run needs it to end its step.
            signal.alarm(GRACE)

    def _stop_if_told(self, runner: Runner, iterations: int) -> None:
        told = self.signal or 0
        if self.group is not None:
            flag = torch.tensor([told], device=self.device)
            try:
                dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
            except RuntimeError as error:
                raise LostPeer(str(error)) from error
            told = int(flag)
        if not told:
            return
        name = signal.Signals(told).name
        runner.logger.warning(f'{name}: the run saves its state and ends')
        saved = [hook.save_now(runner, iterations) for hook in runner.hooks
                 if isinstance(hook, SafeCheckpointHook)]
        raise Preempted(f'stopped by {name} after iteration {iterations}; ' + (
            'its state is saved, go on with --resume' if any(saved) else
            'a resumed run goes on from the last checkpoint before it'))


class Watchdog(threading.Thread):
    """End this process when another of the run is gone: killed, or on a machine that is.

    Each process counts up its own number in a store that all reach; a number that stands still, or
    a store out of reach, means that its process is gone. One that waits for it in a collective on a
    GPU would wait until NCCL's timeout, one that waits for it at the start until gloo's. The
    environment must name the ranks, as torchrun does and mmengine after its init_dist.

    Args:
        patience: Seconds.
        start: Seconds until each must have been seen once.
    """

    def __init__(self, patience: float = 40., start: float = 600.) -> None:
        super().__init__(name='watchdog', daemon=True)
        self.patience, self.first = patience, start
        self.rank, self.world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        self.prefix = f"alive/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/"
        self.stopped = threading.Event()
        self.counts: dict[int, int] = {}

    def run(self) -> None:
        """Watch until stopped."""
        threading.Thread(target=self._count, name='alive', daemon=True).start()
        moved = dict.fromkeys(range(self.world_size), time.monotonic() + self.first - self.patience)
        seen = dict.fromkeys(moved, 0)
        while not self.stopped.wait(self.patience / 8):
            now, counts = time.monotonic(), self.counts
            moved.update((rank, now) for rank, count in counts.items() if count != seen[rank])
            seen.update(counts)
            silent = [rank for rank, when in moved.items() if now - when > self.patience]
            if silent and not self.stopped.is_set():
                # One's own count stands still where the store cannot be reached.
                who = ('the process that started this run' if self.rank in silent
                       else f'rank {silent[0]}')
                print(f'error: rank {self.rank} ends: {who} gave no sign of life for '
                      f'{self.patience:g} s. What it logged last says why; go on with --resume',
                      file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may wait in a collective for ever

    def _count(self) -> None:
        """Count up one's own number and read the others', which may block for ever."""
        store = None  # a connection of its own: the process group's may be busy waiting
        while True:
            try:
                store = store or dist.TCPStore(
                    os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False,
                    wait_for_workers=False)
                store.add(f'{self.prefix}{self.rank}', 1)
                self.counts = {rank: store.add(f'{self.prefix}{rank}', 0)
                               for rank in range(self.world_size)}
            except RuntimeError:  # of stores and sockets; `run` sees that nothing moves
                pass
            if self.stopped.wait(self.patience / 8):
                return

    def stop(self) -> None:
        """Watch no more."""
        self.stopped.set()


def is_lost_peer(error: Exception) -> bool:
    """Whether an error says that another process of the run is gone."""
    return isinstance(error, LostPeer) or (is_distributed() and re.search(
        'gloo|nccl|connection|socket|broken pipe', str(error), re.I) is not None)
