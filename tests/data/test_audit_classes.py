"""The audit of classification data sets: images in the folders of their classes, or a list."""
import json
import shutil

import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS
from PIL import Image

from mmseg_edaformer.data.audit import audit, report as audit_report
from mmseg_edaformer.errors import ConfigError, DataError
from tests.conftest import ROOT
from tests.data.spoiling import cut, found


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
    assert not (out / 'samples.png').exists()
    with pytest.raises(ConfigError, match='--fix is for masks'):
        audit_report.check(crops_cfg, out, workers=1, with_fixes=True)
