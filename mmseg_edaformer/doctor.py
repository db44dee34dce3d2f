"""What an environment has, what in it is missing or known to be bad, and the command that mends it.

This must run where the libraries are missing, damaged, crash or hang. So this file is loaded by its
path (tools/doctor.py), imports the standard library alone, and leaves every other import to a
process of its own (`try_all`), which notes each step before it takes it.
"""
import functools
import importlib
import importlib.util
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def load_sibling(name: str) -> types.ModuleType:
    """A module of this folder by its file: importing the package needs what is checked here."""
    path = Path(__file__).with_name(f'{name}.py')
    spec = importlib.util.spec_from_file_location(f'_{name}', path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compat = load_sibling('compat')

PYTHON = shlex.quote(sys.executable)
PIP = f'{PYTHON} -m pip'
INSTALL = compat.install_command(compat.installed_stack())

OPENCV = tuple(f'opencv-{kind}' for kind in (
    'python', 'python-headless', 'contrib-python', 'contrib-python-headless'))
STACKS = {**compat.STACKS, 'openmmlab': (*compat.STACKS['openmmlab'], 'mmcv')}
NUMPY2 = {**dict.fromkeys(OPENCV, '4.10'), 'matplotlib': '3.9', 'scipy': '1.13'}
"""The first versions that can be used with numpy 2."""
IMPORTS = {'numpy': 'numpy', 'cv2': 'opencv-python', 'torch': 'torch', 'mmengine': 'mmengine',
           'mmcv': 'mmcv', 'mmseg': 'mmsegmentation'}
"""What Python imports, in this order, and the package that holds it."""
OPTIONAL = ('torchvision', 'timm', 'transformers', 'mmpretrain')

MENDS = {
    r'libGL\.so|libgthread|libSM\.so|libXext': f'{PIP} uninstall -y opencv-python && '
                                               f'{PIP} install opencv-python-headless',
    "No module named 'mmseg_edaformer": INSTALL,
    'pkg_resources': f'{PIP} install "setuptools<81"',
    r'_ARRAY_API|numpy\.core\.multiarray|numpy\.dtype size changed': f'{PIP} install "numpy<2"',
}
"""Commands for what errors say; the first that is found."""


@dataclass(frozen=True)
class Finding:
    """Something to mend: an error keeps training or testing from running, a warning does not."""
    level: str
    about: str  # names of facts, joined by ' + '
    what: str
    mend: str | None = None


@dataclass
class Report:
    """Facts by section and name, and the findings."""
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    stage: str = 'Python'

    @property
    def ready(self) -> bool:
        """Whether training and testing can run."""
        return all(finding.level != 'error' for finding in self.findings)

    def add_fact(self, section: str, name: str, value: Any) -> None:
        """Note a fact, in place of an earlier one of that name."""
        self.facts.setdefault(section, {})[name] = str(value)

    def add(self, level: str, about: str, what: str, mend: str | None = None) -> None:
        """Add a finding."""
        self.findings.append(Finding(level, about, what, mend))

    def begin(self, stage: str) -> None:
        """Note what is tried next; it has failed as long as nothing else is said of it."""
        self.stage = stage
        self.add_fact('Tried', stage, 'fails')

    def level(self, name: str) -> str:
        """The worst that was found about a fact, or 'ok'."""
        levels = {finding.level for finding in self.findings if name in finding.about.split(' + ')}
        return 'error' if 'error' in levels else 'warning' if levels else 'ok'


class _Notes(Report):
    """The report of a process that may die: each entry is a line of a file at once."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)

    def _write(self, *entry: Any) -> None:
        with self._path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(entry) + '\n')

    def add_fact(self, section: str, name: str, value: Any) -> None:
        self._write('add_fact', section, name, str(value))

    def add(self, level: str, about: str, what: str, mend: str | None = None) -> None:
        self._write('add', level, about, what, mend)

    def begin(self, stage: str) -> None:
        self._write('begin', stage)


def examine(config: str | None = None, timeout: float = 120.) -> Report:
    """Look at everything.

    Args:
        config: Path of a config to check as well.
        timeout: Seconds after which a step that is tried counts as hanging.
    """
    report = Report()
    check_versions(report)
    check_machine(report)
    if config is None:
        check_folder(report, 'work dir', Path('work_dirs'), '--work-dir FOLDER', 'warning')
    try_apart(report, config, timeout)
    check_gpus(report)
    return report


# Versions

def check_versions(report: Report) -> None:
    """Compare the installed packages, by their metadata alone, with what is known to be bad."""
    have: Callable[[str], str | None] = compat._version
    add = functools.partial(report.add_fact, 'Versions')
    add('Python', f'{platform.python_version()}, {sys.executable}')
    add('system', platform.platform())
    add('mmseg_edaformer', have('mmseg_edaformer') or 'not installed')
    stacks = {name: [each for each in names if have(each)] for name, names in STACKS.items()}
    names = ['torch', *compat.STACKS['fork' if stacks['fork'] and not stacks['openmmlab']
                                     else 'openmmlab']]
    if have('mmcv'):
        names.remove('mmcv-lite')
    for name in dict.fromkeys([
            *names, *(each for found in stacks.values() for each in found), 'numpy',
            *filter(have, OPENCV), 'safetensors', 'simplejpeg', 'setuptools', *OPTIONAL, 'triton']):
        add(name, have(name) or 'not installed')
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        report.add('warning', 'Python', 'this Python is not tested: 3.11, 3.12 and 3.13 are',
                   'python3.11 -m venv .venv')
    # Not by importlib.util.find_spec, which makes setuptools leave distutils alone from then on.
    if have('pip') is None:
        report.add('warning', 'Python', 'pip is missing, which the commands here need',
                   f'{PYTHON} -m ensurepip')
    if have('simplejpeg') is None:
        report.add('warning', 'simplejpeg', 'simplejpeg is missing, without which a damaged JPEG '
                   'is read as if it were whole', f'{PIP} install simplejpeg')
    _check_stack(report, have, stacks)
    _check_pairs(report, have)


def _check_stack(report: Report, have: Callable[[str], str | None],
                 stacks: dict[str, list[str]]) -> None:
    def overwritten(level: str, names: list[str], install: str, why: str) -> None:
        report.add(level, ' + '.join(names), f'{", ".join(names)} are installed together: {why}',
                   f'{PIP} uninstall -y {" ".join(names)} && {install}')

    if all(stacks.values()):
        names = [name for each in stacks.values() for name in each]
        overwritten('error', names, INSTALL.replace('[fork]', '[openmmlab]'),
                    'OpenMMLab and its fork have the same import names and overwrite each other\'s '
                    'files. To keep the fork, write [fork] for [openmmlab]')
    else:
        try:
            compat.check_environment()
        except ImportError as error:
            what, _, mend = str(error).partition('. Run: ')
            what = what.partition('cannot start: ')[2]
            if re.search('(^|; )mmcv ', what):  # the full one has no wheels for a new torch
                mend = f'{PIP} uninstall -y mmcv && {mend.replace("mmcv>=", "mmcv-lite>=")}'
            about = ' + '.join(part.split()[0] for part in what.split('; ') if part)
            report.add('error', about, what, mend)
        if have('mmcv') and have('mmcv-lite'):
            low, high = compat.STACKS['openmmlab']['mmcv-lite']
            overwritten('error', ['mmcv', 'mmcv-lite'],
                        f'{PIP} install "mmcv-lite>={low},<{high}"',
                        'they overwrite each other\'s files, and the lite one suffices')
    cv2 = [name for name in OPENCV if have(name)]
    if len(cv2) > 1:
        overwritten('warning', cv2, f'{PIP} install {cv2[0]}',
                    'they overwrite each other\'s files, and the next update of one breaks cv2')
    if have('mmpretrain') and have('onedl-mmpretrain'):
        overwritten('warning', ['mmpretrain', 'onedl-mmpretrain'],
                    f'{PIP} install {"onedl-" if stacks["fork"] else ""}mmpretrain',
                    'they overwrite each other\'s files')
    lacking = [name for name in ('ftfy', 'regex') if not have(name)]
    if lacking and any(stacks.values()):
        report.add('error', 'mmsegmentation + onedl-mmsegmentation',
                   f'{" and ".join(lacking)} missing, which mmsegmentation imports and does not '
                   'declare', f'{PIP} install {" ".join(lacking)}')


def _check_pairs(report: Report, have: Callable[[str], str | None]) -> None:
    torch, vision = have('torch'), have('torchvision')
    if torch and vision:
        major, minor = (*compat._digits(torch), 0)[:2]
        builds = [version.partition('+')[2] for version in (torch, vision)]
        cuda = all(build.startswith('cu') for build in builds) and builds[0] != builds[1]
        if major == 2 and (compat._digits(vision)[:2] != (0, minor + 15) or cuda):
            report.add('warning', 'torch + torchvision',
                       f'torchvision {vision} was not built for torch {torch}: it fails at import, '
                       'and timm and mmpretrain with it',
                       _install_torchvision(torch))
    if compat._digits(have('numpy') or '0') >= (2,):
        for name, first in NUMPY2.items():
            found = have(name)
            if found and compat._digits(found) < compat._digits(first):
                report.add('error', f'numpy + {name}', f'{name} {found} was built for numpy 1 and '
                           f'fails at import with numpy {have("numpy")}',
                           f'{PIP} install "{name}>={first}"')
    if have('mmpretrain'):
        if compat._digits(have('setuptools') or '99') >= (81,):
            report.add('warning', 'setuptools + mmpretrain', 'there is no pkg_resources, by which '
                       'mmengine finds configs named mmpretrain:: or mmseg::; the configs here '
                       'name none', f'{PIP} install "setuptools<81"')
        if have('pycocotools') and compat._digits(have('transformers') or '0') >= (5,):
            report.add('warning', 'transformers + mmpretrain', 'mmpretrain fails at import where '
                       'pycocotools and transformers 5 are both installed',
                       f'{PIP} install "transformers<5"')


def _install_torchvision(torch: str) -> str:
    """The command that installs the torchvision that was built for this torch."""
    minor = (*compat._digits(torch), 0)[1]
    return (f'{PIP} install --force-reinstall --no-deps "torchvision==0.{minor + 15}.*"'
            f'{_index(torch)}')


def _index(version: str) -> str:
    """Where a build of torch such as 2.13.0+cpu comes from, as an option of pip."""
    build = version.partition('+')[2]
    return f' --index-url https://download.pytorch.org/whl/{build}' if build else ''


# The machine

def check_machine(report: Report) -> None:
    """Look at cores, memory, limits, folders and the compiler, with the containers' limits."""
    add = functools.partial(report.add_fact, 'Machine')
    cpuinfo = Path('/proc/cpuinfo')
    named = re.search(r'model name\s*: (.+)', cpuinfo.read_text()) if cpuinfo.exists() else None
    cores, limit = usable_cores()
    add('CPU', named[1] if named else platform.processor() or platform.machine())
    add('cores', f'{cores} usable of {os.cpu_count()}' +
        (f'; the cgroup gives the time of {limit:g}' if limit < math.inf else ''))
    add('memory', _memory())
    shm = Path('/dev/shm')
    if shm.is_dir():
        size = shutil.disk_usage(shm)
        add('/dev/shm', f'{_gib(size.free)} free of {_gib(size.total)}')
        if size.free < 2 ** 29:
            report.add('warning', '/dev/shm', 'the shared memory is too small for data loader '
                       'workers, which then die with "Bus error". In Docker give the container '
                       'more, or train without workers: --cfg-options '
                       'train_dataloader.num_workers=0 train_dataloader.persistent_workers=False '
                       'and the same with val_ and test_dataloader',
                       'docker run --shm-size=8g ...')
    if importlib.util.find_spec('resource') is not None:  # not on Windows
        import resource
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        add('open files', 'unlimited' if files == resource.RLIM_INFINITY else files)
        if 0 <= files < 1024:
            report.add('warning', 'open files', f'a process may open {files} files only; data '
                       'loader workers need one for each tensor that they hand over',
                       'ulimit -n 65536')
    compiler = os.environ.get('CXX', 'g++')
    add('C++ compiler', shutil.which(compiler) or 'not installed')
    if shutil.which(compiler) is None:
        report.add('warning', 'C++ compiler', f'{compiler} is not on the PATH: prediction on the '
                   'CPU is slower, and --compile cannot work', 'sudo apt-get install g++')
    _check_caches(report)
    for name in ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS', 'PYTHONPATH', 'LD_LIBRARY_PATH',
                 'EDAFORMER_NATIVE', 'XDG_CACHE_HOME', 'TORCH_HOME', 'CXX'):
        if name in os.environ:
            report.add_fact('Variables', name, os.environ[name] or '(empty)')


def _check_caches(report: Report) -> None:
    compat.provide_home()
    home = Path(os.path.expanduser('~'))
    cache = Path(os.environ.get('XDG_CACHE_HOME') or home / '.cache')
    for name, folder, variable in (
            ('cache', cache / 'mmseg_edaformer', 'XDG_CACHE_HOME'),
            ('cache of torch', Path(os.environ.get('TORCH_HOME') or cache / 'torch'), 'TORCH_HOME'),
            ('cache of Triton', Path(os.environ.get('TRITON_CACHE_DIR') or home / '.triton/cache'),
             'TRITON_CACHE_DIR'),
            ('temporary files', Path(os.environ.get('TMPDIR') or tempfile.gettempdir()), 'TMPDIR')):
        check_folder(report, name, folder, f'export {variable}=/a/folder/of/yours', 'warning', 0.1)


def check_folder(report: Report, name: str, folder: Path, mend: str, level: str,
                 need: float = 2.) -> None:
    """See that a folder, or the one in which it will be made, takes files; need is in GiB."""
    folder = folder.absolute()
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    free = shutil.disk_usage(there).free
    report.add_fact('Machine', name, f'{folder}, {_gib(free)} free')
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b' ')
    except OSError as error:
        report.add(level, name, f'{folder} cannot be written: {error.strerror}', mend)
    else:
        if free < need * 2 ** 30:
            report.add('warning', name, f'only {_gib(free)} are free in {folder}: free some space, '
                       'or use another folder', mend)


def usable_cores() -> tuple[int, float]:
    """Cores that this process may run on, and the cores' worth of time that its cgroup gives."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
             else os.cpu_count() or 1)
    limits = [math.inf]
    for text in _cgroup('cpu.max'):  # version 2: quota and period
        quota, _, period = text.partition(' ')
        limits += [int(quota) / int(period)] if quota != 'max' else []
    for quota, period in zip(_cgroup('cpu.cfs_quota_us'), _cgroup('cpu.cfs_period_us')):
        limits += [int(quota) / int(period)] if int(quota) > 0 else []
    return cores, min(limits)


def _memory() -> str:
    meminfo = Path('/proc/meminfo')
    if not meminfo.exists():
        return 'unknown'
    kib = dict(re.findall(r'(\w+):\s+(\d+) kB', meminfo.read_text()))
    total = int(kib['MemTotal']) * 1024
    limits = [int(text) for name in ('memory.max', 'memory.limit_in_bytes')
              for text in _cgroup(name) if text.isdigit() and int(text) < total]
    return (f'{_gib(int(kib.get("MemAvailable", 0)) * 1024)} free of {_gib(total)}' +
            (f'; the cgroup gives {_gib(min(limits))}' if limits else ''))


def _cgroup(name: str) -> Iterator[str]:
    """What a file says in this process's control group and in those around it."""
    groups, base = Path('/proc/self/cgroup'), Path('/sys/fs/cgroup')
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(':', 2)
        top = base / controllers
        for folder in (top / path.lstrip('/'), *(top / path.lstrip('/')).parents):
            if folder.is_relative_to(top) and (folder / name).is_file():
                yield (folder / name).read_text().strip()


def _gib(size: float) -> str:
    return f'{size / 2 ** 30:.1f} GiB'


# GPUs

def nvidia_smi() -> list[str] | str:
    """A line for each GPU that the driver knows: name, memory, driver; or why there is none."""
    try:
        done = subprocess.run(
            ['nvidia-smi', '--query-gpu=name,memory.total,driver_version', '--format=csv,noheader'],
            capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f'nvidia-smi: {getattr(error, "strerror", None) or "no answer within 60 s"}'
    lines = (done.stdout + done.stderr).strip().splitlines()
    return ' '.join(lines) if done.returncode else lines


def nvidia_boards() -> bool:
    """Whether an NVIDIA display controller or accelerator is on the bus, driver or not."""
    for device in Path('/sys/bus/pci/devices').glob('*'):
        vendor, kind = device / 'vendor', device / 'class'
        if vendor.is_file() and kind.is_file() and vendor.read_text().strip() == '0x10de' and (
                kind.read_text().startswith(('0x0300', '0x0302'))):
            return True
    return False


def check_gpus(report: Report) -> None:
    """Compare the GPUs that torch uses with those that the driver and the bus know."""
    driver, torch = nvidia_smi(), report.facts.get('torch', {})
    seen = driver if isinstance(driver, list) else []
    report.add_fact('Machine', 'NVIDIA GPUs', '; '.join(seen) or 'none')
    if torch.get('GPUs') != 'none':  # it has some, or cannot be asked
        return
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES')
    if not seen:
        if nvidia_boards():
            report.add('warning', 'NVIDIA GPUs', 'there is an NVIDIA GPU, but no driver answers '
                       f'({driver}). In Docker, the container must be given the GPUs; elsewhere, '
                       'install the driver and restart', 'docker run --gpus all ...')
    elif torch['build'] == 'CPU only':
        report.add('warning', 'build', 'this torch cannot use the GPU: it was built for '
                   'CPUs. Take the build that https://pytorch.org/get-started/locally names, such '
                   'as', f'{PIP} install --force-reinstall --index-url https://pypi.org/simple '
                   f'"torch=={(compat._version("torch") or "").partition("+")[0]}"')
    elif hidden is not None and hidden.strip() in ('', '-1'):
        report.add('warning', 'CUDA_VISIBLE_DEVICES', 'it hides the GPU',
                   'unset CUDA_VISIBLE_DEVICES')
    elif not any(finding.about == 'GPUs' for finding in report.findings):
        report.add('warning', 'GPUs', 'torch sees no GPU, and the driver does '
                   f'({"; ".join(seen)}): the driver is too old for {torch["build"]}, or the '
                   'device files are not open to this user', 'ls -l /dev/nvidia*')


# What works, in a process of its own

_CHILD = '''import sys
sys.path[:] = [path for path in sys.path if path]  # as tools see it, not the folder at hand
import importlib.util
spec = importlib.util.spec_from_file_location('_doctor', sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.try_all(*sys.argv[2:])
'''


def try_apart(report: Report, config: str | None, timeout: float) -> None:
    """Run `try_all` in another process, and add what it found, or that it crashed or hung."""
    with tempfile.TemporaryDirectory() as folder:
        notes, output = Path(folder, 'notes'), Path(folder, 'output')
        notes.touch()
        with output.open('wb') as stream:  # no pipe: it would wait for what the libraries start
            child = subprocess.Popen(
                [sys.executable, '-c', _CHILD, __file__, notes, *([config] if config else [])],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
            try:
                hung = not _ends(child, notes, timeout)
            finally:
                child.kill()
                code = child.wait()
        for line in notes.read_text(encoding='utf-8').splitlines(keepends=True):
            if line.endswith('\n'):  # the last one may be cut off
                method, *entry = json.loads(line)
                getattr(report, method)(*entry)
        said = output.read_text(errors='replace').strip().splitlines()[-1:]
    if not hung and code == 0:
        return
    if hung:
        what = f'{report.stage} does not end within {timeout:g} s (--timeout waits longer)'
    else:
        how = signal.Signals(-code).name if code < 0 else f'exit code {code}'
        what = f'{report.stage} crashes ({how}){": " if said else ""}{"".join(said)}'
        if how == 'SIGKILL':
            what = f'{report.stage} was killed, as happens where memory runs out'
    report.add('error', report.stage, f'{what}{_place(report.stage)}', _mend(report.stage, what))


def _ends(child: 'subprocess.Popen[bytes]', notes: Path, timeout: float) -> bool:
    """Wait until the process ends; False when it takes longer for one step than the timeout."""
    size, since = 0, time.monotonic()
    while time.monotonic() - since < timeout:
        try:
            child.wait(0.1)
            return True
        except subprocess.TimeoutExpired:
            if notes.stat().st_size != size:
                size, since = notes.stat().st_size, time.monotonic()
    return False


def try_all(notes: str, config: str | None = None) -> None:
    """Import what is needed, predict with EDAFormer-T, check the config; note each step."""
    report = _Notes(notes)
    if not _try_imports(report):
        return
    devices = ['cpu']
    torch = sys.modules['torch']
    if torch.cuda.is_available():
        devices.append('cuda')
    for device in devices:
        _attempt(report, f'EDAFormer-T on {device}', functools.partial(_predict, report, device))
    if config is not None:
        _attempt(report, 'config', functools.partial(check_config, report, config))


def _attempt(report: Report, stage: str, call: Callable[[], str], level: str = 'error') -> bool:
    """Take a step, which says how it went; what it raises is a finding, whatever it is."""
    report.begin(stage)
    try:
        report.add_fact('Tried', stage, call())
        return True
    except (Exception, SystemExit) as error:
        what = f'{stage} fails: {_describe(error)}{_place(stage)}'
        report.add(level, stage, what, _mend(stage, what))
        return False


def _try_imports(report: Report) -> bool:
    for name, package in IMPORTS.items():
        if not _attempt(report, f'import {name}', functools.partial(_import, report, name,
                                                                    package)):
            return False
        if name == 'torch':
            _attempt(report, 'torch devices', functools.partial(ask_torch, report))
    # As the package itself does before it imports them.
    compat.stub_mmcv_ops()
    compat.declare_torchvision_ops()
    for name in OPTIONAL:
        if importlib.util.find_spec(name) is not None:
            _attempt(report, f'import {name}', functools.partial(_import, report, name, name),
                     'warning')
    return _attempt(report, 'import mmseg_edaformer', functools.partial(_import, report,
                                                                        'mmseg_edaformer'))


def _import(report: Report, name: str, package: str | None = None) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        module = importlib.import_module(name)
        if name == 'mmpretrain':
            importlib.import_module('mmpretrain.models')  # the rest does not say whether it works
    if getattr(module, '__file__', None) is None:
        raise ImportError(f'{" ".join(module.__path__)} is what a removed package left: there is '
                          'no __init__.py')
    version, folder = getattr(module, '__version__', ''), Path(str(module.__file__)).parent
    if name == 'mmseg_edaformer' and folder.resolve() != Path(__file__).resolve().parent:
        report.add('warning', f'import {name}', f'Python imports {folder}, another copy than the '
                   f'one in {ROOT}', INSTALL)
    names = [each for each in (package, f'onedl-{package}', f'{package}-lite')
             if each and compat._version(each)]
    if version and len(names) == 1:
        found, digits = compat._version(names[0]), compat._digits(version)[:3]
        if digits != compat._digits(found)[:len(digits)]:
            report.add('warning', f'import {name} + {names[0]}', f'Python imports {name} {version} '
                       f'from {folder}, while {names[0]} {found} is installed',
                       _mend(f'import {name}', ''))
    if name == 'torchvision':
        _check_build(report, version)
    return f'{version} {folder}'.strip()


def _check_build(report: Report, vision: str) -> None:
    """Compare the build of torchvision, which its metadata may not tell, with torch's."""
    torch = sys.modules['torch'].__version__
    builds = {version.partition('+')[2] for version in (torch, vision)}
    if len(builds) == 2 and '' not in builds:
        report.add('warning', 'torchvision + import torchvision',
                   f'torchvision {vision} was not built for torch {torch}: a program that imports '
                   'it without mmseg_edaformer fails ("operator torchvision::nms does not exist"). '
                   'What imports mmseg_edaformer first, as all tools here do, works, and timm and '
                   "mmpretrain with it, but torchvision's own operators (nms, roi_align) do not",
                   _install_torchvision(torch))


def ask_torch(report: Report) -> str:
    """Find what torch was built for, how many threads it starts, and the GPUs that it can use."""
    import torch
    add = functools.partial(report.add_fact, 'torch')
    add('build', f'CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
        if torch.version.cuda else f'ROCm {torch.version.hip}' if torch.version.hip else 'CPU only')
    cores, limit = usable_cores()
    cores, threads = math.ceil(min(cores, limit)), torch.get_num_threads()
    add('threads', threads)
    if threads > cores:
        report.add('warning', 'threads', f'torch starts {threads} threads and has {cores} '
                   f'core{"s" if cores > 1 else ""}, which makes it many times slower',
                   f'export OMP_NUM_THREADS={cores}')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        add('GPUs', count or 'none')
        for index in range(count):
            card = torch.cuda.get_device_properties(index)
            add(f'GPU {index}', f'{card.name}, {_gib(card.total_memory)}, compute capability '
                f'{card.major}.{card.minor}, bfloat16 {"yes" if card.major >= 8 else "no"}')
    for warning in said:
        report.add('warning', 'GPUs', f'torch says: {" ".join(str(warning.message).split())}')
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    if count:
        add('NCCL', '.'.join(map(str, torch.cuda.nccl.version())) if nccl else 'not installed')
        if compat._version('triton') is None:
            report.add('warning', 'triton', '--compile needs Triton on a GPU',
                       f'{PIP} install triton')
    if count > 1 and not nccl:
        report.add('warning', 'NCCL', 'this torch lacks NCCL, which training on several GPUs needs')
    return f'{count or "no"} GPU{"" if count == 1 else "s"}'


def _predict(report: Report, device: str) -> str:
    """Predict a 64 x 64 image with EDAFormer-T and random weights, without ISR and with it."""
    import torch
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    import mmseg_edaformer
    init_default_scope('mmseg')
    sizes = dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model = MODELS.build(Config.fromfile(
            ROOT / 'configs' / 'edaformer_t_ade.py').model).eval().to(device)

        def labels() -> tuple[int, ...]:
            with torch.no_grad():
                result = model.test_step(dict(
                    inputs=[torch.zeros(3, 64, 64, dtype=torch.uint8)],
                    data_samples=[SegDataSample(metainfo=sizes)]))
            return tuple(result[0].pred_sem_seg.data.cpu().shape)

        shapes = [labels()]
        with mmseg_edaformer.isr(model, 'optimal'):
            shapes.append(labels())
    if shapes != [(1, 64, 64)] * 2:
        raise RuntimeError(f'label maps of {shapes} come out of an image of 64 x 64')
    for warning in said:
        if str(warning.message).startswith('cpu_kernels.cpp'):
            report.add('warning', 'C++ compiler', str(warning.message))
    return 'predicts a 64 x 64 image, without ISR and with it'


def check_config(report: Report, path: str) -> str:
    """Check a config as tools/train.py and tools/test.py do, but go on after an error."""
    import torch
    from mmengine.logging import MMLogger

    from mmseg_edaformer.engine import checks
    from mmseg_edaformer.engine.run_config import load_config
    from mmseg_edaformer.errors import clear_errors

    class Warnings(logging.Handler):

        def emit(self, record: logging.LogRecord) -> None:
            report.add('warning', 'config', record.getMessage())

    def check(call: Callable[..., Any], *args: Any) -> Any:
        try:
            with clear_errors():
                return call(*args)
        except SystemExit as end:
            what = str(end.code).removeprefix('error: ')
        except Exception as error:  # the other checks have more to say
            what = _describe(error)
        report.add('error', 'config', what, _mend('config', what))

    handler, logger = Warnings(logging.WARNING), MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        cfg = check(load_config, path)
        if cfg is None:
            return path
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for call in (checks.check_amp, checks.check_compile, checks.check_start):
            check(call, cfg)
        check(checks.check_batch_size, cfg, gpus or 1)
        for split in ('train', 'val', 'test'):
            check(checks.check_data, cfg, split)
        check_folder(report, 'work dir', Path(cfg.work_dir), '--work-dir FOLDER', 'error')
    finally:
        logger.removeHandler(handler)
    return path


def _describe(error: BaseException) -> str:
    return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'


def _module(stage: str) -> str | None:
    return stage.removeprefix('import ') if stage.startswith('import ') else None


def _place(stage: str) -> str:
    """Where the module that a step imports lies, in words."""
    module = _module(stage)
    spec = importlib.util.find_spec(module) if module else None
    return f' ({module} is {spec.origin})' if spec and spec.origin else ''


def _mend(stage: str, error: str) -> str | None:
    """The command for a step that failed."""
    for pattern, mend in MENDS.items():
        if re.search(pattern, error):
            return mend
    module = _module(stage)
    if module is None:
        return None
    lacking = re.search(r"No module named '(\w+)", error)
    if lacking and module in OPTIONAL:
        return f'{PIP} install {lacking[1]}'
    if lacking:
        return INSTALL
    spec = importlib.util.find_spec(module)
    places = [place for place in os.environ.get('PYTHONPATH', '').split(os.pathsep) if place]
    if spec and spec.origin and any(Path(spec.origin).resolve().is_relative_to(
            Path(place).resolve()) for place in places) and module != 'mmseg_edaformer':
        return 'unset PYTHONPATH'
    package = IMPORTS.get(module, module)
    for name in (package, f'{package}-lite', f'onedl-{package}'):
        version = compat._version(name)
        if version and module != 'mmseg_edaformer':
            return (f'{PIP} install --force-reinstall --no-deps "{name}=={version}"' +
                    (_index(version) if name in ('torch', 'torchvision') else ''))
    return INSTALL


# The report, for people and for programs

_STYLES = {'ok': 'green', 'warning': 'yellow', 'error': 'bold red', '-': 'dim'}


def as_json(report: Report) -> str:
    """The whole report."""
    return json.dumps(dict(ready=report.ready, findings=[asdict(each) for each in report.findings],
                           facts=report.facts), indent=2)


def show(report: Report) -> None:
    """Print the report: in colours on a terminal."""
    width = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))
    console = _console()
    for line in _lines(report, width):
        if console is None:
            print(''.join(text for text, _ in line))
        else:
            from rich.text import Text
            console.print(Text.assemble(*line), soft_wrap=True)


def _console() -> Any:
    """rich's terminal; None where there is no terminal or no rich."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False)


def _lines(report: Report, width: int) -> Iterator[list[tuple[str, str]]]:
    """Lines of pieces of text with their styles."""
    column = max(len(name) for facts in report.facts.values() for name in facts) + 2
    for section, facts in report.facts.items():
        yield [(section, 'bold')]
        for name, value in facts.items():
            level = report.level(name)
            level = '-' if level == 'ok' and value in ('none', 'not installed') else level
            yield [(f'  {level:9}', _STYLES[level]), (f'{name:{column}}{value}', '')]
        yield []
    if report.findings:
        yield [('To mend', 'bold')]
    for finding in sorted(report.findings, key=lambda each: each.level):
        first, *rest = textwrap.wrap(finding.what, width - 11, break_long_words=False,
                                     break_on_hyphens=False)
        yield [(f'  {finding.level:9}', _STYLES[finding.level]), (first, '')]
        for line in rest:
            yield [(' ' * 11 + line, '')]
        if finding.mend:
            yield [(' ' * 11 + finding.mend, 'cyan')]  # one line: it is to be copied
        yield []
    errors = sum(finding.level == 'error' for finding in report.findings)
    if report.ready:
        yield [('Training and testing can run here.', 'bold green')]
    else:
        yield [(f'Training or testing cannot run here: mend the error{"s" if errors > 1 else ""} '
                'above.', 'bold red')]
