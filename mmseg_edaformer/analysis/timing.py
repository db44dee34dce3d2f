"""Time calls in turn, so that other load on the machine falls on all of them alike."""
import importlib
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from .. import __version__

_LEAST_ROUNDS = 5

Key = TypeVar('Key', bound=Hashable)
Prepare = Callable[[], Callable[[], Any]]
"""Untimed preparation, which returns the call to time."""


def take_turns(calls: Mapping[Key, Prepare], device: torch.device, *, repeats: int = 50,
               seconds: float = 20., warm_up: int = 2) -> dict[Key, list[float]]:
    """Time calls round by round: each call once per round.

    Args:
        calls: What to time.
        device: Device to wait for before and after each call.
        repeats: Maximum number of rounds.
        seconds: Time after which no round starts, once there are five.
        warm_up: Number of untimed rounds before.

    Returns:
        Seconds of each round; a call that ran out of memory is left out.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    began = time.perf_counter()
    for i in range(-warm_up, repeats):
        if i == 0:
            began = time.perf_counter()
        if i >= _LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for key in list(times):
            try:
                elapsed, _ = time_call(calls[key](), device)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                del times[key]
            else:
                if i >= 0:
                    times[key].append(elapsed)
                continue
            free(device)  # after the traceback, which holds tensors
    return times


def time_call(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds from an idle device to an idle device, and the result."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return time.perf_counter() - start, result


def milliseconds(seconds: Sequence[float] | np.ndarray, quantile: float = 0.5) -> float:
    """Return the median, or another quantile, in ms."""
    return 1e3 * float(np.quantile(seconds, quantile))


def relative(seconds: Sequence[float] | np.ndarray,
             others: Sequence[float] | np.ndarray) -> float:
    """Return the median ratio of times that were measured in the same rounds."""
    return float(np.median(np.divide(seconds, others)))


def number(value: float | None) -> str:
    """Format three significant digits; nothing for None."""
    if value is None:
        return ''
    return f'{value:.0f}' if abs(value) >= 100 else f'{value:.1f}' if abs(value) >= 10 else (
        f'{value:.2f}')


def size_text(size: Sequence[int]) -> str:
    """Return a height and width as in 512x1024."""
    return f'{size[0]}x{size[1]}'


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    """Give the memory that a GPU's allocator keeps back."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a lack of memory, of a GPU or a CPU, from other errors."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
        sign in str(error) for sign in ('DefaultCPUAllocator', 'CUBLAS_STATUS_ALLOC_FAILED'))


@dataclass(frozen=True)
class Rates:
    """What the machine reaches in one dtype: billions of multiply-adds and of bytes per second."""
    gmacs_per_s: float
    gb_per_s: float


def measure_rates(device: torch.device, dtype: torch.dtype, side: int | None = None) -> Rates:
    """Measure the best rates of a square matrix product and of a copy that no cache holds.

    A copy of n bytes reads n and writes n. ``side`` is that of the matrices.
    """
    large = device.type == 'cuda'
    side, size = side or (8192 if large else 2048), 2**30 if large else 2**28
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    with torch.no_grad():
        times = take_turns(dict(gemm=lambda: lambda: left @ right,
                                copy=lambda: lambda: target.copy_(source)),
                           device, repeats=20, seconds=2.)
    return Rates(side**3 / min(times['gemm']) / 1e9, 2 * size / min(times['copy']) / 1e9)


def environment(device: str, *, keep_memory: bool = True) -> dict[str, str]:
    """Return where figures come from: device, threads, settings, versions, commit."""
    facts = dict(device={'cuda': torch.cuda.get_device_name, 'cpu': _cpu_name,
                         'meta': lambda: 'none (costs are counted)'}[device](),
                 threads=str(torch.get_num_threads()))
    if device == 'cpu':
        facts['freed_memory'] = 'kept' if keep_memory else 'left to the system'
    if device == 'cuda':
        facts.update(
            float32_matmul='TF32' if torch.backends.cuda.matmul.allow_tf32 else 'full',
            float32_conv='TF32' if torch.backends.cudnn.allow_tf32 else 'full',
            cudnn_benchmark='yes' if torch.backends.cudnn.benchmark else 'no')
    facts.update(python=platform.python_version(), torch=torch.__version__)
    for package in ('mmengine', 'mmcv', 'mmseg'):
        facts[package] = importlib.import_module(package).__version__
    return dict(facts, mmseg_edaformer=__version__, commit=_commit())


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return f'{line.partition(":")[2].strip()} CPU'
    return f'{platform.machine()} CPU'


def _commit() -> str:
    """Return the commit of this package's files, with '+' if they were changed since."""
    def git(*command: str) -> str:
        return subprocess.run(['git', *command], cwd=Path(__file__).parent, text=True, check=True,
                              capture_output=True).stdout.strip()
    try:
        return git('rev-parse', '--short', 'HEAD') + (
            '+' if git('status', '--porcelain', '--untracked-files=no') else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
