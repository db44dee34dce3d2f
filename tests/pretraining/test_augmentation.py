"""The crop, and RandAugment and RandomErasing on the device, against mmpretrain's own."""
import io
import pickle

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmpretrain', reason='mmpretrain, whose transforms are the reference, is not '
                    'there')

from mmengine.config import Config
from mmengine.registry import FUNCTIONS, MODELS, TRANSFORMS, init_default_scope

from mmseg_edaformer.data.drawing import draw_scene
from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.pretraining import PackForDevice, RandomResizedCrop, augment_collate
from mmseg_edaformer.pretraining.augmentation import augment_batch, draw_augmentation
from tests.conftest import ROOT

SIZE = 96, 80
NAMES = ['AutoContrast', 'Equalize', 'Invert', 'Rotate', 'Posterize', 'Solarize', 'SolarizeAdd',
         'ColorTransform', 'Contrast', 'Brightness', 'Sharpness', 'Shear', 'Shear vertical',
         'Translate', 'Translate vertical']
MOVED = range(3, 4), range(11, 15)


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmpretrain')


@pytest.fixture
def steps():
    return Config.fromfile(ROOT / 'configs' / 'eft_t_in1k.py').train_pipeline[-1].transforms


@pytest.fixture
def recipe(steps):
    """The two transforms of the recipe."""
    return [TRANSFORMS.build(transform) for transform in steps]


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*SIZE, 3), np.uint8),  # noise
            draw_scene(rng, SIZE)[0].copy(),
            np.full((*SIZE, 3), 77, np.uint8),
            rng.integers(60, 90, (*SIZE, 3), np.uint8),
            np.repeat(rng.integers(0, 2, (*SIZE, 1), np.uint8) * 255, 3, 2)]


def batch(images):
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def images_of(tensor):
    return tensor.permute(0, 2, 3, 1).numpy()


def assert_close(found, expected, moved):
    """Equal, but for rounding where pixels move; OpenCV before 5 rounds where they come from."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    if not moved:
        assert difference.max() == 0
    elif int(cv2.__version__.split('.')[0]) < 5:
        assert difference.mean() < 1.5
    else:
        assert difference.max() <= 1
        assert difference.mean() < 0.002


@pytest.mark.parametrize(('index', 'name'), enumerate(NAMES))
def test_each_operation_is_that_of_mmpretrain(recipe, index, name):
    augment = recipe[0]
    step = augment.transforms[index]
    assert f'{type(step).__name__} {getattr(step, "direction", "")}'.startswith(name.split()[0])
    assert getattr(step, 'direction', 'horizontal') == (name.split()[1:] or ['horizontal'])[0]
    augment.random_policy_indices = lambda: [index]
    inputs, expected, drawn = [], [], []
    for seed in range(12):
        for image in pictures():
            np.random.seed(seed)
            expected.append(augment(dict(img=image.copy()))['img'])
            after = np.random.random()
            np.random.seed(seed)
            drawn.append(list(draw_augmentation(augment, SIZE)))
            assert np.random.random() == after
            inputs.append(image)
    found = images_of(augment_batch(batch(inputs), drawn))
    changed = [not np.array_equal(a, b) for a, b in zip(found, inputs)]
    assert 5 < sum(changed) < 45  # it is drawn half of the time
    assert_close(found, np.stack(expected), any(index in moved for moved in MOVED))


def test_the_recipe_is_that_of_mmpretrain(recipe):
    """The same numbers choose the same operations, of which one follows the other."""
    count, image = 300, pictures()[1]
    expected, drawn = [], []
    for seed in range(count):
        np.random.seed(seed)
        results = dict(img=image.copy())
        for transform in recipe:
            results = transform(results)
        expected.append(results['img'])
        np.random.seed(seed)
        drawn.append([each for transform in recipe
                      for each in draw_augmentation(transform, SIZE)])
    kinds = [[operation.kind for operation in operations] for operations in drawn]
    assert {len(each) for each in kinds} == {0, 1, 2, 3}
    assert {kind for each in kinds for kind in each} == {
        'table', 'auto_contrast', 'equalize', 'contrast', 'color', 'sharpness', 'warp', 'erase'}
    found = images_of(augment_batch(batch([image] * count), drawn))
    after_a_move = 0
    for each, ours, theirs in zip(drawn, found, expected):
        ours, theirs = ours.copy(), theirs.copy()
        for operation in each:
            if operation.kind == 'erase':  # other noise, in the same place
                top, left, height, width = operation.values[:4]
                for picture in (ours, theirs):
                    picture[top:top + height, left:left + width] = 0
        if each and 'warp' in [operation.kind for operation in each[:-1]]:
            after_a_move += 1  # what follows may widen a difference of one level
            assert np.abs(ours.astype(int) - theirs).mean() < 0.1 + 4 * (cv2.__version__ < '5')
        else:
            assert_close(ours, theirs, 'warp' in [operation.kind for operation in each])
    assert after_a_move > 10


@pytest.mark.parametrize('settings', [
    dict(type='RandAugment', num_policies=3, magnitude_level=9,  # no ranges
         policies=[dict(type='Rotate', angle=20., prob=1.), dict(type='Posterize', bits=3, prob=1.),
                   dict(type='Contrast', magnitude=0.4, prob=1.)],
         hparams=dict(pad_val=(9, 9, 9), interpolation='bicubic')),
    dict(type='RandomErasing', erase_prob=1., mode='const', fill_color=[9.9, 20, 30])])
def test_fixed_values(settings):
    augment, image = TRANSFORMS.build(settings), pictures()[1]
    augment.random_policy_indices = lambda: [2, 1, 0]
    np.random.seed(3)
    expected = augment(dict(img=image.copy()))['img']
    np.random.seed(3)
    found = augment_batch(batch([image]), [list(draw_augmentation(augment, SIZE))])
    assert_close(images_of(found)[0], expected, moved='policies' in settings)


def packed(recipe_steps, count=6, seed=0):
    np.random.seed(seed)
    step = PackForDevice(recipe_steps)
    rng = np.random.default_rng(seed)
    return [step(dict(img=rng.integers(0, 256, (*SIZE, 3), np.uint8), gt_label=number))
            for number in range(count)]


def test_batches_are_those_of_mmpretrain(steps):
    """What the model gets, with labels; also after the way through processes."""
    settings = dict(num_classes=7, mean=[1., 2., 3.], std=[4., 5., 6.], to_rgb=True)
    ours = MODELS.build(dict(settings, type='mmseg.AugmentingPreProcessor'))
    theirs = MODELS.build(dict(settings, type='ClsDataPreprocessor'))
    samples = packed(steps[:1])
    data = pickle.loads(pickle.dumps(augment_collate(samples)))
    assert len(data['inputs']) == 6
    found = ours(data, training=True)
    done = augment_batch(torch.stack([sample['inputs'] for sample in samples]),
                         [sample['drawn'] for sample in samples])
    plain = FUNCTIONS.get('default_collate')([
        dict(inputs=image, data_samples=sample['data_samples'])
        for image, sample in zip(done, samples)])
    expected = theirs(plain, training=True)
    assert torch.equal(found['inputs'], expected['inputs'])
    assert [int(sample.gt_label) for sample in found['data_samples']] == list(range(6))
    # Batches without draws, as for validation, pass through.
    assert torch.equal(ours(plain)['inputs'], expected['inputs'])
    with pytest.raises(ConfigError, match='AugmentingPreProcessor'):
        theirs(data, training=True)  # which would leave out the augmentations


def test_an_image_does_not_depend_on_its_batch(steps):
    samples = packed(steps[:1])
    images = torch.stack([sample['inputs'] for sample in samples])
    drawn = [sample['drawn'] for sample in samples]
    together = augment_batch(images.clone(), drawn)
    for place in range(len(samples)):
        assert torch.equal(
            augment_batch(images[place:place + 1].clone(), drawn[place:place + 1])[0],
            together[place])
    assert not torch.equal(together, images)
    with torch.autocast('cpu', torch.bfloat16):  # in which mixed precision prepares batches
        assert torch.equal(augment_batch(images.clone(), drawn), together)


@pytest.mark.parametrize(('transform', 'says'), [
    (dict(type='RandomFlip', prob=0.5), 'cannot do RandomFlip'),
    (dict(type='RandomErasing', mode='rand'), 'needs a fill_std'),
    (dict(type='RandAugment', policies='timm_increasing', num_policies=2, magnitude_level=9),
     'cannot do Rotate, Translate, Translate of RandAugment'),
    (dict(type='RandAugment', policies=[dict(type='Cutout', shape=3)], num_policies=1,
          magnitude_level=9), 'cannot do Cutout of RandAugment')])
def test_what_the_device_cannot_do(transform, says):
    with pytest.raises(ConfigError, match=says):
        PackForDevice([transform])


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
