"""Hooks for distributed tests, which a config imports: what a cluster does to a run."""
import os
import signal
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class StopHook(Hook):
    """Send SIGUSR1 to the script that started torchrun, before an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration and get_rank() == 0:
            status = Path(f'/proc/{os.getppid()}/status').read_text()
            script = int(status.partition('PPid:')[2].split()[0])
            os.kill(script, signal.SIGUSR1)


@HOOKS.register_module()
class KillHook(Hook):
    """SIGKILL rank 1 before an iteration, at the first start of a run."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if (runner.iter == self.iteration and get_rank() == 1 and
                os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'):
            os.kill(os.getpid(), signal.SIGKILL)
