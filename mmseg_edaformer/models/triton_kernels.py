"""Triton kernels for GPUs, imported by `layers.gpu_kernels` if Triton is installed.

Each has a plain counterpart, named in its docstring, with which the tests compare it.

The kernels on logits work on *cells*: the pixels that lie between the same neighbouring logits. A
program loads the few logits of a cell once, all classes along the memory, and makes the cell's
pixels from them in registers. Logits at full resolution never exist.
"""
import functools
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .resize import Chain, axis_taps

MAX_CELL = 8
"""Pixels of a cell along one axis; longer runs are split."""

CLASS_BLOCK = 32
"""Classes that a program holds at once."""


class Axis:
    """One axis of a resize as a kernel reads it: runs of outputs that share their inputs."""

    def __init__(self, indices: Tensor, weights: Tensor, device: torch.device) -> None:
        indices = indices.cpu()
        new = torch.ones(len(indices), dtype=torch.bool)
        new[1:] = (indices[1:] != indices[:-1]).any(1)
        begins = [*new.nonzero().flatten().tolist(), len(indices)]
        starts = torch.tensor([begin for a, b in pairwise(begins)
                               for begin in range(a, b, MAX_CELL)], dtype=torch.int32)
        ends = torch.cat([starts[1:], starts.new_tensor([len(indices)])])
        self.cells = len(starts)
        self.taps = indices.shape[1]
        self.block = triton.next_power_of_2(int((ends - starts).max()))
        self.starts = starts.to(device)
        self.lengths = (ends - starts).to(device)
        self.indices = indices[starts.long()].to(device, torch.int32).contiguous()
        self.weights = weights.to(device, torch.float32).contiguous()

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, device: torch.device, *size: Any) -> 'Axis':
        """The axis that `resize.axis_taps` describes."""
        return cls(*axis_taps(*size), device)

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.starts, self.lengths, self.indices, self.weights


@triton.jit
def _pixels(y_start, y_length, x_start, x_length, BY: tl.constexpr, BX: tl.constexpr):
    """The cell and the image of a program, and the positions of its pixels and which exist."""
    cell_x, cell_y, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, column = tl.arange(0, BY * BX) // BX, tl.arange(0, BY * BX) % BX
    exists = (row < tl.load(y_length + cell_y)) & (column < tl.load(x_length + cell_x))
    y, x = tl.load(y_start + cell_y) + row, tl.load(x_start + cell_x) + column
    return cell_y, cell_x, image, y, x, exists


@triton.jit
def _tap(index, weight, cell, position, exists, i, T: tl.constexpr):
    """One of the T taps of a cell on an axis, and its weight for each of these positions."""
    return tl.load(index + cell * T + i), tl.load(weight + position * T + i, mask=exists, other=0.)


@triton.jit
def _cell_logits(logits, stride_c, stride_y, stride_x, classes: tl.constexpr, c, y, x, exists,
                 cell_y, cell_x, y_index, y_weight, x_index, x_weight, TY: tl.constexpr,
                 TX: tl.constexpr, P: tl.constexpr, BC: tl.constexpr):
    """Logits of the pixels of a cell, P x BC, for the classes c."""
    values = tl.zeros([P, BC], tl.float32)
    for i in range(TY):
        row, row_weight = _tap(y_index, y_weight, cell_y, y, exists, i, TY)
        for j in range(TX):
            column, weight = _tap(x_index, x_weight, cell_x, x, exists, j, TX)
            corner = tl.load(logits + row * stride_y + column * stride_x + c * stride_c,
                             mask=c < classes, other=0.).to(tl.float32)
            values += (row_weight * weight)[:, None] * corner[None, :]
    return tl.where((c < classes)[None, :], values, float('-inf'))


@triton.jit
def _resize_argmax(logits, stride_n, stride_c, stride_y, stride_x, labels, height, width,
                   y_start, y_length, y_index, y_weight, x_start, x_length, x_index, x_weight,
                   classes: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BY: tl.constexpr,
                   BX: tl.constexpr, BC: tl.constexpr):
    cell_y, cell_x, image, y, x, exists = _pixels(y_start, y_length, x_start, x_length, BY, BX)
    best = tl.full([BY * BX], float('-inf'), tl.float32)
    label = tl.zeros([BY * BX], tl.int32)
    logits += image * stride_n
    for first in range(0, classes, BC):
        c = first + tl.arange(0, BC)
        values = _cell_logits(logits, stride_c, stride_y, stride_x, classes, c, y, x, exists,
                              cell_y, cell_x, y_index, y_weight, x_index, x_weight, TY, TX,
                              BY * BX, BC)
        top, index = tl.max(values, axis=1, return_indices=True)
        label = tl.where(top > best, first + index, label)
        best = tl.maximum(best, top)
    place = image * height * width + y * width + x
    tl.store(labels + place, label.to(labels.dtype.element_ty), mask=exists)


def resize_argmax(logits: Tensor, rows: Axis, columns: Axis, dtype: torch.dtype) -> Tensor:
    """Labels N x H x W from finite logits N x C x h x w; plain: `Chain.resize` and argmax.

    Of two classes within rounding of each other, either may be the label.
    """
    n, classes = logits.shape[:2]
    height, width = len(rows.weights), len(columns.weights)
    labels = torch.empty((n, height, width), dtype=dtype, device=logits.device)
    _resize_argmax[columns.cells, rows.cells, n](
        logits, *logits.stride(), labels, height, width, *rows.tables, *columns.tables,
        classes=classes, TY=rows.taps, TX=columns.taps, BY=rows.block, BX=columns.block,
        BC=CLASS_BLOCK)
    return labels


@triton.jit
def _resize_cross_entropy(logits, stride_n, stride_c, stride_y, stride_x, labels, ignore,
                          height, width, loss, correct, grad, low_height, low_width,
                          y_start, y_length, y_index, y_weight, x_start, x_length, x_index,
                          x_weight, classes: tl.constexpr, GRAD: tl.constexpr, TY: tl.constexpr,
                          TX: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,
                          BC: tl.constexpr):
    cell_y, cell_x, image, y, x, exists = _pixels(y_start, y_length, x_start, x_length, BY, BX)
    label = tl.load(labels + image * height * width + y * width + x, mask=exists, other=ignore)
    counts = label != ignore
    logits += image * stride_n
    best = tl.full([BY * BX], float('-inf'), tl.float32)
    total = tl.zeros([BY * BX], tl.float32)
    wanted = tl.full([BY * BX], float('nan'), tl.float32)  # stays NaN for a label out of range
    predicted = tl.zeros([BY * BX], tl.int32)
    for first in range(0, classes, BC):
        c = first + tl.arange(0, BC)
        values = _cell_logits(logits, stride_c, stride_y, stride_x, classes, c, y, x, exists,
                              cell_y, cell_x, y_index, y_weight, x_index, x_weight, TY, TX,
                              BY * BX, BC)
        top, index = tl.max(values, axis=1, return_indices=True)
        new = tl.maximum(best, top)
        total = total * tl.exp(best - new) + tl.sum(tl.exp(values - new[:, None]), axis=1)
        predicted = tl.where(top > best, first + index, predicted)
        best = new
        hit = c[None, :] == label[:, None]
        here = (label >= first) & (label < tl.minimum(first + BC, classes))
        wanted = tl.where(here, tl.sum(tl.where(hit, values, 0.), axis=1), wanted)
    log_total = best + tl.log(total)
    program = (image * tl.num_programs(1) + cell_y) * tl.num_programs(0) + cell_x
    tl.store(loss + program, tl.sum(tl.where(counts, log_total - wanted, 0.), axis=0))
    tl.store(correct + program, tl.sum((counts & (predicted == label)).to(tl.int32), axis=0))
    if GRAD:
        grad += image * low_height * low_width * classes
        for first in range(0, classes, BC):
            c = first + tl.arange(0, BC)
            values = _cell_logits(logits, stride_c, stride_y, stride_x, classes, c, y, x, exists,
                                  cell_y, cell_x, y_index, y_weight, x_index, x_weight, TY, TX,
                                  BY * BX, BC)
            share = tl.exp(values - log_total[:, None])
            share = tl.where(c[None, :] == label[:, None], share - 1, share)
            share = tl.where(counts[:, None], share, 0.)
            for i in range(TY):
                row, row_weight = _tap(y_index, y_weight, cell_y, y, exists, i, TY)
                for j in range(TX):
                    column, weight = _tap(x_index, x_weight, cell_x, x, exists, j, TX)
                    tl.atomic_add(grad + (row * low_width + column) * classes + c,
                                  tl.sum((row_weight * weight)[:, None] * share, axis=0),
                                  mask=c < classes)


def resize_cross_entropy(logits: Tensor, labels: Tensor, rows: Axis, columns: Axis, ignore: int,
                         with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of resized logits and its gradient; plain: `loss.plain_cross_entropy`.

    Returns the sum of the losses, NaN where a label is out of range, the number of right
    predictions, and the gradient of the sum, N x C x h x w float32, if asked for.
    """
    n, classes, low_height, low_width = logits.shape
    height, width = labels.shape[1:]
    options: dict[str, Any] = dict(device=logits.device, dtype=torch.float32)
    loss = torch.empty((n, rows.cells, columns.cells), **options)
    correct = torch.empty(loss.shape, device=logits.device, dtype=torch.int32)
    grad = torch.zeros((n, low_height, low_width, classes) if with_grad else (1,), **options)
    _resize_cross_entropy[columns.cells, rows.cells, n](
        logits, *logits.stride(), labels.contiguous(), ignore, height, width, loss, correct, grad,
        low_height, low_width, *rows.tables, *columns.tables, classes=classes, GRAD=with_grad,
        TY=rows.taps, TX=columns.taps, BY=rows.block, BX=columns.block, BC=CLASS_BLOCK)
    return loss.sum(), correct.sum(), grad.permute(0, 3, 1, 2) if with_grad else grad


def check(device: torch.device) -> None:
    """Compare every kernel with plain PyTorch on this device; only then they are used.

    Two cases: float32 logits resized once, and bfloat16 ones in channels-last memory of more
    classes than a program holds, of a padded and flipped image that is resized again.

    Raises:
        RuntimeError: A result is not that of plain PyTorch.
    """
    low = 3, 4
    again = Chain((10, 14), (2, 1, 0, 3), 'horizontal', (9, 17))
    for classes, dtype, chain in ((40, torch.float32, Chain((9, 19))),
                                  (70, torch.bfloat16, again)):
        with torch.random.fork_rng(devices=[]):
            logits = torch.randn(2, classes, *low, device='cpu').to(device, dtype)
            labels = torch.randint(classes, (2, *chain.input_size), device='cpu').to(device)
        labels[:, :2] = 255
        if dtype == torch.bfloat16:
            logits = logits.contiguous(memory_format=torch.channels_last)
        with torch.enable_grad():
            plain = logits.float().requires_grad_()
            full = F.interpolate(plain, chain.input_size, mode='bilinear')
            wanted = F.cross_entropy(full, labels, ignore_index=255, reduction='sum')
            wanted_grad, = torch.autograd.grad(wanted, plain)
        best, order = chain.resize(plain.detach()).topk(2, 1)
        near = best[:, 0] - best[:, 1] < 1e-4
        rows, columns = (Axis.of(device, *axis) for axis in chain.axes(low, device))
        predicted = resize_argmax(logits, rows, columns, torch.uint8)
        rows, columns = (Axis.of(device, low, size, (0, 0), False, None, False)
                         for low, size in zip(low, chain.input_size))
        loss, correct, grad = resize_cross_entropy(logits, labels, rows, columns, 255, True)
        if near.float().mean() > 0.1 or not (
                ((predicted == order[:, 0]) | near).all() and
                torch.allclose(loss, wanted, rtol=1e-4) and
                torch.allclose(grad, wanted_grad, rtol=1e-3, atol=1e-3) and
                abs(correct - (full.argmax(1) == labels).sum()) <= near.sum() + 1):
            raise RuntimeError(f'the results for {classes} classes in {dtype} differ from those '
                               'of plain PyTorch')
