"""Segmenter: the labels of mmseg, whatever comes in and however large it is."""
import gc
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.apis import inference_model, init_model
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from PIL import Image

from mmseg_edaformer import apply_isr
from mmseg_edaformer.data.drawing import CLASSES, PALETTE, draw_scene
from mmseg_edaformer.errors import CheckpointError, ConfigError, DataError, RatioError
from mmseg_edaformer.predict import segmenter as module
from mmseg_edaformer.predict.segmenter import Segmentation, Segmenter
from tests.conftest import ROOT
from tests.predict.conftest import expected, same, seen_sizes


@pytest.mark.gpu
def test_labels_are_those_of_mmseg(work, device, images):
    """For paths, arrays and PIL images; on a GPU, of classes within rounding either may be one."""
    config = str(work / 'mini.py')
    model = init_model(config, str(work / 'best_mIoU_iter_4.pth'), str(device),
                       dict(model=dict(type='EncoderDecoder')))

    def wanted(image):
        model.cfg = Config.fromfile(config)  # inference_model changes it
        return inference_model(model, image).pred_sem_seg.data[0].cpu().numpy()

    segmenter = Segmenter(work, device=str(device))
    rng = np.random.default_rng(0)
    sizes = (40, 200), (200, 30), (1, 90), (64, 96)
    arrays = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    cases = [(array, array, [array]) for array in arrays]
    for path in images:
        array = cv2.imread(str(path))
        cases.append((array, str(path), [path, str(path), array, Image.open(path)]))
    for array, reference, sources in cases:
        labels = wanted(reference)
        for source in sources:
            found = segmenter(source)
            assert found.labels.shape == labels.shape
            assert np.count_nonzero(found.labels != labels) <= (
                max(2, labels.size // 1000) if device.type == 'cuda' else 0)
            assert same(found.image, array)
    assert len(np.unique(labels)) > 3


@pytest.mark.gpu
def test_many_come_in_order_whatever_their_sizes(work, device):
    single = Segmenter(work, device=str(device))
    batched = Segmenter(work, device=str(device), batch_size=3)
    seen = seen_sizes(batched)
    rng = np.random.default_rng(1)
    images = [draw_scene(rng, (64, 96) if i % 3 else (96, 64))[0] for i in range(10)]
    for image, found in zip(images, batched(images), strict=True):
        assert same(found.image, image)
        assert (found.labels == single(image).labels).mean() > 0.999  # rounds otherwise
    batches = [count for count, *_ in seen]
    assert (max(batches), sum(batches)) == (3, 10)
    assert len(batches) < 7


@pytest.mark.parametrize('batch_size', [1, 2])
def test_nothing_is_kept_and_little_read_ahead(work, images, batch_size):
    segmenter = Segmenter(work, device='cpu', batch_size=batch_size)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield images[taken % 4]
    results = segmenter(endless())
    for _ in range(20):
        next(results)
    assert taken <= 20 + 6 * batch_size
    results.close()
    gc.collect()
    assert not [item for item in gc.get_objects() if isinstance(item, Segmentation)]


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_into_memory_is_halved(work, images, cuda, monkeypatch):
    segmenter = Segmenter(work, device='cuda', batch_size=4)
    wanted = [found.labels for found in segmenter(images)]
    own, most, sizes = segmenter.model.predict_labels, 2, []
    more_than_there_is = 2 * torch.cuda.get_device_properties(0).total_memory

    def predict(inputs, data_samples):
        sizes.append(len(inputs))
        if len(inputs) > most:
            torch.empty(more_than_there_is, dtype=torch.uint8, device=inputs.device)
        return own(inputs, data_samples)
    monkeypatch.setattr(segmenter.model, 'predict_labels', predict)
    found = [found.labels for found in segmenter(images)]
    assert sizes == [4, 2, 2]
    assert np.mean([(a == b).mean() for a, b in zip(found, wanted, strict=True)]) > 0.999
    most = 0
    with pytest.raises(DataError, match=r'an image of 128x96 pixels does not fit into the memory '
                                        'of cuda: set isr_ratio to auto'):
        segmenter(images[0])


@pytest.mark.gpu
def test_memory_stays_flat(work, images, cuda):
    segmenter = Segmenter(work, device='cuda')
    sizes = cv2.imread(str(images[0])), cv2.imread(str(images[1]))[:, :64]
    used = []
    for count in 20, 480 if torch.cuda.is_initialized() else 20:  # a fake one is not
        for number in range(count):
            segmenter(sizes[number % 2])
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert used[1][0] <= used[0][0]
    assert used[1][1] <= used[0][1] + (20 << 20)  # one more block of the allocator


@pytest.mark.parametrize('orientation', [3, 6])
def test_images_are_upright(segmenter, images, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / 'turned.jpg'
    Image.open(images[0]).save(path, exif=exif, quality=95)
    upright = segmenter(cv2.imread(str(path)))
    assert upright.labels.shape == ((64, 96) if orientation == 3 else (96, 64))
    assert same(segmenter(path).labels, upright.labels)
    # Pillow has another JPEG decoder.
    assert (segmenter(Image.open(path)).labels == upright.labels).mean() > 0.99


@pytest.mark.gpu
def test_the_ratio_is_a_dial(work, images, device):
    segmenter = Segmenter(work, device=str(device), isr_ratio='optimal')
    optimal = segmenter(images[0]).labels
    other = Segmenter(work, device=str(device))
    plain = other(images[0]).labels
    assert not same(plain, optimal)
    apply_isr(other.model, 'optimal')
    assert same(other(images[0]).labels, optimal)
    assert same(expected(segmenter, images[0], 'none').labels, plain)
    with pytest.raises(RatioError, match='4 multipliers for the decoder'):
        segmenter.isr_ratio = '2211-2222'
    assert same(segmenter(images[0]).labels, plain)
    assert not same(expected(segmenter, images[0], 2).labels, plain)
    assert str(segmenter.isr_ratio) == '2'


def test_threads_share_a_segmenter_each_with_its_ratio(whole, whole_segmenter, images):
    ratios = 'none', 'optimal', 2, '4422-444'
    arrays = [cv2.imread(str(path)) for path in images]
    wanted = [[expected(whole_segmenter, image, ratio).labels for image in arrays]
              for ratio in ratios]
    shared = Segmenter(*whole, device='cpu')

    def predict(index):
        return sum(not same(expected(shared, image, ratios[index]).labels, labels)
                   for _ in range(3)
                   for image, labels in zip(arrays, wanted[index], strict=True))
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(predict, range(4))) == [0] * 4
    # Who has set none follows: this thread, and a new one.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(setattr, shared, 'isr_ratio', 2).result()
    assert same(shared(arrays[0]).labels, wanted[2][0])


def test_shares_masks_and_overlays(segmenter, images):
    found = segmenter(images[1])
    wanted = {CLASSES[label]: (found.labels == label).mean() for label in np.unique(found.labels)}
    assert found.shares == pytest.approx(wanted, abs=1e-6)
    assert list(found.shares) == sorted(wanted, key=wanted.get, reverse=True)
    assert same(np.array(found.mask), found.labels)
    sample = SegDataSample(pred_sem_seg=PixelData(data=torch.tensor(found.labels)[None]))
    visualizer = SegLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = dict(classes=CLASSES, palette=PALETTE)
    visualizer.add_datasample('', found.image[..., ::-1], sample, with_labels=False)
    drawn = np.array(found.overlay()).astype(int)
    assert np.abs(drawn - visualizer.get_image()).max() <= 1  # mmseg cuts off, OpenCV rounds
    assert same(np.array(found.overlay(0.)), found.image[..., ::-1])


def test_more_classes_than_a_byte_counts():
    labels = np.arange(300, dtype=np.int16).reshape(15, 20)
    palette = tuple((i % 256, i // 256, 7) for i in range(300))
    found = Segmentation(labels, np.zeros((15, 20, 3), np.uint8), tuple(map(str, range(300))),
                         palette)
    assert same(np.array(found.mask), labels)
    assert same(np.array(found.overlay(1.)).reshape(300, 3), np.array(palette))
    assert len(found.shares) == 300


# Large images, for which these tests lower the bounds.

@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(module, 'LARGE', 128 * 128)
    return draw_scene(np.random.default_rng(3), (160, 256))[0]


def test_large_images_have_auto_by_default(whole, large, images, caplog, monkeypatch):
    small = cv2.imread(str(images[0]))
    default, plain, auto = (Segmenter(*whole, device='cpu', isr_ratio=ratio)
                            for ratio in (None, 'none', 'auto'))
    assert not same(plain(large).labels, auto(large).labels)
    monkeypatch.setattr(module, '_QUICK', 100 * 100)
    caplog.clear()
    for _ in range(2):
        assert same(default(large).labels, auto(large).labels)
        assert same(default(small).labels, plain(small).labels)
    [record] = caplog.records
    assert re.match(r'an image of 256x160 pixels takes about \d+ s on cpu at ISR ratio auto, the '
                    'default above ', record.message)
    default.isr_ratio = 'none'
    assert same(default(large).labels, plain(large).labels)
    default.isr_ratio = None
    assert same(default(large).labels, auto(large).labels)
    # Where there is nothing to reduce, and in windows that are not large, it is none.
    with monkeypatch.context() as patch:
        patch.setattr(module, 'find_attention', lambda model: SimpleNamespace(parts=()))
        assert same(default(large).labels, plain(large).labels)
    for segmenter in default, plain:
        segmenter.model.test_cfg.update(mode='slide', crop_size=(96, 96), stride=(64, 64))
    assert same(default(large).labels, plain(large).labels)


def test_a_long_prediction_is_announced(whole, large, caplog, monkeypatch):
    segmenter = Segmenter(*whole, device='cpu', isr_ratio='none')
    monkeypatch.setattr(module, '_QUICK', 90 * 90)
    segmenter(large)
    assert not caplog.records
    segmenter._told.clear()
    estimates = iter([7., float('nan')])
    monkeypatch.setattr(segmenter, '_estimate', lambda view: next(estimates))
    for image in large, large[:96], np.tile(large, (3, 3, 1)):
        segmenter(image)
    assert caplog.messages == [
        f'an image of {what} on cpu at ISR ratio none: a smaller max_side (--max-side N) takes '
        'less, and so may isr_ratio auto (--isr-ratio auto)'
        for what in ('256x160 pixels takes about 7 s', '768x480 pixels takes long')]


@pytest.mark.parametrize('resizing', [False, True])
def test_max_side(whole, work, large, resizing):
    source = [work] if resizing else whole
    segmenter = Segmenter(*source, device='cpu', max_side=96)
    seen = seen_sizes(segmenter)
    found = segmenter(large)
    assert same(found.image, large)
    assert found.labels.shape == large.shape[:2]
    small = segmenter(large[:40, :60])
    assert seen == ([(1, 64, 96)] * 2 if resizing else [(1, 60, 96), (1, 40, 60)])
    plain = Segmenter(*source, device='cpu', isr_ratio='none')
    assert segmenter.fingerprint() != plain.fingerprint()
    if not resizing:
        assert same(small.labels, plain(large[:40, :60]).labels)
        shrunk = plain(cv2.resize(large, (96, 60), interpolation=cv2.INTER_AREA)).labels
        enlarged = cv2.resize(shrunk, (256, 160), interpolation=cv2.INTER_NEAREST)
        assert (enlarged == found.labels).mean() > 0.9


# Models and settings that are none.

@pytest.mark.parametrize(('model', 'checkpoint', 'error', 'says'), [
    ('{work}/mini.py', None, ConfigError, 'mini.py: a config needs a checkpoint'),
    ('{work}/mini.py', '{work}/none.pth', CheckpointError, 'checkpoint not found: .*none.pth'),
    ('{pth}', None, ConfigError, 'is a checkpoint and does not say what model it is of'),
    ('{work}/..', None, ConfigError, 'is not the work dir of a training: it holds no config'),
    ('{root}/configs/edaformer_t_synthetic.py', '{pth}', CheckpointError,
     'the checkpoint does not fit the model: .* is 16x3x7x7 in the checkpoint and 32x3x7x7'),
    ('{root}/configs/eft_t_in1k.py', '{pth}', ConfigError, 'no model that predicts a class per'),
    ('{work}/nope', None, ConfigError, 'no such model: .*nope: give the work dir of a training'),
])
def test_models_and_settings_that_are_none(work, model, checkpoint, error, says):
    places = dict(work=work, pth=work / 'best_mIoU_iter_4.pth', root=ROOT)
    with pytest.raises(error, match=says):
        Segmenter(*(path and path.format(**places) for path in (model, checkpoint)), device='cpu')
    for settings in dict(max_side=8), dict(device='cuda:99'), dict(batch_size=0):
        with pytest.raises(ConfigError, match=r'give 32 or more|cannot be used|must be 1'):
            Segmenter(work, **{'device': 'cpu', **settings})


def test_weights_that_are_no_numbers(work, tmp_path):
    content = torch.load(work / 'best_mIoU_iter_4.pth', weights_only=True)
    content['state_dict']['decode_head.conv_seg.weight'].flatten()[1] = torch.nan
    torch.save(content, tmp_path / 'bad.pth')
    with pytest.raises(CheckpointError, match=r'bad.pth: decode_head.conv_seg.weight has 1 of \d+ '
                                              'numbers .* nan or infinite: the training diverged'):
        Segmenter(work / 'mini.py', tmp_path / 'bad.pth', device='cpu')


def test_a_work_dir_without_a_best_checkpoint(work, tmp_path):
    shutil.copy(work / 'mini.py', tmp_path)
    with pytest.raises(CheckpointError, match='holds no checkpoint of a training'):
        Segmenter(tmp_path, device='cpu')
    shutil.copy(work / 'best_mIoU_iter_4.pth', tmp_path / 'iter_4.pth')
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/iter_4.pth')
    assert Segmenter(tmp_path, device='cpu').source == str(tmp_path / 'iter_4.pth')
    shutil.copy(work / 'mini.py', tmp_path / 'other.py')
    with pytest.raises(ConfigError, match=r'several configs, mini.py, other.py: give one'):
        Segmenter(tmp_path, device='cpu')


# Input that cannot be predicted.

@pytest.mark.parametrize(('source', 'says'), [
    ('none.png', 'no such file or folder: .*none.png'),
    ('*.webp', r'no file matches .*\*.webp'),
    ('text.jpg', 'image cannot be decoded: .*text.jpg .*its format is unknown'),
    ('nothing.png', 'nothing.png .*it is empty'),
    ('cut.png', 'image cannot be decoded: .*cut.png'),
    ('void', 'no image in the folder .*void: nothing below it ends in .avif'),
    ('text.mp4', 'video cannot be decoded: .*text.mp4'),
    (np.zeros((4, 5)), r'an array of shape \(4, 5\) and type float64 is not an image'),
    (np.zeros((4, 5, 7), np.uint8), r'shape \(4, 5, 7\)'),
    (Image.new('F', (3, 3)), 'a PIL image of mode F'),
    ([3], 'cannot predict a int'),
])
def test_bad_input(segmenter, images, tmp_path, source, says):
    (tmp_path / 'void').mkdir()
    (tmp_path / 'nothing.png').write_bytes(b'')
    (tmp_path / 'cut.png').write_bytes(images[0].read_bytes()[:900])
    for name in 'text.jpg', 'text.mp4', 'void/notes.txt':
        (tmp_path / name).write_text('%PDF words' * 20)
    with pytest.raises(DataError, match=says):
        list(segmenter(tmp_path / source if isinstance(source, str) else source))


def test_a_bad_one_among_many_is_an_error_or_listed(segmenter, images, tmp_path):
    (tmp_path / 'bad.png').write_text('words')
    many, skipped = [images[0], tmp_path / 'bad.png', images[1]], {}
    results = segmenter(many)
    next(results)
    with pytest.raises(DataError, match=r'bad.png'):
        next(results)
    assert len(list(segmenter(many, skipped))) == 2
    assert [*skipped] == [str(many[1])]


def test_an_image_too_large_to_be_decoded_is_refused(work, tmp_path, monkeypatch):
    bomb = tmp_path / 'bomb.png'
    Image.new('1', (20000, 20000)).save(bomb)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2 ** 26)  # as in a new process
    with warnings.catch_warnings():
        warnings.simplefilter('error', Image.DecompressionBombWarning)
        segmenter = Segmenter(work, device='cpu')
        with pytest.raises(DataError, match=r'bomb.png .* more than 268435456'):
            segmenter(bomb)
        with Image.open(bomb) as image, pytest.raises(DataError, match='20000x20000'):
            segmenter(image)
