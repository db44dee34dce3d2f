"""mmseg's EncoderDecoder, with label maps straight from the head's logits."""
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder, SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import add_prefix
from torch import Tensor

from ..errors import ConfigError
from ..isr.apply import isr
from ..isr.range_training import RatioRange, consistency, same_draws
from .label_map import label_maps
from .resize import Chain


@MODELS.register_module()
class StreamedEncoderDecoder(EncoderDecoder):
    """EncoderDecoder that predicts labels without logits at full resolution.

    mmseg resizes the logits of all classes twice and keeps them: 14 GB for an image of 24
    megapixels and 150 classes. Here the labels come from the head's own logits, see
    `label_map.label_maps`; they equal mmseg's except where two classes tie within rounding. Images
    are cast to the type of the weights, so a model in bfloat16 works.

    Heads with one channel, and heads that override how mmseg predicts, take mmseg's own path.

    Args:
        args: Arguments of mmseg's EncoderDecoder.
        kwargs: Keyword arguments of mmseg's EncoderDecoder. ``test_cfg`` has three more keys:
            ``seg_logits=True`` adds mmseg's ``seg_logits`` to the results; ``memory_mib=256``
            bounds the temporary tensors of the label maps and, with ``mode='slide'``, the images
            and logits of the windows that run at once; ``window_batch`` sets the number of these
            windows instead. ``train_cfg`` has ``isr_range``, the arguments of `RatioRange`, which
            trains for many ratios at once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.test_cfg: Any = ConfigDict({'mode': 'whole', **(self.test_cfg or {})})
        if self.test_cfg.mode not in ('whole', 'slide'):
            raise ConfigError(f"test_cfg.mode='{self.test_cfg.mode}': it must be whole or slide")
        for name in ('memory_mib', 'window_batch'):
            if self.test_cfg.get(name, 1) <= 0:
                raise ConfigError(f'test_cfg.{name}={self.test_cfg[name]}: it must be positive')
        self.isr_range = None
        if (self.train_cfg or {}).get('isr_range'):
            try:
                self.isr_range = RatioRange(**self.train_cfg['isr_range'])
            except TypeError as error:
                raise ConfigError(f'train_cfg.isr_range={self.train_cfg["isr_range"]}: it takes '
                                  f'isr_ratios, a list, and weight ({error})') from error
            if not self.streamable or type(self.decode_head).loss is not BaseDecodeHead.loss:
                raise ConfigError('train_cfg.isr_range needs a head whose loss is computed from '
                                  f'logits per pixel, not {type(self.decode_head).__name__}')
            for ratio in self.isr_range.isr_ratios:
                with isr(self, ratio):
                    pass  # fail early if a ratio does not fit the model

    @property
    def streamable(self) -> bool:
        """Whether the head predicts as mmseg's heads do, by only resizing its logits."""
        head = type(self.decode_head)
        return (self.out_channels > 1 and
                getattr(head, 'predict', None) is BaseDecodeHead.predict and
                head.predict_by_feat is BaseDecodeHead.predict_by_feat)

    @property
    def _memory(self) -> int:
        return int(self.test_cfg.get('memory_mib', 256) * 2**20)

    def extract_feat(self, inputs: Tensor) -> list[Tensor]:
        """Extract features from images N x 3 x H x W, cast to the type of the weights."""
        weight = next(self.backbone.parameters(), inputs)
        return super().extract_feat(inputs.to(weight.dtype))

    def loss(self, inputs: Tensor, data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        """mmseg's losses and, with ``isr_range``, the distance of a drawn ratio's pass."""
        if self.isr_range is None:
            return super().loss(inputs, data_samples)
        ratio, draws_again = self.isr_range.draw(), same_draws(inputs)
        features = self.extract_feat(inputs)
        logits = self.decode_head(features)
        losses = add_prefix(self.decode_head.loss_by_feat(logits, data_samples), 'decode')
        if self.with_auxiliary_head:
            losses |= self._auxiliary_head_forward_train(features, data_samples)
        with isr(self, ratio), draws_again:
            reduced = self._forward(inputs)
        return losses | dict(loss_isr=self.isr_range.weight * consistency(reduced, logits))

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict[str, Any]]) -> Tensor:
        """Logits at the size of the input, in float32."""
        if not self.streamable:
            return super().encode_decode(inputs, batch_img_metas)
        return self.decode_head.predict_by_feat(self._forward(inputs).float(), batch_img_metas)

    def predict(self, inputs: Tensor,
                data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """Predict as mmseg does, with ``seg_logits`` only if ``test_cfg.seg_logits`` is set."""
        wanted = self.test_cfg.get('seg_logits', False)
        if wanted or not self.streamable:
            data_samples = super().predict(inputs, data_samples)
            for sample in () if wanted else data_samples:
                del sample.seg_logits
            return data_samples
        labels = self.predict_labels(inputs, data_samples)
        if data_samples is None:
            data_samples = [SegDataSample() for _ in labels]
        for sample, label in zip(data_samples, labels):
            sample.pred_sem_seg = PixelData(data=label[None].long())
        return data_samples

    def predict_labels(self, inputs: Tensor,
                       data_samples: list[SegDataSample] | None = None) -> list[Tensor]:
        """Predict only label maps H x W, uint8 for up to 256 classes, else int16.

        ``data_samples`` stay unchanged; without them labels have the size of the input.
        """
        if not self.streamable:
            copies = [SegDataSample(metainfo=sample.metainfo) for sample in data_samples or []]
            dtype = torch.uint8 if self.out_channels <= 256 else torch.int16
            return [sample.pred_sem_seg.data[0].to(dtype)
                    for sample in super().predict(inputs, copies or None)]
        metas = [sample.metainfo for sample in data_samples or []]
        slide = self.test_cfg.get('mode') == 'slide'
        if slide:
            logits = self.slide_inference(inputs, metas)
            size = _pair(logits.shape[2:])
        else:
            logits = self._forward(inputs)
            size = _input_size(metas[0]) if metas else _pair(inputs.shape[2:])
        plain = Chain(size, align_corners=self.align_corners, first=not slide)
        chains = [_follow(plain, meta) for meta in metas] or [plain] * len(inputs)
        return label_maps(logits, chains, self._memory)

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict[str, Any]]) -> Tensor:
        """mmseg's mean logits of overlapping windows, computed for several windows at once."""
        if not self.streamable:
            return super().slide_inference(inputs, batch_img_metas)
        crop = [min(length, full) for length, full in zip(self.test_cfg.crop_size,
                                                          inputs.shape[2:])]
        begins = [[min(i * stride, full - length)
                   for i in range(-(-(full - length) // stride) + 1)]
                  for length, full, stride in zip(crop, inputs.shape[2:], self.test_cfg.stride)]
        windows = [(i, slice(y, y + crop[0]), slice(x, x + crop[1]))
                   for y in begins[0] for x in begins[1] for i in range(len(inputs))]
        logits = inputs.new_zeros(len(inputs), self.out_channels, *inputs.shape[2:],
                                  dtype=torch.float32)
        window = 4 * (inputs.shape[1] + self.out_channels) * crop[0] * crop[1]
        batch = self.test_cfg.get('window_batch') or max(1, self._memory // window)
        for start in range(0, len(windows), batch):
            part = windows[start:start + batch]
            low = self._forward(torch.stack([inputs[i, :, y, x] for i, y, x in part]))
            for j, (i, y, x) in enumerate(part):
                logits[i, :, y, x] += F.interpolate(low[j:j + 1], crop, None, 'bilinear',
                                                    self.align_corners)[0]
        counts = [logits.new_zeros(full) for full in inputs.shape[2:]]
        for count, length, starts in zip(counts, crop, begins):
            for begin in starts:
                count[begin:begin + length] += 1
        return logits.div_(counts[0][:, None] * counts[1])


def _pair(shape: Any) -> tuple[int, int]:
    return int(shape[0]), int(shape[1])


def _input_size(meta: dict[str, Any]) -> tuple[int, int]:
    """The size to which mmseg's heads resize a batch, from the first image's metadata."""
    padded = not isinstance(meta['img_shape'], torch.Size) and 'pad_shape' in meta
    return _pair(meta['pad_shape' if padded else 'img_shape'])


def _follow(chain: Chain, meta: dict[str, Any]) -> Chain:
    """The chain, followed by what mmseg's postprocess_result does for this metadata."""
    padding = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    flip = meta.get('flip_direction') if meta.get('flip') else None
    if meta.get('flip') and flip not in ('horizontal', 'vertical'):
        raise ConfigError(f"flip_direction='{flip}': test images can only be flipped 'horizontal' "
                          "or 'vertical'")
    left, right, top, bottom = (int(length) for length in padding)
    return replace(chain, padding=(left, right, top, bottom), flip=flip,
                   ori_shape=_pair(meta['ori_shape']))


@MODELS.register_module()
class StreamedTTAModel(SegTTAModel):
    """mmseg's test-time augmentation, for which a `StreamedEncoderDecoder` returns ``seg_logits``.

    Arguments are those of mmseg's SegTTAModel.
    """

    def __init__(self, module: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(module, *args, **kwargs)
        if isinstance(self.module, StreamedEncoderDecoder):
            self.module.test_cfg.seg_logits = True
