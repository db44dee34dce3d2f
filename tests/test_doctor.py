"""What tools/doctor.py finds, and that it survives what it looks for."""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import types
import venv
from importlib import metadata

import pytest
import torch

from mmseg_edaformer import doctor
from tests.conftest import ROOT, run, write_config

GOOD = {'torch': '2.6.0+cu124', 'torchvision': '0.21.0+cu124', 'mmengine': '0.10.7',
        'mmsegmentation': '1.2.2', 'mmcv-lite': '2.1.0', 'numpy': '2.2.0', 'scipy': '1.13.1',
        'opencv-python': '4.10.0.84', 'matplotlib': '3.9.0', 'ftfy': '6.3', 'regex': '2025.1',
        'setuptools': '80.9.0', 'timm': '1.0.31', 'mmpretrain': '1.2.0', 'transformers': '5.1.0',
        'safetensors': '0.5', 'simplejpeg': '1.9', 'pip': '24.0'}
FORK = {**GOOD, 'mmengine': None, 'mmsegmentation': None, 'mmcv-lite': None, 'mmpretrain': None,
        'onedl-mmengine': '0.10.12', 'onedl-mmsegmentation': '1.4.2', 'onedl-mmcv': '2.3.6'}


def versions(monkeypatch, installed):
    """The report of an environment with these packages alone."""
    monkeypatch.setattr(doctor.compat, '_version', installed.get)
    report = doctor.Report()
    doctor.check_versions(report)
    return report


@pytest.mark.parametrize('installed', [
    GOOD, FORK, {**GOOD, 'mmcv-lite': None, 'mmcv': '2.1.0'},
    {**GOOD, 'torch': '2.13.0+cpu', 'torchvision': '0.28.0'},  # mended by declare_torchvision_ops
    {**GOOD, 'numpy': '1.26.4', 'opencv-python': '4.8.1.78', 'matplotlib': '3.8.0'},
    {**FORK, 'setuptools': '84.0.0', 'torchvision': None, 'pycocotools': '2.0.8'}])
def test_sound_versions_are_all_right(monkeypatch, installed):
    report = versions(monkeypatch, installed)
    assert report.findings == []
    assert report.ready
    facts = report.facts['Versions']
    assert facts['torch'] == installed['torch']
    assert facts.get('mmengine') == installed['mmengine']


@pytest.mark.parametrize(('change', 'level', 'about', 'says', 'mend'), [
    ({'onedl-mmcv': '2.3.6'}, 'error', 'onedl-mmcv', 'overwrite each other',
     r'uninstall -y mmengine mmsegmentation mmcv-lite onedl-mmcv && .*\[openmmlab\]'),
    ({'onedl-mmpretrain': '1.3.6'}, 'warning', 'mmpretrain', 'overwrite',
     'uninstall -y mmpretrain onedl-mmpretrain && .* install mmpretrain$'),
    ({'simplejpeg': None}, 'warning', 'simplejpeg', 'a damaged JPEG is',
     'install simplejpeg$'),
    ({'mmcv': '2.1.0'}, 'error', 'mmcv-lite', 'overwrite',
     'uninstall -y mmcv mmcv-lite && .* install "mmcv-lite>=2.0.1,<2.2.0"$'),
    ({'mmcv': '2.2.0', 'mmcv-lite': None}, 'error', 'mmcv', 'mmcv 2.2.0 does not fit',
     'uninstall -y mmcv && .*"mmcv-lite>=2.0.1,<2.2.0"'),
    ({'mmcv-lite': '2.2.0'}, 'error', 'mmcv-lite', 'older than 2.2.0',
     'install .*"mmcv-lite>=2.0.1,<2.2.0"'),
    ({'opencv-python-headless': '4.10.0.84'}, 'warning', 'opencv-python', 'overwrite',
     'uninstall -y opencv-python opencv-python-headless && .* install opencv-python$'),
    ({'ftfy': None}, 'error', 'mmsegmentation', 'ftfy missing', 'install ftfy$'),
    ({'ftfy': None, 'regex': None}, 'error', 'mmsegmentation', 'ftfy and regex missing',
     'install ftfy regex$'),
    ({'setuptools': '81.0.0'}, 'warning', 'setuptools', 'no pkg_resources',
     'install "setuptools<81"$'),
    ({'torchvision': '0.20.1+cu124'}, 'warning', 'torchvision', 'not built for torch 2.6.0',
     r'"torchvision==0\.21\.\*" --index-url https://download.pytorch.org/whl/cu124$'),
    ({'torchvision': '0.21.0+cu118'}, 'warning', 'torchvision', 'not built for', 'whl/cu124$'),
    ({'opencv-python': '4.8.1.78'}, 'error', 'opencv-python', 'built for numpy 1',
     'install "opencv-python>=4.10"$'),
    ({'matplotlib': '3.8.4'}, 'error', 'numpy', 'built for numpy 1', 'install "matplotlib>=3.9"$'),
    ({'pycocotools': '2.0.8'}, 'warning', 'mmpretrain', 'transformers 5',
     'install "transformers<5"$'),
    ({'torch': '2.3.1', 'torchvision': None}, 'error', 'torch', 'must be 2.4 or newer',
     'install "torch>=2.4"'),
    ({'mmsegmentation': None}, 'error', 'mmsegmentation', 'is missing',
     'install .*"mmsegmentation>=1.2.2"'),
    ({'pip': None}, 'warning', 'Python', 'pip is missing', None),
])
def test_bad_versions_are_found_with_the_command_that_mends_them(monkeypatch, change, level, about,
                                                                 says, mend):
    report = versions(monkeypatch, {**GOOD, **change})
    [finding] = report.findings
    assert (finding.level, report.level(about)) == (level, level)
    assert says in finding.what
    if mend is None:
        assert finding.mend == f'{sys.executable} -m ensurepip'
    else:
        assert finding.mend.startswith(f'{sys.executable} -m pip ')
        assert re.search(mend, finding.mend), finding.mend
    assert report.ready == (level == 'warning')


def test_versions_ask_for_no_module(monkeypatch):
    """Once pip's is asked for, setuptools leaves distutils alone, and cannot be imported itself."""
    asked = []
    monkeypatch.setattr(sys, 'meta_path', [
        types.SimpleNamespace(find_spec=lambda name, *_: asked.append(name)), *sys.meta_path])
    versions(monkeypatch, GOOD)
    assert asked == []


def test_an_untested_python_is_a_warning(monkeypatch):
    monkeypatch.setattr(sys, 'version_info', (3, 14, 0))
    report = versions(monkeypatch, GOOD)
    assert [(each.level, each.about) for each in report.findings] == [('warning', 'Python')]


def machine():
    report = doctor.Report()
    doctor.check_machine(report)
    return {finding.about: finding for finding in report.findings}, report


def test_what_a_container_lacks_is_found(monkeypatch, tmp_path):
    gib = 2 ** 30
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(
        total=gib, used=0, free=gib // 16 if str(path) == '/dev/shm' else 4 * gib))
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (256, 4096))
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file' / 'cache'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    groups = {'cpu.max': ['max 100000', '150000 100000'], 'memory.max': ['max', str(gib)]}
    monkeypatch.setattr(doctor, '_cgroup', lambda name: iter(groups.get(name, [])))
    findings, report = machine()
    assert findings.keys() == {'/dev/shm', 'open files', 'C++ compiler', 'cache'}
    assert 'num_workers=0' in findings['/dev/shm'].what
    assert findings['/dev/shm'].mend == 'docker run --shm-size=8g ...'
    assert findings['open files'].mend == 'ulimit -n 65536'
    assert 'cannot be written' in findings['cache'].what
    assert findings['cache'].mend.startswith('export XDG_CACHE_HOME=')
    assert report.ready
    assert report.facts['Machine']['cores'].endswith('the cgroup gives the time of 1.5')
    assert report.facts['Machine']['memory'].endswith('the cgroup gives 1.0 GiB')


def test_a_sound_machine_is_all_right(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(
        total=2 ** 40, used=0, free=2 ** 39))
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (65536, 65536))
    monkeypatch.setattr(shutil, 'which', lambda name: f'/usr/bin/{name}')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    assert machine()[0] == {}


def test_a_full_or_closed_work_dir_is_found(monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    report = doctor.Report()
    doctor.check_folder(report, 'work dir', tmp_path / 'file' / 'work', '--work-dir X', 'error')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=2 ** 29))
    doctor.check_folder(report, 'work dir', tmp_path / 'new' / 'work', '--work-dir X', 'error')
    assert [each.level for each in report.findings] == ['error', 'warning']
    assert 'cannot be written' in report.findings[0].what
    assert 'only 0.5 GiB are free' in report.findings[1].what
    assert list(tmp_path.iterdir()) == [tmp_path / 'file']


@pytest.mark.parametrize(('driver', 'build', 'board', 'hidden', 'says', 'mend'), [
    (['H200, 143771 MiB, 570.1'], 'CPU only', True, None, 'built for CPUs', '"torch==2.13.0"'),
    (['H200, 143771 MiB, 570.1'], 'CUDA 13.0', True, '', 'hides the GPU', 'unset CUDA'),
    (['K80, 11441 MiB, 450.1'], 'CUDA 13.0', True, None, 'too old for CUDA 13.0', 'ls -l /dev'),
    ('nvidia-smi: No such file', 'CUDA 13.0', True, None, 'no driver answers (nvidia-smi: No such',
     'docker run --gpus all'),
    ('nvidia-smi: No such file', 'CUDA 13.0', False, None, None, None),
])
def test_a_gpu_that_torch_does_not_see_is_a_warning(monkeypatch, driver, build, board, hidden, says,
                                                   mend):
    monkeypatch.setattr(doctor, 'nvidia_smi', lambda: driver)
    monkeypatch.setattr(doctor, 'nvidia_boards', lambda: board)
    monkeypatch.setattr(doctor.compat, '_version', lambda name: '2.13.0+cpu')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if hidden is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
    report = doctor.Report()
    report.facts['torch'] = {'build': build, 'GPUs': 'none'}
    doctor.check_gpus(report)
    assert report.ready
    if says is None:
        assert report.findings == []
    else:
        [finding] = report.findings
        assert says in finding.what
        assert mend in finding.mend


def test_gpus_are_described(monkeypatch):
    card = types.SimpleNamespace(name='V100', total_memory=16 * 2 ** 30, major=7, minor=0)
    monkeypatch.setattr(torch.version, 'cuda', '12.4')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda index: card)
    monkeypatch.setattr(torch.distributed, 'is_nccl_available', lambda: False)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 64)
    monkeypatch.setattr(doctor, 'usable_cores', lambda: (64, 1.5))
    monkeypatch.setattr(doctor.compat, '_version', {}.get)
    report = doctor.Report()
    assert doctor.ask_torch(report) == '2 GPUs'
    assert report.facts['torch']['GPU 1'] == (
        'V100, 16.0 GiB, compute capability 7.0, bfloat16 no')
    assert {each.about: each.mend for each in report.findings} == {
        'threads': 'export OMP_NUM_THREADS=2', 'NCCL': None,
        'triton': f'{sys.executable} -m pip install triton'}


@pytest.mark.parametrize(('stage', 'error', 'mend'), [
    ('import cv2', 'libGL.so.1: cannot open shared object file', 'opencv-python-headless$'),
    ('import cv2', 'numpy.core.multiarray failed to import', 'install "numpy<2"$'),
    ('config', "x.py cannot be read: No module named 'pkg_resources'", '"setuptools<81"$'),
    ('config', "x.py cannot be read: No module named 'mine'", None),
    ('import timm', "No module named 'torchvision.ops'", 'install torchvision$'),
    ('import mmseg', "No module named 'scipy'", r'install -e .*\[(openmmlab|fork)\]'),
    ('import torch', 'undefined symbol', '--force-reinstall --no-deps "torch==.*"'),
    ('EDAFormer-T on cpu', 'crashes (SIGILL)', None),
])
def test_failures_have_the_command_that_mends_them(stage, error, mend):
    found = doctor._mend(stage, error)
    assert found is None if mend is None else re.search(mend, found)


def test_config_errors_are_all_found(scenes, tmp_path):
    config = write_config(tmp_path, scenes)
    config.write_text(config.read_text() + '''
load_from = 'gone.pth'
work_dir = '/dev/null/work'
auto_scale_lr = dict(base_batch_size=16)
train_dataloader.update(batch_size=3)
train_dataloader['dataset']['metainfo'] = dict(
    classes=('sky', 'road'), palette=[[0, 0, 0], [1, 1, 1]])
val_dataloader['dataset'] = dict(data_root='gone')
test_dataloader = dict(dataset=dict(data_root=data_root, metainfo=dict(
    classes=('a', 'b'), palette=[[0, 0, 0], [1, 1, 1]])))
''')
    report = doctor.Report()
    doctor.check_config(report, str(config))
    says = [(each.level, each.what) for each in report.findings]
    for level, part in (('error', 'load_from=gone.pth does not exist'),
                        ('error', 'the val set is not where the config says: gone'),
                        ('error', 'has 2 classes, the model 8'),
                        ('error', "the test set cannot be built: new classes ('a', 'b') is not a"),
                        ('error', '/dev/null/work cannot be written'),
                        ('warning', 'images per step, but the learning rate')):
        assert any(level == each and part in what for each, what in says), (part, says)
    assert len(says) == 6


@pytest.mark.parametrize(('pair', 'mend'), [
    (('2.13.0+cpu', '0.28.0+cu130'), r'"torchvision==0\.28\.\*" --index-url .*/whl/cpu$'),
    (('2.6.0+cu124', '0.21.0+cpu'), r'"torchvision==0\.21\.\*" --index-url .*/whl/cu124$'),
    (('2.13.0+cu130', '0.28.0+cu130'), None), (('2.13.0', '0.28.0+cu130'), None),
])
def test_a_torchvision_of_another_build_is_a_warning(monkeypatch, pair, mend):
    """Its metadata say 0.28.0 alone, and the package works round it, so all looks well."""
    monkeypatch.setattr(torch, '__version__', pair[0])
    monkeypatch.setattr(doctor.importlib, 'import_module', lambda name: types.SimpleNamespace(
        __version__=pair[1], __file__='/site/torchvision/__init__.py'))
    monkeypatch.setattr(doctor.compat, '_version', {}.get)
    report = doctor.Report()
    assert doctor._import(report, 'torchvision', 'torchvision') == f'{pair[1]} /site/torchvision'
    assert report.ready
    if mend is None:
        assert report.findings == []
    else:
        [finding] = report.findings
        assert report.level('torchvision') == report.level('import torchvision') == 'warning'
        assert f'{pair[1]} was not built for torch {pair[0]}' in finding.what
        assert re.search(mend, finding.mend)


@pytest.fixture(scope='module')
def checked(scenes, tmp_path_factory):
    """The whole tool on this environment and a config that can run."""
    config = write_config(tmp_path_factory.mktemp('config'), scenes)
    return run('tools/doctor.py', config, '--json'), config


def test_this_environment_can_run(checked):
    done, config = checked
    report = json.loads(done.stdout)
    assert report['ready'] is True
    assert not any(finding['level'] == 'error' for finding in report['findings'])
    for name, version in report['facts']['Versions'].items():
        if name not in ('Python', 'system') and version != 'not installed':
            assert version == metadata.version(name)
    assert {'torch', 'numpy', 'opencv-python'} <= report['facts']['Versions'].keys()
    tried = report['facts']['Tried']
    assert 'fails' not in tried.values()
    assert tried['EDAFormer-T on cpu'].startswith('predicts a 64 x 64 image')
    assert tried['import mmseg_edaformer'].endswith(str(ROOT / 'mmseg_edaformer'))
    assert tried['config'] == str(config)


@pytest.mark.parametrize(('broken', 'says'), [
    ("raise RuntimeError('half\\ninstalled')", 'import mmseg fails: RuntimeError: half ('),
    ('import os; os.abort()', 'import mmseg crashes (SIGABRT)'),
    ('import time; time.sleep(600)', 'import mmseg does not end within 5 s'),
])
def test_a_broken_library_is_named(tmp_path, broken, says):
    for name in ('numpy', 'cv2', 'torch', 'mmengine', 'mmcv'):
        (tmp_path / f'{name}.py').touch()
    (tmp_path / 'mmseg.py').write_text(broken)
    done = run('tools/doctor.py', '--timeout', 5, check=False,
               env=dict(os.environ, PYTHONPATH=str(tmp_path), COLUMNS='500'))
    assert done.returncode == 1
    assert says in done.stdout
    assert str(tmp_path / 'mmseg.py') in done.stdout
    assert 'unset PYTHONPATH' in done.stdout
    assert 'Training or testing cannot run here' in done.stdout.splitlines()[-1]
    assert 'Traceback' not in done.stdout + done.stderr
    assert '\x1b' not in done.stdout


def test_it_starts_where_nothing_is_installed(tmp_path):
    venv.create(tmp_path / 'venv', symlinks=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    done = subprocess.run([python, ROOT / 'tools' / 'doctor.py', '--json'], env=environment,
                          cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, '')
    report = json.loads(done.stdout)
    assert any('torch is missing' in finding['what'] and
               finding['mend'].startswith(f'{python} -m pip install "torch>=2.4"')
               for finding in report['findings'])
    assert report['facts']['Tried'] == {'import numpy': 'fails'}
