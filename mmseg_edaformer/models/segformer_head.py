"""The decoder of SegFormer (arXiv 2105.15203) as its authors and transformers have it."""
from collections.abc import Sequence
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from .fused_head import FusedHead
from .layers import channels_last


@MODELS.register_module()
class FusedSegformerHead(FusedHead):
    """The fuse layer alone: the projections of the levels before it are linear, and folded into it.

    mmseg's SegformerHead has a norm and an activation on each level besides, so it computes
    something else. Arguments are those of `FusedHead`.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, *,
                 in_index: Sequence[int] = (0, 1, 2, 3), **kwargs: Any) -> None:
        super().__init__([nn.Identity() for _ in in_channels], in_channels, channels,
                         in_index=in_index, **kwargs)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Decode maps into logits N x num_classes x H x W of the shallowest level."""
        return self.classify(list(map(channels_last, self._transform_inputs(inputs))))

    @classmethod
    @torch.no_grad()
    def fold(cls, head: Any) -> 'FusedSegformerHead':
        """Return the decoder of transformers with equal logits, but for rounding.

        It resizes each level to ``channels`` before the fuse layer, which takes most of the time.
        """
        levels = [level.proj for level in head.linear_projections]
        classes, channels = head.classifier.weight.shape[:2]
        own = cls([level.in_features for level in levels], channels, num_classes=classes)
        parts = head.linear_fuse.weight.flatten(1).double().chunk(len(levels), 1)
        pairs = list(zip(parts, levels[::-1]))  # the deepest level first
        own.fuse.weight.copy_(torch.cat([part @ level.weight.double() for part, level in pairs],
                                        1)[..., None, None])
        own.fuse_norm.load_state_dict(head.batch_norm.state_dict())
        for part, level in pairs:
            own.fuse_norm.running_mean -= part @ level.bias.double()
        own.conv_seg.load_state_dict(head.classifier.state_dict())
        return own.eval()
