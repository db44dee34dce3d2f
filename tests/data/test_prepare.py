"""Preparing data sets: what is missing is named, masks are converted by mmseg, nothing is lost."""
import argparse
import importlib.util
import json
import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import DictAction
from mmseg import datasets
from PIL import Image

from mmseg_edaformer.data import preparing as module
from mmseg_edaformer.data.preparing import LAYOUTS, prepare
from mmseg_edaformer.errors import DataError, clear_errors
from mmseg_edaformer.pretraining.folders import FOLDERS
from tests.conftest import ROOT

TOOL = runpy.run_path(f'{ROOT}/tools/prepare_data.py')
POLYGONS = dict(imgHeight=4, imgWidth=6, objects=[
    dict(label='road', polygon=[[0, 0], [5, 0], [5, 3], [0, 3]])])
# Does what the converter needs of the package, so that mmseg's script runs without it.
STAND_IN = """
import json
from PIL import Image

def json2labelImg(source, target, encoding):
    assert encoding == 'trainIds'
    size = json.load(open(source))
    Image.new('L', (size['imgWidth'], size['imgHeight']), 0).save(target)
"""


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(((0, 1, 13), (181, 255, 2)), np.uint8)).save(path)


def build(name, root, count=2, converted=True):
    """Make a data set of ``count`` pairs per split, as unpacked or as converted."""
    layout = LAYOUTS[name]
    for split in layout.splits:
        for index in range(count):
            stem = f'town/town_{index}' if name == 'cityscapes' else f'{index:05d}'
            save(root / split.images / (stem + layout.image_suffix))
            if layout.converter:
                source = root / split.masks / (stem + layout.converter.source)
                if source.suffix == '.json':
                    source.parent.mkdir(parents=True, exist_ok=True)
                    source.write_text(json.dumps(POLYGONS))
                else:
                    save(source)
            if converted or not layout.converter:
                save(root / split.masks / (stem + layout.mask_suffix))
    return root


def files(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob('*')}


@pytest.fixture
def cityscapesscripts(tmp_path, monkeypatch):
    if not importlib.util.find_spec('cityscapesscripts'):
        folder = tmp_path / 'packages' / 'cityscapesscripts' / 'preparation'
        folder.mkdir(parents=True)
        (folder / 'json2labelImg.py').write_text(STAND_IN)
        monkeypatch.syspath_prepend(folder.parents[1])
        monkeypatch.setenv('PYTHONPATH', str(folder.parents[1]), prepend=os.pathsep)


@pytest.fixture
def no_converter(monkeypatch):
    def refuse(command, **_):
        raise AssertionError(f'started {command}')

    monkeypatch.setattr(module.subprocess, 'run', refuse)


@pytest.mark.parametrize('name', LAYOUTS)
def test_ready(name, tmp_path, capsys, no_converter):
    root = build(name, tmp_path)
    (root / LAYOUTS[name].splits[0].images / f'._0{LAYOUTS[name].image_suffix}').touch()  # hidden
    before = files(root)
    prepare(LAYOUTS[name], root)
    out = capsys.readouterr().out
    assert '  train: 2 images, 2 masks\n' in out
    assert '  val: 2 images, 2 masks\n' in out
    assert f'ready: use configs/edaformer_t_{name}.py' in out
    assert ('warning: val has officially' in out) == (name != 'synthetic')
    assert files(root) == before


@pytest.mark.parametrize(('name', 'dataset'), [
    ('ade', 'ADE20KDataset'), ('cityscapes', 'CityscapesDataset'),
    ('cocostuff', 'COCOStuffDataset')])
def test_mmseg_finds_the_same_pairs(name, dataset, tmp_path):
    root = build(name, tmp_path, 3)
    for split in LAYOUTS[name].splits:
        prefix = dict(img_path=split.images, seg_map_path=split.masks)
        items = getattr(datasets, dataset)(data_root=str(root), data_prefix=prefix, pipeline=[])
        assert len(items) == 3
        for index in range(3):
            item = items.get_data_info(index)
            assert Path(item['img_path']).is_file()
            assert Path(item['seg_map_path']).is_file()
            assert item['seg_map_path'].endswith(LAYOUTS[name].mask_suffix)


@pytest.mark.parametrize('name', LAYOUTS)
def test_nothing_there(name, tmp_path, no_converter):
    layout, root = LAYOUTS[name], tmp_path / 'absent'
    with pytest.raises(DataError) as caught:
        prepare(layout, root)
    message = str(caught.value)
    for split in layout.splits:
        assert f'{split.name}: no *{layout.image_suffix} in {split.images}' in message
        assert re.search(rf'{split.name}: no \*\S+ in {split.masks}\n', message)
    for line in layout.downloads:
        assert line.format(root=root) in message
    assert '{' not in message
    assert not root.exists()


@pytest.mark.parametrize('name', ['ade', 'cocostuff'])
def test_files_without_a_partner(name, tmp_path, no_converter):
    layout, root = LAYOUTS[name], build(name, tmp_path)
    train, val = layout.splits
    for index in range(5):
        save(root / train.images / f'x{index}{layout.image_suffix}')
    save(root / val.masks / f'y{layout.mask_suffix}')
    with pytest.raises(DataError) as caught:
        prepare(layout, root)
    shown = ', '.join(f'{train.images}/x{index}{layout.image_suffix}' for index in range(3))
    message = str(caught.value)
    assert f'train: 5 without a complete mask: {shown} and 2 more\n' in message
    assert f'val: 1 without an image: {val.masks}/y{layout.mask_suffix}\n' in message


def test_folders_of_cityscapes(tmp_path, capsys):
    """Linked ones are followed; the same name in another one is no partner."""
    root = build('cityscapes', tmp_path / 'data')
    images, masks = (root / path for path in ('leftImg8bit/train/town', 'gtFine/train/town'))
    images.rename(tmp_path / 'elsewhere')
    images.symlink_to(tmp_path / 'elsewhere')
    prepare(LAYOUTS['cityscapes'], root)
    assert '  train: 2 images, 2 masks\n' in capsys.readouterr().out
    masks.rename(masks.with_name('other'))
    with pytest.raises(DataError, match=r'without a complete mask.*town/town_0') as caught:
        prepare(LAYOUTS['cityscapes'], root)
    assert 'without an image: gtFine/train/other/town_0' in str(caught.value)


@pytest.mark.parametrize('name', ['cityscapes', 'cocostuff'])
def test_check_reports_what_is_not_converted_and_leaves_it(name, tmp_path, capsys, no_converter):
    layout, root = LAYOUTS[name], build(name, tmp_path)
    train, val = (root / split.masks for split in layout.splits)
    absent = next(train.rglob(f'*0{layout.mask_suffix}'))
    absent.unlink()
    bad = sorted(val.rglob(f'*{layout.mask_suffix}'))
    bad[0].write_bytes(b'')
    bad[1].write_bytes(bad[1].read_bytes()[:-5])
    before = files(root)
    with pytest.raises(DataError) as caught:
        prepare(layout, root, check_only=True)
    assert str(caught.value).splitlines()[1:] == [
        f'  train: 1 not converted: {absent.relative_to(root)}',
        f'  val: 2 not converted: {", ".join(str(path.relative_to(root)) for path in bad)}',
        f'  run: python tools/prepare_data.py {name} --root {root}']
    assert '  train: 2 images, 1 masks, 1 to convert\n' in capsys.readouterr().out
    assert files(root) == before


def test_a_cut_mask_without_annotation_is_refused(tmp_path, no_converter):
    masks = build('cocostuff', tmp_path) / LAYOUTS['cocostuff'].splits[0].masks
    (masks / '00001.png').unlink()
    cut = masks / '00001_labelTrainIds.png'
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(DataError, match=r'train: 1 without a complete mask: \S*/00001\.jpg'):
        prepare(LAYOUTS['cocostuff'], tmp_path)


@pytest.mark.usefixtures('cityscapesscripts')
def test_a_failed_conversion_of_cityscapes_is_noticed_and_finished_by_mmseg(tmp_path, capsys):
    layout, root = LAYOUTS['cityscapes'], build('cityscapes', tmp_path / 'data', converted=False)
    first = root / 'gtFine/train/town/town_0_gtFine_labelTrainIds.png'
    save(first)
    first.write_bytes(first.read_bytes()[:20])
    broken = root / 'gtFine/val/town/town_1_gtFine_polygons.json'
    broken.write_text('{')
    with pytest.raises(DataError, match=r'cityscapes\.py of mmseg stopped with exit code 1'):
        prepare(layout, root)
    assert '  train: 2 images, 1 masks, 2 to convert\n' in capsys.readouterr().out
    with pytest.raises(DataError, match=r'val: . not converted: .*town_1_gtFine_labelTrainIds'):
        prepare(layout, root, check_only=True)
    broken.write_text(json.dumps(POLYGONS))
    prepare(layout, root)
    masks = [np.array(Image.open(mask)) for mask in root.rglob('*_gtFine_labelTrainIds.png')]
    assert [(mask.shape, mask[1, 1]) for mask in masks] == [((4, 6), 0)] * 4


@pytest.mark.parametrize(('name', 'message'), [
    ('cityscapes', 'not installed: pip install cityscapesscripts'),
    ('cocostuff', r'mmseg has no converter .*coco_stuff164k\.py: install')])
def test_what_a_conversion_lacks(name, message, tmp_path, monkeypatch, no_converter):
    monkeypatch.setattr(module, 'find_spec', lambda package: None)
    if name == 'cocostuff':
        monkeypatch.setattr(module, '_CONVERTERS', tmp_path)
    with pytest.raises(DataError, match=message):
        prepare(LAYOUTS[name], build(name, tmp_path, converted=False))


def test_a_part_of_cocostuff_is_not_converted(tmp_path, no_converter):
    root = build('cocostuff', tmp_path, converted=False)
    with pytest.raises(DataError) as caught:
        prepare(LAYOUTS['cocostuff'], root)
    for part in ('from 123,287 files *.png', 'annotations/train2017, annotations/val2017',
                 'hold 4.', 'stuffthingmaps_trainval2017.zip'):
        assert part in str(caught.value)


def test_cocostuff_is_converted_by_mmseg(tmp_path, monkeypatch, capsys):
    root = build('cocostuff', tmp_path, converted=False)
    # The converter counts by an assertion, which Python leaves out when it optimises.
    monkeypatch.setenv('PYTHONOPTIMIZE', '1')
    layout = LAYOUTS['cocostuff']
    prepare(layout._replace(converter=layout.converter._replace(exact=4)), root)
    assert '  train: 2 images, 2 masks\n' in capsys.readouterr().out
    path = root / 'annotations/train2017/00001_labelTrainIds.png'
    assert np.array(Image.open(path)).tolist() == [[0, 1, 12], [170, 255, 2]]
    assert len(list((root / 'annotations').rglob('*.png'))) == 8


def test_where_a_config_finds_the_data(tmp_path, monkeypatch, capsys):
    """The default folder needs no options, another one --cfg-options or a link."""
    monkeypatch.chdir(tmp_path)
    layout = LAYOUTS['ade']
    build('ade', Path(layout.root))
    prepare(layout, tmp_path / layout.root)
    assert 'options' not in capsys.readouterr().out
    prepare(layout, build('ade', Path('2016')))
    out = capsys.readouterr().out
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    assert parser.parse_args(out[out.index('--cfg-options'):].split()).cfg_options == {
        f'{split}_dataloader.dataset.data_root': str(tmp_path / '2016')
        for split in ('train', 'val', 'test')}
    root = build('ade', tmp_path / 'my data')
    prepare(layout, root)
    assert f"after: ln -s '{root}' data/ade/ADEChallengeData2016\n" in capsys.readouterr().out


def test_the_tool_knows_every_data_set():
    known = {layout.name: layout.title for layout in (*LAYOUTS.values(), *FOLDERS.values())}
    assert TOOL['_TITLES'] == known


def test_command_line(tmp_path, capsys):
    root = build('cityscapes', tmp_path)
    TOOL['main'](['cityscapes', '--root', str(root)])
    assert f'Cityscapes in {root}\n  train: 2 images, 2 masks\n' in capsys.readouterr().out
    for mask in root.rglob('*labelTrainIds*'):
        mask.unlink()
    with pytest.raises(SystemExit, match=rf'error: Cityscapes in {root} is not converted:\n'), (
            clear_errors()):
        TOOL['main'](['cityscapes', '--root', str(root), '--check'])
    with pytest.raises(SystemExit):  # there is nothing to draw
        TOOL['main'](['ade', '--seed', '1'])


def test_synthetic_is_drawn_but_not_by_a_check(tmp_path, capsys):
    def main(*args):
        TOOL['main'](['synthetic', '--root', str(root), *map(str, args)])

    root = tmp_path / 'drawn'
    with pytest.raises(DataError, match=r'python tools/prepare_data\.py synthetic --root'):
        main('--check')
    assert not root.exists()
    main('--train', 3, '--val', 1, '--seed', 7)
    assert '  train: 3 images, 3 masks\n  val: 1 images, 1 masks\nready' in capsys.readouterr().out
    main('--check')
    first = (root / 'images/training/00000.png').read_bytes()
    main('--train', 3, '--val', 1, '--seed', 8)
    assert (root / 'images/training/00000.png').read_bytes() != first
