"""From crops to batches: how images and labels reach the device on which the model trains.

A worker hands over one block of images and one of labels, both uint8, instead of two tensors per
image and labels of eight bytes; the rest is done on the device, for the whole batch at once.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dataset import pseudo_collate
from mmengine.registry import FUNCTIONS
from mmengine.structures import PixelData
from mmseg.models import SegDataPreProcessor
from mmseg.registry import MODELS
from torch import Tensor
from torch.utils.data import default_collate

from ..compat import swaps_channels
from .photometric import distort, draw_distortions


@FUNCTIONS.register_module()
def stack_collate(samples: Sequence[dict[str, Any]],
                  photometric: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Stack the samples of PackSegInputs for a `BatchPreProcessor`; for training only.

    Args:
        samples: Images with a label map each, and no other annotation.
        photometric: Arguments of `draw_distortions`; None leaves the colours as they are. It draws
            in the workers, which mmengine seeds differently on all ranks; the ranks themselves
            share a seed. A pipeline must not also contain PhotoMetricDistortion.

    Returns:
        ``inputs`` (N x 3 x H x W) and ``labels`` (N x H x W), as large as the largest image and
        undefined beyond each image's ``img_shape``; ``data_samples`` without labels; and
        ``distortions`` if colours change.
    """
    batch = pseudo_collate(samples)
    labels = []
    for image, sample in zip(batch['inputs'], batch['data_samples']):
        sample.set_metainfo(dict(img_shape=tuple(image.shape[-2:])))
        label = sample.gt_sem_seg.data[0]
        low, high = label.aminmax()
        labels.append(label.to(torch.uint8) if low >= 0 and high <= 255 else label)
        del sample.gt_sem_seg
    batch.update(inputs=_stack(batch['inputs']), labels=_stack(labels))
    if photometric is not None:
        batch['distortions'] = draw_distortions(len(samples), **photometric)
    return batch


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors after padding; torch does it in shared memory within a worker."""
    height, width = (max(tensor.shape[side] for tensor in tensors) for side in (-2, -1))
    return default_collate([
        tensor if tensor.shape[-2:] == (height, width) else
        F.pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]))
        for tensor in tensors])


@MODELS.register_module()
class BatchPreProcessor(SegDataPreProcessor):
    """mmseg's SegDataPreProcessor that also takes the batches of `stack_collate`.

    The result is that of SegDataPreProcessor for images that were distorted before. Any other
    batch, and every batch outside training, goes to SegDataPreProcessor.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._non_blocking = True  # matters where the dataloader pins memory
        self._swap = swaps_channels(self)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Move a batch to the device, distort, normalise and pad it."""
        if not training or 'labels' not in data:
            return super().forward(data, training)
        data = self.cast_data(data)
        images, samples, drawn = data['inputs'], data['data_samples'], data.get('distortions')
        images = images.float() if drawn is None else distort(images, drawn)
        if self._swap:
            images = images.flip(1)
        if self._enable_normalize:
            images = images.sub_(self.mean).div_(self.std)
        images, labels = (self._pad(tensor) for tensor in (images, data['labels'].long()))
        for image, label, sample in zip(images, labels, samples):
            bottom, right = sample.img_shape
            for tensor, value in ((image, self.pad_val), (label, self.seg_pad_val)):
                tensor[..., bottom:, :] = value
                tensor[..., :bottom, right:] = value
            sample.gt_sem_seg = PixelData(data=label[None])
            height, width = (whole - part for whole, part in zip(label.shape, sample.img_shape))
            sample.set_metainfo(dict(pad_shape=tuple(label.shape),
                                     padding_size=(0, width, 0, height)))
        if self.batch_augments is not None:
            images, samples = self.batch_augments(images, samples)
        return dict(inputs=images, data_samples=samples)

    def _pad(self, batch: Tensor) -> Tensor:
        """Pad to `size`, or to a multiple of `size_divisor`, with arbitrary values."""
        step = self.size_divisor or 1
        size = self.size or [-(-side // step) * step for side in batch.shape[-2:]]
        height, width = (max(wanted - side, 0) for wanted, side in zip(size, batch.shape[-2:]))
        return F.pad(batch, (0, width, 0, height)) if height or width else batch
