"""How much memory a call takes at its peak, and what its activations amount to."""
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cost import on_meta


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of the tensors that operators allocate within a ``with`` block.

    Views and in-place results share memory and count once; a tensor's bytes end with its last
    user. What a kernel allocates and frees within one call is not seen. ``resident`` tensors do not
    count, and ``peak`` is the most bytes alive at any one time.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {_address(tensor) for tensor in resident}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _address(leaf) not in self.known:
                storage = leaf.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _release(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


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
