"""A CPU that passes for a GPU, so that code for GPUs is run where there is none.

Tensors that are moved to ``cuda`` are computed on the CPU, but say that they are on a GPU, do not
mix with others, and are not given to numpy. So the code takes the way that it takes on a GPU, and a
tensor that was left behind is an error. No kernel of a GPU runs, and times and memory mean nothing.

``python -m tests.fake_cuda tools/benchmark_gpu.py ...`` runs a command line so.
"""
import contextlib
import functools
import runpy
import sys
import types
import weakref
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

GPU = torch.device('cuda', 0)
CPU = torch.device('cpu')
MIXED = {'copy_', '__getitem__', '__setitem__', 'index_put_', 'to', '__set__', '__get__', 'set_',
         '_has_compatible_shallow_copy_type'}
"""What takes tensors of two devices."""
NUMPY = {'numpy', '__array__'}
GET = {name: getattr(Tensor, name).__get__ for name in ('is_cuda', 'is_cpu', 'device', 'grad')}


class FakeCuda(TorchFunctionMode):
    """Keeps apart what was moved to the GPU, by the storage of each tensor."""
    storages: set[int] = set()  # of all instances: caches of tensors outlive a test

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if func == GET['is_cuda']:
            return self.holds(args[0])
        if func == GET['is_cpu']:
            return not self.holds(args[0])
        if func == GET['device']:
            return GPU if self.holds(args[0]) else func(*args)
        if func == GET['grad']:
            return self.keep(func(*args), self.holds(args[0]))
        if name == 'pin_memory':
            return args[0]
        # nn.Module.to asks _parse_to, and then calls that of its tensors.
        if name == '_parse_to' or func is torch.device:
            return func(*args, **kwargs)
        if name == '__deepcopy__':  # whose memo holds tensors of all devices
            return self.keep(func(*args, **kwargs), self.holds(args[0]))
        leaves = list(_leaves((args, kwargs)))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given):  # torch's, of a traced graph
            args, kwargs, _ = _devices(name, args, kwargs)
            return func(*args, **kwargs)
        on_gpu = [self.holds(tensor) for tensor in given]
        if name in NUMPY and any(on_gpu):
            raise TypeError(f'{name}: the tensor is on {GPU}, and numpy needs it on the CPU')
        if any(on_gpu) and name not in MIXED and any(
                tensor.dim() and not there for tensor, there in zip(given, on_gpu)):
            raise RuntimeError(f'{name}: tensors on {GPU} and on the CPU')
        wanted = None
        if name in ('cuda', 'cpu') or any(isinstance(leaf, (str, torch.device)) for leaf in leaves):
            args, kwargs, wanted = _devices(name, args, kwargs)
        try:
            out = func(*args, **kwargs)
        except RuntimeError as error:
            if wanted == GPU and 'DefaultCPUAllocator' in str(error):
                raise torch.cuda.OutOfMemoryError(str(error)) from error
            raise
        if name in ('to', 'cuda', 'cpu') and isinstance(out, Tensor) and wanted is not None and (
                wanted == GPU) != on_gpu[0] and out.data_ptr() == args[0].data_ptr():
            out = out.clone()
        there = any(on_gpu) if wanted is None else wanted == GPU
        for leaf in _leaves((out,)):
            self.keep(leaf, there)
        return out

    def holds(self, tensor):
        """Whether a tensor is on the GPU; those without memory of their own are not."""
        try:
            return tensor.untyped_storage()._cdata in self.storages
        except (NotImplementedError, RuntimeError):
            return False

    def keep(self, tensor, there):
        """Note that a new tensor is on the GPU; returns it."""
        if there and isinstance(tensor, Tensor) and not self.holds(tensor):
            storage = tensor.untyped_storage()
            self.storages.add(storage._cdata)
            weakref.finalize(storage, self.storages.discard, storage._cdata)
        return tensor


def _leaves(values):
    """What nested lists, tuples and dicts hold; torch's `tree_leaves` takes longer than a step."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        elif isinstance(value, dict):
            yield from _leaves(value.values())
        else:
            yield value


def _devices(name, args, kwargs):
    """The arguments with the CPU in place of the GPU, and which of the two they ask for, if any."""
    wanted = None
    if name in ('cuda', 'cpu'):
        return args[:1], {}, GPU if name == 'cuda' else CPU
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.device) or (
        isinstance(leaf, str) and leaf.partition(':')[0] in ('cuda', 'cpu'))]
    for i in places:
        device = torch.device(leaves[i])
        wanted = GPU if device.type == 'cuda' else CPU if device.type == 'cpu' else wanted
        leaves[i] = CPU if device.type == 'cuda' else leaves[i]
    return *tree_unflatten(leaves, spec), wanted


class _Graph(TorchDispatchMode):
    """In the place of ``torch.cuda.CUDAGraph`` and of the block that records it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        """Compute all again, into the same memory."""
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _compile(model=None, **options):
    """In the place of ``torch.compile``: checks the options, and compiles nothing."""
    unknown = set(options.get('options') or {}) - set(torch._inductor.list_options())
    assert not unknown, f'torch.compile has no options {unknown}'
    if model is None:
        return _compile
    if isinstance(model, torch.nn.Module):
        return model

    @functools.wraps(model)
    def compiled(*args, **kwargs):
        return model(*args, **kwargs)

    vars(compiled)['_torchdynamo_orig_callable'] = model
    return compiled


@contextlib.contextmanager
def fake_cuda():
    """Have a GPU within the block."""
    card = types.SimpleNamespace(
        name='a CPU that passes for a GPU', total_memory=1 << 46, multi_processor_count=132,
        major=9, minor=0, L2_cache_size=60 << 20)
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    state: dict[str, Any] = dict.fromkeys(
        ('set_device', 'synchronize', 'empty_cache', 'reset_peak_memory_stats', 'manual_seed',
         'manual_seed_all'), lambda *_, **__: None)
    state |= dict.fromkeys(('memory_allocated', 'max_memory_allocated', 'memory_reserved',
                            'current_device'), lambda *_, **__: 0)
    state |= dict(
        is_available=lambda: True, device_count=lambda: 1,
        get_device_name=lambda *_, **__: card.name, get_device_properties=lambda *_, **__: card,
        get_device_capability=lambda *_, **__: (9, 0), is_bf16_supported=lambda *_, **__: True,
        Stream=lambda: stream, current_stream=lambda: stream, CUDAGraph=_Graph,
        graph=lambda graph: graph, stream=lambda stream: contextlib.nullcontext(),
        is_current_stream_capturing=lambda: False,
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda value, *_: torch.set_rng_state(value))
    autocast: Any = torch.autocast.__init__
    load: Any = torch.load

    def load_to(*args, map_location=None, **kwargs):
        device = torch.device(map_location) if isinstance(map_location, str) else map_location
        if getattr(device, 'type', None) != 'cuda':
            return load(*args, map_location=map_location, **kwargs)
        return tree_map_only(Tensor, lambda tensor: tensor.to(GPU),
                             load(*args, map_location=CPU, **kwargs))

    def on_cpu(self, device_type, *args, **kwargs):
        autocast(self, 'cpu' if device_type == 'cuda' else device_type, *args, **kwargs)

    with (mock.patch.multiple(torch.cuda, **state), mock.patch('torch.compile', _compile),
          mock.patch.object(torch.autocast, '__init__', on_cpu), mock.patch('torch.load', load_to),
          mock.patch('mmengine.device.utils.DEVICE', 'cuda'), FakeCuda()):
        yield GPU


def main():
    sys.argv = sys.argv[1:]
    with fake_cuda():
        runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
