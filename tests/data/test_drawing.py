"""The drawn data set: the same for the same seed, complete, learnable, and careful with folders."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mmseg_edaformer.data import drawing as synthetic

SMALL = {'train': 3, 'val': 2, 'size': (48, 64)}


def scene(seed, size=(48, 64)):
    return synthetic.draw_scene(np.random.default_rng(seed), size)


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in Path(root).rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def labels():
    return np.stack([scene(seed, (96, 128))[1] for seed in range(60)])


@pytest.mark.parametrize('size', [(33, 47), (32, 160), (160, 32)])
def test_scene_has_the_size_asked_for(size):
    for seed in range(4):
        image, label = scene(seed, size)
        assert (image.shape, image.dtype) == ((*size, 3), np.uint8)
        assert (label.shape, label.dtype) == (size, np.uint8)
        assert label.max() < len(synthetic.CLASSES)
        assert image.std() > 10


def test_image_and_label_show_the_same_edges():
    gap = []
    for seed in range(20):
        image, label = scene(seed, (96, 128))
        step = np.abs(np.diff(image.astype(float).mean(2), axis=1))
        edge = np.diff(label.astype(int), axis=1) != 0
        gap.append(step[edge].mean() - step[~edge].mean())
    assert min(gap) > 3


def test_every_class_occurs_and_none_rules(labels):
    share = np.bincount(labels.ravel(), minlength=8) / labels.size
    assert share.shape == (8,)
    assert share.min() > 0.0003
    assert share.max() < 0.45
    lamp, bird = labels == synthetic.LAMP, labels == synthetic.BIRD
    assert (lamp | bird).mean() < 0.03
    assert lamp.any((1, 2)).mean() >= 0.4
    assert bird.any((1, 2)).mean() >= 0.25
    assert bird.mean() < 0.005


def test_data_set_layout(tmp_path):
    root = synthetic.draw_dataset(tmp_path / 'new' / 'drawn', **SMALL)
    images = [f'{kind}/{split}/{index:05d}.png' for kind in ('images', 'annotations')
              for split, count in (('training', 3), ('validation', 2)) for index in range(count)]
    assert set(contents(root)) == {*images, 'synthetic.json'}
    for name in images:
        with Image.open(root / name) as image:
            assert image.size == (64, 48)
            assert image.mode == ('RGB' if name.startswith('images') else 'L')
    record = json.loads((root / 'synthetic.json').read_text())
    assert (record['train'], record['val'], record['size'], record['seed']) == (3, 2, [48, 64], 0)


def test_data_set_is_its_seed(tmp_path):
    first = contents(synthetic.draw_dataset(tmp_path / 'a', **SMALL))
    assert contents(synthetic.draw_dataset(tmp_path / 'b', **SMALL)) == first
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    synthetic.draw_dataset(tmp_path / 'b', **SMALL)  # touches nothing
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
    other = contents(synthetic.draw_dataset(tmp_path / 'c', **SMALL, seed=1))
    assert not set(first.values()) & set(other.values())
    assert len(set(first.values())) == len(first)
    more = contents(synthetic.draw_dataset(tmp_path / 'more', train=5, val=4, size=(48, 64)))
    del first['synthetic.json']  # a larger one keeps the images of a smaller one
    assert len(more) == 19
    assert first.items() <= more.items()


def test_interrupted_run_is_repaired(tmp_path, monkeypatch):
    whole = contents(synthetic.draw_dataset(tmp_path, **SMALL))
    draw, left = synthetic.draw_scene, iter(range(2))

    def stop(rng, size, scale):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return draw(rng, size, scale)

    monkeypatch.setattr(synthetic, 'draw_scene', stop)
    with pytest.raises(KeyboardInterrupt):
        synthetic.draw_dataset(tmp_path, **SMALL, seed=1)
    assert set(contents(tmp_path)) == {f'{kind}/training/{index:05d}.png'
                                       for kind in ('images', 'annotations') for index in (0, 1)}
    monkeypatch.undo()
    synthetic.draw_dataset(tmp_path, **SMALL)
    assert contents(tmp_path) == whole


def test_other_parameters_leave_no_old_images(tmp_path):
    synthetic.draw_dataset(tmp_path, train=6, val=2, size=(32, 32))
    assert len(contents(synthetic.draw_dataset(tmp_path, **SMALL))) == 11


@pytest.mark.parametrize('foreign', ['images/training/ADE_train_00000001.jpg', 'masks/00000.png'])
def test_foreign_folder_is_refused_and_untouched(tmp_path, foreign):
    synthetic.draw_dataset(tmp_path, **SMALL)
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text('mine')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=foreign.split('0')[0]) as caught:
        synthetic.draw_dataset(tmp_path, **SMALL, seed=1)
    assert 'choose a new folder' in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(('wrong', 'remedy'), [
    (dict(val=0), 'at least one'), (dict(size=(31, 64)), 'at least 32'),
    (dict(seed=-1), '0 or more')])
def test_bad_arguments(tmp_path, wrong, remedy):
    with pytest.raises(ValueError, match=remedy):
        synthetic.draw_dataset(tmp_path / 'drawn', **{**SMALL, **wrong})
    assert not (tmp_path / 'drawn').exists()


def test_larger_worlds_hold_more_objects_of_the_same_size():
    areas = {}
    for size, scale, seeds in ((192, 1., 24), (768, 0.25, 4)):
        masks = [synthetic.draw_scene(np.random.default_rng(seed), (size, size), scale)[1] ==
                 synthetic.BIRD for seed in range(seeds)]
        areas[size] = np.concatenate([
            cv2.connectedComponentsWithStats(mask.astype(np.uint8))[2][1:, -1] for mask in masks])
    assert len(areas[768]) / 4 > 4 * len(areas[192]) / 24
    assert np.median(areas[768]) == pytest.approx(np.median(areas[192]), rel=0.4)
