"""What an environment has, what in it is missing or known to be bad, and the command that fixes it.

This must run where the libraries are missing, damaged, crash or hang. So it needs the standard
library alone, and leaves every other import to a child process (`doctor_trials`), which notes each
step before it takes it.
"""
import importlib.util
import json
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import compat

PIP = f'{shlex.quote(sys.executable)} -m pip'
INSTALL = compat.install_command(compat.installed_stack())

OPENCV = tuple(f'opencv-{kind}' for kind in (
    'python', 'python-headless', 'contrib-python', 'contrib-python-headless'))
STACKS = {**compat.STACKS, 'openmmlab': (*compat.STACKS['openmmlab'], 'mmcv')}
NUMPY2 = {**dict.fromkeys(OPENCV, '4.10'), 'matplotlib': '3.9', 'scipy': '1.13'}
"""The first versions that can be used with numpy 2."""
IMPORTS = {'numpy': 'numpy', 'cv2': 'opencv-python', 'torch': 'torch', 'mmengine': 'mmengine',
           'mmcv': 'mmcv', 'mmseg': 'mmsegmentation'}
"""Modules that training needs, in this order, and the packages that hold them."""
OPTIONAL = ('torchvision', 'timm', 'transformers', 'mmpretrain')
FIXES = {
    r'libGL\.so|libgthread|libSM\.so|libXext': f'{PIP} uninstall -y opencv-python && '
                                               f'{PIP} install opencv-python-headless',
    "No module named 'mmseg_edaformer": INSTALL,
    'pkg_resources': f'{PIP} install "setuptools<81"',
    r'_ARRAY_API|numpy\.core\.multiarray|numpy\.dtype size changed': f'{PIP} install "numpy<2"',
}
"""Commands by patterns of error messages; the first that matches counts."""
VARIABLES = ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS', 'PYTHONPATH', 'LD_LIBRARY_PATH',
             'EDAFORMER_NATIVE', 'XDG_CACHE_HOME', 'TORCH_HOME', 'CXX')


@dataclass(frozen=True)
class Finding:
    """A problem: an 'error' prevents training or testing, a 'warning' does not."""
    level: str
    problem: str
    fix: str | None = None


@dataclass
class Report:
    """Facts by section and name, and findings; each is noted in a file at once, if there is one."""
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: str | None = None

    @property
    def ready(self) -> bool:
        return all(finding.level != 'error' for finding in self.findings)

    def add_fact(self, section: str, name: str, value: Any) -> None:
        self._note('add_fact', section, name, str(value))
        self.facts.setdefault(section, {})[name] = str(value)

    def add(self, level: str, problem: str, fix: str | None = None) -> None:
        self._note('add', level, problem, fix)
        if Finding(level, problem, fix) not in self.findings:
            self.findings.append(Finding(level, problem, fix))

    def add_failure(self, level: str, step: str, problem: str) -> None:
        """Add the finding that a step of `doctor_trials` failed."""
        module = step.removeprefix('import ') if step.startswith('import ') else None
        spec = importlib.util.find_spec(module) if module else None
        file = spec.origin if spec else None
        self.add(level, f'{step} {problem}' + (f' ({module} is {file})' if file else ''),
                 find_fix(problem, module, file))

    def _note(self, *entry: Any) -> None:
        if self.notes:
            with open(self.notes, 'a', encoding='utf-8') as lines:
                lines.write(json.dumps(entry) + '\n')


def examine(config: str | None = None, timeout: float = 120.) -> Report:
    """Check versions, the machine, the libraries and, with ``config``, a config and its data.

    A step of the child process counts as hanging after ``timeout`` seconds.
    """
    report = Report()
    check_versions(report)
    check_machine(report)
    if config is None:
        check_folder(report, Path('work_dirs'), 'warning')
    try_apart(report, config, timeout)
    return report


def check_versions(report: Report) -> None:
    """Compare the installed packages, by their metadata alone, with what is known to be bad."""
    have: Callable[[str], str | None] = compat._version
    openmmlab, fork = ([*filter(have, names)] for names in STACKS.values())
    wanted = compat.STACKS['fork' if fork and not openmmlab else 'openmmlab']
    report.add_fact('Versions', 'Python', f'{platform.python_version()}, {sys.executable}')
    for name in dict.fromkeys([
            'mmseg_edaformer', 'torch', *wanted, *openmmlab, *fork, 'numpy', *filter(have, OPENCV),
            'safetensors', 'simplejpeg', 'setuptools', *OPTIONAL, 'triton']):
        if name != 'mmcv-lite' or have(name) or not have('mmcv'):
            report.add_fact('Versions', name, have(name) or 'not installed')

    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        report.add('warning', 'this version of Python is not tested; 3.11, 3.12 and 3.13 are',
                   'python3.11 -m venv .venv')
    # Not by importlib.util.find_spec, which makes setuptools leave distutils alone from then on.
    if have('pip') is None:
        report.add('warning', 'pip is missing, and the commands below need it',
                   f'{shlex.quote(sys.executable)} -m ensurepip')
    if have('simplejpeg') is None:
        report.add('warning', 'simplejpeg is missing, so damaged JPEGs are read as if they were '
                   'whole', f'{PIP} install simplejpeg')
    missing = [name for name in ('ftfy', 'regex') if not have(name)]
    if missing and (openmmlab or fork):
        report.add('error', f'{" and ".join(missing)} missing: mmsegmentation needs it and does '
                   'not declare it', f'{PIP} install {" ".join(missing)}')
    if openmmlab and fork:
        _check_overwritten(report, 'error', openmmlab + fork, INSTALL.replace(
            '[fork]', '[openmmlab]'), '. To keep the fork, write [fork] in place of [openmmlab]')
    else:
        try:
            compat.check_environment()
        except ImportError as error:
            problem, _, fix = str(error).partition('. Run: ')
            problem = problem.partition('cannot start: ')[2]
            if re.search('(^|; )mmcv ', problem):  # the full mmcv has no wheels for a new torch
                fix = f'{PIP} uninstall -y mmcv && {fix.replace("mmcv>=", "mmcv-lite>=")}'
            report.add('error', problem, fix)
        low, high = compat.STACKS['openmmlab']['mmcv-lite']
        _check_overwritten(report, 'error', ['mmcv', 'mmcv-lite'],
                           f'{PIP} install "mmcv-lite>={low},<{high}"')
    opencv = [*filter(have, OPENCV)]
    _check_overwritten(report, 'warning', opencv, f'{PIP} install {"".join(opencv[:1])}')
    _check_overwritten(report, 'warning', ['mmpretrain', 'onedl-mmpretrain'],
                       f'{PIP} install {"onedl-" if fork else ""}mmpretrain')
    check_torchvision(report, have('torch') or '', have('torchvision') or '')
    for name, first in NUMPY2.items() if compat._digits(have('numpy') or '0') >= (2,) else ():
        if have(name) and compat._digits(have(name) or '') < compat._digits(first):
            report.add('error', f'{name} {have(name)} was built for numpy 1: importing it fails '
                       f'with numpy {have("numpy")}', f'{PIP} install "{name}>={first}"')


def _check_overwritten(report: Report, level: str, names: list[str], install: str,
                       note: str = '') -> None:
    if len(names) > 1 and all(map(compat._version, names)):
        report.add(level, f'{", ".join(names)} are installed together and overwrite each other\'s '
                   f'files{note}', f'{PIP} uninstall -y {" ".join(names)} && {install}')


def check_torchvision(report: Report, torch: str, vision: str) -> None:
    """Check that torchvision was built for the installed torch; the versions may be ''."""
    release, builds = compat._digits(torch), [name.partition('+')[2] for name in (torch, vision)]
    if torch and vision and release[0] == 2 and (
            compat._digits(vision)[:2] != (0, release[1] + 15) or
            (all(builds) and builds[0] != builds[1])):
        report.add('warning', f'torchvision {vision} was not built for torch {torch}: its '
                   'operators (nms, roi_align) fail, and so does importing it, timm or mmpretrain '
                   'before mmseg_edaformer',
                   reinstall('torchvision', f'0.{release[1] + 15}.*', builds[0]))


def reinstall(name: str, version: str, build: str = '') -> str:
    """Return the command that installs a version again, for a build of torch."""
    return f'{PIP} install --force-reinstall --no-deps "{name}=={version}"' + (
        f' --index-url https://download.pytorch.org/whl/{build}' if build else '')


def check_machine(report: Report) -> None:
    """Check the shared memory and the compiler, and note the variables that matter."""
    if os.path.isdir('/dev/shm') and shutil.disk_usage('/dev/shm').free < 2 ** 29:
        report.add('warning', 'the shared memory (/dev/shm) has less than 0.5 GiB free, so data '
                   'loader workers die with "Bus error". In Docker give the container more, or '
                   'train without workers: --cfg-options train_dataloader.num_workers=0 '
                   'train_dataloader.persistent_workers=False and the same with val_ and '
                   'test_dataloader', 'docker run --shm-size=8g ...')
    compiler = os.environ.get('CXX', 'g++')
    if shutil.which(compiler) is None:
        report.add('warning', f'the C++ compiler {compiler} is not on the PATH: prediction on the '
                   'CPU is slower, and --compile cannot work', 'sudo apt-get install g++')
    for name in filter(os.environ.get, VARIABLES):
        report.add_fact('Variables', name, os.environ[name])


def check_folder(report: Report, folder: Path, level: str) -> None:
    """Check that a work dir, or the folder in which it will be made, takes 2 GiB of files."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    free = shutil.disk_usage(existing).free / 2 ** 30
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b' ')
    except OSError as error:
        report.add(level, f'{folder} cannot be written: {error.strerror}',
                   '--work-dir FOLDER')
    else:
        if free < 2:
            report.add('warning', f'only {free:.1f} GiB are free in {folder}: free some space, or '
                       'use another folder', '--work-dir FOLDER')


_CHILD = '''import importlib, sys, types
sys.path[:] = [path for path in sys.path if path]  # as tools see it, not the folder at hand
package = sys.modules['_doctor'] = types.ModuleType('_doctor')  # the real one is tried later
package.__path__ = [sys.argv[1]]
importlib.import_module('_doctor.doctor_trials').try_all(*sys.argv[2:])
'''


def try_apart(report: Report, config: str | None, timeout: float) -> None:
    """Run `doctor_trials` in a child process, and add what it found, or that it crashed or hung."""
    with tempfile.TemporaryDirectory() as folder:
        notes, output = Path(folder, 'notes'), Path(folder, 'output')
        notes.touch()
        with output.open('wb') as stream:  # no pipe: it would wait for what the libraries start
            code = subprocess.call(
                [sys.executable, '-c', _CHILD, Path(__file__).parent, notes, str(timeout),
                 *([config] if config else [])],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
        for line in notes.read_text(encoding='utf-8').splitlines(keepends=True):
            if line.endswith('\n'):  # the last one may be cut off
                method, *entry = json.loads(line)
                getattr(report, method)(*entry)
        said = output.read_text(errors='replace').strip()
    if code == 0:
        return
    step = [*report.facts.get('Tried', {'Python': ''})][-1]
    how = signal.Signals(-code).name if code < 0 else f'exit code {code}'
    if re.search(r'^Timeout \(.*\)!$', said, re.M):
        problem = f'does not end within {timeout:g} s (--timeout waits longer)'
    elif how == 'SIGKILL':
        problem = 'was killed, as happens where memory runs out'
    else:
        problem = f'crashes ({how})' + ''.join(f': {line}' for line in said.splitlines()[-1:])
    report.add_failure('error', step, problem)


def find_fix(problem: str, module: str | None = None, file: str | None = None) -> str | None:
    """Return the command for a step that failed, and that imported a module, or None."""
    for pattern, fix in FIXES.items():
        if re.search(pattern, problem):
            return fix
    if module is None:
        return None
    missing = re.search(r"No module named '(\w+)", problem)
    if missing and module in OPTIONAL:
        return f'{PIP} install {missing[1]}'
    if missing or module == 'mmseg_edaformer':
        return INSTALL
    places = filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))
    if file and any(Path(file).resolve().is_relative_to(Path(place).resolve())
                    for place in places):
        return 'unset PYTHONPATH'
    package = IMPORTS.get(module, module)
    for name in (package, f'{package}-lite', f'onedl-{package}'):
        if version := compat._version(name):
            return reinstall(name, version, version.partition('+')[2] if 'torch' in name else '')
    return INSTALL


def as_json(report: Report) -> str:
    """Return the whole report as JSON."""
    return json.dumps(dict(ready=report.ready, findings=[*map(asdict, report.findings)],
                           facts=report.facts), indent=2)


def show(report: Report) -> None:
    """Print the report."""
    width = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))
    column = max(len(name) for facts in report.facts.values() for name in facts) + 2
    for section, facts in report.facts.items():
        print(section)
        for name, value in facts.items():
            print(f'  {name:{column}}{value}')
        print()
    for finding in sorted(report.findings, key=lambda finding: finding.level):
        print(textwrap.fill(f'{finding.level:9}{finding.problem}', width,
                            subsequent_indent=' ' * 9, break_long_words=False,
                            break_on_hyphens=False))
        if finding.fix:
            print(f'{"":9}how to fix: {finding.fix}')  # one line: it is to be copied
        print()
    print('Training and testing can run here.' if report.ready else
          'Training or testing cannot run here: fix each error above.')
