"""Every defect that can be planted in a drawn data set is found, and none in a sound one."""
import hashlib
import json
import os
import runpy
import shutil

import numpy as np
import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS
from PIL import Image

from mmseg_edaformer.data.audit import audit, check_samples, inner_datasets, report as audit_report
from mmseg_edaformer.data.audit.files import examine_files
from mmseg_edaformer.data.drawing import PALETTE
from mmseg_edaformer.errors import ConfigError, DataError, clear_errors
from tests.conftest import ROOT, write_config

IMAGES, MASKS = 'images/training', 'annotations/training'


@pytest.fixture
def data(scenes, tmp_path):
    """A copy of the drawn scenes, to spoil."""
    return shutil.copytree(scenes, tmp_path / 'data')


@pytest.fixture
def cfg(data, tmp_path):
    return Config.fromfile(write_config(tmp_path, data))


def found(cfg, *splits, **kwargs):
    """What was found: the names of the files, or classes, by split and check."""
    done = audit(cfg, splits or ('train', 'val', 'test'), workers=1, **kwargs)
    return {(finding.split, finding.check): {'/'.join(name.split('/')[-2:])
                                             for name, _ in finding.items}
            for finding in done.findings}


def array(path):
    return np.array(Image.open(path))


def save(path, content):
    Image.fromarray(content).save(path)


def relabel(folder, change):
    for path in folder.iterdir():
        save(path, change(array(path)).astype(np.uint8))


def colours(path):
    save(path, np.array(PALETTE, np.uint8)[array(path)])


def recoloured(path):
    """A palette that holds the right colours, in the opposite order."""
    image = Image.fromarray(7 - array(path))
    image.putpalette(np.array(PALETTE[::-1], np.uint8).tobytes())
    image.save(path)


def turned(path):
    """As a phone saves it: pixels as its sensor has them, and a note."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


def deep(path):
    Image.fromarray(array(path).astype(np.uint16)).save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def smaller(path):
    save(path, array(path)[:-1])


def out_of_range(path):
    labels = array(path)
    labels[3, 4:6] = 9
    save(path, labels)


def unlabelled(path):
    save(path, np.full((64, 96), 255, np.uint8))


def names(folder, *indices):
    return {f'{folder.split("/")[-1]}/{index:05d}.png' for index in indices}


def test_sound_data_has_no_finding(cfg, data):
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
    (IMAGES, cut, 'image unreadable', IMAGES),
    (MASKS, cut, 'mask unreadable', MASKS),
    (MASKS, smaller, 'sizes differ', IMAGES),
    (IMAGES, turned, 'image turned by EXIF', IMAGES),
    (MASKS, colours, 'mask of colours', MASKS),
    (MASKS, recoloured, 'palette of other indices', MASKS),
    (MASKS, deep, 'more than 8 bits', MASKS),
    (MASKS, out_of_range, 'label out of range', MASKS),
    (MASKS, unlabelled, 'no label', MASKS)])
def test_defect_is_named(where, spoil, check, named, cfg, data):
    for index in (3, 7):
        spoil(data / where / f'{index:05d}.png')
    assert found(cfg) == {('train', check): names(named, 3, 7)}


def test_exif_that_fits_is_a_warning(cfg, data):
    turned(data / IMAGES / '00001.png')
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
    assert found(cfg, 'val') == {('val', 'folder missing'): {'gone'}}


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
    out_of_range(data / 'annotations/validation/00002.png')
    assert [key for key, _ in inner_datasets(cfg.train_dataloader.dataset)] == [
        'dataset.datasets.0', 'dataset.datasets.1.dataset']
    assert found(cfg, 'train') == {
        ('train[1]', 'label out of range'): names('x/validation', 2)}
    assert found(cfg)['val', 'train image in val or test'] == names('x/validation', 0, 1, 2, 3)


def test_suffixes(cfg, data):
    for folder, suffix in ((IMAGES, '_leftImg8bit.png'), (MASKS, '_gtFine_labelTrainIds.png')):
        for path in (data / folder).iterdir():
            (data / folder / 'ulm').mkdir(exist_ok=True)
            path.rename(data / folder / 'ulm' / (path.stem + suffix))
    (data / MASKS / 'ulm/00001_gtFine_color.png').write_bytes(b'of no concern')
    cfg.train_dataloader.dataset.type = 'CityscapesDataset'
    cfg.model.decode_head.num_classes = 19
    cfg.train_dataloader.dataset.pipeline[1].num_classes = 19
    assert set(found(cfg, 'train')) == {('train', 'class never occurs')}
    os.remove(data / MASKS / 'ulm/00003_gtFine_labelTrainIds.png')
    assert found(cfg, 'train')['train', 'mask missing'] == {'ulm/00003_gtFine_labelTrainIds.png'}


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


def binary(cfg, data):
    """Houses and the rest, stored as a drawing program stores them."""
    for folder in ('training', 'validation'):
        relabel(data / 'annotations' / folder, lambda labels: 255 * (labels == 3))
    cfg.model.decode_head.num_classes = 2
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.update(type='BaseSegDataset', img_suffix='.png', metainfo=dict(
            classes=('rest', 'house'), palette=PALETTE[:2]))
        loader.dataset.pipeline[1].num_classes = 2


def test_masks_of_0_and_255(cfg, data):
    binary(cfg, data)
    assert found(cfg, 'train') == {('train', 'mask of 0 and 255'): names(MASKS, *range(12)),
                                   ('train', 'class never occurs'): {'house'}}
    relabel(data / MASKS, lambda labels: np.minimum(labels, 1))
    assert found(cfg, 'train') == {}
    relabel(data / MASKS, lambda labels: 255 * labels if labels.any() else labels)
    path = next(path for path in (data / MASKS).iterdir() if array(path).any())
    save(path, np.minimum(array(path), 1))
    assert set(found(cfg, 'train')) == {('train', 'perhaps 0 and 255')}


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob('*.*'))}


def test_fix_writes_copies(cfg, data, scenes, tmp_path, capsys):
    for index, spoil in enumerate((colours, recoloured, deep)):
        spoil(data / MASKS / f'{index:05d}.png')
    Image.open(data / IMAGES / '00004.png').save(data / IMAGES / '00004.png', format='JPEG')
    image = Image.open(data / IMAGES / '00004.png')
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(data / IMAGES / '00004.png', format='JPEG', exif=exif, quality='keep')
    turned(data / IMAGES / '00003.png')
    cut(data / IMAGES / '00008.png')
    save(data / MASKS / '00009.png', np.full((64, 96, 3), 77, np.uint8))  # of no class
    before = digests(data)
    out = tmp_path / 'out'
    assert audit_report.check(cfg, out, workers=1, with_fixes=True) > 0
    assert digests(data) == before
    report = json.loads((out / 'report.json').read_text())
    fixed, = report['fixed']
    assert {item['name'].split('/')[-2] + item['name'][-10:] for item in fixed['files']} == {
        *(f'training/{i:05d}.png' for i in (0, 1, 2, 3, 4))}
    assert {item['name'][-9:] for item in fixed['left_out']} == {'00008.png', '00009.png'}
    assert '[77, 77, 77] belongs to no class' in str(fixed['left_out'])
    assert 'left out because they cannot be fixed: 2' in capsys.readouterr().out
    cfg.merge_from_dict(dict(option.split('=') for option in fixed['cfg_options']))
    assert found(cfg) == {}
    written = out / 'fixed/train'
    assert len(list((written / 'masks').iterdir())) == 10
    for name in ('00000', '00001', '00002'):
        assert (array(written / f'masks/{name}.png') == array(scenes / MASKS / f'{name}.png')).all()
    # Every pixel of the JPEG as it was, and the PNG too.
    assert (array(written / 'images/00004.png') == array(data / IMAGES / '00004.png')).all()
    assert (array(written / 'images/00003.png') == array(data / IMAGES / '00003.png')).all()


def test_fix_of_0_and_255(cfg, data, tmp_path):
    binary(cfg, data)
    audit_report.check(cfg, tmp_path / 'out', workers=1, with_fixes=True)
    fixed = json.loads((tmp_path / 'out/report.json').read_text())['fixed']
    assert [one['split'] for one in fixed] == ['train', 'val']
    cfg.merge_from_dict(dict(option.split('=') for one in fixed for option in one['cfg_options']))
    assert found(cfg) == {}
    for path in (tmp_path / 'out/fixed/train/masks').iterdir():
        assert (array(path) * 255 == array(data / MASKS / path.name)).all()


def test_writes_nowhere_else(cfg, data, tmp_path):
    for out in (data / MASKS, data / IMAGES / 'new', (data / IMAGES).parent, data / 'check'):
        with pytest.raises(ConfigError, match='lies within'):
            audit_report.check(cfg, out, workers=1)
        assert not (out / 'report.json').exists()
    colours(data / MASKS / '00001.png')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/fixed').symlink_to(data)
    with pytest.raises(ConfigError, match='which this run would replace'):
        audit_report.check(cfg, tmp_path / 'out', workers=1, with_fixes=True)
    (data / IMAGES / 'sub').mkdir()
    for folder in (IMAGES, MASKS):
        shutil.copy(data / folder / '00001.png', data / folder.split('/')[0] / 'x.png')
    (data / 'train.txt').write_text('00001\n../x\n')
    cfg.train_dataloader.dataset.ann_file = 'train.txt'
    before = digests(data)
    audit_report.check(cfg, tmp_path / 'other', workers=1, with_fixes=True)
    fixed, = json.loads((tmp_path / 'other/report.json').read_text())['fixed']
    assert 'lies outside' in fixed['left_out'][0]['note']
    assert len(list((tmp_path / 'other/fixed').rglob('*.png'))) == 2
    assert digests(data) == before


def test_unchanged_files_are_not_read_again(cfg, data, tmp_path):
    out = tmp_path / 'out'
    first = audit(cfg, workers=1, out=out)
    assert first.files_read == 32  # test has the files of val
    again = audit(cfg, workers=1, out=out)
    assert again.files_read == 0
    assert again.facts == first.facts
    out_of_range(data / MASKS / '00003.png')
    changed = audit(cfg, workers=1, out=out)
    assert changed.files_read == 1
    assert [f.check for f in changed.findings] == ['label out of range']
    assert audit(cfg, workers=1, out=out, fresh=True).files_read == 32
    cache = out / 'files.cache'
    for content in (cache.read_bytes()[:-9], cache.read_bytes().replace(b'[3,', b'[2,', 1), b''):
        cache.write_bytes(content)
        assert audit(cfg, workers=1, out=out).files_read == 32


def test_processes_find_the_same(cfg, data):
    files = [(kind, str(path)) for kind, folder in (('image', IMAGES), ('mask', MASKS))
             for path in (data / folder).iterdir()]
    assert examine_files(files, workers=2) == examine_files(files, workers=1)


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
    (out_of_range, r'label out of range: .*: 9 \(2 pixels\)'), (cut, 'mask unreadable')])
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
    deep(data / MASKS / '00000.png')
    recoloured(data / MASKS / '00001.png')
    unlabelled(data / MASKS / '00002.png')
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
    cut(data / MASKS / '00000.png')
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


def test_names_that_would_steer_a_terminal(cfg, data, tmp_path, capsys):
    for index, name in enumerate(('[red]$x_1$', 'a\nb\x1b[31m', os.fsdecode(b'\xff'))):
        for folder in (IMAGES, MASKS):
            (data / folder / f'{index:05d}.png').rename(data / folder / f'{name}.png')
        out_of_range(data / MASKS / f'{name}.png')
    audit_report.check(cfg, tmp_path / 'out', workers=1)
    told = capsys.readouterr().out
    for name in ('[red]$x_1$', r'a\x0ab\x1b[31m', r'\xff'):
        assert f'/{name}.png: 9 (2 pixels)' in told
    assert '\x1b' not in told
    assert '\\ud' not in (tmp_path / 'out' / 'report.json').read_text()


def test_command_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = str(write_config(tmp_path, data))
    main = runpy.run_path(f'{ROOT}/tools/check_data.py')['main']
    unlabelled(data / MASKS / '00003.png')
    with pytest.raises(SystemExit) as ended:
        main([config, '--out', 'out', '--workers', '1'])
    assert ended.value.code == 0
    assert '0 errors, 1 warning.' in capsys.readouterr().out
    (data / MASKS / '00001.png').write_bytes(b'')
    with pytest.raises(SystemExit) as ended:
        main([config, '--split', 'train', '--workers', '2'])
    assert ended.value.code == 1
    assert {path.name for path in (tmp_path / 'work_dirs/mini/data_check').iterdir()} == {
        'report.json', 'classes.png', 'samples.png', 'files.cache'}
    told = capsys.readouterr().out
    assert 'error: train: mask unreadable (1)' in told
    assert f'{data / MASKS / "00001.png"}: the file has 0 bytes' in told


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """Images of ten classes in folders; read-only."""
    pytest.importorskip('mmpretrain', reason='mmpretrain is not there')
    from mmseg_edaformer.pretraining.crops import draw_crops
    return draw_crops(tmp_path_factory.mktemp('drawn') / 'data', train=4, val=2)


@pytest.fixture
def crops(drawn, tmp_path):
    """A copy of them, to spoil."""
    return shutil.copytree(drawn, tmp_path / 'crops')


@pytest.fixture
def crops_cfg(crops):
    return crops_config('eft_t_crops', crops)


def crops_config(name, root):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(root)
    return cfg


def test_classes_that_are_sound(crops_cfg):
    assert found(crops_cfg) == {}
    done = audit(crops_cfg, workers=1)
    assert [(part.name, len(part.keys), len(part.pairs)) for part in done.parts] == [
        ('train', 1, 40), ('val', 2, 20)]
    # As the data set that is trained on has them.
    dataset = DATASETS.build(crops_cfg.train_dataloader.dataset)
    part = done.parts[0]
    assert [(path, number) for (path, _), number in zip(part.pairs, part.targets)] == [
        (dataset.get_data_info(i)['img_path'], dataset.get_data_info(i)['gt_label'])
        for i in range(len(dataset))]
    assert part.classes == dataset.metainfo['classes']
    assert part.counts.tolist() == [4] * 10


def stretch(path, *size):
    Image.open(path).resize(size).save(path)


@pytest.mark.parametrize(('spoil', 'check', 'named'), [
    (lambda root: cut(root / 'car/00001.png'), 'image unreadable', {'car/00001.png'}),
    (lambda root: [path.unlink() for path in (root / 'sky').iterdir()], 'class without images',
     {'train/sky'}),
    (lambda root: shutil.copy(root / 'car/00001.png', root / 'sky/1.png'), 'duplicate',
     {'sky/1.png'}),
    (lambda root: shutil.copy(root.parent / 'val/car/00001.png', root / 'car/x.png'), None, None),
    (lambda root: stretch(root / 'car/00001.png', 9, 80), 'extreme size', {'car/00001.png'}),
    (lambda root: stretch(root / 'car/00001.png', 10, 80), None, {}),
    (lambda root: stretch(root / 'car/00001.png', 7, 9), 'extreme size', {'car/00001.png'}),
    (lambda root: stretch(root / 'car/00001.png', 520, 512), 'extreme size', {'car/00001.png'}),
    (lambda root: (root / 'car/notes.txt').write_text(''), 'passed over', {'car/notes.txt'}),
    (lambda root: (root / 'car/00001.png').rename(root / 'x.png'), 'passed over', {'train/x.png'}),
    (lambda root: (root / 'car/.hidden').write_text(''), None, {}),
])
def test_spoilt_classes(spoil, check, named, crops_cfg, crops):
    spoil(crops / 'train')
    if named is None:
        assert found(crops_cfg) == {('val', 'train image in val or test'): {'car/00001.png'}}
    else:
        assert found(crops_cfg) == ({('train', check): named} if check else {})


def test_classes_that_differ(crops_cfg, crops):
    (crops / 'val/tree').rename(crops / 'val/shrub')
    done = audit(crops_cfg, workers=1)
    assert [(f.split, f.check, f.items) for f in done.findings] == [
        ('val', 'classes differ', (('shrub', 'only in val'), ('tree', 'only in train')))]


def test_number_of_classes(crops_cfg, crops):
    crops_cfg.model.head.loss.num_classes = 12
    assert found(crops_cfg, 'train') == {
        ('train', 'number of classes'): {'model.head.loss.num_classes=12'}}
    # ImageNet's names are no assertion that fails.
    assert found(crops_config('eft_t_in1k', crops), 'val') == {('val', 'number of classes'): {
        'val_dataloader.dataset.type=ImageNet', 'model.head.num_classes=1000',
        'model.head.loss.num_classes=1000', 'model.data_preprocessor.num_classes=1000'}}


def test_list_of_images(crops_cfg, crops, tmp_path):
    lines = [f'{path.relative_to(crops / "train")} {number}' for number, folder in
             enumerate(sorted((crops / 'train').iterdir())) for path in sorted(folder.iterdir())]
    (crops / 'list.txt').write_text('\n'.join([*lines[8:], 'car/gone.png 1', 'sky/00001.png 10']))
    crops_cfg.train_dataloader.dataset.ann_file = 'list.txt'
    assert found(crops_cfg, 'train') == {
        ('train', 'image missing'): {'car/gone.png'}, ('train', 'duplicate'): {'sky/00001.png'},
        ('train', 'label out of range'): {'sky/00001.png'}, ('train', 'class never occurs'): {'0'}}
    assert audit_report.check(crops_cfg, tmp_path / 'out', ['train'], workers=1) == 2
    crops_cfg.model = {}  # then nothing says how many classes there are
    assert audit_report.check(crops_cfg, tmp_path / 'out', ['train'], workers=1) == 2
    (crops / 'list.txt').write_text('car/00001.png\n')
    with pytest.raises(DataError, match=r'list\.txt is no list of images and the numbers'):
        audit(crops_cfg, ['train'], workers=1)


def test_classes_that_are_not_there(crops_cfg, crops, tmp_path):
    for path in (crops / 'val').iterdir():
        shutil.rmtree(path)
    assert found(crops_cfg, 'val') == {('val', 'no images'): {'<class>/<image>'}}
    shutil.rmtree(crops / 'val')
    assert found(crops_cfg, 'val') == {('val', 'folder missing'): {'crops/val'}}


def test_report_of_classes(crops_cfg, crops, tmp_path, capsys):
    for name in ('00000', '00001', '00002'):
        (crops / f'train/car/{name}.png').unlink()
    cut(crops / 'train/sky/00001.png')
    out = tmp_path / 'out'
    assert audit_report.check(crops_cfg, out, workers=1) == 1
    told = capsys.readouterr().out
    assert [[cell.strip() for cell in line.split('|')[1:-1]] for line in told.splitlines()
            if 'CustomDataset' in line] == [
        ['train', 'CustomDataset', '37', '10', '1', '4', '4'],
        ['val, test', 'CustomDataset', '20', '10', '2', '2', '2']]
    assert 'error: train: image unreadable (1)' in told
    counts = json.loads((out / 'report.json').read_text())['splits']['train']['images_of_class']
    assert (len(counts), counts['car'], counts['sky']) == (10, 1, 4)
    assert (out / 'samples.png').exists()
    with pytest.raises(ConfigError, match='--fix is for masks'):
        audit_report.check(crops_cfg, out, workers=1, with_fixes=True)


def test_figures_of_more_classes_than_can_be_named(crops, tmp_path):
    for split in ('train', 'val'):
        for number in range(301):
            folder = tmp_path / 'many' / split / f'n{number:08d}'
            folder.mkdir(parents=True)
            shutil.copy(crops / 'train/car/00001.png', folder / 'a.JPEG')
    audit_report.check(crops_config('eft_t_in1k', tmp_path / 'many'), tmp_path / 'out', workers=1)
    assert Image.open(tmp_path / 'out/classes.png').size == (990, 440)
