"""Every defect that can be planted in a drawn data set is found, and none in a sound one."""
import os
import shutil

import numpy as np
import pytest
from mmseg.registry import DATASETS
from PIL import Image

from mmseg_edaformer.data.audit import audit, check_samples, inner_datasets
from mmseg_edaformer.data.drawing import PALETTE
from mmseg_edaformer.errors import ConfigError, DataError, clear_errors
from tests.data import spoiling
from tests.data.spoiling import IMAGES, MASKS, array, found, names, relabel, save


def test_sound_data_has_no_finding(cfg, data):
    (data / MASKS / '00001_colour.jpg').write_bytes(b'of no concern')
    assert found(cfg) == {}
    for palette in (PALETTE, [[i, i, i] for i in range(8)]):
        image = Image.fromarray(array(data / MASKS / '00001.png'))
        image.putpalette(np.array(palette, np.uint8).tobytes())
        image.save(data / MASKS / '00001.png')
        assert Image.open(data / MASKS / '00001.png').mode == 'P'
        assert found(cfg) == {}


@pytest.mark.parametrize(('where', 'spoil', 'check', 'named'), [
    (MASKS, os.remove, 'mask missing', MASKS),
    (IMAGES, os.remove, 'image missing', MASKS),
    (IMAGES, spoiling.cut, 'image unreadable', IMAGES),
    (MASKS, spoiling.cut, 'mask unreadable', MASKS),
    (MASKS, spoiling.smaller, 'sizes differ', IMAGES),
    (IMAGES, spoiling.turned, 'image turned by EXIF', IMAGES),
    (MASKS, spoiling.colours, 'mask of colours', MASKS),
    (MASKS, spoiling.recoloured, 'palette of other indices', MASKS),
    (MASKS, spoiling.deep, 'more than 8 bits', MASKS),
    (MASKS, spoiling.out_of_range, 'label out of range', MASKS),
    (MASKS, spoiling.unlabelled, 'no label', MASKS)])
def test_defect_is_named(where, spoil, check, named, cfg, data):
    for index in (3, 7):
        spoil(data / where / f'{index:05d}.png')
    assert found(cfg) == {('train', check): names(named, 3, 7)}


def test_exif_that_fits_is_a_warning(cfg, data):
    spoiling.turned(data / IMAGES / '00001.png')
    [finding] = audit(cfg, ['train'], workers=1).findings
    assert finding.items[0][1] == '96x64 pixels like its mask, but read as 64x96'
    save(data / MASKS / '00001.png', array(data / MASKS / '00001.png').T)
    assert found(cfg) == {('train', 'EXIF orientation'): names(IMAGES, 1)}
    cfg.train_dataloader.dataset.pipeline[0].color_type = 'color_ignore_orientation'
    assert found(cfg, 'train') == {('train', 'sizes differ'): names(IMAGES, 1)}


def test_duplicates_and_leaks(cfg, data):
    again = data / IMAGES / '00005.png'
    Image.open(data / IMAGES / '00002.png').save(again, compress_level=9)  # other bytes
    shutil.copy(data / IMAGES / '00004.png', data / 'images/validation/00001.png')
    done = audit(cfg, workers=1)
    assert {(f.check, f.items[0][0].split('/')[-1], f.items[0][1].split(str(data))[0])
            for f in done.findings} == {
        ('duplicate', '00005.png', 'the same pixels as '),
        ('train image in val or test', '00001.png', 'the same pixels as ')}
    assert [f.split for f in done.findings if f.check != 'duplicate'] == ['val']


def test_missing_folders_and_empty_splits(cfg, data):
    shutil.rmtree(data / MASKS)
    for path in (data / 'images/validation').iterdir():
        path.unlink()
    assert found(cfg) == {('train', 'folder missing'): {MASKS},
                          ('val', 'no images'): {'validation/*.png'},
                          ('val', 'image missing'): names('x/validation', 0, 1, 2, 3)}
    cfg.val_dataloader.dataset.data_root = 'gone'
    assert found(cfg, 'val') == {
        ('val', 'folder missing'): {'images/validation', 'annotations/validation'}}


def test_links_that_lead_back(cfg, data):
    (data / IMAGES / 'up').symlink_to('..')
    (data / IMAGES / 'loop.png').symlink_to('loop.png')
    (data / 'annotations/validation/here').symlink_to('.')
    assert found(cfg, 'train', 'val') == {
        ('train', 'link loop'): {'training/up', 'training/loop.png'},
        ('val', 'link loop'): {'validation/here'}}
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, lazy_init=True))
    with pytest.raises(SystemExit, match=r'Too many levels .*: remove this link'), clear_errors():
        check_samples(cfg, 'train', dataset)


def test_list_of_names(cfg, data):
    (data / 'train.txt').write_text('00001\n00002\nnowhere\n00002\n')
    cfg.train_dataloader.dataset.ann_file = 'train.txt'
    assert found(cfg, 'train') == {
        ('train', 'image missing'): {'training/nowhere.png'},
        ('train', 'mask missing'): {'training/nowhere.png'},
        ('train', 'duplicate'): names(IMAGES, 2)}
    (data / 'train.txt').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(DataError, match=r'train\.txt is not a text file'):
        audit(cfg, ['train'], workers=1)
    cfg.train_dataloader.dataset.ann_file = 'gone.txt'
    assert found(cfg, 'train') == {('train', 'folder missing'): {'data/gone.txt'}}


def test_wrapped_data_sets(cfg, data):
    plain = cfg.train_dataloader.dataset
    other = dict(plain, data_prefix=dict(cfg.val_dataloader.dataset.data_prefix))
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        plain, dict(type='RepeatDataset', times=3, dataset=other)])
    spoiling.out_of_range(data / 'annotations/validation/00002.png')
    assert [key for key, _ in inner_datasets(cfg.train_dataloader.dataset)] == [
        'dataset.datasets.0', 'dataset.datasets.1.dataset']
    assert found(cfg, 'train') == {
        ('train[1]', 'label out of range'): names('x/validation', 2)}
    assert found(cfg)['val', 'train image in val or test'] == names('x/validation', 0, 1, 2, 3)


def test_pixels_are_counted_as_numpy_counts_them(cfg, data):
    relabel(data / MASKS, lambda labels: np.where(labels == 3, 255, labels))
    part = audit(cfg, ['train'], workers=1).parts[0]
    labels = np.stack([array(path) for path in sorted((data / MASKS).iterdir())])
    assert part.counts.tolist() == [(labels == i).sum() for i in range(8)]
    assert part.unlabelled == (labels == 255).sum()
    cfg.train_dataloader.dataset.update(
        reduce_zero_label=True, metainfo=dict(classes=('car', 'sky'), palette=PALETTE))
    part = audit(cfg, ['train'], workers=1).parts[0]
    # One lower: what is stored as 6 is the car, as 1 the sky.
    assert part.counts.tolist() == [(labels == 6).sum(), (labels == 1).sum()]


def test_classes_that_lack(cfg, data):
    relabel(data / MASKS, lambda labels: np.where(labels >= 6, 0, labels))
    relabel(data / 'annotations/validation', lambda labels: np.where(labels == 7, 0, labels))
    assert found(cfg) == {('train', 'class never occurs'): {'lamp', 'bird'},
                          ('val', 'class never occurs'): {'bird'},
                          ('val', 'class not in train'): {'lamp'}}


def test_reduce_zero_label_that_looks_wrong(cfg, data):
    cfg.train_dataloader.dataset.reduce_zero_label = True
    assert set(found(cfg, 'train')) == {('train', 'reduce_zero_label'),
                                        ('train', 'class never occurs')}
    relabel(data / MASKS, lambda labels: labels + 1)  # as ADE20K stores them
    assert found(cfg, 'train') == {}
    cfg.train_dataloader.dataset.reduce_zero_label = False
    assert set(found(cfg, 'train')) == {
        ('train', 'reduce_zero_label'), ('train', 'label out of range'),
        ('train', 'class never occurs')}


def test_heads_and_colours(cfg):
    cfg.model.decode_head.num_classes = 7
    cfg.model.auxiliary_head = [dict(num_classes=8), dict(num_classes=150)]
    assert found(cfg, 'train') == {('train', 'number of classes'): {
        'model.decode_head.num_classes=7', 'model.auxiliary_head.1.num_classes=150'}}
    cfg.model.decode_head.num_classes = 8
    del cfg.model.auxiliary_head
    cfg.train_dataloader.dataset.metainfo = dict(palette=[*PALETTE[:7], PALETTE[0]])
    assert found(cfg, 'train') == {('train', 'colours'): {'sky, bird'}}
    cfg.train_dataloader.dataset.metainfo = dict(palette=PALETTE[:3])
    with pytest.raises(ConfigError, match=r'train_dataloader\.dataset cannot be built: .*palette'):
        audit(cfg, ['train'])


def test_masks_of_0_and_255(cfg, data):
    spoiling.binary(cfg, data)
    assert found(cfg, 'train') == {('train', 'mask of 0 and 255'): names(MASKS, *range(12)),
                                   ('train', 'class never occurs'): {'house'}}
    relabel(data / MASKS, lambda labels: np.minimum(labels, 1))
    assert found(cfg, 'train') == {}
    relabel(data / MASKS, lambda labels: 255 * labels if labels.any() else labels)
    path = next(path for path in (data / MASKS).iterdir() if array(path).any())
    save(path, np.minimum(array(path), 1))
    assert set(found(cfg, 'train')) == {('train', 'perhaps 0 and 255')}


def build(cfg, split='train'):
    return DATASETS.build({**cfg[f'{split}_dataloader'].dataset, 'lazy_init': True})


@pytest.fixture
def told(monkeypatch):
    """The warnings of the samples."""
    texts = []
    monkeypatch.setattr('mmseg_edaformer.data.audit.print_log',
                        lambda text, **kwargs: texts.append(text))
    return texts


@pytest.mark.parametrize(('spoil', 'check'), [
    (spoiling.out_of_range, r'label out of range: .*: 9 \(2 pixels\)'),
    (spoiling.cut, 'mask unreadable')])
def test_samples_stop_a_run(spoil, check, cfg, data):
    check_samples(cfg, 'train', build(cfg))
    spoil(data / MASKS / '00000.png')
    with pytest.raises(DataError, match=f'the train set: {check}.*1 of 12 looked at'):
        check_samples(cfg, 'train', build(cfg))


def test_samples_warn(cfg, data, told):
    cfg.train_dataloader.dataset.reduce_zero_label = True
    check_samples(cfg, 'train', build(cfg))
    assert told.pop().startswith('the train set: reduce_zero_label: ')
    cfg.train_dataloader.dataset.reduce_zero_label = False
    spoiling.deep(data / MASKS / '00000.png')
    spoiling.recoloured(data / MASKS / '00001.png')
    spoiling.unlabelled(data / MASKS / '00002.png')
    check_samples(cfg, 'train', build(cfg))
    assert [text.split(':')[1].strip() for text in told] == [
        'more than 8 bits', 'palette of other indices', 'no label']
    assert found(cfg, 'train').keys() == {('train', text.split(':')[1].strip()) for text in told}


@pytest.mark.parametrize(('change', 'check'), [
    (lambda labels: 255 * (labels == 3), 'mask of 0 and 255'),
    (lambda labels: 255 + 0 * labels, 'no label in any mask')])
def test_masks_that_are_wrong_together(change, check, cfg, data, told):
    """check_data.py and the samples before a run find the same."""
    relabel(data / MASKS, change)
    assert found(cfg, 'train')['train', check] == names(MASKS, *range(12))
    with pytest.raises(DataError, match=f'{check}: .*12 of 12 looked at.*What to do'):
        check_samples(cfg, 'train', build(cfg))
    assert not told
    check_samples(cfg, 'train', build(cfg), alone=False)
    check_samples(cfg, 'test', build(cfg))
    assert check in told[0]
    assert check.split(' in any')[0] in told[1]


def test_a_class_that_few_masks_hold(cfg, data, told):
    """More masks are looked at before a run is stopped for what holds for all of them."""
    for folder in (IMAGES, MASKS):
        for index in range(12, 300):
            (data / folder / f'{index:05d}.png').symlink_to(data / folder / '00000.png')
    relabel(data / MASKS, lambda labels: 255 * (labels == 3))
    (data / MASKS / '00200.png').unlink()
    save(data / MASKS / '00200.png', np.ones((64, 96), np.uint8))
    check_samples(cfg, 'train', build(cfg))
    assert not told


def test_samples_that_a_run_skips_or_cannot_read(cfg, data, tmp_path, told):
    spoiling.cut(data / MASKS / '00000.png')
    cfg.train_dataloader.dataset.pipeline[1].skip_list = str(tmp_path / 'bad.txt')
    check_samples(cfg, 'train', build(cfg))
    assert len(told) == 1
    assert '00000.png: image file is truncated' in told[0]
    (data / 'none.txt').touch()
    cfg.train_dataloader.dataset.ann_file = 'none.txt'
    with pytest.raises(DataError, match=r'the train set: no images: .*none\.txt\. What to do'):
        check_samples(cfg, 'train', build(cfg))
    cfg.train_dataloader.dataset.update(data_root=None, ann_file='', data_prefix=dict(
        img_path='s3://x/images', seg_map_path='s3://x/masks'))
    check_samples(cfg, 'train', build(cfg))
    assert found(cfg, 'train') == {('train', 'not audited'): {'SyntheticDataset'}}
