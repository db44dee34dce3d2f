"""Label maps from a head's low-resolution logits, without logits at full resolution.

mmseg resizes the logits of all classes to the network's input, crops the padding, flips back,
resizes to the original image and takes the largest class. Both resizes are linear and separable,
so every output row (column) is a weighted sum of a few low-resolution ones, its *taps*. The output
is computed in blocks from the logits under each block, for those classes alone that can win there.
Sums in another order round otherwise, so pixels whose two best classes lie within rounding are
*contested* and computed again with the very arithmetic of mmseg's resizes.

Shapes: C classes, h x w low-resolution logits, H x W labels.
"""
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .layers import gpu_kernels
from .resize import Axis, Chain, axis_taps, find_orders, is_channels_last, resize_at

ROUNDING = 32 * torch.finfo(torch.float32).eps
"""How far apart mmseg's difference of two logits and ours can be, relative to the largest logit:
two bilinear resizes round at most 23 times by half an eps, for each logit."""
_LARGEST = torch.finfo(torch.float32).max / 16  # beyond, sums of logits may not be finite
CACHE = 1 << 20
"""Bytes of a working set that stays in a core's cache."""


def label_maps(logits: Tensor, chains: Sequence[Chain], memory: int = 1 << 28) -> list[Tensor]:
    """`label_map` of each image of a batch; at once on a GPU, where all have the same chain.

    There, of two classes within rounding of each other either may be the label. Nearly every image
    has a few such pixels, and to settle them takes many small kernels.

    Args:
        logits: N x C x h x w from the head.
        chains: The resizes of each image.
        memory: As for `label_map`, for each image.

    Returns:
        A label map H x W for each image.
    """
    kernels = gpu_kernels(logits)
    axes = chains[0].axes(logits.shape[2:], logits.device)
    if kernels is None or len(set(chains)) > 1 or _unchanged(axes):
        return [label_map(logits[i:i + 1], chain, memory) for i, chain in enumerate(chains)]
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        rows, columns = (kernels.Axis.of(logits.device, *axis) for axis in axes)
        labels = kernels.resize_argmax(logits, rows, columns, _label_type(logits))
        # The only wait for the GPU.
        finite = (logits.abs().amax((1, 2, 3)).float() < _LARGEST).tolist()
        return [labels[i] if there else _literal(logits[i:i + 1].float(), chains[i], memory)
                for i, there in enumerate(finite)]


def label_map(logits: Tensor, chain: Chain, memory: int = 1 << 28) -> Tensor:
    """The labels that mmseg's chain of resizes and argmax gives, label for label.

    Of equal logits the lowest class wins. Where logits are not finite the chain is followed
    literally, so NaN wins as in ``torch.argmax``.

    Args:
        logits: 1 x C x h x w from the head, ``logits[i:i + 1]`` of a batch, strided as mmseg has
            them: torch rounds otherwise for channels-last. Computed in float32.
        chain: The resizes.
        memory: Bound of the temporary tensors, in bytes, beyond one copy of the logits. Only what
            follows the chain literally may exceed it, with up to 19 planes of H x W.

    Returns:
        H x W labels, uint8 for up to 256 classes, else int16.
    """
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        lowest, largest = (float(value) for value in torch.aminmax(logits))
        scale = max(abs(lowest), abs(largest))
        finite = scale < _LARGEST
        axes = chain.axes(logits.shape[2:], logits.device)
        if finite and _unchanged(axes):
            rows, columns = (axis_taps(*axis)[0][:, 0] for axis in axes)
            labels = logits[0].argmax(0).to(_label_type(logits))
            return labels[rows][:, columns]
        resized = math.prod(chain.input_size) * chain.first + math.prod(chain.ori_shape or (0, 0))
        if not finite or resized < 2 * math.prod(logits.shape[2:]):  # cheap as it is
            return _literal(logits, chain, memory)
        labels, contested = resize_argmax(logits, chain, ROUNDING * scale, memory)
        return settle(labels, contested, logits, chain, ROUNDING * scale, memory)


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

    Returns:
        The low-resolution positions of each block, n x span, the weight of each for every position
        of the block, n x size x span, and how many positions of the first block lie before the
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


def resize_argmax(logits: Tensor, chain: Chain, tolerance: float,
                  memory: int) -> tuple[Tensor, Tensor]:
    """The largest classes, and where two classes lie within the tolerance.

    The output is cut into blocks. A class can win in a block only if the largest of its logits
    under the block reaches what some class has at least there; blocks with one such class are done.

    Args:
        logits: 1 x C x h x w, float32 and finite.
        chain: The resizes.
        tolerance: What two logits may differ by for rounding alone.
        memory: Bound of the temporary tensors, in bytes, beyond one copy of the logits.

    Returns:
        Labels H x W, uint8 for up to 256 classes, else int16, and a mask H x W of the contested
        ones, whose labels mean nothing.
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
    labels = torch.cat(parts)[top:top + height, left:left + width]
    return labels.to(_label_type(logits)), labels < 0


def _block_labels(x: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor],
                  tolerance: float, memory: int, most: float) -> Tensor | None:
    """Labels of whole rows of blocks (int16, -1 where contested) from logits h x w x C.

    None where more than the share ``most`` of all classes is possible on average.
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
    # The rest, those with the most classes first, in chunks that stay in a core's cache. They are
    # products of the dense weights of the block's rows and columns with the logits under it.
    count, blocks = count.sort(descending=True)
    start, counts = start[blocks], count.tolist()
    code = 1 << x.shape[2].bit_length()
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
        value.ge_(value.amax(2, keepdim=True).sub_(tolerance))
        # The sum over the classes is code + class if only one is the largest.
        value = value.mul_((candidate + code)[:, None, :, None]).sum(2).flatten(1)
        labels[block] = torch.where(value < 2 * code, value - code, -1).short()
        done += n
    return labels.view(-1, across, size, size).transpose(1, 2).reshape(-1, across * size)


def _product_dtype() -> torch.dtype:
    """float64 where the user lets float32 matrix products be rounded to TF32 or bfloat16."""
    try:
        exact = torch.get_float32_matmul_precision() == 'highest'
    except RuntimeError:  # set through torch's newer interface, which this one cannot read
        exact = False
    return torch.float32 if exact else torch.float64


def settle(labels: Tensor, contested: Tensor, logits: Tensor, chain: Chain, tolerance: float,
           memory: int) -> Tensor:
    """Compute the contested labels as mmseg does.

    Args:
        labels: H x W, changed in place.
        contested: Mask H x W.
        logits: 1 x C x h x w, float32 and finite, strided as mmseg resizes them.
        chain: The resizes.
        tolerance: What two logits may differ by for rounding alone.
        memory: Bound of the temporary tensors, in bytes.

    Returns:
        The labels.
    """
    pixels = contested.flatten().nonzero()[:, 0]
    if not len(pixels):
        return labels
    orders = find_orders(logits, chain)
    if orders is None or len(pixels) > contested.numel() / 16:
        return _literal(logits, chain, memory)
    rows, columns = (axis_taps(*axis) for axis in chain.axes(logits.shape[2:], logits.device))
    taps = rows[0].shape[1] * columns[0].shape[1]
    for part in pixels.split(max(1, memory // (logits.shape[1] * (8 * taps + 256)))):
        y, x = part // labels.shape[1], part % labels.shape[1]
        value = logits[0][:, rows[0][y, :, None], columns[0][x, None]]  # C, part, taps, taps
        value = (value * (rows[1][y, :, None] * columns[1][x, None])).sum((2, 3))
        classes, pixel = (value >= value.amax(0) - tolerance).nonzero(as_tuple=True)
        value = resize_at(logits, chain, orders, classes, y[pixel], x[pixel])
        best = value.new_full((len(part),), -torch.inf).scatter_reduce_(0, pixel, value, 'amax')
        first = value == best[pixel]
        winner = torch.full_like(part, logits.shape[1]).scatter_reduce_(
            0, pixel[first], classes[first], 'amin')
        labels[y, x] = winner.to(labels.dtype)
    return labels


def _literal(logits: Tensor, chain: Chain, memory: int) -> Tensor:
    """The labels by mmseg's own resizes, some classes at a time."""
    _, channels, height, width = logits.shape
    channels_last = is_channels_last(logits)
    shape = [len(axis_taps(*axis)[0]) for axis in chain.axes((height, width), logits.device)]
    planes = memory // (12 * (math.prod(chain.input_size) + math.prod(shape)))
    # Vectorised over channels, for channels-last and small outputs, torch rounds otherwise in the
    # last, incomplete vector, and takes another kernel for fewer than four channels.
    vectors = (channels_last or logits.is_contiguous(memory_format=torch.channels_last) or
               min(sum(chain.input_size), sum(shape)) <= 128)
    step = (planes // 16 * 16 or 16) if vectors else max(planes, 1)
    bounds = [*range(0, max(channels - 3, 1), step), channels]
    best = labels = None
    for begin, end in pairwise(bounds):
        block = logits[:, begin:end].contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        value, label = chain.resize(block)[0].max(0)
        label = (label + begin).to(_label_type(logits))
        if best is None or labels is None:
            best, labels = value, label
        else:
            better = ~(value <= best) & ~best.isnan()  # NaN is the largest
            best, labels = value.where(better, best), label.where(better, labels)
    assert labels is not None
    return labels
