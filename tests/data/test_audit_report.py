"""Fixed copies, the cache, the report and the command line of an audit."""
import hashlib
import json
import os
import runpy
import shutil

import numpy as np
import pytest
from PIL import Image

from mmseg_edaformer.data.audit import report as audit_report
from mmseg_edaformer.data.audit.files import examine_files
from mmseg_edaformer.errors import ConfigError
from tests.conftest import ROOT, write_config
from tests.data import spoiling
from tests.data.spoiling import IMAGES, MASKS, array, found, save


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob('*.*'))}


def test_fix_writes_copies(cfg, data, scenes, tmp_path, capsys):
    for index, spoil in enumerate((spoiling.colours, spoiling.recoloured, spoiling.deep)):
        spoil(data / MASKS / f'{index:05d}.png')
    Image.open(data / IMAGES / '00004.png').save(data / IMAGES / '00004.png', format='JPEG')
    image = Image.open(data / IMAGES / '00004.png')
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(data / IMAGES / '00004.png', format='JPEG', exif=exif, quality='keep')
    spoiling.turned(data / IMAGES / '00003.png')
    spoiling.cut(data / IMAGES / '00008.png')
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
    spoiling.binary(cfg, data)
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
    spoiling.colours(data / MASKS / '00001.png')
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


def test_processes_find_the_same(cfg, data):
    files = [(kind, str(path)) for kind, folder in (('image', IMAGES), ('mask', MASKS))
             for path in (data / folder).iterdir()]
    assert examine_files(files, 2) == examine_files(files, 1)


def test_names_that_would_steer_a_terminal(cfg, data, tmp_path, capsys):
    for index, name in enumerate(('[red]$x_1$', 'a\nb\x1b[31m', os.fsdecode(b'\xff'))):
        for folder in (IMAGES, MASKS):
            (data / folder / f'{index:05d}.png').rename(data / folder / f'{name}.png')
        spoiling.out_of_range(data / MASKS / f'{name}.png')
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
    spoiling.unlabelled(data / MASKS / '00003.png')
    with pytest.raises(SystemExit) as ended:
        main([config, '--out', 'out', '--workers', '1'])
    assert ended.value.code == 0
    assert '0 errors, 1 warning.' in capsys.readouterr().out
    (data / MASKS / '00001.png').write_bytes(b'')
    with pytest.raises(SystemExit) as ended:
        main([config, '--split', 'train', '--workers', '2'])
    assert ended.value.code == 1
    assert {path.name for path in (tmp_path / 'work_dirs/mini/data_check').iterdir()} == {
        'report.json', 'samples.png'}
    told = capsys.readouterr().out
    assert 'error: train: mask unreadable (1)' in told
    assert f'{data / MASKS / "00001.png"}: it is empty' in told
