"""Per-pixel layers on channels-last maps.

Shapes: N batch, C channels, H x W the map. A map N x C x H x W in ``torch.channels_last`` and its
tokens N x H x W x C are the same memory, so nothing here transposes by copying.
"""
import functools
import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.model.weight_init import update_init_info
from torch import Tensor, nn

from ..errors import ConfigError
from . import cpu_kernels


def to_tokens(x: Tensor) -> Tensor:
    """View a map as tokens: N C H W -> N H W C."""
    return x.permute(0, 2, 3, 1)


def to_map(x: Tensor) -> Tensor:
    """View tokens as a map: N H W C -> N C H W."""
    return x.permute(0, 3, 1, 2)


def pixel_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear map, C_out x C_in, to every pixel: N x C_in x H x W -> N x C_out x H x W.

    On CPUs a 1x1 convolution on channels-last memory runs in oneDNN, 2 to 6 times as fast as
    ``F.linear`` for these shapes; on GPUs ``F.linear`` is a plain matrix product.
    """
    if x.device.type == 'cpu':
        return F.conv2d(x, weight[:, :, None, None], bias)
    return to_map(F.linear(to_tokens(x), weight, bias))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """View a map as heads: N C H W -> N h (H W) d."""
    return to_tokens(x).flatten(1, 2).unflatten(2, (num_heads, -1)).transpose(1, 2)


def attend_maps(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention of a map to the pixels of two others, N x C each; a map of the queries' size."""
    n, c, height, width = q.shape
    q, k, v = (split_heads(x, num_heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return to_map(out.transpose(1, 2).reshape(n, height, width, c))


def check_lengths(needs: str, sizes: Mapping[str, Sequence[Any]]) -> None:
    """Raise a ConfigError if lists that go together differ in length."""
    if len({len(values) for values in sizes.values()}) > 1:
        raise ConfigError(f'{needs}, found ' + ', '.join(
            f'{len(values)} {name}' for name, values in sizes.items()))


def gelu(x: Tensor) -> Tensor:
    """``F.gelu`` of a map that nothing else uses: in place on a CPU if no gradient is needed."""
    out = None
    if x.device.type == 'cpu' and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        out = cpu_kernels.gelu_(channels_last(x))
    return F.gelu(x) if out is None else out


class PixelLinear(nn.Linear):
    """``nn.Linear`` over the channels of a map: N x C_in x H x W -> N x C_out x H x W."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_linear(x, self.weight, self.bias)


class PixelNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return to_map(super().forward(to_tokens(x)))


def init_weights(model: BaseModule) -> None:
    """Initialise all layers of a model, as the released implementation does.

    Linear layers: truncated normal with std 0.02. Convolutions: normal with std
    sqrt(2 / fan_out). Biases 0, norms 1 and 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif not isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)):
            continue
        elif module.weight is not None:
            nn.init.ones_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if hasattr(model, '_params_init_info'):  # mmengine logs what initialised each weight
        update_init_info(model, 'as released, see mmseg_edaformer.models.layers.init_weights')


def channels_last(x: Tensor) -> Tensor:
    """The map in channels-last memory, without a copy if it already is."""
    return x.contiguous(memory_format=torch.channels_last)


def gpu_kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels, if the tensor is on a GPU on which their self-check has passed."""
    return _kernels(x.device) if x.is_cuda and cpu_kernels.kernels_allowed() else None


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    # torch for Windows or CPUs comes without Triton.
    if importlib.util.find_spec('triton') is None:
        return None
    try:
        kernels = importlib.import_module('.triton_kernels', __package__)
        kernels.check(device)
    except Exception as error:  # whatever other versions of compiler and driver raise
        warnings.warn(f'the Triton kernels do not work on {torch.cuda.get_device_name(device)}, so '
                      f'slower code runs ({type(error).__name__}: {error}): set EDAFORMER_NATIVE=0 '
                      'to silence this', stacklevel=2)
        return None
    return kernels
