"""mmseg's resizes of logits: as a whole, as taps of each axis, and bit for bit at single pixels.

Shapes: C classes, h x w low-resolution logits, H x W labels.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

Axis = tuple[int, int, tuple[int, int], bool, int | None, bool, str]
"""One axis of a `Chain`: the arguments of `axis_taps`."""
Order = tuple[tuple[int, ...], bool]
"""In which order a kernel adds the four corners of a sample, or if two, those of each line and then
the lines; and whether it fuses multiplication and addition."""
ORDERS: list[Order] = [*((order, fused) for order in permutations(range(2))
                         for fused in (True, False)),
                       *((order, True) for order in permutations(range(4))),
                       (tuple(range(4)), False)]


@dataclass(frozen=True)
class Chain:
    """What mmseg does to one image's logits before it takes the largest.

    Args:
        input_size: Size of the first resize: the network's input.
        padding: Left, right, top and bottom rows or columns to crop after it.
        flip: 'horizontal' or 'vertical' where the input was flipped.
        ori_shape: Size of the second resize: the original image; None for no second resize.
        align_corners: As of ``F.interpolate``.
        first: Whether there is a first resize: of sliding windows' logits there is none, and they
            have the network's input size already.
    """

    input_size: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip: str | None = None
    ori_shape: tuple[int, int] | None = None
    align_corners: bool = False
    first: bool = True

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
def _resize_taps(size: int, out: int, align_corners: bool,
                 device: str) -> tuple[Tensor, Tensor, bool]:
    """Both taps of one axis of ``F.interpolate``: indices and weights, out x 2; are they its own?

    Compilers fuse ``position * scale - 0.5`` or not, which moves the weights of long axes by
    several roundings, so the variant is the one that agrees with a resize of unit vectors.
    """
    position = torch.arange(out, dtype=torch.float64, device=device)
    whole, parts = (size - 1, out - 1) if align_corners else (size, out)
    scale = (torch.tensor(float(whole)) / max(parts, 1)).double().item() if parts else 0.
    units = F.one_hot(torch.arange(size, device=device) % 3, 4).float().t()[None, :, :, None]
    found = F.interpolate(units, (out, 1), None, 'bilinear', align_corners)[0, :, :, 0]
    for fused in (True, False):
        source = position * scale if align_corners else (position + 0.5) * scale
        if not fused:
            source = source.float().double()
        source = (source if align_corners else source - 0.5).float().clamp(min=0)
        first = source.floor().clamp(max=size - 1)
        second = (source - first).clamp(0, 1)
        index = torch.stack([first, (first + 1).clamp(max=size - 1)], 1).long()
        weight = torch.stack([1 - second, second], 1)
        same = torch.zeros_like(found).scatter_add_(0, index.t() % 3, weight.t()).equal(found)
        if same:
            break
    return index, weight, same


@lru_cache(256)
@torch.inference_mode(False)
def axis_taps(low: int, inner: int, pad: tuple[int, int], flip: bool, out: int | None,
              align_corners: bool, device: str = 'cpu') -> tuple[Tensor, Tensor]:
    """The taps of one axis of a chain: crop and flip are but indices into the first resize.

    Args:
        low: Length h or w of the logits.
        inner: Length after the first resize.
        pad: What is cropped from its beginning and its end.
        flip: Whether it is then reversed.
        out: Length after the second resize; None for no second resize.
        align_corners: As of ``F.interpolate``.
        device: Where the tables lie.

    Returns:
        Indices (int32) and weights (float32) of low-resolution positions, out x taps, with as many
        taps as any position needs. Those that need fewer repeat an index with weight 0.
    """
    index, weight = _resize_taps(low, inner, align_corners, device)[:2]
    kept = slice(pad[0], inner - pad[1])
    index, weight = index[kept], weight[kept]
    if flip:
        index, weight = index.flip(0), weight.flip(0)
    if out is not None:
        second, factor = _resize_taps(len(index), out, align_corners, device)[:2]
        index = index[second].flatten(1)
        weight = (factor[..., None] * weight[second]).flatten(1)
    index = index.where(weight > 0, index.gather(1, weight.argmax(1, keepdim=True)))
    index, order = index.sort(1)
    slot = F.pad(index.diff(dim=1) != 0, (1, 0)).cumsum(1)
    taps = int(slot.max()) + 1
    weights = weight.new_zeros(len(index), taps).scatter_add_(1, slot, weight.gather(1, order))
    indices = index[:, -1:].repeat(1, taps).scatter_(1, slot, index)
    return indices.int(), weights


def is_channels_last(logits: Tensor) -> bool:
    """Whether the first resize of logits 1 x C x h x w gives channels-last memory."""
    return F.interpolate(logits, (2, 2), None, 'bilinear', False).stride(1) == 1


def find_orders(logits: Tensor, chain: Chain) -> list[Tensor] | None:
    """In which order the chain's resizes add: for each resize the entry of ORDERS, by class.

    It depends on the processor and on how torch was built, on the memory format and the size
    (small outputs take another kernel), and on whether the class fills a vector; so it is found
    by trial. None: in none that is known. Logits are 1 x C x h x w.
    """
    device = str(logits.device)
    channels_last = logits.is_contiguous(memory_format=torch.channels_last)
    steps = [(channels_last, True, *logits.shape[2:], *chain.input_size)]
    if chain.ori_shape is not None:
        left, right, top, bottom = chain.padding
        steps.append((is_channels_last(logits), bool(chain.flip) or not left + right,
                      chain.input_size[0] - top - bottom, chain.input_size[1] - left - right,
                      *chain.ori_shape))
    orders = []
    for layout, dense, h, w, height, width in steps:
        found = _try_orders(logits.shape[1], layout, dense, height + width <= 128, device)
        if found is None or not all(_resize_taps(*sizes, chain.align_corners, device)[2]
                                    for sizes in ((h, height), (w, width))):
            return None
        orders.append(found)
    return orders


@lru_cache(64)
def _try_orders(classes: int, channels_last: bool, dense: bool, small: bool,
                device: str) -> Tensor | None:
    x = torch.randn(1, classes, 6, 8, generator=torch.Generator().manual_seed(0)).to(device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x = x if dense else x[..., :7]
    size = (11, 13 if small else 130)
    wanted = F.interpolate(x, size, None, 'bilinear', False)[0]
    (row, rows, known), (column, columns, _) = (_resize_taps(n, out, False, device)
                                                for n, out in zip(x.shape[2:], size))
    corners = [x[0][:, row[:, i]][..., column[:, j]] for i in range(2) for j in range(2)]
    found = torch.full((classes,), -1, device=device)
    for i, order in enumerate(ORDERS):
        value = _bilinear(order, corners, [weight[:, None] for weight in rows.t()], columns.t())
        found[(found < 0) & (value == wanted).all(2).all(1)] = i
    return found if known and bool((found >= 0).all()) else None


def resize_at(logits: Tensor, chain: Chain, orders: Sequence[Tensor], classes: Tensor, y: Tensor,
              x: Tensor) -> Tensor:
    """Single values of ``chain.resize(logits)``, bit for bit.

    Args:
        logits: 1 x C x h x w, float32.
        chain: The resizes.
        orders: From `find_orders`.
        classes: Class of each value.
        y: Row of each value.
        x: Column of each value.
    """
    corners, weights, outer = [], [], []
    for axis, position in zip(chain.axes(logits.shape[2:], logits.device), (y, x)):
        low, inner, pad, flip, out, align_corners, device = axis
        position = position[:, None]
        if out is not None:
            second, factor, _ = _resize_taps(inner - sum(pad), out, align_corners, device)
            outer.append(factor[position[:, 0]].t())
            position = second[position[:, 0]]
        position = inner - pad[1] - 1 - position if flip else position + pad[0]
        index, weight, _ = _resize_taps(low, inner, align_corners, device)
        corners.append([pair.unbind(1) for pair in index[position].unbind(1)])
        weights.append([pair.t() for pair in weight[position].unbind(1)])
    values = [_by_class(orders[0][classes], [logits[0, classes, i, j] for i in row for j in column],
                        row_weights, column_weights)
              for row, row_weights in zip(corners[0], weights[0])
              for column, column_weights in zip(corners[1], weights[1])]
    return _by_class(orders[1][classes], values, *outer) if outer else values[0]


def _by_class(orders: Tensor, corners: Sequence[Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear samples, each in the order of its class."""
    value = torch.empty_like(corners[0])
    for i in orders.unique().tolist():
        chosen = orders == i
        value[chosen] = _bilinear(ORDERS[i], [corner[chosen] for corner in corners],
                                  rows[:, chosen], columns[:, chosen])
    return value


def _bilinear(order: Order, corners: Sequence[Tensor], rows: Sequence[Tensor] | Tensor,
              columns: Sequence[Tensor] | Tensor) -> Tensor:
    """Bilinear samples from their corners, line by line, and the weights of rows and columns."""
    if len(order[0]) == 2:
        lines = [_dot(columns, corners[:2], order), _dot(columns, corners[2:], order)]
        return _dot(rows, lines, order)
    return _dot([row * column for row in rows for column in columns], corners, order)


def _dot(weights: Sequence[Tensor] | Tensor, values: Sequence[Tensor], order: Order) -> Tensor:
    """Sum of products, rounded to float32 as in this order."""
    first, *others = order[0]
    total = weights[first] * values[first]
    for i in others:
        if order[1]:  # float64 holds the product exactly
            total = (weights[i].double() * values[i].double() + total.double()).float()
        else:
            total = weights[i] * values[i] + total
    return total
