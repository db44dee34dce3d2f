"""Label maps from a head's low-resolution logits, without logits at full resolution.

mmseg resizes the logits of all classes to the network's input, crops the padding, flips back,
resizes to the original image and takes the largest class. Both resizes are linear and separable,
so every output row (column) is a weighted sum of a few low-resolution ones, its *taps*. The output
is computed in blocks from the logits under each block, for only those classes that can win there.
Sums in another order round differently, so where the logits of the two best classes differ by no
more than `ROUNDING` times the largest logit, either of the two may be the label.

Shapes: C classes, h x w low-resolution logits, H x W labels.
"""
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .layers import gpu_kernels
from .resize import Axis, Chain, axis_taps

ROUNDING = 32 * torch.finfo(torch.float32).eps
"""Bound of the difference between mmseg's distance of two logits and the one here, relative to the
largest logit: two bilinear resizes round at most 23 times by half an eps, for each logit."""
_LARGEST = torch.finfo(torch.float32).max / 16  # above it, sums of logits may overflow
CACHE = 1 << 20
"""Bytes of a working set that stays in a core's cache."""


def label_maps(logits: Tensor, chains: Sequence[Chain], memory: int = 1 << 28) -> list[Tensor]:
    """`label_map` of each image of a batch; at once on a GPU, if all have the same chain."""
    kernels = gpu_kernels(logits)
    axes = chains[0].axes(logits.shape[2:], logits.device)
    if kernels is None or len(set(chains)) > 1 or _unchanged(axes):
        return [label_map(logits[i:i + 1], chain, memory) for i, chain in enumerate(chains)]
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        rows, columns = (kernels.Axis.of(logits.device, *axis) for axis in axes)
        labels = kernels.resize_argmax(logits, rows, columns, _label_type(logits))
        # The only synchronisation with the GPU.
        finite = (logits.abs().amax((1, 2, 3)).float() < _LARGEST).tolist()
        return [labels[i] if finite[i] else _literal(logits[i:i + 1].float(), chains[i], memory)
                for i in range(len(finite))]


def label_map(logits: Tensor, chain: Chain, memory: int = 1 << 28) -> Tensor:
    """The labels of mmseg's chain of resizes and argmax, but for ties within rounding.

    Where the logits of two classes differ by no more than ``ROUNDING * logits.abs().max()``, either
    may be the label; of equal sums the lowest class wins. If logits are not finite the chain is
    followed literally, so NaN wins as in ``torch.argmax``.

    ``logits`` are 1 x C x h x w from the head. ``memory`` bounds the temporary tensors, in bytes,
    in addition to one copy of the logits; following the chain literally may exceed it by one plane
    of H x W and its input. The labels, H x W, are uint8 for up to 256 classes, else int16.
    """
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        scale = max(abs(float(value)) for value in torch.aminmax(logits))
        finite = scale < _LARGEST
        axes = chain.axes(logits.shape[2:], logits.device)
        if finite and _unchanged(axes):
            rows, columns = (axis_taps(*axis)[0][:, 0] for axis in axes)
            labels = logits[0].argmax(0).to(_label_type(logits))
            return labels[rows][:, columns]
        resized = math.prod(chain.input_size) * chain.first + math.prod(chain.ori_shape or (0, 0))
        if not finite or resized < 2 * math.prod(logits.shape[2:]):  # cheap as it is
            return _literal(logits, chain, memory)
        return resize_argmax(logits, chain, ROUNDING * scale, memory)


def _unchanged(axes: Sequence[Axis]) -> bool:
    """Whether the resizes of a chain change nothing."""
    return all(low == inner and out in (None, inner - sum(pad))
               for low, inner, pad, _, out, *_ in axes)


def _label_type(logits: Tensor) -> torch.dtype:
    return torch.uint8 if logits.shape[1] <= 256 else torch.int16


@lru_cache(256)
@torch.inference_mode(False)
def _blocks(size: int, axis: Axis) -> tuple[Tensor, Tensor, int]:
    """Cut one axis of the output into n blocks of equal size.

    Returns the low-resolution positions of each block, n x span, the weight of each for every
    position of the block, n x size x span, and how many positions of the first block lie before the
    output. Those, and those after the output, repeat its ends.
    """
    indices, weights = axis_taps(*axis)
    out, taps = indices.shape
    best = None
    for lead in range(0, size, max(size // 16, 1)):
        n = -(-(out + lead) // size)
        position = (torch.arange(n * size, device=indices.device) - lead).clamp(0, out - 1)
        index = indices[position].long().view(n, size, taps)
        first, last = index.amin((1, 2)), index.amax((1, 2))
        cost = int((last - first).max()), int((last - first).sum())
        if best is None or cost < best[0]:
            best = cost, lead, position, index, first, last
    assert best is not None
    (span, _), lead, position, index, first, last = best
    region = (first[:, None] + torch.arange(span + 1, device=first.device)).minimum(last[:, None])
    dense = weights.new_zeros(*index.shape[:2], span + 1)
    dense.scatter_add_(2, index - first[:, None, None], weights[position].view_as(index))
    return region, dense, lead


def resize_argmax(logits: Tensor, chain: Chain, tolerance: float, memory: int) -> Tensor:
    """The largest class of each pixel.

    The output is cut into blocks. A class can win in a block only if the largest of its logits
    under the block reaches the smallest one of every other class, less ``tolerance``; blocks with a
    single such class need no resize. Arguments are those of `label_map`, with finite logits.
    """
    rows, columns = chain.axes(logits.shape[2:], logits.device)
    height, width = len(axis_taps(*rows)[0]), len(axis_taps(*columns)[0])
    x = logits[0].permute(1, 2, 0).contiguous()
    size = 16
    while size < 64 and size <= height / x.shape[0]:
        size *= 2
    # Where most classes are possible nearly everywhere, large blocks save the most.
    for block, most in ((size, 0.25), (64, 1.)):
        regions, weights, top = _blocks(block, rows)
        across, _, left = columns_blocks = _blocks(block, columns)
        lines = 12 * x.shape[2] * (regions.shape[1] * x.shape[1] + across.numel())
        step = max(1, memory // 2 // lines)
        parts = []
        for i in range(0, len(regions), step):
            part = _block_labels(x, (regions[i:i + step], weights[i:i + step]),
                                 columns_blocks[:2], tolerance, memory // 2, most)
            if part is None:
                break
            parts.append(part)
        if part is not None:
            break
    return torch.cat(parts)[top:top + height, left:left + width].to(_label_type(logits))


def _block_labels(x: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor],
                  tolerance: float, memory: int, most: float) -> Tensor | None:
    """Labels (int16) of whole rows of blocks from logits h x w x C.

    None if more than the fraction ``most`` of all classes is possible on average.
    """
    (row_regions, row_weights), (column_regions, column_weights) = rows, columns
    (across, span), (_, size, height) = column_regions.shape, row_weights.shape
    lines = x[row_regions]
    upper = lines.amax(1)[:, column_regions].amax(2)
    lower = lines.amin(1)[:, column_regions].amin(2)
    possible = (upper >= lower.amax(2, keepdim=True) - tolerance).flatten(0, 1)
    del lines, upper, lower
    count = possible.sum(1)
    if int(count.sum()) > most * possible.numel():
        return None
    classes = possible.nonzero()[:, 1]
    start = count.cumsum(0) - count
    labels = classes[start].short()[:, None].repeat(1, size * size)
    # Then the other blocks, those with the most classes first, in chunks that stay in a core's
    # cache: products of the dense weights of a block's rows and columns with the logits under it.
    count, blocks = count.sort(descending=True)
    start, counts = start[blocks], count.tolist()
    done = 0
    while done < len(counts) and counts[done] > 1:
        k = counts[done]
        cost = k * (12 * height * span + 4 * size * (size + span))
        chunk = slice(done, done + max(1, min(memory, CACHE) // cost))
        block = blocks[chunk]
        n = len(block)
        row, column = block // across, block % across
        rank = torch.arange(k, device=x.device)
        candidate = classes[(start[chunk, None] + rank).clamp_(max=len(classes) - 1)]
        index = row_regions[row][:, :, None, None] * x.shape[1]
        index = (index + column_regions[column][:, None, None]) * x.shape[2]
        value = x.view(-1)[index + candidate[:, None, :, None]]  # n, height, k, span
        value.masked_fill_((rank >= count[chunk, None])[:, None, :, None], -1e38)
        value = value.to(_product_dtype())
        value = row_weights[row].to(value) @ value.view(n, height, k * span)
        value = value.view(n, size * k, span) @ column_weights[column].to(value).transpose(1, 2)
        value = value.view(n, size, k, size)
        value.ge_(value.amax(2, keepdim=True))
        # The lowest of the largest classes, without the slow argmax over a middle axis.
        value.mul_((x.shape[2] - candidate)[:, None, :, None])
        labels[block] = (x.shape[2] - value.amax(2).flatten(1)).short()
        done += n
    return labels.view(-1, across, size, size).transpose(1, 2).reshape(-1, across * size)


def _product_dtype() -> torch.dtype:
    """float64 if the user allows TF32 or bfloat16 in float32 matrix products."""
    try:
        exact = torch.get_float32_matmul_precision() == 'highest'
    except RuntimeError:  # set through torch's newer interface, which this one cannot read
        exact = False
    return torch.float32 if exact else torch.float64


def _literal(logits: Tensor, chain: Chain, memory: int) -> Tensor:
    """The labels by mmseg's own resizes, some classes at a time."""
    shape = [len(axis_taps(*axis)[0]) for axis in chain.axes(logits.shape[2:], logits.device)]
    step = max(1, memory // (12 * (math.prod(chain.input_size) + math.prod(shape))))
    best = labels = None
    for begin in range(0, logits.shape[1], step):
        value, label = chain.resize(logits[:, begin:begin + step])[0].max(0)
        label = (label + begin).to(_label_type(logits))
        if best is None or labels is None:
            best, labels = value, label
        else:
            better = ~(value <= best) & ~best.isnan()  # NaN is the largest
            best, labels = value.where(better, best), label.where(better, labels)
    assert labels is not None
    return labels
