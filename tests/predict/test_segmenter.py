"""Pictures and videos in, label maps and overlays out: what mmseg predicts, whatever comes in."""
import copy
import gc
import json
import os
import re
import shutil
import sys
import time
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmseg_edaformer import apply_isr
from mmseg_edaformer.data import drawing as synthetic
from mmseg_edaformer.engine.convert import pack_file
from mmseg_edaformer.errors import CheckpointError, ConfigError, DataError, RatioError
from mmseg_edaformer.predict import segmenter as predictor
from mmseg_edaformer.predict.segmenter import (
    Segmentation,
    Segmenter,
    Video,
    describe_summary,
    find_pictures,
    predict_pictures,
    predict_video,
)
from tests.conftest import ROOT, run, seeing_model, write_config
from tests.processes import run_tool

CLASSES, PALETTE = synthetic.CLASSES, synthetic.PALETTE


@pytest.fixture(scope='module')
def work(scenes, tmp_path_factory):
    """A work dir: the config, which resizes as ADE20K's do, and weights that see many classes."""
    folder = tmp_path_factory.mktemp('work')
    config = write_config(folder, scenes)
    config.write_text(config.read_text() + '''
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(256, 80), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadSegLabels', num_classes=8), dict(type='PackSegInputs')]
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    data_root=data_root, pipeline=test_pipeline))
''')
    model = seeing_model(config, scenes)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(
        classes=CLASSES, palette=PALETTE))), folder / 'best_mIoU_iter_4.pth')
    return folder


@pytest.fixture(scope='module')
def segmenter(work):
    return Segmenter(work, device='cpu')


@pytest.fixture
def mmsegs(work, device):
    """mmseg's own EncoderDecoder with the same weights, predicting from a path or an array."""
    config = str(work / 'mini.py')
    model = init_model(config, str(work / 'best_mIoU_iter_4.pth'), str(device),
                       dict(model=dict(type='EncoderDecoder')))

    def predict(image):
        model.cfg = Config.fromfile(config)  # inference_model changes it
        return inference_model(model, image).pred_sem_seg.data[0].cpu().numpy()
    return predict


@pytest.fixture
def pictures(scenes):
    return sorted((scenes / 'images' / 'validation').iterdir())


def same(one, other):
    return one.shape == other.shape and bool((one == other).all())


def agree(one, other, device):
    """The same labels; on a GPU, of classes within rounding of each other either may be one."""
    differ = np.count_nonzero(one != other)
    return one.shape == other.shape and differ <= (max(2, one.size // 1000) if device.type == 'cuda'
                                                   else 0)


@pytest.mark.gpu
def test_paths_arrays_and_pil_are_predicted_as_mmseg_does(work, device, mmsegs, pictures):
    segmenter = Segmenter(work, device=str(device))
    for path in pictures:
        wanted = mmsegs(str(path))
        assert len(np.unique(wanted)) > 3
        array = cv2.imread(str(path))
        assert same(mmsegs(array), wanted)
        for source in path, str(path), array, Image.open(path):
            found = segmenter(source)
            assert agree(found.labels, wanted, device)
            assert same(found.picture, array)


@pytest.mark.gpu
def test_any_size(work, device, mmsegs):
    segmenter = Segmenter(work, device=str(device))
    for size in (40, 200), (200, 30), (1, 90), (64, 96):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        assert agree(segmenter(image).labels, mmsegs(image), device), size


@pytest.mark.slow
def test_labels_are_those_of_the_test_tool(work, pictures, tmp_path):
    checkpoint = work / 'best_mIoU_iter_4.pth'
    code, output = run_tool('tools/test.py', work / 'mini.py', checkpoint, '--isr-ratio', '2',
                            '--out', tmp_path / 'test', '--work-dir', tmp_path / 'log')
    assert code == 0, output
    segmenter = Segmenter(work / 'mini.py', checkpoint, device='cpu', isr='2')
    predict_pictures(segmenter, [pictures[0].parent], tmp_path / 'out')
    for path in pictures:
        ours, theirs = (Image.open(folder / path.name) for folder in (
            tmp_path / 'out' / 'masks', tmp_path / 'test'))
        assert same(np.array(ours), np.array(theirs))
        # As a picture it has the colours of the classes.
        assert same(np.array(ours.convert('RGB')), np.array(PALETTE)[np.array(theirs)])


@pytest.mark.gpu
def test_many_come_in_order_whatever_their_sizes(work, device):
    single = Segmenter(work, device=str(device))
    batched = Segmenter(work, device=str(device), batch_size=3)
    batches = []
    own = batched.model.predict_labels
    batched.model.predict_labels = lambda inputs, data_samples: (
        batches.append(len(inputs)), own(inputs, data_samples))[1]
    rng = np.random.default_rng(1)
    images = [synthetic.draw_scene(rng, (64, 96) if i % 3 else (96, 64))[0] for i in range(10)]
    for image, found in zip(images, batched(images), strict=True):
        assert same(found.picture, image)
        assert (found.labels == single(image).labels).mean() > 0.999  # rounds otherwise
    assert max(batches) == 3
    assert sum(batches) == 10
    assert len(batches) < 7


@pytest.mark.parametrize('batch_size', [1, 2])
def test_nothing_is_kept_and_little_read_ahead(work, pictures, batch_size):
    segmenter = Segmenter(work, device='cpu', batch_size=batch_size)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield pictures[taken % 4]
    results = segmenter(endless())
    for _ in range(20):
        next(results)
    assert taken <= 20 + 6 * batch_size
    results.close()
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, Segmentation)]


def test_what_does_not_fit_into_memory_is_halved(work, pictures, monkeypatch):
    segmenter = Segmenter(work, device='cpu', batch_size=4)
    wanted = [found.labels for found in segmenter(pictures)]
    own, most = segmenter.model.predict_labels, 1

    def predict(inputs, data_samples):
        if len(inputs) > most:
            raise torch.cuda.OutOfMemoryError
        return own(inputs, data_samples)
    monkeypatch.setattr(segmenter.model, 'predict_labels', predict)
    found = [found.labels for found in segmenter(pictures)]
    assert np.mean([(a == b).mean() for a, b in zip(found, wanted, strict=True)]) > 0.999
    most = 0
    with pytest.raises(DataError, match=r'an image of 128x96 pixels does not fit .* isr to auto'):
        segmenter(pictures[0])


@pytest.mark.gpu
def test_a_gpu_that_is_full(work, pictures, cuda, monkeypatch):
    segmenter = Segmenter(work, device='cuda', batch_size=4)
    wanted = [found.labels for found in segmenter(pictures)]
    own, most, sizes = segmenter.model.predict_labels, 2, []
    more_than_there_is = 2 * torch.cuda.get_device_properties(0).total_memory

    def predict(inputs, data_samples):
        sizes.append(len(inputs))
        if len(inputs) > most:
            torch.empty(more_than_there_is, dtype=torch.uint8, device=inputs.device)
        return own(inputs, data_samples)
    monkeypatch.setattr(segmenter.model, 'predict_labels', predict)
    found = [found.labels for found in segmenter(pictures)]
    assert sizes == [4, 2, 2]
    assert np.mean([(a == b).mean() for a, b in zip(found, wanted, strict=True)]) > 0.999
    most = 0
    with pytest.raises(DataError, match=r'does not fit into the memory of cuda: set isr to auto'):
        segmenter(pictures[0])


@pytest.mark.gpu
def test_memory_stays_flat(work, pictures, cuda):
    segmenter = Segmenter(work, device='cuda')
    sizes = cv2.imread(str(pictures[0])), cv2.imread(str(pictures[1]))[:, :64]
    used = []
    for count in 20, 480 if torch.cuda.is_initialized() else 20:  # a fake one is not
        for number in range(count):
            segmenter(sizes[number % 2])
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert used[1][0] <= used[0][0]
    assert used[1][1] <= used[0][1] + (20 << 20)  # one more block of the allocator


@pytest.mark.parametrize('orientation', [3, 6, 8])
def test_pictures_are_upright(segmenter, pictures, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(pictures[0]).save(tmp_path / 'turned.jpg', exif=exif, quality=95)
    upright = segmenter(cv2.imread(str(tmp_path / 'turned.jpg')))
    assert upright.labels.shape == ((64, 96) if orientation == 3 else (96, 64))
    assert same(segmenter(tmp_path / 'turned.jpg').labels, upright.labels)
    with Image.open(tmp_path / 'turned.jpg') as picture:
        assert (segmenter(picture).labels == upright.labels).mean() > 0.99  # another JPEG decoder


@pytest.mark.gpu
def test_the_ratio_is_a_dial(work, pictures, device):
    segmenter = Segmenter(work, device=str(device), isr='optimal')
    optimal = segmenter(pictures[0]).labels
    other = Segmenter(work, device=str(device))
    plain = other(pictures[0]).labels
    assert not same(plain, optimal)
    apply_isr(other.model, 'optimal')
    assert same(other(pictures[0]).labels, optimal)
    segmenter.isr = 'none'
    assert same(segmenter(pictures[0]).labels, plain)
    with pytest.raises(RatioError, match='4 multipliers for the decoder'):
        segmenter.isr = '2211-2222'
    assert same(segmenter(pictures[0]).labels, plain)
    segmenter.isr = 2
    assert str(segmenter.isr) == '2'
    assert not same(segmenter(pictures[0]).labels, plain)


def test_shares_masks_and_overlays(segmenter, pictures):
    found = segmenter(pictures[1])
    wanted = {CLASSES[label]: (found.labels == label).mean() for label in np.unique(found.labels)}
    assert found.shares == pytest.approx(wanted, abs=1e-6)
    assert list(found.shares) == sorted(wanted, key=wanted.get, reverse=True)
    assert same(np.array(found.mask), found.labels)
    sample = SegDataSample(pred_sem_seg=PixelData(data=torch.tensor(found.labels)[None]))
    visualizer = SegLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = dict(classes=CLASSES, palette=PALETTE)
    visualizer.add_datasample('', found.picture[..., ::-1], sample, with_labels=False)
    drawn = np.array(found.overlay()).astype(int)
    assert np.abs(drawn - visualizer.get_image()).max() <= 1  # mmseg cuts off, OpenCV rounds
    assert same(np.array(found.overlay(0.)), found.picture[..., ::-1])


def test_more_classes_than_a_byte_counts():
    labels = np.arange(300, dtype=np.int16).reshape(15, 20)
    palette = tuple((i % 256, i // 256, 7) for i in range(300))
    found = Segmentation(labels, np.zeros((15, 20, 3), np.uint8), tuple(map(str, range(300))),
                         palette)
    assert same(np.array(found.mask), labels)
    assert same(np.array(found.overlay(1.)).reshape(300, 3), np.array(palette))
    assert len(found.shares) == 300


def test_a_picture_too_large_to_be_decoded_is_refused(work, tmp_path, monkeypatch):
    bomb = tmp_path / 'bomb.png'
    Image.new('1', (20000, 20000)).save(bomb)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2 ** 26)  # as in a new process
    with warnings.catch_warnings():
        warnings.simplefilter('error', Image.DecompressionBombWarning)
        segmenter = Segmenter(work, device='cpu')
        with pytest.raises(DataError, match=r'bomb.png .* more than 268435456'):
            segmenter(bomb)
        with Image.open(bomb) as picture, pytest.raises(DataError, match='20000x20000'):
            segmenter(picture)


# Large images, for which these tests lower the bounds.

@pytest.fixture
def whole(work, scenes, tmp_path, monkeypatch):
    """The config and the checkpoint of a model that sees images at their full size."""
    monkeypatch.setattr(predictor, 'LARGE', 128 * 128)
    return write_config(tmp_path, scenes), work / 'best_mIoU_iter_4.pth'


@pytest.fixture
def large():
    return synthetic.draw_scene(np.random.default_rng(3), (160, 256))[0]


def test_large_images_have_auto_by_default(whole, large, pictures, caplog, monkeypatch):
    small = cv2.imread(str(pictures[0]))
    default, plain, auto = (Segmenter(*whole, device='cpu', isr=ratio)
                            for ratio in (None, 'none', 'auto'))
    assert not same(plain(large).labels, auto(large).labels)
    monkeypatch.setattr(predictor, '_QUICK', 100 * 100)
    caplog.clear()
    for _ in range(2):
        assert same(default(large).labels, auto(large).labels)
        assert same(default(small).labels, plain(small).labels)
    [record] = caplog.records
    assert record.message.startswith(
        'an image of 256x160 pixels takes about 0 s on cpu at ISR ratio auto, the default above ')
    assert str(default.isr) == '1'
    default.isr = 'none'
    assert same(default(large).labels, plain(large).labels)
    default.isr = None
    assert same(default(large).labels, auto(large).labels)
    # Where there is nothing to reduce, and in windows that are not large, it is none.
    with monkeypatch.context() as patch:
        patch.setattr(predictor, 'find_attention', lambda model: SimpleNamespace(parts=()))
        assert same(default(large).labels, plain(large).labels)
    for each in default, plain:
        each.model.test_cfg.update(mode='slide', crop_size=(96, 96), stride=(64, 64))
    assert same(default(large).labels, plain(large).labels)


def test_the_summary_says_which_ratio_large_images_had(whole, work, large, pictures, tmp_path):
    cv2.imwrite(str(tmp_path / 'large.png'), large)
    out = tmp_path / 'out'
    segmenter = Segmenter(*whole, device='cpu')
    assert predict_pictures(segmenter, [pictures[0]], out)['isr_ratio'] == 'none'
    for kept in 0, 1:
        summary = predict_pictures(segmenter, [tmp_path / 'large.png'], out)
        assert (summary['kept'], summary['isr_ratio']) == (kept, 'auto')
    both = predict_pictures(segmenter, [pictures[0], tmp_path / 'large.png'], out)
    assert both['isr_ratio'] == 'none, auto for 1 of 2'
    segmenter.isr = 'none'  # asked for: no mask of auto is taken for it
    summary = predict_pictures(segmenter, [tmp_path / 'large.png'], out)
    assert (summary['kept'], summary['isr_ratio']) == (0, 'none')
    # The pipeline makes it small.
    assert predict_pictures(Segmenter(work, device='cpu'), [tmp_path / 'large.png'],
                            tmp_path / 'other')['isr_ratio'] == 'none'


def test_what_takes_long_is_said_before(whole, large, caplog, monkeypatch):
    segmenter = Segmenter(*whole, device='cpu', isr='none')
    monkeypatch.setattr(predictor, '_QUICK', 90 * 90)
    segmenter(large)
    assert not caplog.records
    monkeypatch.setattr(predictor, '_LONG', 0.)
    segmenter._told.clear()
    estimates = iter([7., 400., float('nan')])
    monkeypatch.setattr(segmenter, '_estimate', lambda view: next(estimates))
    for image in large, large[:96], np.tile(large, (3, 3, 1)), np.tile(large, (9, 6, 1)):
        segmenter(image)
    assert [record.message.partition(':')[0] for record in caplog.records] == [
        'an image of 256x160 pixels takes about 7 s on cpu at ISR ratio none',
        'an image of 768x480 pixels takes about 7 min on cpu at ISR ratio none',
        'an image of 1536x1440 pixels takes long on cpu at ISR ratio none']
    assert caplog.messages[0].endswith(
        ': a smaller max_side (--max-side N) takes less, and so may isr auto (--isr-ratio auto)')


def test_an_estimate_is_near_and_never_an_error(whole, monkeypatch):
    segmenter = Segmenter(*whole, device='cpu', isr='none')
    with torch.no_grad():
        segmenter._estimate((64, 64))
        found = segmenter._estimate((640, 960))
        start = time.perf_counter()
        segmenter.model.predict_labels(torch.zeros(1, 3, 640, 960))
        assert 0.05 < found / (time.perf_counter() - start) < 20  # other work runs beside it
        monkeypatch.setattr(segmenter.model, 'predict_labels', lambda inputs: 1 / 0)
        assert np.isnan(segmenter._estimate((640, 960)))


@pytest.mark.parametrize('resizing', [False, True])
def test_max_side(whole, work, large, resizing):
    source = [work] if resizing else whole
    segmenter = Segmenter(*source, device='cpu', max_side=96)
    seen, own = [], segmenter.model.predict_labels
    segmenter.model.predict_labels = lambda inputs, data_samples: (
        seen.append(tuple(inputs.shape[2:])), own(inputs, data_samples))[1]
    found = segmenter(large)
    assert same(found.picture, large)
    assert found.labels.shape == large.shape[:2]
    assert same(segmenter(large[:40, :60]).picture, large[:40, :60])
    assert seen == ([(64, 96), (64, 96)] if resizing else [(60, 96), (40, 60)])
    plain = Segmenter(*source, device='cpu', isr='none')
    assert segmenter.fingerprint() != plain.fingerprint()
    if not resizing:
        assert same(segmenter(large[:40, :60]).labels, plain(large[:40, :60]).labels)
        shrunk = plain(cv2.resize(large, (96, 60), interpolation=cv2.INTER_AREA)).labels
        enlarged = cv2.resize(shrunk, (256, 160), interpolation=cv2.INTER_NEAREST)
        assert (enlarged == found.labels).mean() > 0.9


def test_progress_for_a_log_file(monkeypatch, capsys):
    now = 0.
    monkeypatch.setattr(predictor.time, 'monotonic', lambda: now)
    with predictor.progress_bar('predict', 1000, done=100) as advance:
        for step in range(1, 901):
            now = step * 2.
            advance(100 + step)
    with predictor.progress_bar('frames', None) as advance:
        now += 10
        advance(7)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ['predict: 105 of 1000, 0:29:50 left', 'predict: 110 of 1000, 0:29:40 left']
    assert len(lines) == 11
    assert lines[-1] == 'frames: 7'


# Threads.

def test_threads_share_a_segmenter_each_with_its_ratio(whole, pictures):
    ratios = 'none', 'optimal', 2, '4422-444'
    images = [cv2.imread(str(path)) for path in pictures]
    single = Segmenter(*whole, device='cpu')
    wanted = []
    for ratio in ratios:
        single.isr = ratio
        wanted.append([single(image).labels for image in images])
    shared = Segmenter(*whole, device='cpu')

    def predict(index):
        wrong = 0
        for _ in range(3):
            shared.isr = ratios[index]
            wrong += sum(not same(shared(image).labels, labels)
                         for image, labels in zip(images, wanted[index], strict=True))
        return wrong
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(predict, range(4))) == [0] * 4
    # Who has set none follows: this thread, and a new one.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(setattr, shared, 'isr', 2).result()
    assert same(shared(images[0]).labels, wanted[2][0])
    other = copy.deepcopy(shared)  # with a lock of its own
    shared.isr = 'none'
    assert same(other(images[0]).labels, wanted[2][0])


# One file that says all.

@pytest.fixture(scope='module')
def single(work):
    """The path of a .safetensors made of the work dir."""
    pack_file(work / 'best_mIoU_iter_4.pth', work / 'model.safetensors',
              Config.fromfile(work / 'mini.py'))
    return work / 'model.safetensors'


def test_one_file_predicts_alone(single, segmenter, pictures, tmp_path):
    shutil.copy(single, tmp_path / 'alone.safetensors')
    alone = Segmenter(tmp_path / 'alone.safetensors', device='cpu')
    assert alone.classes == CLASSES
    assert [list(colour) for colour in alone.description.palette] == PALETTE
    for path in pictures:
        assert same(alone(path).labels, segmenter(path).labels)


def test_a_segformer_is_told_as_data_too(tmp_path, pictures):
    config = ROOT / 'configs' / 'segformer_b0_synthetic.py'
    model = init_model(str(config), device='cpu')
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    for source in ([config, tmp_path / 'weights.safetensors'], [tmp_path / 'one.safetensors']):
        if len(source) == 1:
            pack_file(tmp_path / 'weights.safetensors', source[0], Config.fromfile(config))
        segmenter = Segmenter(*source, device='cpu')
        assert segmenter.classes == CLASSES  # of the data set, where the checkpoint names none
        assert same(segmenter(pictures[0]).labels,
                    inference_model(model, str(pictures[0])).pred_sem_seg.data[0].numpy())


def told(single, target, change):
    """A copy of the file with a changed description."""
    with safe_open(single, 'pt') as file:
        content = json.loads(file.metadata()['mmseg_edaformer'])
    text = change(content)
    save_file(load_file(single), target,
              dict(mmseg_edaformer=text if isinstance(text, str) else json.dumps(content)))
    return target


HOSTILE = {
    'a function': lambda c: c['model'].update(backbone=dict(type='os.system',
                                                            command='touch canary')),
    'a function deep inside': lambda c: c['model']['decode_head'].update(
        norm_cfg=dict(type='os.system', command='touch canary')),
    'another library': lambda c: c['model']['backbone'].update(type='evil.EFT'),
    'a class that is not listed': lambda c: c['model']['backbone'].update(type='TIMMBackbone'),
    'no name': lambda c: c['model']['backbone'].update(type=['EFT']),
    'a pickle to read': lambda c: c['model']['decode_head'].update(loss_decode=dict(
        type='CrossEntropyLoss', class_weight='weights.pkl')),
    'weights to fetch': lambda c: c['model']['backbone'].update(init_cfg=dict(
        type='Pretrained', checkpoint='http://localhost/x.pth')),
    'a scope': lambda c: c['model'].update(_scope_='evil'),
    'a step': lambda c: c['pipeline'].insert(1, dict(type='Albu', transforms=[])),
    'a file to write': lambda c: c['pipeline'][0].update(skip_list='canary'),
    'no model': lambda c: c.pop('model'),
    'no pipeline': lambda c: c.pop('pipeline'),
    'half a pipeline': lambda c: c['pipeline'].pop(),
    'other classes': lambda c: c.update(classes=['a', 'b']),
    'a newer form': lambda c: c.update(format=99),
    'senseless sizes': lambda c: c['model']['backbone'].update(embed_dims=[0, -1, 'x', None]),
    'a word for sizes': lambda c: c['model']['decode_head'].update(in_channels='many'),
    'no JSON': lambda c: 'import os',
    'deep JSON': lambda c: '[' * 100000,
}


@pytest.mark.parametrize('change', HOSTILE.values(), ids=HOSTILE)
def test_what_a_file_says_is_data(single, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    target = told(single, tmp_path / 'hostile.safetensors', change)
    with pytest.raises(CheckpointError, match=r'hostile.safetensors is refused'):
        Segmenter(target, device='cpu')
    assert os.listdir(tmp_path) == ['hostile.safetensors']


@pytest.mark.parametrize(('part', 'name', 'value'), [
    *(('Resize', 'scale', value) for value in (
        0, -1, [64, float('nan')], [100000, 100000], 'x', [float('inf'), 64], {})),
    ('Resize', 'scale_factor', 1000), ('Resize', 'keep_ratio', 'yes'),
    ('ResizeToMultiple', 'size_divisor', 0), ('data_preprocessor', 'size_divisor', 0),
    ('data_preprocessor', 'std', [1, 0, 1]), ('data_preprocessor', 'mean', [0, 0, float('nan')]),
    ('data_preprocessor', 'bgr_to_rgb', 'x'), ('decode_head', 'align_corners', 'x'),
    ('decode_head', 'in_index', [1, 2, 99]), ('decode_head', 'depths', [1, 1, 10 ** 6]),
    ('test_cfg', 'mode', 'other'), ('test_cfg', 'stride', [0, 0]),
    *(('LoadImageFromFile', 'imdecode_backend', value) for value in (
        'turbojpeg', 'tifffile', 'other', None, [])),
    ('LoadImageFromFile', 'color_type', 'unchanged')])
def test_what_no_image_can_be_predicted_with(single, tmp_path, part, name, value):
    def change(content):
        steps = {step['type']: step for step in content['pipeline']}
        if part in ('Resize', 'ResizeToMultiple'):
            content['pipeline'].insert(1, {'type': part, name: value})
        else:
            {**steps, **content['model']}[part][name] = value

    target = told(single, tmp_path / 'hostile.safetensors', change)
    with pytest.raises(CheckpointError, match=rf'hostile.safetensors is refused: .*\({name}='):
        Segmenter(target, device='cpu')


@pytest.mark.parametrize('change', [
    lambda c: c['pipeline'][-1].update(meta_keys=['ori_shape']),
    lambda c: c['pipeline'].insert(1, dict(type='Resize')),
    lambda c: c['model']['data_preprocessor'].update(mean=[1, 2], std=[1, 1]),
    lambda c: c['model'].update(test_cfg=dict(mode='slide'))])
def test_values_that_do_not_go_together(single, tmp_path, change):
    target = told(single, tmp_path / 'hostile.safetensors', change)
    reason = r'refused: (it cannot predict an image|its model cannot be built) \(.+\)'
    with pytest.raises(CheckpointError, match=reason):
        Segmenter(target, device='cpu')


def test_names_do_a_terminal_no_harm(single, tmp_path):
    target = told(single, tmp_path / 'x.safetensors', lambda c: c.update(
        classes=['\x1b[2J', *CLASSES[1:]], palette=[[300, 0, 0]] * 8))
    segmenter = Segmenter(target, device='cpu')
    assert segmenter.classes[0] == '?[2J'
    assert len(set(segmenter.description.palette)) == 8


@pytest.mark.parametrize(('arguments', 'error', 'says'), [
    (['{work}/none.py', '{pth}'], ConfigError, 'config not found: .*none.py'),
    (['{work}/mini.py'], ConfigError, 'mini.py: a config needs a checkpoint'),
    (['{work}/mini.py', '{work}/none.pth'], CheckpointError, 'checkpoint not found: .*none.pth'),
    (['{pth}'], ConfigError, 'is a checkpoint and does not say what model it is of'),
    (['{work}/empty'], ConfigError, 'empty is the work dir of no training, it holds no config'),
    (['{root}/configs/edaformer_t_synthetic.py', '{pth}'], CheckpointError,
     'the checkpoint does not fit the model: .* is 16x3x7x7 in the checkpoint and 32x3x7x7'),
    (['{root}/configs/eft_t_in1k.py', '{pth}'], ConfigError, 'no model that predicts a class for'),
    (['{work}/weights.safetensors'], CheckpointError, 'weights.safetensors holds weights alone'),
    (['{single}', '{pth}'], ConfigError, 'model.safetensors holds its own weights: leave'),
    (['{work}/nope'], ConfigError, 'no such file or folder: .*nope: give the work dir of a'),
    (['{work}/nope.pth'], ConfigError, 'no such file or folder: .*nope.pth'),
])
def test_models_that_are_none(work, single, arguments, error, says):
    pth = work / 'best_mIoU_iter_4.pth'
    (work / 'empty').mkdir(exist_ok=True)
    save_file(load_file(single), work / 'weights.safetensors')
    with pytest.raises(error, match=says):
        Segmenter(*(each.format(work=work, pth=pth, single=single, root=ROOT)
                    for each in arguments), device='cpu')


@pytest.mark.parametrize(('name', 'value'), [
    ('decode_head.conv_seg.weight', torch.nan), ('backbone.stages.0.norm.bias', -torch.inf),
    ('decode_head.fuse_norm.running_mean', torch.nan)])
def test_weights_that_are_no_numbers(work, tmp_path, name, value):
    content = torch.load(work / 'best_mIoU_iter_4.pth', weights_only=True)
    content['state_dict'][name].flatten()[1] = value
    torch.save(content, tmp_path / 'bad.pth')
    with pytest.raises(CheckpointError, match=rf'bad.pth: {name} has 1 of \d+ numbers .* that are '
                                              'nan or infinite: the training diverged'):
        Segmenter(work / 'mini.py', tmp_path / 'bad.pth', device='cpu')


def test_no_such_device_and_no_such_batch(work):
    for nothing in None, 3:
        with pytest.raises(ConfigError, match=f'model {nothing} is no path: give a work dir'):
            Segmenter(nothing)
    with pytest.raises(ConfigError, match='max_side 8: give 32 or more pixels'):
        Segmenter(work, device='cpu', max_side=8)
    with pytest.raises(ConfigError, match=r'device cuda:99 cannot be used: .'):
        Segmenter(work, device='cuda:99')
    with pytest.raises(ConfigError, match='batch_size 0: it must be 1 or more'):
        Segmenter(work, device='cpu', batch_size=0)


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
    ('void', 'no picture in the folder .*void: nothing below it ends in .avif'),
    ('text.mp4', 'video cannot be decoded: .*text.mp4'),
    ('page.pdf', 'page.pdf .*its format is unknown'),
    (np.zeros((4, 5)), r'an array of shape \(4, 5\) and type float64 is no picture'),
    (np.zeros((0, 5, 3), np.uint8), r'shape \(0, 5, 3\)'),
    (np.zeros((4, 5, 7), np.uint8), r'shape \(4, 5, 7\)'),
    (Image.new('F', (3, 3)), "PIL's mode F"),
    ([3], 'a int is no picture'),
])
def test_bad_input(segmenter, pictures, tmp_path, source, says):
    (tmp_path / 'void').mkdir()
    (tmp_path / 'nothing.png').write_bytes(b'')
    (tmp_path / 'cut.png').write_bytes(pictures[0].read_bytes()[:900])
    for name in 'text.jpg', 'text.mp4', 'page.pdf', 'void/notes.txt':
        (tmp_path / name).write_text('%PDF words' * 20)
    with pytest.raises(DataError, match=says):
        list(segmenter(tmp_path / source if isinstance(source, str) else source))


def test_a_bad_one_among_many_is_an_error_or_listed(segmenter, pictures, tmp_path):
    (tmp_path / 'bad.png').write_text('words')
    many = [pictures[0], tmp_path / 'bad.png', pictures[1]]
    results = segmenter(many)
    next(results)
    with pytest.raises(DataError, match=r'bad.png'):
        next(results)
    skipped = {}
    found = list(segmenter(many, skipped))
    assert [same(each.labels, segmenter(path).labels)
            for each, path in zip(found, [pictures[0], pictures[1]], strict=True)] == [True] * 2
    assert list(skipped) == [str(tmp_path / 'bad.png')]


# Folders.

@pytest.fixture
def photos(pictures, tmp_path):
    """A folder with a folder in it, two pictures of one name, a bad one, and no pictures."""
    folder = tmp_path / 'photos'
    (folder / 'more').mkdir(parents=True)
    (folder / '.hidden').mkdir()
    for name, path in zip(['a.png', 'more/b.png', '.hidden/c.png', '._a.png'], pictures):
        shutil.copy(path, folder / name)
    Image.open(pictures[3]).save(folder / 'a.jpg')
    (folder / 'bad.JPG').write_text('words')
    (folder / 'notes.txt').write_text('words')
    return folder


def spoil(folder):
    """Add entries that cannot be read, and pictures of names that are hard to write."""
    for name, target in ((b'gone.png', b'nowhere'), (b'loop.png', b'loop.png'),
                         (b'dead\xe8.png', b'\xff')):
        (folder / os.fsdecode(name)).symlink_to(os.fsdecode(target))
    os.mkfifo(folder / 'pipe.png')
    for name in b'\xe9.png', b'n' * 251 + b'.png', b'n' * 250 + b'm.png', b'd' * 255 + b'/d.png':
        path = folder / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        shutil.copy(folder / 'a.png', path)


def written(out):
    return {str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns)
            for kind in ('masks', 'overlays') for path in (out / kind).rglob('*.*')}


def test_a_folder(segmenter, photos):
    out = photos / 'results'  # within the input: not to be read again
    seconds = 0
    for kept in 0, 3:
        summary = predict_pictures(segmenter, [photos], out)
        assert sorted(written(out)) == [
            'masks/a.jpg.png', 'masks/a.png.png', 'masks/more/b.png',
            'overlays/a.jpg.jpg', 'overlays/a.png.jpg', 'overlays/more/b.jpg']
        assert summary['kept'] == kept
        assert list(summary['skipped']) == ['../bad.JPG']
        assert 'bad.JPG' in summary['skipped']['../bad.JPG']
        seconds = seconds or summary['seconds']
    assert summary['seconds'] == seconds  # of the run that predicted
    assert os.path.samefile(out / summary['checkpoint'], segmenter.source)
    assert json.loads((out / 'summary.json').read_text()) == summary
    entry = summary['pictures']['../more/b.png']
    found = segmenter(photos / 'more' / 'b.png')
    assert entry == dict(mask='masks/more/b.png', shares=found.shares)
    assert same(np.array(Image.open(out / entry['mask'])), found.labels)
    drawn = cv2.imread(str(out / 'overlays' / 'more' / 'b.jpg')).astype(int)
    assert np.abs(drawn - found.draw()).mean() < 5
    assert sum(summary['shares'].values()) == pytest.approx(1, abs=1e-4)
    assert summary['classes']['sky'] == '#6cb4ee'
    assert Image.open(out / 'legend.png').width > 60


def test_it_goes_on_where_it_stopped(work, photos, tmp_path, monkeypatch):
    segmenter, out = Segmenter(work, device='cpu'), tmp_path / 'out'
    whole = predict_pictures(segmenter, [photos], tmp_path / 'whole')
    own, calls = segmenter.model.predict_labels, []

    def predict(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(*args, **kwargs)
    monkeypatch.setattr(segmenter.model, 'predict_labels', predict)
    with pytest.raises(KeyboardInterrupt):
        predict_pictures(segmenter, [photos], out)
    before = written(out)
    assert len(before) == 4
    summary = predict_pictures(segmenter, [photos], out)
    assert len(calls) == 4
    assert before.items() <= written(out).items()
    assert {**summary, 'kept': 0, 'seconds': 0} == {**whole, 'kept': 0, 'seconds': 0}
    # Another ratio, another picture: done anew.
    os.utime(photos / 'a.png', (1, 1))
    (out / 'summary.json').write_text(json.dumps(dict(summary, seconds=1e6)))
    more = predict_pictures(segmenter, [photos], out)
    assert more['kept'] == 2
    assert 1e6 < more['seconds'] < 2e6  # with those of the run before
    segmenter.isr = 2
    assert predict_pictures(segmenter, [photos], out)['kept'] == 0
    (out / 'masks' / 'a.png.png').write_bytes(b'damaged')
    assert predict_pictures(segmenter, [photos], out)['kept'] == 2


def test_entries_that_are_no_pictures_are_listed(segmenter, photos, tmp_path, capsys):
    spoil(photos)
    summary = predict_pictures(segmenter, [photos], tmp_path / 'out')
    reasons = {os.path.basename(path): reason for path, reason in summary['skipped'].items()}
    for name, reason in {
            'gone.png': 'gone.png: it is a link to nowhere, which does not exist',
            'loop.png': 'loop.png (Too many levels of symbolic links)',
            'pipe.png': 'pipe.png is not a regular file',
            'dead\\xe8.png': 'dead\\xe8.png: it is a link to \\xff, which does not exist',
            'bad.JPG': 'bad.JPG (5 bytes)'}.items():
        assert reason in reasons.pop(name)
    assert not reasons
    assert len(summary['pictures']) == 7
    print(describe_summary(summary, tmp_path / os.fsdecode(b'\xff')))
    assert f'are in {tmp_path}/\\xff\n' in capsys.readouterr().out
    with pytest.raises(DataError, match=r'gone.png: it is a link to nowhere, which does not exist'):
        predict_pictures(segmenter, [photos / 'gone.png'], tmp_path / 'out')


def test_names_that_are_long_or_not_utf8(segmenter, photos, tmp_path):
    spoil(photos)
    out = tmp_path / 'out'
    for kept in 0, 7:
        summary = predict_pictures(segmenter, [photos], out)
        assert summary['kept'] == kept
        read = json.loads((out / 'summary.json').read_bytes().decode())  # without lone surrogates
        assert json.dumps(read, ensure_ascii=False).encode()
        names = sorted(os.listdir(os.fsencode(out / 'masks')))
        assert names[-1] == b'\xe9.png'
        assert read['pictures']['../photos/\\xe9.png']['mask'] == 'masks/\\xe9.png'
        long = [name for name in names if name.startswith(b'nn')]
        assert len(long) == 2
        assert all(len(name) <= 255 and f'masks/{os.fsdecode(name)}' in {
            entry['mask'] for entry in read['pictures'].values()} for name in long)
    assert same(np.array(Image.open(out / 'masks' / os.fsdecode(b'\xe9.png'))),
                segmenter(photos / 'a.png').labels)


def test_links_that_lead_back_up(photos, tmp_path):
    plain = find_pictures(photos / '**' / '**.png')
    (photos / 'a_loop').symlink_to('.')
    (photos / 'more' / 'up').symlink_to('..')
    assert find_pictures(photos / '**' / '*.png') == plain == [
        (photos / name, name) for name in ('a.png', 'more/b.png')]
    assert len(find_pictures(photos / '**')) == 5
    assert len(find_pictures(photos / '**' / '.hidden' / '*')) == 1
    assert find_pictures(photos / '**' / '*.png', (photos / 'more').resolve()) == plain[:1]
    assert len(find_pictures(photos)) == 4
    with pytest.raises(DataError, match='no such file or folder'):
        find_pictures('n' * 300)


def test_one_bad_picture_alone_is_an_error(segmenter, photos, tmp_path):
    with pytest.raises(DataError, match=r'bad.JPG'):
        predict_pictures(segmenter, [photos / 'bad.JPG'], tmp_path / 'out')
    shutil.copy(photos / 'bad.JPG', photos / 'worse.jpg')
    with pytest.raises(DataError, match=r'not one picture can be read: .*bad.JPG'):
        predict_pictures(segmenter, [photos / '*.JPG', photos / 'worse.jpg'], tmp_path / 'out')


def test_two_pictures_of_one_name(segmenter, photos, tmp_path):
    shutil.copy(photos / 'a.png', tmp_path)
    with pytest.raises(DataError, match=r'a.png and .*a.png would be written under one name'):
        predict_pictures(segmenter, [photos / 'a.png', tmp_path / 'a.png'], tmp_path / 'out')


def test_an_output_that_cannot_be_written(segmenter, pictures, tmp_path):
    (tmp_path / 'file').write_text('')
    for out in tmp_path / 'file', tmp_path / 'file' / 'below':
        with pytest.raises(ConfigError, match='cannot be written to'):
            predict_pictures(segmenter, [pictures[0]], out)


# Videos.

@pytest.fixture
def clip(pictures, tmp_path):
    """A video of twelve frames, and the frames as they are decoded."""
    path = tmp_path / 'clip.mp4'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), 12.5, (96, 64))
    for index in range(12):
        writer.write(cv2.imread(str(pictures[index // 3])))
    writer.release()
    capture = cv2.VideoCapture(str(path))
    return path, [capture.read()[1] for _ in range(12)]


def test_a_video(segmenter, clip, tmp_path):
    path, frames = clip
    wanted = [segmenter(frame) for frame in frames]
    assert all(same(found.labels, each.labels)
               for found, each in zip(segmenter(path), wanted, strict=True))
    out = tmp_path / 'out'
    summary = predict_video(segmenter, path, out, masks=True)
    assert (summary['video'], summary['frames']) == ('clip_overlay.mp4', 12)
    overlays = Video(out / 'clip_overlay.mp4')
    assert (overlays.frames, overlays.size, overlays.rate) == (12, (96, 64), 12.5)
    for index, (overlay, each) in enumerate(zip(overlays, wanted, strict=True)):
        assert np.abs(overlay.astype(int) - each.draw()).mean() < 8
        mask = Image.open(out / 'masks' / 'clip' / f'{index:06}.png')
        assert same(np.array(mask), each.labels)
    inode = (out / 'clip_overlay.mp4').stat().st_ino
    assert predict_video(segmenter, path, out, masks=True) == summary
    assert (out / 'clip_overlay.mp4').stat().st_ino == inode
    assert predict_video(segmenter, path, out)['frames'] == 12  # asks for something else
    assert (out / 'clip_overlay.mp4').stat().st_ino != inode
    assert sorted(os.listdir(out)) == ['clip_overlay.mp4', 'legend.png', 'masks', 'summary.json']


@pytest.mark.skipif(not shutil.which('ffmpeg'), reason='needs ffmpeg')
@pytest.mark.parametrize('size', [(96, 64), (97, 65)])
def test_ffmpeg_writes_h264(segmenter, clip, tmp_path, size):
    path = tmp_path / 'odd.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 10, size)
    for frame in clip[1]:
        writer.write(cv2.resize(frame, size))
    writer.release()
    summary = predict_video(segmenter, path, tmp_path / 'out')
    assert (summary['codec'], summary['frames']) == ('h264', 12)
    assert 'MPEG-4' not in describe_summary(summary, tmp_path / 'out')
    capture = cv2.VideoCapture(str(tmp_path / 'out' / summary['video']))
    assert int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, 'little') in (b'avc1', b'h264')


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """Give a function that puts a program, or none, in the place of ffmpeg; OpenCV has no H.264."""
    own = cv2.VideoWriter

    def writer(name, fourcc, *more):
        return own() if fourcc == own.fourcc(*'avc1') else own(name, fourcc, *more)
    writer.fourcc = own.fourcc
    monkeypatch.setattr(cv2, 'VideoWriter', writer)
    (tmp_path / 'bin').mkdir()
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))

    def put(text):
        (tmp_path / 'bin' / 'ffmpeg').write_text(f'#!{sys.executable}\nimport sys\n{text}')
        (tmp_path / 'bin' / 'ffmpeg').chmod(0o755)
    return put


def test_the_command_that_writes_h264(segmenter, clip, ffmpeg, tmp_path):
    ffmpeg(f"""
import cv2, numpy
words = sys.argv[1:]
assert '{tmp_path}/out/.clip_overlay.' in words[-1]
size, rate = words[words.index('-video_size') + 1], words[words.index('-framerate') + 1]
for option, value in ('-f', 'rawvideo'), ('-pix_fmt', 'bgr24'), ('-c:v', 'h264'):
    assert words[words.index(option) + 1] == value
content = numpy.frombuffer(sys.stdin.buffer.read(), numpy.uint8).reshape(-1, 64, 96, 3)
open('{tmp_path}/got', 'a').write(f'{{size}} {{rate}} {{len(content)}} ')
writer = cv2.VideoWriter(words[-1].removeprefix('file:'), cv2.VideoWriter.fourcc(*'mp4v'),
                         float(rate), (96, 64))
for frame in content:
    writer.write(frame)
writer.release()
""")
    summary = predict_video(segmenter, clip[0], tmp_path / 'out')
    assert summary['codec'] == 'h264'
    assert (tmp_path / 'got').read_text() == '96x64 12.5 1 96x64 12.5 12 '
    for overlay, frame in zip(Video(tmp_path / 'out' / summary['video']), clip[1], strict=True):
        assert np.abs(overlay.astype(int) - segmenter(frame).draw()).mean() < 8


@pytest.mark.parametrize('program', [None, 'sys.exit(1)'])
def test_without_h264_a_note_says_so(segmenter, clip, ffmpeg, tmp_path, program):
    if program is not None:
        ffmpeg(program)
    summary = predict_video(segmenter, clip[0], tmp_path / 'out')
    assert summary['codec'] == 'mpeg4'
    told = describe_summary(summary, tmp_path / 'out')
    assert told.count('MPEG-4 part 2, which browsers do not play: install ffmpeg') == 1
    assert Video(tmp_path / 'out' / summary['video']).frames == 12


def test_ffmpeg_that_dies(segmenter, clip, ffmpeg, tmp_path):
    ffmpeg('if len(sys.stdin.buffer.read(3 * 64 * 96 * 3)) > 64 * 96 * 3: sys.exit(1)')
    with pytest.raises(ConfigError, match=r'out cannot be written to: .* is the disk full'):
        predict_video(segmenter, clip[0], tmp_path / 'out')
    assert sorted(os.listdir(tmp_path / 'out')) == ['legend.png']


@pytest.mark.parametrize(('stem', 'told'), [
    (b'\xe9', r'\\xe9_overlay'), (b'v' * 251, r'v{218}~[0-9a-f]{16}_overlay')])
def test_names_of_videos_and_frames_of_another_size(segmenter, clip, tmp_path, monkeypatch, stem,
                                                    told):
    path = tmp_path / os.fsdecode(stem + b'.mp4')
    shutil.copy(clip[0], path)
    monkeypatch.setattr(Video, '__iter__', lambda self: iter(
        [*clip[1][:6], *(cv2.resize(frame, (48, 40)) for frame in clip[1][6:])]))
    summary = predict_video(segmenter, path, tmp_path / 'out', masks=True)
    assert summary['frames'] == 12
    assert re.fullmatch(told + '.mp4', summary['video'])
    [written] = (tmp_path / 'out').glob('*.mp4')
    assert len(os.listdir(tmp_path / 'out' / 'masks' / written.stem.removesuffix('_overlay'))) == 12


def test_a_video_that_stops_half_way_leaves_no_half_video(work, clip, tmp_path, monkeypatch):
    segmenter = Segmenter(work, device='cpu')
    own, calls = segmenter.model.predict_labels, []

    def predict(*args, **kwargs):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return own(*args, **kwargs)
    monkeypatch.setattr(segmenter.model, 'predict_labels', predict)
    with pytest.raises(KeyboardInterrupt):
        predict_video(segmenter, clip[0], tmp_path / 'out')
    assert os.listdir(tmp_path / 'out') == ['legend.png']


def test_a_cut_video(segmenter, clip, tmp_path):
    whole = clip[0].read_bytes()
    (tmp_path / 'cut.mp4').write_bytes(whole[:len(whole) // 2])  # its index is at the end
    with pytest.raises(DataError, match=r'video cannot be decoded: .*cut.mp4'):
        predict_video(segmenter, tmp_path / 'cut.mp4', tmp_path / 'out')
    with pytest.raises(DataError, match='no such video'):
        Video('http://localhost/clip.mp4')
    assert not (tmp_path / 'out').exists()


# The command lines.

def test_command_line(work, photos, tmp_path):
    done = run('tools/predict.py', photos, '--model', work, '--out', tmp_path / 'out',
               '--isr-ratio', 'optimal', '--max-side', 64, '--device', 'cpu')
    assert f'{work}/best_mIoU_iter_4.pth, 8 classes, on cpu\n' in done.stdout
    assert '3 pictures at ISR ratio 2211-222, 1 skipped\n' in done.stdout
    assert f'skipped: image cannot be decoded: {photos}/bad.JPG' in done.stdout
    assert '| class ' in done.stdout
    assert 'Warning' not in done.stderr


@pytest.mark.slow
def test_command_line_of_one_file_and_a_video(work, clip, tmp_path):
    single = tmp_path / 'one.safetensors'
    code, output = run_tool('tools/convert_checkpoint.py', work / 'best_mIoU_iter_4.pth', single,
                            '--config', work / 'mini.py')
    assert code == 0, output
    assert f'predict with tools/predict.py INPUT --model {single}' in output
    code, output = run_tool('tools/predict.py', clip[0], '--model', single, '--out',
                            tmp_path / 'out', '--masks', '--device', 'cpu')
    assert code == 0, output
    assert f'12 frames at ISR ratio none: {tmp_path}/out/clip_overlay.mp4' in output
    for wrong, says in (([clip[0], clip[0]], 'one video at a time'),
                        ([work / 'no.png', '--masks'], '--masks is for a video'),
                        ([work / 'no.png'], 'no such file or folder'),
                        ([work / 'mini.py', '--video'], 'video cannot be decoded')):
        code, output = run_tool('tools/predict.py', *wrong, '--model', single, '--out',
                                tmp_path / 'none', '--device', 'cpu')
        assert code == 1
        assert output.splitlines()[-1].startswith('error: ')
        assert says in output
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize(('target', 'config', 'says'), [
    ('x.pth', 'mini.py', 'with a config, write to a .safetensors file'),
    ('x.safetensors', 'foreign.py', "cannot be told as data .'TimmMaps' is not among"),
])
def test_what_cannot_be_one_file(work, tmp_path, target, config, says):
    cfg = Config.fromfile(work / 'mini.py')
    if config == 'foreign.py':
        cfg.model.backbone.type = 'TimmMaps'
    with pytest.raises((CheckpointError, ConfigError), match=says):
        pack_file(work / 'best_mIoU_iter_4.pth', tmp_path / target, cfg)
    assert not os.listdir(tmp_path)
