"""mmseg's resizes of logits, as a whole and as taps of each axis.

Shapes: C classes, h x w low-resolution logits, H x W labels.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Axis = tuple[int, int, tuple[int, int], bool, int | None, bool, str]
"""One axis of a `Chain`: the arguments of `axis_taps`."""


@dataclass(frozen=True)
class Chain:
    """What mmseg does to one image's logits before it takes the largest."""

    input_size: tuple[int, int]  # of the network, to which the first resize goes
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, right, top, bottom to crop after it
    flip: str | None = None  # 'horizontal' or 'vertical' if the input was flipped
    ori_shape: tuple[int, int] | None = None  # to which the second resize goes, if any
    align_corners: bool = False
    first: bool = True  # False for sliding windows, whose logits have the input's size already

    def resize(self, logits: Tensor) -> Tensor:
        """Resize as mmseg does, all classes at once: 1 x C x h x w -> 1 x C x H x W."""
        left, right, top, bottom = self.padding
        height, width = self.input_size
        x = logits
        if self.first:
            x = F.interpolate(x, self.input_size, None, 'bilinear', self.align_corners)
        x = x[..., top:height - bottom, left:width - right]
        if self.flip:
            x = x.flip(3 if self.flip == 'horizontal' else 2)
        if self.ori_shape is None:
            return x
        return F.interpolate(x, self.ori_shape, None, 'bilinear', self.align_corners)

    def axes(self, low: Sequence[int], device: torch.device) -> tuple[Axis, Axis]:
        """Rows and columns, for `axis_taps`."""
        left, right, *rows = self.padding
        out = self.ori_shape or (None, None)
        return ((low[0], self.input_size[0], (rows[0], rows[1]), self.flip == 'vertical', out[0],
                 self.align_corners, str(device)),
                (low[1], self.input_size[1], (left, right), self.flip == 'horizontal', out[1],
                 self.align_corners, str(device)))


@lru_cache(256)
@torch.inference_mode(False)
def _resize_taps(size: int, out: int, align_corners: bool, device: str) -> tuple[Tensor, Tensor]:
    """Both taps of one axis of ``F.interpolate``: indices and weights, out x 2.

    Compilers fuse ``position * scale - 0.5`` or not. For a position of 4000 that moves the weights
    by 2e-4, so this takes the variant that agrees with a resize of unit vectors.
    """
    position = torch.arange(out, dtype=torch.float64, device=device)
    whole, parts = (size - 1, out - 1) if align_corners else (size, out)
    scale = (torch.tensor(float(whole)) / max(parts, 1)).double().item() if parts else 0.
    units = F.one_hot(torch.arange(size, device=device) % 3, 4).float().t()[None, :, :, None]
    expected = F.interpolate(units, (out, 1), None, 'bilinear', align_corners)[0, :, :, 0]
    for fused in (True, False):
        source = position * scale if align_corners else (position + 0.5) * scale
        if not fused:
            source = source.float().double()
        source = (source if align_corners else source - 0.5).float().clamp(min=0)
        first = source.floor().clamp(max=size - 1)
        second = (source - first).clamp(0, 1)
        index = torch.stack([first, (first + 1).clamp(max=size - 1)], 1).long()
        weight = torch.stack([1 - second, second], 1)
        resized = torch.zeros_like(expected).scatter_add_(0, index.t() % 3, weight.t())
        if resized.equal(expected):
            break
    return index, weight


@lru_cache(256)
@torch.inference_mode(False)
def axis_taps(low: int, inner: int, pad: tuple[int, int], flip: bool, out: int | None,
              align_corners: bool, device: str = 'cpu') -> tuple[Tensor, Tensor]:
    """The taps of one axis of a chain: crop and flip only select rows of the first resize.

    It goes from length ``low`` of the logits to ``inner``, loses ``pad`` at its beginning and end,
    is reversed to ``flip`` it, and resized again to ``out`` unless that is None.

    Returns:
        Indices (int32) and weights (float32) of low-resolution positions, out x taps, with as many
        taps as any position needs. Those that need fewer repeat an index with weight 0.
    """
    index, weight = _resize_taps(low, inner, align_corners, device)
    kept = slice(pad[0], inner - pad[1])
    index, weight = index[kept], weight[kept]
    if flip:
        index, weight = index.flip(0), weight.flip(0)
    if out is not None:
        second, factor = _resize_taps(len(index), out, align_corners, device)
        index = index[second].flatten(1)
        weight = (factor[..., None] * weight[second]).flatten(1)
    index = index.where(weight > 0, index.gather(1, weight.argmax(1, keepdim=True)))
    index, order = index.sort(1)
    slot = F.pad(index.diff(dim=1) != 0, (1, 0)).cumsum(1)
    taps = int(slot.max()) + 1
    weights = weight.new_zeros(len(index), taps).scatter_add_(1, slot, weight.gather(1, order))
    indices = index[:, -1:].repeat(1, taps).scatter_(1, slot, index)
    return indices.int(), weights
