"""Reading images and labels: equal to mmseg's where they are good, named where they are bad."""
import numpy as np
import pytest
from mmseg.datasets.transforms import LoadAnnotations, Resize
from mmseg.registry import TRANSFORMS
from PIL import Image

from mmseg_edaformer.data import LoadSegImage, LoadSegLabels
from mmseg_edaformer.data.transforms import REPLACES, SegResize, with_checks, without_checks
from mmseg_edaformer.errors import DataError


@pytest.fixture
def mask(tmp_path):
    def write(array, mode=None):
        path = tmp_path / 'mask.png'
        Image.fromarray(array, mode).save(path)
        return dict(seg_map_path=str(path), img_path='image.jpg', seg_fields=[],
                    reduce_zero_label=False, ori_shape=array.shape[:2])
    return write


@pytest.mark.parametrize('reduce_zero_label', [False, True])
@pytest.mark.parametrize('label_map', [None, {0: 1, 1: 255, 2: 0, 3: 2}])
def test_equal_to_mmseg(mask, reduce_zero_label, label_map):
    labels = np.random.default_rng(0).choice([0, 1, 2, 3, 255], (20, 30)).astype(np.uint8)
    labels = labels + (reduce_zero_label & (labels < 255)).astype(np.uint8)
    labels[0, 0] = 0
    results = dict(mask(labels), reduce_zero_label=reduce_zero_label, label_map=label_map)
    expected = LoadAnnotations().transform(dict(results, seg_fields=[]))
    found = LoadSegLabels(num_classes=4).transform(dict(results, seg_fields=[]))
    assert found['seg_fields'] == ['gt_seg_map']
    assert found['gt_seg_map'].dtype == expected['gt_seg_map'].dtype
    assert np.array_equal(found['gt_seg_map'], expected['gt_seg_map'])


@pytest.mark.parametrize(('array', 'message'), [
    (np.full((4, 4), 9, np.uint8), r'holds the label 9 \(16 pixels\): its 4 classes are 0 to 3'),
    (np.full((4, 4), 300, np.uint16), r'holds the label 300 \(16 pixels\)'),
    (np.zeros((4, 4, 3), np.uint8), 'has 3 channels'),
])
def test_what_is_wrong_is_named(mask, array, message):
    with pytest.raises(DataError, match=message) as caught:
        LoadSegLabels(num_classes=4).transform(mask(array))
    assert 'mask.png' in str(caught.value)


def test_zero_and_the_classes_when_zero_is_no_label(mask):
    results = dict(mask(np.full((4, 4), 5, np.uint8)), reduce_zero_label=True)
    assert (LoadSegLabels(num_classes=5).transform(results)['gt_seg_map'] == 4).all()
    with pytest.raises(DataError, match='its 4 classes are 1 to 4, and 0 and 255 mean no label'):
        LoadSegLabels(num_classes=4).transform(dict(results, seg_fields=[]))


@pytest.mark.parametrize('content', [None, b'', b'not an image'])
def test_bad_images_can_be_ignored_as_in_mmcv(tmp_path, content):
    path = tmp_path / 'file.png'
    if content is not None:
        path.write_bytes(content)
    assert LoadSegImage(ignore_empty=True).transform(dict(img_path=str(path))) is None


def test_without_a_number_of_classes_any_label_passes(mask):
    results = mask(np.full((4, 4), 200, np.uint8))
    assert (LoadSegLabels().transform(results)['gt_seg_map'] == 200).all()
    with pytest.raises(DataError, match='labels lie below 255'):
        LoadSegLabels().transform(mask(np.full((4, 4), 300, np.uint16)))


def test_float_images_and_grey_ones(tmp_path):
    path = str(tmp_path / 'file.png')
    image = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
    Image.fromarray(image).save(path)
    grey = LoadSegImage(to_float32=True, color_type='grayscale').transform(dict(img_path=path))
    assert grey['img'].dtype == np.float32
    assert np.array_equal(grey['img'], image)
    assert grey['img_shape'] == grey['ori_shape'] == (5, 7)


@pytest.mark.parametrize(('shape', 'options', 'size'), [
    ((1, 20000), dict(scale=(2048, 512), keep_ratio=True), (1, 2048)),
    ((20000, 1), dict(scale=(2048, 512), keep_ratio=True), (2048, 1)),
    ((1, 9), dict(scale_factor=0.25), (1, 2))])
def test_a_thin_image_keeps_a_pixel(shape, options, size):
    results = dict(img=np.full((*shape, 3), 7, np.uint8), seg_fields=['gt_seg_map'],
                   gt_seg_map=np.full(shape, 3, np.uint8))
    results = SegResize(**options).transform(results)
    assert results['img'].shape == (*size, 3)
    assert results['img_shape'] == size
    assert results['gt_seg_map'].shape == size
    assert (results['gt_seg_map'] == 3).all()


def test_each_class_has_its_own_name():
    for name, cls in REPLACES.items():
        assert TRANSFORMS.get(cls.__name__) is cls
        step = dict(type=name, scale=8)
        assert with_checks(step) == dict(step, type=cls.__name__)
        assert without_checks(with_checks(step)) == step
        assert without_checks(dict(step, type=f'mmseg.{cls.__name__}')) == step
    assert with_checks(dict(type='PackSegInputs')) == dict(type='PackSegInputs')


def test_images_without_a_mask():
    """mmseg's inferencers give no mask; a data set without masks is a mistake."""
    results = dict(img_path='a.png')
    assert LoadSegLabels().transform(results) == dict(img_path='a.png')
    with pytest.raises(DataError, match=r'a\.png has no mask: set data_prefix\.seg_map_path'):
        LoadSegLabels().transform(dict(results, seg_fields=[]))


def test_the_message_survives_a_worker_process():
    error = DataError('Caught DataError in DataLoader worker process 0.\nOriginal Traceback:\n'
                      '  File "x.py"\nmmseg_edaformer.errors.DataError: mask a.png holds 7\n')
    assert str(error) == 'mask a.png holds 7'


@pytest.mark.parametrize('options', [
    dict(scale=(40, 20), keep_ratio=True), dict(scale=(40, 20)), dict(scale_factor=1.5)])
def test_resize_is_mmsegs(options):
    rng = np.random.default_rng(0)
    results = dict(img=rng.integers(0, 256, (30, 50, 3), np.uint8), seg_fields=['gt_seg_map'],
                   gt_seg_map=rng.integers(0, 8, (30, 50), np.uint8))
    expected = Resize(**options).transform(dict(results))
    found = SegResize(**options).transform(dict(results))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
