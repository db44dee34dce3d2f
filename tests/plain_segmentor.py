"""The plain EDAFormer as a segmentor of mmseg, to compare the fast one with."""
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.models import BaseSegmentor
from mmseg.registry import MODELS

from mmseg_edaformer.errors import RatioError
from tests import plain


@MODELS.register_module()
class PlainSegmentor(BaseSegmentor):
    """`plain.build` with the loss and the label maps that mmseg makes of it.

    All logits are resized to the image, for the loss and for the arg max alike.
    """

    def __init__(self, size='tiny', num_classes=150, data_preprocessor=None):
        super().__init__(data_preprocessor)
        network = plain.build(size, num_classes)
        self.backbone, self.decode_head = network.backbone, network.decode_head
        self.num_classes = num_classes

    def set_isr(self, ratio):
        """Apply an ISRRatio; tools/benchmark.py calls it."""
        if getattr(ratio, 'auto', False):
            raise RatioError(f'isr_ratio {ratio}: PlainSegmentor takes multipliers only')
        plain.PlainEDAFormer.set_isr(self, ratio.for_stages('encoder', 4),
                                     ratio.for_stages('decoder', 3))

    def extract_feat(self, inputs):
        return self.backbone(inputs)

    def _forward(self, inputs, data_samples=None):
        return self.decode_head(self.extract_feat(inputs))

    def encode_decode(self, inputs, batch_data_samples=None):
        return F.interpolate(self._forward(inputs), inputs.shape[2:], mode='bilinear')

    def predict(self, inputs, data_samples=None):
        labels = self.encode_decode(inputs).argmax(1, keepdim=True)
        for sample, label in zip(data_samples, labels):
            sample.pred_sem_seg = PixelData(data=label)
        return data_samples

    def loss(self, inputs, data_samples):
        labels = torch.cat([sample.gt_sem_seg.data for sample in data_samples]).long()
        return dict(loss_ce=F.cross_entropy(self.encode_decode(inputs), labels, ignore_index=255))
