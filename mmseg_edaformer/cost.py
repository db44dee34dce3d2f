"""What one forward pass costs, counted without computing it."""
import copy
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .errors import ExampleError, UserError

Inputs = tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: its arguments, by position or by name."""


def count_macs(model: nn.Module, input_size: tuple[int, int] = (512, 512), *,
               compute: bool = True) -> int:
    """Count the multiply-accumulates of one image through a model.

    Convolutions, linear layers and attention (2 N M C for N queries and M keys of C channels) as
    this implementation runs them; norms, activations, pooling and resizing are left out. What
    papers print as FLOPs is this number.

    Args:
        model: A segmentor, a backbone or any module that takes one N x 3 x H x W tensor; wrapped
            by DDP or compiled too.
        input_size: Height and width in pixels.
        compute: Whether a model that asks for values on the way may run; otherwise its error is
            raised.
    """
    with on_meta(model) as shadow:
        return trace_macs(shadow, input_size, compute=compute)


def windows(model: nn.Module, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return height and width of each window that mmseg's sliding inference makes of an image.

    All windows of an image have one size. It is the image itself where the model's ``test_cfg``
    does not slide.
    """
    settings = getattr(model, 'test_cfg', None) or {}
    if settings.get('mode') != 'slide':
        return [size]
    sides = list(zip(size, settings['crop_size'], settings['stride']))
    count = math.prod(max(math.ceil((full - crop) / stride), 0) + 1
                      for full, crop, stride in sides)
    rows, columns = (min(full, crop) for full, crop, _ in sides)
    return [(rows, columns)] * count


def trace_macs(shadow: nn.Module, inputs: tuple[int, int] | Inputs, *,
               compute: bool = True) -> int:
    """`count_macs` for a model that is on the meta device already.

    A model that asks for values on the way gets its own weights back and computes.

    Args:
        shadow: The model.
        inputs: Height and width in pixels of an image, or what the model is called with.
    """
    def on(device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
        given = inputs
        if not isinstance(inputs, Mapping) and isinstance(inputs[0], int):
            given = example_image(shadow, inputs)
        return cast(Inputs, tree_map_only(torch.Tensor, lambda x: x.to(
            device, dtype if x.is_floating_point() else None), given))

    try:
        return _trace(shadow, on(torch.device('meta'), torch.float))
    except UserError:
        raise
    except Exception:
        if not compute:
            raise
        with_weights(shadow)
        return _trace(shadow, on(_place(shadow)[0]))


def _trace(model: nn.Module, inputs: Inputs) -> int:
    # torch's counter does not see into the fast path of nn.MultiheadAttention, nor into a fused
    # attention on the CPU, which it takes for 0.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (FlopCounterMode(display=False) as counter, torch.no_grad(),
              sdpa_kernel(SDPBackend.MATH)):
            run(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def run(model: nn.Module, inputs: Inputs) -> None:
    """Call a model with what it takes, or a segmentor with an image."""
    if isinstance(inputs, Mapping):
        model(**inputs)
        return
    head = getattr(model, 'decode_head', None)
    if head is None or 'batch_data_samples' not in inspect.signature(head.forward).parameters:
        model(*inputs)
        return
    # Heads of mmdet ask for the sizes of the images too.
    size = tuple(inputs[0].shape[2:])
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size)
    cast(Any, model).encode_decode(inputs[0], [meta] * len(inputs[0]))


def example_image(model: nn.Module, size: tuple[int, int] | None = None) -> Inputs:
    """Random pixels of as many channels as the first convolution of a model takes, in its dtype.

    Args:
        model: The model.
        size: Height and width in pixels; by default those that the model declares, or 224.
    """
    if size is None:
        declared = (getattr(place, name, None) for module in model.modules()
                    for place in (module, getattr(module, 'config', None))
                    for name in ('img_size', 'image_size'))
        size = next((_pair(value) for value in declared if value), (224, 224))
    channels = next((module.in_channels for module in model.modules()
                     if isinstance(module, nn.Conv2d)), 3)
    generator = torch.Generator().manual_seed(0)
    device, dtype = _place(model)
    return torch.randn(1, channels, *size, generator=generator).to(device, dtype),


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model's first floating-point parameter."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return parameter.device, parameter.dtype


def _pair(value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(value)[-2:]
    return int(sides[0]), int(sides[-1])


def with_weights(shadow: nn.Module) -> None:
    """Give a model on the meta device the weights that it stands for; buffers are copied."""
    for module in shadow.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, 'isr_origin'):
                module.register_parameter(name, nn.Parameter(parameter.isr_origin.detach(),
                                                             requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if hasattr(buffer, 'isr_origin'):
                module.register_buffer(name, buffer.isr_origin.clone(),
                                       name not in module._non_persistent_buffers_set)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model within DDP, and within mmengine's wrappers and test-time augmentation."""
    while isinstance(model, _wrappers()):
        model = cast(Any, model).module
    return model


def _wrappers() -> tuple[type, ...]:
    wrappers: tuple[type, ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if 'mmengine.model' in sys.modules:  # without it, no model can be wrapped by it
        from mmengine.model import BaseTTAModel
        from mmengine.registry import MODEL_WRAPPERS
        wrappers += BaseTTAModel, *MODEL_WRAPPERS.module_dict.values()
    return wrappers


@contextmanager
def on_meta(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model without wrappers, in eval mode, whose weights take no memory.

    Each of them knows, as ``isr_origin``, what it stands for.
    """
    model = unwrap(model)
    # deepcopy takes what the memo holds in place of the weights.
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        # In float32, since some models only run so, or under autocast.
        empty = torch.empty_like(tensor, device='meta',
                                 dtype=torch.float if tensor.is_floating_point() else None)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(
            tensor, nn.Parameter) else empty
        memo[id(tensor)].isr_origin = tensor
    try:
        shadow = copy.deepcopy(getattr(model, '_orig_mod', model), memo)
    except Exception as error:  # of whatever it holds: locks, generators, results of a forward
        raise ExampleError(f'{type(model).__name__} cannot be copied, which counting its cost '
                           f'needs ({type(error).__name__}: {error})') from error
    for module in list(shadow.modules()):  # count what the compiled parts were compiled from
        if hasattr(vars(module).get('forward'), '_torchdynamo_orig_callable'):
            del module.forward
        for name, child in module.named_children():
            if hasattr(child, '_orig_mod'):
                setattr(module, name, child._orig_mod)
    shadow.eval()  # mmseg's SwinTransformer returns None from it
    yield shadow
