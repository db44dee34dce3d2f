"""Time and memory of calls, rates of the machine, and where the figures come from."""
import importlib
import platform
import subprocess
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cost import on_meta
from ..files import templates

_LEAST_ROUNDS = 5

Key = TypeVar('Key', bound=Hashable)
Prepare = Callable[[], Callable[[], Any]]
"""Untimed preparation, which returns the call to time."""


def take_turns(calls: Mapping[Key, Prepare], device: torch.device, *, repeats: int = 50,
               seconds: float = 20., warm_up: int = 2) -> dict[Key, list[float]]:
    """Time calls round by round, so that other load on the machine falls on all of them alike.

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
    end = 0.
    for i in range(-warm_up, repeats):
        if i <= 0:
            end = time.perf_counter() + seconds
        if i >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for key in list(times):
            try:
                elapsed, _ = time_call(calls[key](), device)
                if i >= 0:
                    times[key].append(elapsed)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                del times[key]
            torch.cuda.empty_cache()  # after the traceback, which holds tensors
    return times


def time_call(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds from an idle device to an idle device, and the result."""
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    wait()
    start = time.perf_counter()
    result = call()
    wait()
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


def thread_text() -> str:
    """Return the number of torch's threads in words."""
    count = torch.get_num_threads()
    return f'{count} thread{"s" if count > 1 else ""}'


def render(template: str, filters: Mapping[str, Callable[[Any], str]] | None = None,
           **values: Any) -> str:
    """Fill a jinja2 template of this folder; values in HTML are escaped."""
    environment = templates(Path(__file__).parent)
    environment.filters.update(filters or {})
    return str(environment.get_template(template).render(values))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a lack of memory, of a GPU or a CPU, from other errors."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
        sign in str(error) for sign in ('DefaultCPUAllocator', 'CUBLAS_STATUS_ALLOC_FAILED'))


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of the tensors that operators allocate within a ``with`` block.

    Views and in-place results share memory and count once; a tensor's bytes end with its last
    user. What a kernel allocates and frees within one call is not seen. ``resident`` tensors do not
    count, and ``peak`` is the most bytes alive at any one time.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self.live: dict[int, int] = {}  # bytes by address
        self.resident = {_address(tensor) for tensor in resident}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.resident and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def peak_bytes(run: Callable[[], Any], resident: Iterable[Tensor], device: torch.device) -> int:
    """Return the most bytes that a call needs, with the ``resident`` tensors that it works on.

    On a GPU these are what torch's allocator hands out, elsewhere what `LiveBytes` follows. What
    other models keep on the device does not count.
    """
    tensors = {_address(tensor): tensor for tensor in resident}
    kept = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    if device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return kept + torch.cuda.max_memory_allocated() - before
    with LiveBytes(tensors.values()) as live:
        run()
    return kept + live.peak


def count_activations(model: nn.Module, input_size: tuple[int, int] = (512, 512)) -> int:
    """Count the numbers that the innermost modules put out for one image, without computing them.

    Outputs of functions that no module wraps, such as attention, pooling and resizing, are left
    out. A module that passes a tensor on or changes it in place does not count.
    """
    image = torch.empty(1, 3, *input_size, device='meta')
    kept: dict[int, Tensor] = {}  # keeps the tensors, so that no address comes twice

    def note(module: nn.Module, args: Any, out: Any) -> None:
        kept.update((_address(leaf), leaf) for leaf in tree_leaves(out)
                    if isinstance(leaf, Tensor))

    with on_meta(model) as shadow, torch.no_grad():
        for module in shadow.modules():
            if next(module.children(), None) is None:
                module.register_forward_hook(note)
        shadow(image)
    kept.pop(_address(image), None)
    return sum(tensor.numel() for tensor in kept.values())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


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
    names = dict(cuda=torch.cuda.get_device_name, cpu=_cpu_name,
                 meta=lambda: 'none (costs are counted)')
    facts = dict(device=names[device](), threads=str(torch.get_num_threads()))
    if device == 'cpu':
        facts['freed_memory'] = 'kept' if keep_memory else 'left to the system'
    if device == 'cuda':
        facts.update(
            float32_matmul='TF32' if torch.backends.cuda.matmul.allow_tf32 else 'full',
            float32_conv='TF32' if torch.backends.cudnn.allow_tf32 else 'full',
            cudnn_benchmark='yes' if torch.backends.cudnn.benchmark else 'no')
    facts['python'] = platform.python_version()
    for package in ('torch', 'mmengine', 'mmcv', 'mmseg', 'mmseg_edaformer'):
        facts[package] = importlib.import_module(package).__version__
    return dict(facts, commit=_commit())


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return f'{line.partition(":")[2].strip()} CPU'
    return f'{platform.machine()} CPU'


def _commit() -> str:
    """Return the commit of this package's files, with '+' if they were changed since."""
    try:
        return subprocess.run(['git', 'describe', '--always', '--exclude=*', '--dirty=+'],
                              cwd=Path(__file__).parent, text=True, check=True,
                              capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
