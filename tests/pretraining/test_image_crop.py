"""The fast random crop: mmpretrain's windows, Pillow's pixels."""
import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('mmpretrain', reason='mmpretrain, whose crop is the reference, is not there')

from mmengine.registry import TRANSFORMS, init_default_scope

from mmseg_edaformer.data.drawing import draw_scene
from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.pretraining import RandomResizedCrop


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmpretrain')


def reference(**kwargs):
    return TRANSFORMS.build(dict(type='RandomResizedCrop', backend='pillow',
                                 interpolation='bicubic', **kwargs))


def decoded(grain, size=(240, 320), quality=92):
    """A drawn image as it comes out of a JPEG file."""
    rng = np.random.default_rng(1)
    image = draw_scene(rng, size)[0] + rng.normal(0, 1, (*size, 3)) * grain
    file = io.BytesIO()
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(file, 'JPEG', quality=quality)
    return np.array(Image.open(file))[..., ::-1].copy()


@pytest.mark.parametrize('options', [
    {}, dict(crop_ratio_range=(0.5, 1.0)), dict(aspect_ratio_range=(1.0, 1.0), max_attempts=2),
    dict(max_attempts=0)])
def test_windows_are_those_of_mmpretrain(options):
    """From the same numbers, which leaves the generator in the same state."""
    ours, theirs = RandomResizedCrop(8, **options), reference(scale=8, **options)
    windows = []
    for seed, (height, width) in enumerate([
            (375, 500), (500, 375), (1, 1), (3, 500), (500, 3), (64, 64), (31, 1000)] * 60):
        states = []
        for draw, shape in ((ours.draw, (height, width)),
                            (theirs.rand_crop_params, [np.empty((height, width, 3), np.uint8)])):
            np.random.seed(seed)
            windows.append(draw(*shape))
            states.append(np.random.random())
        assert windows[-2] == windows[-1]
        assert states[0] == states[1]
    assert len(set(windows)) > (150 if ours.max_attempts > 5 else 5)


@pytest.mark.parametrize(('grain', 'scale'), [(0, 64), (80, 64), (20, (48, 160)), (80, 224)])
def test_pixels_are_those_of_pillow(grain, scale):
    """Up to one level, rarely two, whether windows shrink or grow.

    In two passes, because Pillow itself chooses which one comes first.
    """
    image = decoded(grain)
    ours, theirs = RandomResizedCrop(scale), reference(scale=scale)
    for seed in range(12):
        results = []
        for crop in (ours, theirs):
            np.random.seed(seed)
            results.append(crop(dict(img=image.copy())))
        found, expected = (each['img'].astype(int) for each in results)
        assert tuple(results[0]['img_shape']) == found.shape[:2] == expected.shape[:2]
        assert results[0]['img'].dtype == np.uint8
        assert np.abs(found - expected).mean() < 0.5
        np.random.seed(seed)
        top, left, height, width = ours.draw(*image.shape[:2])
        window = Image.fromarray(image[top:top + height, left:left + width])
        for size in ((ours.scale[1], height), ours.scale[::-1]):
            window = window.resize(size, Image.Resampling.BICUBIC)
        difference = np.abs(found - np.asarray(window))
        assert difference.max() <= 2
        assert (difference > 1).mean() < 1e-4
        assert difference.mean() < 0.02


def test_packing_copies_nothing():
    """A crop lies in memory plane by plane, as batches do."""
    crop = RandomResizedCrop(32)(dict(img=np.zeros((60, 80, 3), np.uint8)))
    plane = crop['img'][..., 0]
    packed = TRANSFORMS.build(dict(type='PackInputs'))(crop)
    assert packed['inputs'].data_ptr() == plane.__array_interface__['data'][0]


def test_grey_images_stay_grey():
    grey = np.random.default_rng(0).integers(0, 256, (50, 60), np.uint8)
    np.random.seed(0)
    found = RandomResizedCrop(16)(dict(img=grey))['img']
    np.random.seed(0)
    expected = RandomResizedCrop(16)(dict(img=np.repeat(grey[..., None], 3, 2)))['img']
    np.testing.assert_array_equal(found, expected[..., 1])


def test_settings_and_images_that_do_not_fit():
    for options in (dict(scale=0), dict(crop_ratio_range=(0.5, 0.1)),
                    dict(crop_ratio_range=(0.5, 1.5)), dict(aspect_ratio_range=(0, 1))):
        with pytest.raises(ConfigError, match='smaller one first'):
            RandomResizedCrop(**dict(dict(scale=8), **options))
    with pytest.raises(ConfigError, match='uint8 images, not float32'):
        RandomResizedCrop(8)(dict(img=np.zeros((9, 9, 3), np.float32)))
