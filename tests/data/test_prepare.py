import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from mmengine.config import DictAction
from PIL import Image

from mmseg_edaformer.data import preparing as module
from mmseg_edaformer.data.preparing import LAYOUTS, Layout, prepare
from mmseg_edaformer.errors import DataError

TOOL = Path(__file__).parents[2] / 'tools' / 'prepare_data.py'
POLYGONS = {
    'imgHeight': 4,
    'imgWidth': 6,
    'objects': [{'label': 'road', 'polygon': [[0, 0], [5, 0], [5, 3], [0, 3]]}],
}
# Does what the converter needs of the package, so that mmseg's script runs without it.
STAND_IN = """
import json
from PIL import Image

def json2labelImg(source, target, encoding):
    assert encoding == 'trainIds'
    size = json.load(open(source))
    Image.new('L', (size['imgWidth'], size['imgHeight']), 0).save(target)
"""


def save(path: Path, values: Sequence[Sequence[int]] = ((0, 1, 13), (181, 255, 2))) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8)).save(path)


def build(layout: Layout, root: Path, count: int = 2, *, converted: bool = True) -> Path:
    """Make a data set of ``count`` pairs per split, as unpacked or as converted."""
    for split in layout.splits:
        for index in range(count):
            name = f'town/town_{index}' if layout.name == 'cityscapes' else f'{index:05d}'
            save(root / split.images / (name + layout.image_suffix))
            if layout.converter:
                source = root / split.masks / (name + layout.converter.source)
                if source.suffix == '.json':
                    source.parent.mkdir(parents=True, exist_ok=True)
                    source.write_text(json.dumps(POLYGONS))
                else:
                    save(source)
            if converted or not layout.converter:
                save(root / split.masks / (name + layout.mask_suffix))
    return root


def files(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob('*')}


def tool(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def cityscapesscripts(tmp_path, monkeypatch):
    if importlib.util.find_spec('cityscapesscripts'):
        return
    folder = tmp_path / 'packages' / 'cityscapesscripts' / 'preparation'
    folder.mkdir(parents=True)
    (folder.parent / '__init__.py').touch()
    (folder / '__init__.py').touch()
    (folder / 'json2labelImg.py').write_text(STAND_IN)
    packages = str(folder.parents[1])
    monkeypatch.syspath_prepend(packages)
    before = os.environ.get('PYTHONPATH')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [packages, before])))


@pytest.fixture
def no_converter(monkeypatch):
    def refuse(command, **_):
        raise AssertionError(f'started {command}')

    monkeypatch.setattr(module.subprocess, 'run', refuse)


@pytest.mark.parametrize('name', LAYOUTS)
def test_ready(name, tmp_path, capsys, no_converter):
    layout = LAYOUTS[name]
    root = build(layout, tmp_path)
    before = files(root)
    prepare(layout, root)
    out = capsys.readouterr().out
    assert '  train: 2 images, 2 masks\n' in out
    assert '  val: 2 images, 2 masks\n' in out
    assert f'ready: use configs/edaformer_t_{name}.py' in out
    assert files(root) == before


@pytest.mark.parametrize(
    ('name', 'dataset'),
    [
        ('ade', 'ADE20KDataset'),
        ('cityscapes', 'CityscapesDataset'),
        ('cocostuff', 'COCOStuffDataset'),
    ],
)
def test_mmseg_finds_the_same_pairs(name, dataset, tmp_path):
    # With mmcv-lite this import works only after that of mmseg_edaformer.
    from mmseg import datasets

    layout = LAYOUTS[name]
    root = build(layout, tmp_path, 3)
    for split in layout.splits:
        prefix = {'img_path': split.images, 'seg_map_path': split.masks}
        items = getattr(datasets, dataset)(data_root=str(root), data_prefix=prefix, pipeline=[])
        assert len(items) == 3
        for index in range(3):
            item = items.get_data_info(index)
            assert Path(item['img_path']).is_file()
            assert Path(item['seg_map_path']).is_file()
            assert item['seg_map_path'].endswith(layout.mask_suffix)


def test_counts_against_the_official_ones(tmp_path, capsys):
    layout = LAYOUTS['ade']
    root = build(layout, tmp_path)
    prepare(layout, root)
    assert 'warning: train has officially 20,210 images' in capsys.readouterr().out
    train, val = layout.splits
    prepare(replace(layout, splits=(replace(train, official=2), val)), root)
    out = capsys.readouterr().out
    assert 'warning: train' not in out
    assert 'warning: val has officially 2,000 images' in out


@pytest.mark.parametrize('name', LAYOUTS)
def test_nothing_there(name, tmp_path, no_converter):
    layout = LAYOUTS[name]
    root = tmp_path / 'absent'
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


@pytest.mark.parametrize('name', ['cityscapes', 'cocostuff'])
def test_only_images_unpacked(name, tmp_path, no_converter):
    layout = LAYOUTS[name]
    root = build(layout, tmp_path)
    for path in (root / layout.splits[1].masks).rglob('*.*'):
        path.unlink()
    with pytest.raises(DataError, match='is not complete') as caught:
        prepare(layout, root)
    message = str(caught.value)
    assert f'val: no *{layout.converter.source} in {layout.splits[1].masks}' in message
    assert 'train: ' not in message
    assert 'without' not in message


@pytest.mark.parametrize('name', LAYOUTS)
def test_files_without_a_partner(name, tmp_path, no_converter):
    layout = LAYOUTS[name]
    root = build(layout, tmp_path)
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
    assert layout.downloads[0].format(root=root) in message


def test_same_name_in_another_folder_is_no_partner(tmp_path):
    layout = LAYOUTS['cityscapes']
    root = build(layout, tmp_path)
    masks = root / layout.splits[0].masks
    (masks / 'town').rename(masks / 'other')
    with pytest.raises(DataError, match=r'without a complete mask.*town/town_0') as caught:
        prepare(layout, root)
    assert 'without an image: gtFine/train/other/town_0' in str(caught.value)


def test_hidden_files_do_not_count(tmp_path, capsys):
    layout = LAYOUTS['ade']
    root = build(layout, tmp_path)
    (root / layout.splits[0].images / '._00000.jpg').touch()
    prepare(layout, root)
    assert '  train: 2 images, 2 masks\n' in capsys.readouterr().out


def test_linked_folders_are_followed(tmp_path, capsys):
    layout = LAYOUTS['cityscapes']
    root = build(layout, tmp_path / 'data')
    town = root / layout.splits[0].images / 'town'
    town.rename(tmp_path / 'elsewhere')
    town.symlink_to(tmp_path / 'elsewhere')
    prepare(layout, root)
    assert '  train: 2 images, 2 masks\n' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['cityscapes', 'cocostuff'])
def test_check_reports_what_is_not_converted_and_leaves_it(name, tmp_path, capsys, no_converter):
    layout = LAYOUTS[name]
    root = build(layout, tmp_path)
    train, val = (root / split.masks for split in layout.splits)
    absent = next(train.rglob(f'*0{layout.mask_suffix}'))
    absent.unlink()
    cut = next(val.rglob(f'*1{layout.mask_suffix}'))
    cut.write_bytes(cut.read_bytes()[:-5])
    empty = next(val.rglob(f'*0{layout.mask_suffix}'))
    empty.write_bytes(b'')
    before = files(root)
    with pytest.raises(DataError, match='is not converted') as caught:
        prepare(layout, root, check_only=True)
    message = str(caught.value)
    assert f'train: 1 not converted: {absent.relative_to(root).as_posix()}\n' in message
    assert 'val: 2 not converted: ' in message
    for path in (cut, empty):
        assert path.relative_to(root).as_posix() in message
    assert f'run: python tools/prepare_data.py {name} --root {root}' in message
    assert '  train: 2 images, 1 masks, 1 to convert\n' in capsys.readouterr().out
    assert files(root) == before


def test_a_cut_mask_without_annotation_is_refused(tmp_path, no_converter):
    layout = LAYOUTS['cocostuff']
    root = build(layout, tmp_path)
    masks = root / layout.splits[0].masks
    (masks / '00001.png').unlink()
    cut = masks / '00001_labelTrainIds.png'
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(DataError, match=r'train: 1 without a complete mask: \S*/00001\.jpg'):
        prepare(layout, root)


@pytest.mark.usefixtures('cityscapesscripts')
def test_cityscapes_is_converted_by_mmseg(tmp_path, capsys):
    layout = LAYOUTS['cityscapes']
    root = build(layout, tmp_path / 'data', converted=False)
    prepare(layout, root)
    out = capsys.readouterr().out
    assert '  train: 2 images, 0 masks, 2 to convert\n' in out
    assert '  train: 2 images, 2 masks\n' in out
    assert 'ready: ' in out
    masks = sorted(root.glob('gtFine/*/town/*_gtFine_labelTrainIds.png'))
    assert len(masks) == 4
    assert all(np.array(Image.open(mask)).shape == (4, 6) for mask in masks)
    assert all(np.array(Image.open(mask))[1, 1] == 0 for mask in masks)


@pytest.mark.usefixtures('cityscapesscripts')
def test_an_interrupted_conversion_is_finished(tmp_path, capsys):
    layout = LAYOUTS['cityscapes']
    root = build(layout, tmp_path / 'data')
    first, second, *_ = sorted((root / 'gtFine/train').rglob(f'*{layout.mask_suffix}'))
    first.unlink()
    second.write_bytes(second.read_bytes()[:20])
    prepare(layout, root)
    assert '  train: 2 images, 1 masks, 2 to convert\n' in capsys.readouterr().out
    assert np.array(Image.open(first)).shape == np.array(Image.open(second)).shape == (4, 6)


@pytest.mark.usefixtures('cityscapesscripts')
def test_a_failed_conversion_is_noticed_at_once_and_next_time(tmp_path):
    layout = LAYOUTS['cityscapes']
    root = build(layout, tmp_path / 'data', converted=False)
    broken = root / 'gtFine/val/town/town_1_gtFine_polygons.json'
    broken.write_text('{')
    for _ in range(2):
        with pytest.raises(DataError, match=r'cityscapes\.py of mmseg stopped with exit code 1'):
            prepare(layout, root)
        with pytest.raises(DataError, match=r'val: . not converted: .*town_1_gtFine_labelTrainIds'):
            prepare(layout, root, check_only=True)
    broken.write_text(json.dumps(POLYGONS))
    prepare(layout, root)
    prepare(layout, root, check_only=True)


def test_missing_package_is_named(tmp_path, monkeypatch, no_converter):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        module, 'find_spec', lambda name: None if name == 'cityscapesscripts' else find(name)
    )
    root = build(LAYOUTS['cityscapes'], tmp_path, converted=False)
    with pytest.raises(DataError, match='not installed: pip install cityscapesscripts'):
        prepare(LAYOUTS['cityscapes'], root)


@pytest.mark.parametrize('installed', [True, False])
def test_missing_converter_is_named(installed, tmp_path, monkeypatch, no_converter):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / 'mmseg')])
    monkeypatch.setattr(module, 'find_spec', lambda name: spec if installed else None)
    root = build(LAYOUTS['cocostuff'], tmp_path, converted=False)
    with pytest.raises(DataError, match=r'mmseg has no converter coco_stuff164k\.py') as caught:
        prepare(LAYOUTS['cocostuff'], root)
    place = tmp_path / 'mmseg/.mim/tools/dataset_converters/coco_stuff164k.py'
    assert (str(place) if installed else 'the package mmseg') in str(caught.value)


def coco(exact: int | None) -> Layout:
    layout = LAYOUTS['cocostuff']
    return replace(layout, converter=replace(layout.converter, exact=exact))


def test_a_part_of_cocostuff_is_not_converted(tmp_path, no_converter):
    root = build(LAYOUTS['cocostuff'], tmp_path, converted=False)
    with pytest.raises(DataError) as caught:
        prepare(LAYOUTS['cocostuff'], root)
    message = str(caught.value)
    assert 'from 123,287 files *.png' in message
    assert 'annotations/train2017, annotations/val2017' in message
    assert 'hold 4.' in message
    assert 'stuffthingmaps_trainval2017.zip' in message


def test_command_for_cocostuff(tmp_path, monkeypatch):
    root = build(LAYOUTS['cocostuff'], tmp_path, converted=False)
    started = []

    def run(command, **_):
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, 'run', run)
    monkeypatch.setattr(module.os, 'cpu_count', lambda: 96)
    with pytest.raises(DataError, match='train: 2 not converted'):
        prepare(coco(exact=4), root)
    [[python, script, *rest]] = started
    assert python == sys.executable
    assert Path(script).parts[-5:] == (
        'mmseg', '.mim', 'tools', 'dataset_converters', 'coco_stuff164k.py',
    )  # fmt: skip
    assert f'COCO_LEN = {LAYOUTS["cocostuff"].converter.exact}\n' in Path(script).read_text()
    assert rest == [str(root), '--nproc', '16']


def test_cocostuff_is_converted_by_mmseg(tmp_path, monkeypatch, capsys):
    root = build(LAYOUTS['cocostuff'], tmp_path, converted=False)
    with pytest.raises(DataError, match=r'coco_stuff164k\.py of mmseg stopped with exit code 1'):
        prepare(coco(exact=None), root)
    # The converter counts by an assertion, which Python leaves out when it optimises.
    monkeypatch.setenv('PYTHONOPTIMIZE', '1')
    prepare(coco(exact=4), root)
    assert '  train: 2 images, 2 masks\n' in capsys.readouterr().out
    path = root / 'annotations/train2017/00001_labelTrainIds.png'
    assert np.array(Image.open(path)).tolist() == [[0, 1, 12], [170, 255, 2]]
    path.unlink()
    prepare(coco(exact=4), root)
    assert np.array(Image.open(path)).tolist() == [[0, 1, 12], [170, 255, 2]]
    assert len(list((root / 'annotations').rglob('*.png'))) == 8


def parsed(text: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(text[text.index('--cfg-options') :].split()).cfg_options


def test_default_root_needs_no_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layout = LAYOUTS['ade']
    build(layout, Path(layout.root))
    prepare(layout)
    prepare(layout, tmp_path / layout.root)
    out = capsys.readouterr().out
    assert out.count('ready: ') == 2
    assert '--cfg-options' not in out


def test_other_root_comes_with_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build(LAYOUTS['ade'], Path('2016'))
    prepare(LAYOUTS['ade'], '2016')
    assert parsed(capsys.readouterr().out) == {
        f'{part}_dataloader.dataset.data_root': str(tmp_path / '2016')
        for part in ('train', 'val', 'test')
    }


def test_root_that_options_cannot_carry(tmp_path, capsys):
    root = build(LAYOUTS['ade'], tmp_path / 'my data')
    prepare(LAYOUTS['ade'], root)
    out = capsys.readouterr().out
    assert f"after: ln -s '{root}' data/ade/ADEChallengeData2016\n" in out
    assert 'data_root=' not in out


def module_from(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_command_line_ready(tmp_path):
    root = build(LAYOUTS['ade'], tmp_path)
    done = tool('ade', '--root', root)
    assert done.returncode == 0
    assert 'error' not in done.stderr
    assert f'ADE20K in {root}\n  train: 2 images, 2 masks\n' in done.stdout


def test_command_line_not_ready(tmp_path):
    root = build(LAYOUTS['cityscapes'], tmp_path, converted=False)
    done = tool('cityscapes', '--root', root, '--check')
    assert done.returncode == 1
    assert f'error: Cityscapes in {root} is not converted:\n' in done.stderr
    assert 'Traceback' not in done.stderr
    assert 'ready:' not in done.stdout
    assert not list(root.rglob('*labelTrainIds*'))


def test_synthetic_is_drawn_but_not_by_a_check(tmp_path, capsys):
    main = module_from(TOOL).main
    root = tmp_path / 'drawn'
    with pytest.raises(DataError, match=r'python tools/prepare_data\.py synthetic --root'):
        main(['synthetic', '--root', str(root), '--check'])
    assert not root.exists()
    main(['synthetic', '--root', str(root), '--train', '3', '--val', '1', '--seed', '7'])
    out = capsys.readouterr().out
    assert '  train: 3 images, 3 masks\n' in out
    assert '  val: 1 images, 1 masks\n' in out
    assert 'warning' not in out
    main(['synthetic', '--root', str(root), '--check'])
    first = (root / 'images/training/00000.png').read_bytes()
    main(['synthetic', '--root', str(root), '--train', '3', '--val', '1', '--seed', '8'])
    assert (root / 'images/training/00000.png').read_bytes() != first
    with pytest.raises(DataError, match='at least one'):
        main(['synthetic', '--root', str(root), '--train', '0'])


def test_drawing_options_are_for_synthetic_only(capsys):
    with pytest.raises(SystemExit) as caught:
        module_from(TOOL).main(['ade', '--seed', '1'])
    assert caught.value.code == 2
    assert '--seed' in capsys.readouterr().err
