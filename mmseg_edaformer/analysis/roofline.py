"""How close a network's operators come to the limits of the device.

The operators of a call are recorded as PyTorch dispatches them, and each is then timed by itself on
tensors of the same sizes. Its *limit* is the longer of two times: its floating-point operations at
the rate of a large matrix product, and its bytes at the rate of a large copy.
"""
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

from .timing import Prepare, Rates, time_call

_WORKING_SET = 2 ** 28
"""Bytes that a timed operator walks through, which no cache holds."""
_FREE = (torch.ops.aten.empty_like.default, torch.ops.aten.detach.default)


class Work(NamedTuple):
    """One call of an operator: FLOPs of products and convolutions, bytes of inputs and outputs."""
    call: Prepare
    flops: int
    bytes: int


class _Like(NamedTuple):
    """A tensor's sizes, without its content."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, leaf: Any) -> Any:
        return cls(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(
            leaf, Tensor) else leaf

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(
            size for size, step in zip(self.shape, self.stride) if step)


class Recorder(TorchDispatchMode):
    """Counts the operators of a ``with`` block by name and arguments; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()
        self.works: dict[Any, Work] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        shapes = tuple(map(_Like.of, leaves))
        out = func(*args, **kwargs)
        given = [leaf for leaf in shapes if isinstance(leaf, _Like)]
        made = [_Like.of(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not given or not made or func.is_view or func in _FREE:
            return out
        name = str(func).removeprefix('aten.').removesuffix('.default')
        key = name, ' '.join('x'.join(map(str, like.shape)) or '1' for like in given[:3]), shapes
        self.calls[key] += 1
        if key not in self.works:

            def ready() -> Callable[[], Any]:
                from torch._dynamo.testing import rand_strided  # takes a second
                # Random numbers; zeros of integers, which index something.
                again, named = tree_unflatten([
                    rand_strided(*leaf) if isinstance(leaf, _Like) else leaf for leaf in shapes],
                    spec)
                return lambda: func(*again, **named)

            self.works[key] = Work(ready, _flops(func, args, kwargs, out),
                                   sum(tensor.bytes for tensor in (*given, *made)))
        return out


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """By torch's own formulas, but for gradients of convolutions in groups, which they overrate."""
    if func is torch.ops.aten.convolution_backward.default:
        grad, _, weight = args[:3]
        return 2 * grad.numel() * weight[0].numel() * sum(args[-1][:2])
    count = flop_registry.get(func._overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0


def rooflines(call: Callable[[], Any], rates: Rates, device: torch.device, *,
              others: Mapping[str, Work] | None = None,
              most: int = 5) -> tuple[list[dict[str, Any]], float]:
    """Return the operators on which a call spends the most time, and the ms of all together.

    The figures of an operator are for all its calls in one pass.

    Args:
        call: A pass through a network, or a training step.
        rates: Rates of the same device in the same dtype.
        device: Device that it runs on.
        others: Work that PyTorch's dispatcher does not see, by name.
        most: Number of operators to return.
    """
    call()
    with Recorder() as recorder:
        call()
    rows = [_row(key[0], key[1], count, recorder.works[key], rates, device)
            for key, count in recorder.calls.items()]
    rows += [_row(name, '', 1, work, rates, device) for name, work in (others or {}).items()]
    rows.sort(key=lambda row: -row['ms'])
    return rows[:most], sum(row['ms'] for row in rows)


def _row(name: str, shapes: str, count: int, work: Work, rates: Rates,
         device: torch.device) -> dict[str, Any]:
    repeats = max(1, min(8, _WORKING_SET // max(work.bytes, 1)))
    calls = [work.call() for _ in range(repeats)]  # back to back, so that caches are cold

    def run() -> None:
        for call in calls:
            call()

    run()
    seconds = statistics.median(time_call(run, device)[0] for _ in range(3)) / repeats
    compute = work.flops / 2e6 / rates.gmacs_per_s
    memory = work.bytes / 1e6 / rates.gb_per_s
    return dict(name=name, shapes=shapes, calls=count, ms=1e3 * count * seconds,
                gflop=count * work.flops / 1e9, mb=count * work.bytes / 1e6,
                limit_ms=count * max(compute, memory),
                bound='compute' if compute > memory else 'memory')
