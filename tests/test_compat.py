"""What is only there because of a dependency's version."""
import sys

import pytest

from mmseg_edaformer import compat
from tests.conftest import run


@pytest.mark.parametrize(('installed', 'says'), [
    (dict(mmsegmentation=None), 'mmsegmentation is missing'),
    (dict(torch='2.3.1'), 'torch 2.3.1 does not fit: it must be 2.4 or newer'),
    ({'mmcv-lite': '2.2.0'}, 'mmcv-lite 2.2.0 does not fit: .* older than 2.2.0'),
    ({'mmcv-lite': None, 'mmcv': '2.2.0'}, 'mmcv 2.2.0 does not fit'),
    ({'mmengine': None, 'onedl-mmengine': '0.10.12', 'onedl-mmcv': None},
     'onedl-mmcv is missing'),
])
def test_what_is_missing_is_named_with_the_command_that_mends_it(monkeypatch, installed, says):
    versions = {'torch': '2.13.0+cpu', 'mmengine': '0.10.7', 'mmsegmentation': '1.2.2',
                'mmcv-lite': '2.1.0', 'onedl-mmsegmentation': '1.4.2', **installed}
    monkeypatch.setattr(compat, '_version', versions.get)
    with pytest.raises(ImportError, match=f'{says}.* -m pip install .*torch>=2.4'):
        compat.check_environment()


def test_a_sound_environment_passes(monkeypatch):
    for versions in ({'torch': '2.4.0', 'mmengine': '0.10.7', 'mmsegmentation': '1.2.2',
                      'mmcv': '2.1.0'},
                     {'torch': '2.13.0a0+git', 'onedl-mmengine': '0.10.12',
                      'onedl-mmsegmentation': '1.4.2', 'onedl-mmcv': '2.3.6'}):
        monkeypatch.setattr(compat, '_version', versions.get)
        compat.check_environment()


def test_import_is_quiet_and_errors_are_one_line():
    done = run('-c', 'import mmseg_edaformer')
    assert 'Warning' not in done.stderr
    broken = run('-c', 'import sys, importlib.metadata as m\n'
                 'real = m.version\n'
                 'def version(name):\n'
                 '    if "mmseg" in name: raise m.PackageNotFoundError(name)\n'
                 '    return real(name)\n'
                 'm.version = version\n'
                 'import mmseg_edaformer', check=False)
    assert broken.returncode == 1
    assert 'mmsegmentation is missing. Run: ' in broken.stderr.splitlines()[-1]


def test_stubbed_operators_say_what_they_need():
    stub = sys.modules.get('mmcv._ext')
    if compat._version('mmcv-lite') is None:
        assert type(stub).__name__ != 'MissingOps'  # a compiled mmcv, or the fork
    else:
        with pytest.raises(RuntimeError, match='nms needs the compiled mmcv'):
            stub.nms()


def test_resume_of_any_runner_looks_for_checkpoints():
    from mmengine.runner import runner

    from mmseg_edaformer.engine import find_checkpoint
    assert runner.find_latest_checkpoint is find_checkpoint
