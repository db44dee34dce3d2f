"""What tools/doctor.py finds, and that it survives what it looks for."""
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types
import venv

import pytest
import torch
import torch.utils.collect_env

from mmseg_edaformer import compat, doctor, doctor_trials
from tests.conftest import ROOT, run, write_config

GOOD = {'torch': '2.6.0+cu124', 'torchvision': '0.21.0+cu124', 'mmengine': '0.10.7',
        'mmsegmentation': '1.2.2', 'mmcv-lite': '2.1.0', 'numpy': '2.2.0', 'scipy': '1.13.1',
        'opencv-python': '4.10.0.84', 'matplotlib': '3.9.0', 'ftfy': '6.3', 'regex': '2025.1',
        'mmpretrain': '1.2.0', 'simplejpeg': '1.9', 'pip': '24.0'}
FORK = {**GOOD, 'mmengine': None, 'mmsegmentation': None, 'mmcv-lite': None, 'mmpretrain': None,
        'onedl-mmengine': '0.10.12', 'onedl-mmsegmentation': '1.4.2', 'onedl-mmcv': '2.3.6'}
MODULES = {'mmcv': ('mmcv', 'mmcv-lite', 'onedl-mmcv'), 'torch': ('torch',),
           'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
           'cv2': ('opencv-python', 'opencv-python-headless')}


def versions(monkeypatch, installed):
    """The report of an environment with these packages alone."""
    monkeypatch.setattr(compat, 'version_of', installed.get)
    monkeypatch.setattr(doctor, 'version_of', installed.get)
    monkeypatch.setattr(doctor, 'packages_distributions', lambda: {
        module: [*filter(installed.get, names)] for module, names in MODULES.items()})
    report = doctor.Report()
    doctor.check_versions(report)
    return report


@pytest.mark.parametrize('installed', [
    GOOD, FORK, {**GOOD, 'mmcv-lite': None, 'mmcv': '2.1.0'},
    {**GOOD, 'torch': '2.13.0+cpu', 'torchvision': '0.28.0'},
    {**GOOD, 'numpy': '1.26.4', 'opencv-python': '4.8.1.78', 'matplotlib': '3.8.0'},
    {**FORK, 'torch': '2.13.0', 'torchvision': '0.28.0+cu130'}])
def test_sound_versions_have_no_findings(monkeypatch, installed):
    report = versions(monkeypatch, installed)
    assert report.findings == []
    assert report.ready
    assert report.facts['Versions']['torch'] == f'torch {installed["torch"]}'


@pytest.mark.parametrize(('change', 'level', 'problem', 'fix'), [
    ({'onedl-mmcv': '2.3.6'}, 'error', 'mmcv-lite, onedl-mmcv are installed together and overwrite',
     r'uninstall -y mmcv-lite onedl-mmcv && .*\[(openmmlab|fork)\]'),
    ({'onedl-mmpretrain': '1.3.6'}, 'warning', 'overwrite',
     r'uninstall -y mmpretrain onedl-mmpretrain && .*\[pretrain(-fork)?\]'),
    ({'simplejpeg': None}, 'warning', 'damaged JPEGs are', 'install simplejpeg$'),
    ({'mmcv': '2.2.0', 'mmcv-lite': None}, 'error', 'mmcv 2.2.0 does not fit',
     'uninstall -y mmcv && .*"mmcv-lite>=2.0.1,<2.2.0"'),
    ({'opencv-python-headless': '4.10.0.84'}, 'warning', 'overwrite',
     'uninstall -y opencv-python opencv-python-headless && .* install opencv-python$'),
    ({'ftfy': None, 'regex': None}, 'error', 'ftfy is missing; regex is missing',
     'install "ftfy>=6" "regex>=2020"$'),
    ({'torchvision': '0.20.1+cu124'}, 'warning',
     'torchvision 0.20.1+cu124 was not built for torch 2.6.0',
     r'"torchvision==0\.21\.\*" --index-url https://download.pytorch.org/whl/cu124$'),
    ({'torchvision': '0.21.0+cpu'}, 'warning', 'not built for torch 2.6.0', '/whl/cu124$'),
    ({'opencv-python': '4.8.1.78'}, 'error', 'built for numpy 1',
     'install "opencv-python>=4.10"$'),
    ({'pip': None}, 'warning', 'pip is missing', '-m ensurepip$'),
])
def test_bad_versions_are_found_with_the_command_that_fixes_them(monkeypatch, change, level,
                                                                 problem, fix):
    report = versions(monkeypatch, {**GOOD, **change})
    [finding] = report.findings
    assert finding.level == level
    assert problem in finding.problem
    assert finding.fix.startswith(f'{sys.executable} -m ')
    assert re.search(fix, finding.fix), finding.fix
    assert report.ready == (level == 'warning')


@pytest.mark.parametrize(('free', 'compiler', 'problems'), [
    (2 ** 40, '/usr/bin/g++', []),
    (2 ** 26, None, ['"Bus error"', 'less than 2 GiB free', 'C++ compiler g++ is not on'])])
def test_what_a_machine_lacks_is_found(monkeypatch, free, compiler, problems):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=free))
    monkeypatch.setattr(shutil, 'which', lambda name: compiler)
    monkeypatch.delenv('CXX', raising=False)
    report = doctor.Report()
    doctor.check_machine(report)
    assert report.ready
    assert all(problem in finding.problem
               for problem, finding in zip(problems, report.findings, strict=True))


@pytest.mark.parametrize(('build', 'problem'), [
    (None, 'built for CPUs'), ('13.0', 'too old for CUDA 13.0')])
def test_a_gpu_that_torch_does_not_see_is_a_warning(monkeypatch, build, problem):
    monkeypatch.setattr(torch.version, 'cuda', build)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.utils.collect_env, 'get_gpu_info', lambda run: 'GPU 0: NVIDIA H200')
    report = doctor.Report()
    assert doctor_trials.check_torch(report) == 'GPUs: 0'
    [finding] = report.findings
    assert finding.level == 'warning'
    assert 'does not see the GPU (GPU 0: NVIDIA H200)' in finding.problem
    assert problem in finding.problem


@pytest.mark.parametrize(('module', 'problem', 'fix'), [
    ('cv2', 'libGL.so.1: cannot open shared object file', 'opencv-python-headless$'),
    ('cv2', 'numpy.core.multiarray failed to import', 'install "numpy<2"$'),
    (None, "x.py cannot be read: No module named 'pkg_resources'", '"setuptools<81"$'),
    ('timm', "No module named 'torchvision.ops'", 'install torchvision$'),
    ('mmseg', "No module named 'scipy'", r'install -e .*\[(openmmlab|fork)\]'),
    ('torch', 'undefined symbol', '--force-reinstall --no-deps "torch==.*"'),
    (None, 'EDAFormer-T on cpu crashes (SIGILL)', None),
])
def test_failures_have_the_command_that_fixes_them(module, problem, fix):
    command = doctor.find_fix(problem, module)
    assert command is None if fix is None else re.search(fix, command)


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
    doctor_trials.check_config(functools.partial(doctor_trials.attempt, report, 60.), report,
                               str(config))
    found = [(finding.level, finding.problem) for finding in report.findings]
    for level, part in (('error', 'checkpoint not found: gone.pth'),
                        ('error', 'the val set is not where the config says: gone'),
                        ('error', 'has 2 classes, the model 8'),
                        ('error', "the test set cannot be built: new classes ('a', 'b') is not a"),
                        ('error', '/dev/null/work cannot be written to'),
                        ('warning', 'images per step, but the learning rate')):
        assert any(level == each and part in problem for each, problem in found), (part, found)
    assert len(found) == 6


def test_this_environment_can_run(scenes, tmp_path):
    config = write_config(tmp_path, scenes)
    report = json.loads(run('tools/doctor.py', config, '--json').stdout)
    assert report['ready'] is True
    assert not any(finding['level'] == 'error' for finding in report['findings'])
    tried = report['facts']['Tried']
    assert 'fails' not in tried.values()
    assert tried['EDAFormer-T on cpu'].startswith('predicts a 64 x 64 image')
    assert tried['import mmseg_edaformer'].endswith(str(ROOT / 'mmseg_edaformer/__init__.py'))
    assert tried['config'] == 'works'
    assert report['facts']['Environment']['CUDA available'] == str(torch.cuda.is_available())


@pytest.mark.parametrize(('broken', 'problem'), [
    ("raise RuntimeError('half\\ndone')", 'import mmseg fails: RuntimeError: half done ('),
    ('import os; os.abort()', 'import mmseg crashes (SIGABRT)'),
    ('import time; time.sleep(600)', 'import mmseg does not end within 5 s'),
])
def test_a_broken_library_is_named(tmp_path, broken, problem):
    for name in ('numpy', 'cv2', 'torch', 'mmengine', 'mmcv'):
        (tmp_path / f'{name}.py').touch()
    (tmp_path / 'mmseg.py').write_text(broken)
    done = run('tools/doctor.py', '--timeout', 5, check=False,
               env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert done.returncode == 1
    assert problem in done.stdout
    assert str(tmp_path / 'mmseg.py') in done.stdout
    assert 'how to fix: unset PYTHONPATH' in done.stdout
    assert 'Training or testing cannot run here' in done.stdout.splitlines()[-1]
    assert 'Traceback' not in done.stdout + done.stderr


def test_it_starts_where_nothing_is_installed(tmp_path):
    venv.create(tmp_path / 'venv', symlinks=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    done = subprocess.run([python, ROOT / 'tools' / 'doctor.py', '--json'], env=environment,
                          cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, '')
    report = json.loads(done.stdout)
    assert any('torch is missing' in finding['problem'] and
               finding['fix'].startswith(f'{python} -m pip install "torch>=2.4"')
               for finding in report['findings'])
    assert report['facts']['Tried'] == {'import numpy': 'fails'}
