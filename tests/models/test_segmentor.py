"""StreamedEncoderDecoder predicts what mmseg does, but for ties within rounding."""
import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.structures import PixelData
from mmseg.apis import inference_model
from mmseg.evaluation import IoUMetric
from mmseg.models import SegTTAModel
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.models import StreamedTTAModel
from mmseg_edaformer.models.label_map import ROUNDING
from tests.conftest import segmentor_config

NORM = dict(type='BN')
HEADS = {
    'ours': dict(),
    'segformer': dict(type='SegformerHead', in_channels=[16, 32, 64, 128], in_index=[0, 1, 2, 3],
                      channels=16, norm_cfg=NORM, num_classes=19),
    'fcn': dict(type='FCNHead', in_channels=64, in_index=2, channels=16, num_convs=1,
                norm_cfg=NORM, num_classes=150, align_corners=True),
    'many': dict(type='FCNHead', in_channels=128, in_index=3, channels=16, num_convs=1,
                 norm_cfg=NORM, num_classes=300),
    'binary': dict(type='FCNHead', in_channels=64, in_index=2, channels=16, num_convs=1,
                   norm_cfg=NORM, num_classes=2),
    'one channel': dict(type='FCNHead', in_channels=64, in_index=2, channels=16, num_convs=1,
                        norm_cfg=NORM, num_classes=2, out_channels=1, threshold=0.5),
    'other': dict(type='SquaringHead', in_channels=64, in_index=2, channels=16, num_convs=1,
                  norm_cfg=NORM, num_classes=8),
    'dual': dict(type='DAHead', in_channels=64, in_index=2, channels=16, pam_channels=8,
                 norm_cfg=NORM, num_classes=8),
}
# Of those that a GPU runs, each stands for others.
ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) if name in (
    'ours', 'segformer', 'many', 'one channel') else name for name in HEADS]
STREAMED = [name for name in HEADS if name not in ('one channel', 'other', 'dual')]
SLIDES = [dict(crop_size=(32, 48), stride=(20, 32)), dict(crop_size=(64, 64), stride=(64, 64)),
          dict(crop_size=(200, 40), stride=(100, 17)), dict(crop_size=(300, 300), stride=(9, 9))]


@MODELS.register_module()
class SquaringHead(FCNHead):
    """A head whose logits are not only resized."""

    def predict_by_feat(self, seg_logits, batch_img_metas):
        return super().predict_by_feat(seg_logits, batch_img_metas) ** 2


def build(name='ours', device='cpu', **test_cfg):
    """The streamed segmentor and mmseg's, with the same weights."""
    config = segmentor_config()
    if HEADS[name]:
        config['decode_head'] = HEADS[name]
    config['auxiliary_head'] = dict(HEADS['binary'], in_index=1, in_channels=32)
    config['test_cfg'] = ConfigDict({'mode': 'whole', **test_cfg})
    models = [MODELS.build(copy.deepcopy(dict(config, type=kind)))
              for kind in ('StreamedEncoderDecoder', 'EncoderDecoder')]
    models[0].init_weights()
    torch.nn.init.normal_(models[0].decode_head.conv_seg.weight)  # many labels, not one
    models[1].load_state_dict(models[0].state_dict())
    return [model.to(device).eval() for model in models]


def samples(*metas, **shared):
    return [SegDataSample(metainfo=dict(shared, **meta)) for meta in metas]


BATCHES = {
    'plain': dict(img_shape=(80, 96), pad_shape=(80, 96), ori_shape=(80, 96)),
    'enlarged': dict(img_shape=(80, 96), ori_shape=(131, 250)),
    'reduced': dict(img_shape=(80, 96), ori_shape=(31, 20)),
    'tuple with channels': dict(img_shape=(70, 90), pad_shape=(80, 96, 3), ori_shape=(100, 90)),
    'padded in training style': dict(img_shape=(70, 90), pad_shape=(80, 96),
                                     padding_size=[0, 6, 0, 10], ori_shape=(140, 180)),
    'padded when testing': dict(img_shape=(70, 90), pad_shape=torch.Size((80, 96)),
                                img_padding_size=(0, 6, 0, 10), padding_size=[1, 1, 1, 1],
                                ori_shape=(75, 99)),
    'flipped': dict(img_shape=(80, 96), ori_shape=(91, 100), flip=True,
                    flip_direction='horizontal'),
    'flipped vertically': dict(img_shape=(80, 96), ori_shape=(91, 100), flip=True,
                               flip_direction='vertical', img_padding_size=(3, 6, 2, 10)),
    'flip unused': dict(img_shape=(80, 96), ori_shape=(91, 100), flip=False, flip_direction=None),
}


def compare(models, inputs, metas=None, tolerance=None):
    """Both models' predictions, which agree as `assert_clear_labels` says."""
    with torch.no_grad():
        got, wanted = (model.predict(inputs, metas and samples(*metas)) for model in models)
        small = models[0].predict_labels(inputs, metas and samples(*metas))
    assert len(got) == len(wanted) == len(small) == len(inputs)
    for ours, theirs, labels in zip(got, wanted, small):
        assert 'seg_logits' not in ours
        label, right = ours.pred_sem_seg.data, theirs.pred_sem_seg.data
        assert label.dtype == right.dtype
        assert label.shape == right.shape
        assert labels.dtype == (torch.int16 if models[0].out_channels > 256 else torch.uint8)
        assert torch.equal(labels.long(), label[0].long())
        assert ours.metainfo == theirs.metainfo
        if models[0].streamable:
            assert_clear_labels(label[0], theirs.seg_logits.data, tolerance)
        else:
            assert torch.equal(label, right)
    return got


def assert_clear_labels(label, logits, tolerance=None):
    """A label map is right wherever the two largest logits differ by more than rounding.

    That is ROUNDING times the largest logit; or ``tolerance``, where the logits differ too.
    """
    best, classes = logits.topk(2, 0)
    near = best[0] - best[1] <= (ROUNDING * logits.abs().max() if tolerance is None else tolerance)
    assert near.float().mean() < 0.05
    assert torch.equal(label[~near].long(), classes[0][~near])


@pytest.mark.parametrize('head', ON_GPU)
def test_whole(head, device):
    models = build(head, device)
    assert models[0].streamable == (head in STREAMED)
    inputs = torch.randn(2, 3, 80, 96).to(device)
    tolerance = 1e-3 if device.type == 'cuda' else None  # its networks round in any order
    got = compare(models, inputs, None, tolerance)
    assert len(got[0].pred_sem_seg.data.unique()) > 1
    for metas in (*([meta] * 2 for meta in BATCHES.values()),
                  [BATCHES['enlarged'], BATCHES['reduced']],
                  [BATCHES['padded when testing'], BATCHES['flipped vertically']]):
        compare(models, inputs, metas, tolerance)


@pytest.mark.parametrize('head', [pytest.param('ours', marks=pytest.mark.gpu), 'fcn', 'other'])
@pytest.mark.parametrize('slide', SLIDES, ids=str)
def test_slide(head, slide, device):
    models = build(head, device, mode='slide', **slide)
    inputs = torch.randn(2, 3, 80, 96).to(device)
    tolerance = 1e-3 if device.type == 'cuda' else 1e-4  # for batches of another size
    metas = [BATCHES['enlarged'], BATCHES['flipped vertically']]
    for batch in (None, 1, 3):
        models[0].test_cfg.window_batch = batch
        logits = [model.slide_inference(inputs, [dict(BATCHES['plain'])] * 2) for model in models]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=tolerance)
        for given in (None, metas):
            compare(models, inputs, given, tolerance)
    models[0].test_cfg.update(seg_logits=True)
    result = models[0].predict(inputs, samples(*metas))
    for ours, theirs in zip(result, models[1].predict(inputs, samples(*metas))):
        torch.testing.assert_close(ours.seg_logits.data, theirs.seg_logits.data, rtol=1e-5,
                                   atol=tolerance)


def test_windows_fit_the_memory():
    model = build(mode='slide', crop_size=(32, 32), stride=(16, 16))[0]
    batches = []
    model.backbone.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    window = 4 * (3 + 8) * 32 * 32
    for mib, wanted in ((0.01, 1), (3.5 * window / 2**20, 3), (256, 16)):
        batches.clear()
        model.test_cfg.memory_mib = mib
        model.predict_labels(torch.randn(1, 3, 80, 80))
        assert max(batches) == wanted
        assert sum(batches) == 16


@pytest.mark.parametrize('head', HEADS)
def test_seg_logits_when_asked(head):
    models = build(head, seg_logits=True)
    inputs, metas = torch.randn(2, 3, 80, 96), [BATCHES['enlarged'], BATCHES['flipped']]
    for given in (None, metas):
        for ours, theirs in zip(*(model.predict(inputs, given and samples(*given))
                                  for model in models)):
            assert torch.equal(ours.seg_logits.data, theirs.seg_logits.data)
            assert torch.equal(ours.pred_sem_seg.data, theirs.pred_sem_seg.data)


@pytest.mark.gpu
@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_bfloat16_weights(mode, device):
    model = build('ours', device, mode=mode, crop_size=(64, 64), stride=(32, 32))[0].bfloat16()
    inputs = torch.randn(1, 3, 80, 96).to(device)
    labels = model.predict_labels(inputs)[0]
    model.test_cfg.seg_logits = True
    sample = model.predict(inputs)[0]
    assert sample.seg_logits.data.dtype == torch.float32
    assert_clear_labels(labels, sample.seg_logits.data, 1e-3 if device.type == 'cuda' else None)


def augmented(model):
    """One image at two scales, plain and flipped, as TestTimeAug gives it."""
    images, metas = [], []
    for size in ((64, 64), (96, 80)):
        for flip in (False, True):
            images.append([torch.randint(256, (3, *size), generator=torch.Generator().manual_seed(
                len(images)), dtype=torch.uint8)])
            metas.append(samples(dict(img_path='a.png', img_shape=size, ori_shape=(70, 90),
                                      flip=flip, flip_direction='horizontal' if flip else None)))
    with torch.no_grad():
        return model.test_step(dict(inputs=images, data_samples=metas))


@pytest.mark.gpu
@pytest.mark.parametrize('head', ['ours', 'one channel'])
def test_tta_is_mmsegs(head, device):
    ours, theirs = build(head, device)
    (got,), (wanted,) = (augmented(model) for model in (
        StreamedTTAModel(module=ours), SegTTAModel(module=theirs)))
    assert torch.equal(got.pred_sem_seg.data, wanted.pred_sem_seg.data)
    (other,) = augmented(StreamedTTAModel(module=theirs))
    assert torch.equal(other.pred_sem_seg.data, wanted.pred_sem_seg.data)
    assert 'seg_logits' not in theirs.test_cfg


@pytest.mark.gpu
def test_it_trains_as_mmsegs(device):
    models = build('ours', device)
    inputs = torch.randn(2, 3, 64, 64).to(device)
    losses = []
    for model in models:
        data = samples({}, {})
        for sample in data:
            sample.gt_sem_seg = PixelData(data=torch.zeros(1, 64, 64).long().to(device))
        losses.append(model.loss(inputs, data))
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name])


def test_settings():
    """Wrong ones are named; all may be left out."""
    config = dict(segmentor_config(), type='StreamedEncoderDecoder')
    for wrong, words in ((dict(mode='sliding'), 'whole or slide'), (dict(memory_mib=0), 'positive'),
                         (dict(mode='whole', window_batch=-1), 'positive')):
        with pytest.raises(ConfigError, match=words):
            MODELS.build(dict(config, test_cfg=wrong))
    del config['test_cfg']
    model = MODELS.build(config).eval()
    assert model.predict_labels(torch.randn(1, 3, 64, 64))[0].shape == (64, 64)
    meta = dict(BATCHES['flipped'], flip_direction='diagonal')
    with pytest.raises(ConfigError, match='diagonal'):
        model.predict(torch.randn(1, 3, 80, 96), samples(meta))


def test_mmsegs_tools_take_the_results():
    models = build()
    for model in models:
        model.cfg = Config(dict(test_pipeline=[dict(type='LoadImageFromFile'), dict(
            type='Resize', scale=(80, 64), keep_ratio=True), dict(type='PackSegInputs')]))
        model.dataset_meta = dict(classes=tuple('abcdefgh'))
    image = np.random.default_rng(0).integers(0, 255, (100, 120, 3), dtype=np.uint8)
    ours, theirs = (inference_model(model, image) for model in models)
    assert_clear_labels(ours.pred_sem_seg.data[0], theirs.seg_logits.data)
    ours.set_field(theirs.pred_sem_seg, 'gt_sem_seg')
    metric = IoUMetric()
    metric.dataset_meta = models[0].dataset_meta
    metric.process({}, [ours.to_dict()])
    assert metric.compute_metrics(metric.results)['aAcc'] == pytest.approx(100, abs=0.1)
