"""The base of decoders that fuse levels of a backbone by one 1x1 convolution."""
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses.cross_entropy_loss import CrossEntropyLoss, cross_entropy
from mmseg.models.utils import resize
from mmseg.utils import SampleList
from torch import Tensor, nn

from ..compat import compiled_resize
from .layers import init_weights, pixel_linear
from .loss import resize_cross_entropy


class FusedHead(BaseDecodeHead):
    """A module for each level, then one fuse layer and the classifier.

    All levels are projected to ``channels``, resized to the shallowest and added. This equals
    concatenating the resized levels before one 1x1 convolution, because that convolution commutes
    with bilinear resizing. Its weight is one tensor, deepest level first. Arguments are those of
    `EDAFormerHead`.
    """

    def __init__(self, levels: Iterable[nn.Module], in_channels: Sequence[int], channels: int, *,
                 in_index: Sequence[int], norm_cfg: dict[str, Any] | None = None,
                 **kwargs: Any) -> None:
        super().__init__(list(in_channels), channels, in_index=list(in_index),
                         input_transform='multiple_select', norm_cfg=norm_cfg or dict(type='BN'),
                         **kwargs)
        self.levels = nn.ModuleList(levels)
        self.fuse = nn.Conv2d(sum(in_channels), channels, 1, bias=False)
        self.fuse_norm = build_norm_layer(self.norm_cfg, channels)[1]
        self.fuse_act = build_activation_layer(self.act_cfg)
        self.to(memory_format=torch.channels_last)

    def init_weights(self) -> None:
        """Initialise as released, and the classifier and what ``init_cfg`` names as mmseg does."""
        init_weights(self)
        super().init_weights()

    def classify(self, maps: Sequence[Tensor]) -> Tensor:
        """Fuse decoded levels, shallow to deep, into logits of the shallowest level's size."""
        weight, shift = self._fuse_weight()
        weights = weight.split(self.in_channels[::-1], dim=1)[::-1]
        fused = pixel_linear(maps[0], weights[0], shift)
        for x, weight in zip(maps[1:], weights[1:]):
            fused += self._resize(pixel_linear(x, weight), fused)
        if shift is None:
            fused = self.fuse_norm(fused)
        return self.cls_seg(self.fuse_act(fused))

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        size = (like.shape[2], like.shape[3])
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            return compiled_resize(x, size, self.align_corners)
        return resize(x, size=size, mode='bilinear', align_corners=self.align_corners)

    def _fuse_weight(self) -> tuple[Tensor, Tensor | None]:
        """The fuse layer's matrix, into which, and a bias, inference folds the batch norm."""
        weight, norm = self.fuse.weight.flatten(1), self.fuse_norm
        if self.training or not isinstance(norm, nn.modules.batchnorm._BatchNorm) or (
                norm.running_var is None or norm.running_mean is None):
            return weight, None
        scale = torch.rsqrt(norm.running_var.float() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        return (weight * scale[:, None]).to(weight.dtype), shift.to(weight.dtype)

    def loss_by_feat(self, seg_logits: Tensor,
                     batch_data_samples: SampleList) -> dict[str, Tensor]:
        """mmseg's losses, with plain cross entropy computed without logits at full size."""
        criterion = self.loss_decode
        if (type(criterion) is not CrossEntropyLoss or self.sampler is not None or
                self.out_channels == 1 or criterion.cls_criterion is not cross_entropy or
                criterion.class_weight is not None or criterion.reduction != 'mean'):
            return super().loss_by_feat(seg_logits, batch_data_samples)
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        loss, correct = resize_cross_entropy(seg_logits, labels, ignore_index=self.ignore_index,
                                             align_corners=self.align_corners)
        counted = (labels != self.ignore_index).sum()
        averaged = counted if criterion.avg_non_ignore else labels.numel()
        eps = torch.finfo(torch.float32).eps  # as in mmseg, for images without a label
        return {criterion.loss_name: criterion.loss_weight * loss / (averaged + eps),
                'acc_seg': ((correct + eps) * 100. / (counted + eps)).reshape(1)}
