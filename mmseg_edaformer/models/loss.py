"""Cross entropy of resized logits that never exist at full size.

mmseg resizes the logits to the size of the labels and keeps them, their logarithms and their
gradients: at 150 classes three tensors of 157 MB for each 512 x 512 image, and on a GPU more time
than the network. Here loss and gradient are computed together, a band of rows at a time.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import gpu_kernels
from .resize import axis_taps

BAND_BYTES = 16 << 20
"""Bytes of full-size logits that the plain version holds at once."""


def resize_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int,
                         align_corners: bool = False) -> tuple[Tensor, Tensor]:
    """Cross entropy between labels and logits resized to them bilinearly.

    Equals ``F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode='bilinear'), labels,
    ignore_index=ignore_index, reduction='sum')`` and its gradient, in float32.

    Returns:
        Sum of the losses of all pixels, and the number of pixels predicted correctly.

    Raises:
        RuntimeError: A label is neither a class nor ``ignore_index``. On a GPU with Triton, where
            the check would cost a synchronisation, the sum is NaN instead.
    """
    loss, correct = _ResizeCrossEntropy.apply(logits, labels, ignore_index, align_corners)
    return loss, correct


class _ResizeCrossEntropy(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int,
                align_corners: bool) -> tuple[Tensor, Tensor]:
        kernels = gpu_kernels(logits)
        with_grad = ctx.needs_input_grad[0]
        sizes = [(low, full, (0, 0), False, None, align_corners)
                 for low, full in zip(logits.shape[2:], labels.shape[1:])]
        if kernels is None:
            rows, columns = (axis_taps(*size) for size in sizes)
            loss, correct, grad = plain_cross_entropy(logits, labels, rows, columns, ignore_index,
                                                      with_grad)
        else:
            axes = [kernels.Axis.of(logits.device, *size) for size in sizes]
            loss, correct, grad = kernels.resize_cross_entropy(logits, labels, *axes,
                                                               ignore_index, with_grad)
        ctx.save_for_backward(grad.to(logits.dtype))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        grad, = ctx.saved_tensors
        return grad * grad_loss, None, None, None


def plain_cross_entropy(logits: Tensor, labels: Tensor, rows: tuple[Tensor, Tensor],
                        columns: tuple[Tensor, Tensor], ignore_index: int,
                        with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`resize_cross_entropy` with its gradient, by matrix products over bands of rows.

    ``rows`` and ``columns`` are taps of `resize.axis_taps`.
    """
    _, classes, low_height, low_width = logits.shape
    height, width = labels.shape[1:]
    resize_rows = _matrix(*rows, low_height).to(logits.device)  # H x h
    resize_columns = _matrix(*columns, low_width).to(logits.device)  # W x w
    counts = labels != ignore_index
    targets = labels.where(counts, 0).long()
    loss = logits.new_zeros((), dtype=torch.float32)
    correct = torch.zeros((), dtype=torch.int64, device=logits.device)
    grad = torch.zeros_like(logits, dtype=torch.float32,
                            memory_format=torch.contiguous_format) if with_grad else loss
    band = max(1, BAND_BYTES // (classes * width * 4))
    with torch.autocast(logits.device.type, enabled=False):
        for n, image in enumerate(logits.float()):
            # h x C x W: a band of rows is then one matrix product, and so is its gradient.
            wide = image.permute(1, 0, 2) @ resize_columns.T
            grad_wide = torch.zeros_like(wide) if with_grad else wide
            for begin in range(0, height, band):
                part = slice(begin, begin + band)
                low = slice(int(rows[0][part].min()), int(rows[0][part].max()) + 1)
                weights = resize_rows[part, low]
                scores = (weights @ wide[low].flatten(1)).view(-1, classes, width)
                target, count = targets[n, part, None], counts[n, part, None]
                correct += ((scores.argmax(1, keepdim=True) == target) & count).sum()
                scores = F.log_softmax(scores, 1)
                loss -= (scores.gather(1, target) * count).sum()
                if with_grad:
                    scores.exp_().scatter_add_(1, target, scores.new_full((1, 1, 1), -1.).expand(
                        target.shape)).mul_(count)
                    grad_wide[low] += (weights.T @ scores.flatten(1)).view(-1, classes, width)
            if with_grad:
                grad[n] = (grad_wide @ resize_columns).permute(1, 0, 2)
    return loss, correct, grad


def _matrix(indices: Tensor, weights: Tensor, size: int) -> Tensor:
    """One axis of a resize as a matrix, out x in."""
    return torch.zeros(len(indices), size).scatter_add_(1, indices.long(), weights)
