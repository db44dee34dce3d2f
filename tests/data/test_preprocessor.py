"""Distorting on the device: the images that mmseg's own pipeline and preprocessor would give."""
import copy
from math import isnan, nan

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.datasets.transforms import PackSegInputs, PhotoMetricDistortion, RandomCrop
from mmseg.models import SegDataPreProcessor
from mmseg.registry import MODELS
from scipy.stats import ks_2samp

from mmseg_edaformer.data import RandomSegCrop, stack_collate
from mmseg_edaformer.data.photometric import distort, distort_batch, draw_distortions
from mmseg_edaformer.engine.checks import check_data
from mmseg_edaformer.errors import ConfigError
from tests.conftest import ROOT

DRAWS = 1000
SETTINGS = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True,
                pad_val=7, seg_pad_val=255, size=(64, 96))
# What is added, contrast, saturation, hue, contrast instead of the one before.
ONE_BY_ONE = torch.tensor([
    (nan, nan, nan, nan, nan), (-20.7, nan, nan, nan, nan), (31.3, nan, nan, nan, nan),
    (nan, nan, nan, nan, 0.61), (nan, 1.43, nan, nan, nan), (nan, nan, 0.52, nan, nan),
    (nan, nan, 1.47, nan, nan), (nan, nan, nan, -18, nan), (nan, nan, nan, 0, nan),
    (nan, nan, nan, 17, nan), (12.5, 1.3, 0.7, -9, nan), (-12.5, nan, 1.4, 11, 1.3)])


def picture(seed=0, size=(64, 96)):
    """Colours of every kind: grey, dark, bright and saturated; the width is a multiple of what
    OpenCV treats at once, since it rounds the rest in another way."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    coarse[0], coarse[1] = 0, coarse[1, :, :1]
    image = np.kron(coarse, np.ones((-(-size[0] // 8), -(-size[1] // 8), 1)))[:size[0], :size[1]]
    return np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8)


def as_batch(*images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


class Forced:
    """numpy's random for PhotoMetricDistortion, with the outcome decided."""

    def __init__(self, drawn):
        light, before, saturation, hue, after = drawn.tolist()
        first = not isnan(before)
        values = [not isnan(light), light, first]
        for value in ((before, saturation, hue) if first else (saturation, hue, after)):
            values += [not isnan(value), value]
        self.values = [value for value in values if not isnan(value)]

    def randint(self, *args):
        return self.values.pop(0)

    uniform = randint


@pytest.fixture
def mmseg_distort(monkeypatch):
    def distorted(image, drawn):
        with monkeypatch.context() as patch:
            patch.setattr('mmseg.datasets.transforms.transforms.random', Forced(drawn))
            return PhotoMetricDistortion().transform(dict(img=image.copy()))['img']
    return distorted


@pytest.mark.gpu
def test_equal_to_mmseg_when_the_draws_are(mmseg_distort, device):
    """Each image of a batch is distorted in its own way."""
    images = [picture(seed) for seed in range(len(ONE_BY_ONE))]
    expected = as_batch(*map(mmseg_distort, images, ONE_BY_ONE)).float()
    found = distort(as_batch(*images), ONE_BY_ONE)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    on_device = as_batch(*images).to(device)
    difference = (distort_batch(on_device.float(), ONE_BY_ONE).cpu() - expected).abs()
    for drawn, one in zip(ONE_BY_ONE, difference):
        assert one.max() <= (1 if drawn.isfinite().sum() < 3 else 2), drawn
        assert (one > 0).float().mean() < 1e-3, drawn


def statistics(images):
    """Of each image of N x H x W x 3: mean and deviation of the channels, mean saturation."""
    images = images.astype(float)
    high, low = images.max(-1), images.min(-1)
    saturation = ((high - low) / np.maximum(high, 1)).mean((1, 2))
    # Rounded: undistorted images are equal, also when their sums are made in another order.
    return np.concatenate([images.mean((1, 2)), images.std((1, 2)), saturation[:, None]],
                          1).round(6)


@pytest.mark.parametrize('function', [
    distort, lambda images, drawn: distort_batch(images.float(), drawn)], ids=['cpu', 'batch'])
def test_the_distribution_is_that_of_mmseg(function):
    image = picture(size=(32, 32))
    np.random.seed(0)
    transform = PhotoMetricDistortion()
    images = np.stack([transform.transform(dict(img=image))['img'] for _ in range(DRAWS)])
    expected = statistics(images)
    levels = function(as_batch(image).expand(DRAWS, -1, -1, -1), draw_distortions(DRAWS))
    found = statistics(levels.permute(0, 2, 3, 1).numpy())
    for mine, theirs in zip(found.T, expected.T):
        assert ks_2samp(mine, theirs).pvalue > 0.001
        error = theirs.std() * (2 / DRAWS) ** 0.5
        assert abs(mine.mean() - theirs.mean()) < 3 * error
        assert mine.std() == pytest.approx(theirs.std(), rel=0.08)
    shares = [np.bincount(whole.astype(np.uint8).ravel(), minlength=256).reshape(32, 8).sum(1)
              / whole.size for whole in (levels.numpy(), images)]
    assert np.abs(shares[0] - shares[1]).max() < 0.006


def test_draws_follow_the_seed_and_the_ranges():
    torch.manual_seed(3)
    first = draw_distortions(99, hue_delta=1)
    torch.manual_seed(3)
    again = draw_distortions(99, hue_delta=1)
    assert torch.equal(again.nan_to_num(9), first.nan_to_num(9))
    assert set(again[:, 3].nan_to_num(9).tolist()) == {9, -1, 0}


def packed(*sizes):
    """Samples as PackSegInputs gives them."""
    rng = np.random.default_rng(0)
    return [PackSegInputs().transform(dict(
        img=picture(seed, size), gt_seg_map=rng.integers(0, 5, size).astype(np.uint8),
        img_shape=size, ori_shape=size)) for seed, size in enumerate(sizes)]


SIZES = (64, 96), (40, 96), (64, 32), (33, 64)


@pytest.mark.parametrize('change', [
    {}, dict(size=None, size_divisor=16), dict(size=None, size_divisor=1, bgr_to_rgb=False),
    dict(mean=None, std=None, pad_val=0), dict(size=(96, 128), seg_pad_val=9)], ids=str)
@pytest.mark.gpu
def test_training_batches_are_those_of_mmseg(mmseg_distort, change, device):
    samples = packed(*SIZES)
    batch = stack_collate(copy.deepcopy(samples), photometric=dict(hue_delta=9))
    assert batch['inputs'].dtype == batch['labels'].dtype == torch.uint8
    assert batch['inputs'].shape == (4, 3, 64, 96)
    for sample, drawn in zip(samples, batch['distortions']):
        image = sample['inputs'].permute(1, 2, 0).contiguous().numpy()
        sample['inputs'] = as_batch(mmseg_distort(image, drawn))[0]
    settings = {**SETTINGS, **change}
    expected = SegDataPreProcessor(**settings)(pseudo_collate(samples), training=True)
    preprocessor = MODELS.build(dict(settings, type='BatchPreProcessor')).to(device)
    found = preprocessor(batch, training=True)
    assert found['inputs'].device.type == device.type
    if device.type == 'cpu':
        assert torch.equal(found['inputs'], expected['inputs'])
    else:  # where the conversion from HSV may differ by a level
        levels = max(settings['std'] or [1])
        difference = (found['inputs'].cpu() - expected['inputs']).abs() * levels
        assert difference.max() <= 2.1
        assert (difference > 0.01).float().mean() < 1e-3
    for mine, theirs in zip(found['data_samples'], expected['data_samples']):
        assert mine.gt_sem_seg.data.device.type == device.type
        assert torch.equal(mine.gt_sem_seg.data.cpu(), theirs.gt_sem_seg.data)
        assert mine.gt_sem_seg.data.dtype == torch.int64
        for key in ('img_shape', 'padding_size', 'ori_shape'):
            assert tuple(getattr(mine, key)) == tuple(getattr(theirs, key))
        assert mine.pad_shape == tuple(theirs.pad_shape)


def test_colours_stay_without_photometric_and_outside_training():
    preprocessor = MODELS.build(dict(SETTINGS, type='BatchPreProcessor'))
    original = SegDataPreProcessor(**SETTINGS)
    batch = stack_collate(packed(*SIZES))
    assert 'distortions' not in batch
    expected = original(pseudo_collate(packed(*SIZES)), training=True)['inputs']
    assert torch.equal(preprocessor(batch, training=True)['inputs'], expected)
    for training in (False, True):
        samples = packed(*SIZES[:1])
        found = preprocessor(pseudo_collate(samples), training=training)
        expected = original(pseudo_collate(packed(*SIZES[:1])), training=training)
        assert torch.equal(found['inputs'], expected['inputs'])


def test_labels_that_uint8_cannot_hold_stay_as_they_are():
    samples = packed((8, 8), (8, 8))
    samples[0]['data_samples'].gt_sem_seg.data[:] = 300
    assert stack_collate(samples)['labels'].tolist()[0] == [[300] * 8] * 8


@pytest.mark.parametrize('ratio', [0.3, 0.75, 1.])
@pytest.mark.parametrize('dtype', [np.uint8, np.int64])
def test_crops_are_those_of_mmseg(ratio, dtype):
    rng = np.random.default_rng(0)
    labels = np.kron(rng.choice([0, 1, 2, 255], (8, 8), p=[0.6, 0.1, 0.1, 0.2]), np.ones((9, 9)))
    for seed in range(20):
        boxes = []
        for kind in (RandomCrop, RandomSegCrop):
            np.random.seed(seed)
            crop = kind(crop_size=(20, 90), cat_max_ratio=ratio)
            boxes.append(crop.crop_bbox(dict(img=labels, gt_seg_map=labels.astype(dtype))))
        assert boxes[0] == boxes[1]


def test_no_config_distorts_twice():
    for path in (ROOT / 'configs').glob('*.py'):
        loader = Config.fromfile(path).train_dataloader
        in_pipeline = any(step.type == 'PhotoMetricDistortion' for step in loader.dataset.pipeline)
        on_device = (loader.get('collate_fn') or {}).get('photometric') is not None
        recipe = 'synthetic' not in path.stem and not path.stem.startswith('eft_')  # classifiers
        assert in_pipeline + on_device == recipe, path


def test_distorting_twice_is_refused(scenes):
    cfg = Config.fromfile(ROOT / 'configs' / 'edaformer_t_synthetic.py')
    cfg.train_dataloader.dataset.data_root = str(scenes)
    cfg.train_dataloader.collate_fn = dict(type='stack_collate', photometric=dict())
    check_data(cfg, 'train')
    cfg.train_dataloader.dataset.pipeline.insert(-1, dict(type='PhotoMetricDistortion'))
    with pytest.raises(ConfigError, match='distorted twice'):
        check_data(cfg, 'train')
    cfg.train_dataloader.collate_fn.photometric = None
    check_data(cfg, 'train')
