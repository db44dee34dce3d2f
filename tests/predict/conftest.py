"""A model with weights that see many classes, images, and how label maps are compared."""
import numpy as np
import pytest
import torch
from PIL import Image

from mmseg_edaformer.data.drawing import CLASSES, PALETTE, draw_scene
from mmseg_edaformer.predict.segmenter import Segmenter
from tests.conftest import seeing_model, write_config

RESIZING = '''
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(256, 80), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadSegLabels', num_classes=8), dict(type='PackSegInputs')]
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    data_root=data_root, pipeline=test_pipeline))
'''


def same(one, other):
    return one.shape == other.shape and bool((one == other).all())


@pytest.fixture(scope='package')
def work(scenes, tmp_path_factory):
    """A work dir: a config that resizes as ADE20K's do, and weights; read-only."""
    folder = tmp_path_factory.mktemp('work')
    config = write_config(folder, scenes)
    model = seeing_model(config, scenes)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(
        classes=CLASSES, palette=PALETTE))), folder / 'best_mIoU_iter_4.pth')
    config.write_text(config.read_text() + RESIZING)
    return folder


@pytest.fixture(scope='package')
def whole(work, scenes, tmp_path_factory):
    """A config that leaves images at their size, and its checkpoint: arguments of Segmenter."""
    return write_config(tmp_path_factory.mktemp('whole'), scenes), work / 'best_mIoU_iter_4.pth'


@pytest.fixture(scope='package')
def segmenter(work):
    return Segmenter(work, device='cpu')


@pytest.fixture(scope='package')
def whole_segmenter(whole):
    """Predicts images at their size; tests set its ratio."""
    return Segmenter(*whole, device='cpu')


@pytest.fixture
def images(scenes):
    return sorted((scenes / 'images' / 'validation').iterdir())


@pytest.fixture(scope='package')
def files(tmp_path_factory):
    """Three drawn scenes, a turned one, one that is broken and one with too many bytes."""
    folder = tmp_path_factory.mktemp('files')
    rng = np.random.default_rng(3)
    for i in range(3):
        Image.fromarray(draw_scene(rng, (128, 192))[0]).save(folder / f'{i}.png')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / '0.png').save(folder / 'turned.jpg', exif=exif, quality=95)
    (folder / 'broken.png').write_bytes((folder / '0.png').read_bytes()[:3000])
    Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8)).save(folder / 'heavy.png')
    return folder


def expected(segmenter, source, ratio):
    """What a segmenter predicts at a ratio."""
    segmenter.isr_ratio = ratio
    return segmenter(source)


def seen_sizes(segmenter):
    """A list that grows with each forward pass: N x H x W of the network's input."""
    seen, own = [], segmenter.model.predict_labels

    def predict(inputs, data_samples=None):
        seen.append((len(inputs), *inputs.shape[2:]))
        return own(inputs, data_samples)
    segmenter.model.predict_labels = predict
    return seen
