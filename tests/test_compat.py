"""What is only there because of a dependency's version."""
import getpass
import importlib
import os
import pwd
import sys
import tempfile
from pathlib import Path

import pytest

from mmseg_edaformer import compat
from tests.conftest import ROOT, run, write_config


@pytest.mark.parametrize(('installed', 'says'), [
    (dict(mmsegmentation=None),
     'mmsegmentation is missing. Run: .* -m pip install "mmsegmentation>=1.2.2"$'),
    (dict(torch='2.3.1'), 'torch 2.3.1 does not fit: it must be 2.4 or newer. .*"torch>=2.4"$'),
    ({'mmcv-lite': '2.2.0'}, 'mmcv-lite 2.2.0 does not fit: .* older than 2.2.0'),
    ({'mmengine': None, 'onedl-mmengine': '0.10.12', 'onedl-mmcv': None},
     'onedl-mmcv is missing'),
    ({'mmcv-lite': None, 'mmcv': '2.1.0'}, None),
    ({'torch': '2.4.0a0+git', 'mmengine': None, 'mmsegmentation': None,
      'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6'}, None)])
def test_what_is_missing_is_named_with_the_command_that_fixes_it(monkeypatch, installed, says):
    versions = {'torch': '2.13.0+cpu', 'mmengine': '0.10.7', 'mmsegmentation': '1.2.2',
                'mmcv-lite': '2.1.0', 'onedl-mmsegmentation': '1.4.2', 'ftfy': '6.3',
                'regex': '2026.1', **installed}
    monkeypatch.setattr(compat, 'version_of', versions.get)
    if says is None:
        compat.check_environment()
    else:
        with pytest.raises(ImportError, match=says):
            compat.check_environment()


def test_import_is_quiet_and_errors_are_one_line():
    done = run('-c', 'import mmseg_edaformer.registered')
    assert 'Warning' not in done.stderr
    broken = run('-c', 'import sys, importlib.metadata as m\n'
                 'real = m.version\n'
                 'def version(name):\n'
                 '    if "mmseg" in name: raise m.PackageNotFoundError(name)\n'
                 '    return real(name)\n'
                 'm.version = version\n'
                 'from mmseg_edaformer import EFT', check=False)
    assert broken.returncode == 1
    assert 'mmsegmentation is missing. Run: ' in broken.stderr.splitlines()[-1]


def test_stubbed_operators_say_what_they_need():
    if compat.version_of('mmcv-lite') is None:  # a compiled mmcv, or the fork
        assert not hasattr(sys.modules.get('mmcv._ext'), 'no_operator')
    else:
        with pytest.raises(RuntimeError, match='nms needs the compiled mmcv'):
            importlib.import_module('mmcv._ext').nms()


def test_a_user_who_is_a_bare_number_gets_a_home_of_its_own(monkeypatch, tmp_path):
    for name in ('HOME', 'USER', 'LOGNAME', 'LNAME', 'USERNAME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', {}.__getitem__)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    with pytest.raises(KeyError):
        getpass.getuser()
    for _ in range(2):  # the second run finds the caches of the first
        monkeypatch.delenv('HOME', raising=False)
        compat.provide_home()
        assert Path.home() == tmp_path / f'home_of_{os.getuid()}'
        assert getpass.getuser() == f'uid_{os.getuid()}'
    assert Path.home().stat().st_mode & 0o777 == 0o700
    # Whoever made the folder first may have put a library into its cache.
    monkeypatch.delenv('HOME')
    monkeypatch.setattr(os, 'getuid', lambda: 4711)
    (tmp_path / 'home_of_4711').mkdir()
    compat.provide_home()
    assert Path.home().parent == tmp_path
    assert Path.home().name != 'home_of_4711'


def test_an_ascii_locale_and_no_home_end_no_training(scenes, tmp_path):
    """Class names are in the config, on the terminal and in the log file."""
    config = write_config(tmp_path, scenes, iterations=1)
    with config.open('a', encoding='utf-8') as file:
        file.write("""
metainfo = dict(classes=('Straße', *'bcdefgh'), palette=[[i, i, i] for i in range(8)])
for each in (train_dataloader, val_dataloader):
    each['dataset'].update(type='BaseSegDataset', img_suffix='.png', seg_map_suffix='.png',
                           reduce_zero_label=False, metainfo=metainfo)
del each
""")
    (tmp_path / 'sitecustomize.py').write_text('import pwd\npwd.getpwuid = {}.__getitem__\n')
    kept = {name: value for name, value in os.environ.items()
            if name not in ('HOME', 'USER', 'LOGNAME', 'LNAME', 'USERNAME', 'PYTHONIOENCODING')}
    done = run('tools/train.py', config, '--verbose', '--work-dir', tmp_path / 'work', env=dict(
        kept, LC_ALL='POSIX', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', TMPDIR=str(tmp_path),
        PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))), EDAFORMER_NATIVE='0'))
    assert 'Traceback' not in done.stdout + done.stderr
    assert '| Stra\\xdfe |' in done.stdout
    [log] = tmp_path.glob('work/*/*.log')
    assert '| Straße |' in log.read_text(encoding='utf-8')
    assert (tmp_path / f'home_of_{os.getuid()}').is_dir()


def test_an_extra_of_an_installed_package_comes_from_where_that_came_from(monkeypatch, tmp_path):
    assert compat.install_command('demo').endswith(f" -m pip install -e '{ROOT}[demo]'")
    monkeypatch.setattr(compat, '__file__', str(tmp_path / 'mmseg_edaformer' / 'compat.py'))
    assert compat.install_command('demo').endswith('"mmseg_edaformer[demo] @ git+'
                                                   'ADDRESS_OF_THE_REPOSITORY"')
