"""Runs whose processes stop together when told to, and notice when one of them is lost."""
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
"""Exit code of a run that was stopped and can be resumed: EX_TEMPFAIL of sysexits.h."""

_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name)]

GRACE = 60  # seconds that data loader workers live on after SIGTERM


class Preempted(Exception):
    """The run was told to stop, and has saved its state."""


class LostPeer(Exception):
    """Another process of a distributed run ended, or cannot be reached."""


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Save and stop after the current step on SIGTERM or SIGUSR1, which Slurm sends.

    All ranks agree after every step, over a process group on the CPU. So a rank without a signal
    stops at the same step, and a rank whose peer is gone fails instead of waiting in a collective
    on a GPU.
    """

    priority = 'LOWEST'  # after the checkpoint hook

    def __init__(self) -> None:
        self.signal, self.main = 0, os.getpid()
        self.group: Any = None
        self.device = 'cpu'
        self.together = True
        self.handlers: dict[int, Any] = {}

    def before_run(self, runner: Runner) -> None:
        """Handle the signals before there are data loader workers, which inherit the handlers."""
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self.handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        if is_distributed():
            try:
                self.group = dist.new_group(backend='gloo')
            except RuntimeError as error:  # on all ranks: the host has no such address
                runner.logger.warning('gloo cannot connect the processes, so they agree on the '
                                      f'GPU and wait for it at every step ({error}): set '
                                      'GLOO_SOCKET_IFNAME to the network interface')
                self.group, self.device = dist.group.WORLD, get_device()

    def before_val(self, runner: Runner) -> None:
        """Find out if all ranks have the same number of batches, and so can agree after each."""
        lengths = all_gather_object(len(runner.val_dataloader))
        self.together = len(set(lengths)) == 1

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict[str, Any] | None = None) -> None:
        self._stop_if_told(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                       outputs: Sequence[Any] | None = None) -> None:
        """Stop if any rank was told to; the resumed run repeats the validation."""
        if self.together:
            self._stop_if_told(runner, runner.iter)

    def after_run(self, runner: Runner) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.main:
            self.signal = number
        else:
            # A data loader worker, forked from this process: the run needs it to end its step.
            signal.alarm(GRACE)

    def _stop_if_told(self, runner: Runner, iterations: int) -> None:
        told = self.signal
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
        runner.logger.warning(f'{name}: saving the state and stopping')
        saved = [hook.save_now(runner, iterations) for hook in runner.hooks
                 if isinstance(hook, SafeCheckpointHook)]
        raise Preempted(f'stopped by {name} after iteration {iterations}; ' + (
            'its state is saved, resume with --resume' if any(saved) else
            'resume from the last checkpoint with --resume'))


class Watchdog(threading.Thread):
    """Ends this process when another of the run gave no sign of life for ``patience`` seconds.

    Each process increments its own counter in a store that all reach. A counter that stands still,
    or a store out of reach, means that its process is gone. Without this, a process would wait for
    it until the timeout of NCCL or gloo. The environment must name the ranks, as torchrun does, and
    mmengine's init_dist.
    """

    def __init__(self, patience: float = 40.) -> None:
        super().__init__(name='watchdog', daemon=True)
        self.patience = patience
        self.rank, self.world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        self.prefix = f"alive/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/"
        self.stopped = threading.Event()
        self.counts: dict[int, int] = {}

    def run(self) -> None:
        threading.Thread(target=self._count, name='alive', daemon=True).start()
        # Each process must have been seen once after ten minutes.
        moved = dict.fromkeys(range(self.world_size), time.monotonic() + 600 - self.patience)
        seen = dict.fromkeys(moved, 0)
        while not self.stopped.wait(self.patience / 8):
            now, counts = time.monotonic(), self.counts
            moved.update((rank, now) for rank, count in counts.items() if count != seen[rank])
            seen.update(counts)
            silent = [rank for rank, when in moved.items() if now - when > self.patience]
            if silent and not self.stopped.is_set():
                # Our own counter stands still if the store cannot be reached.
                who = ('the process that started this run' if self.rank in silent
                       else f'rank {silent[0]}')
                print(f'error: rank {self.rank} ends: {who} gave no sign of life for '
                      f'{self.patience:g} s. Its last log line says why; resume with --resume',
                      file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may wait in a collective forever

    def _count(self) -> None:
        """Increment our counter and read the others', which may block forever."""
        store = None  # its own connection: the process group's may be busy waiting
        while True:
            try:
                store = store or dist.TCPStore(
                    os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False,
                    wait_for_workers=False)
                store.add(f'{self.prefix}{self.rank}', 1)
                self.counts = {rank: store.add(f'{self.prefix}{rank}', 0)
                               for rank in range(self.world_size)}
            except RuntimeError:  # of the store or a socket; `run` notices that nothing changes
                pass
            if self.stopped.wait(self.patience / 8):
                return


def is_lost_peer(error: Exception) -> bool:
    """Return whether an error means that another process of the run is gone."""
    return isinstance(error, LostPeer) or (is_distributed() and re.search(
        'gloo|nccl|connection|socket|broken pipe', str(error), re.I) is not None)
