"""What one forward pass costs, counted without computing it."""
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, input_size: tuple[int, int] = (512, 512)) -> int:
    """Count the multiply-accumulates of one image through a model.

    Convolutions, linear layers and attention (2 N M C for N queries and M keys of C channels) as
    this implementation runs them; norms, activations, pooling and resizing are left out. What
    papers print as FLOPs is this number.

    Args:
        model: A segmentor, a backbone or any module that takes one N x 3 x H x W tensor; wrapped
            by DDP or compiled just as well.
        input_size: Height and width in pixels.
    """
    with on_meta(model) as shadow:
        return trace_macs(shadow, input_size)


def trace_macs(shadow: nn.Module, input_size: tuple[int, int]) -> int:
    """`count_macs` for a model that is on the meta device already."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, 3, *input_size, device='meta'))
    return counter.get_total_flops() // 2


def unwrap(model: Any) -> nn.Module:
    """The model within DDP and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


@contextmanager
def on_meta(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model without wrappers, in eval mode, whose weights take no memory.

    torch's counter takes attention on the CPU for 0, so costs are counted on the meta device.
    """
    model = unwrap(model)
    # deepcopy takes what the memo holds in place of the weights.
    memo: dict[int, object] = {
        id(tensor): nn.Parameter(torch.empty_like(tensor, device='meta'), requires_grad=False)
        if isinstance(tensor, nn.Parameter) else torch.empty_like(tensor, device='meta')
        for tensor in (*model.parameters(), *model.buffers())}
    shadow = copy.deepcopy(getattr(model, '_orig_mod', model), memo)
    for module in list(shadow.modules()):  # count what the compiled parts were compiled from
        if hasattr(vars(module).get('forward'), '_torchdynamo_orig_callable'):
            del module.forward
        for name, child in module.named_children():
            if hasattr(child, '_orig_mod'):
                setattr(module, name, child._orig_mod)
    shadow.eval()  # mmseg's SwinTransformer returns None from it
    yield shadow
