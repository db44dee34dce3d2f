"""What an environment has, what in it is missing or known to be bad, and the command that fixes it.

This must run where the libraries are missing, damaged, crash or hang. So it needs the standard
library alone, and leaves every other import to a child process (`doctor_trials`), which notes each
step before it takes it.
"""
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, NamedTuple

from . import compat
from .compat import PIP, release, version_of

FORK = compat.installed_stack() == 'fork'
INSTALL = compat.install_command(compat.installed_stack())
REQUIRED = ('numpy', 'cv2', 'torch', 'mmengine', 'mmcv', 'mmseg')
"""Modules that training needs, in the order in which they are tried."""
OPTIONAL = ('torchvision', 'timm', 'transformers', 'mmpretrain')
SHARED = {**dict.fromkeys(REQUIRED, INSTALL), 'cv2': f'{PIP} install opencv-python',
          'mmpretrain': compat.install_command('pretrain-fork' if FORK else 'pretrain')}
"""Modules that several packages hold, and how to install one of these packages."""
MISSING = {
    'pip': ('and the commands below need it', f'{PIP[:-3]}ensurepip'),
    'simplejpeg': ('so damaged JPEGs are read as if they were whole', f'{PIP} install simplejpeg')}
NUMPY2 = {'matplotlib': '3.9', 'scipy': '1.13', **{f'opencv-{kind}': '4.10' for kind in (
    'python', 'python-headless', 'contrib-python', 'contrib-python-headless')}}
"""The first versions that can be used with numpy 2."""
FIXES = {
    r'libGL\.so|libgthread|libSM\.so|libXext': f'{PIP} uninstall -y opencv-python && '
                                               f'{PIP} install opencv-python-headless',
    "No module named 'mmseg_edaformer": INSTALL,
    'pkg_resources': f'{PIP} install "setuptools<81"',
    r'_ARRAY_API|numpy\.core\.multiarray|numpy\.dtype size changed': f'{PIP} install "numpy<2"',
}
"""Commands by patterns of error messages; the first that matches counts."""


class Finding(NamedTuple):
    """A problem: an 'error' prevents training or testing, a 'warning' does not."""
    level: str
    problem: str
    fix: str | None = None


@dataclass
class Report:
    """Facts by section and name, and findings; each is noted in a file at once, if there is one."""
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: str = os.devnull

    @property
    def ready(self) -> bool:
        return all(finding.level != 'error' for finding in self.findings)

    def add_fact(self, section: str, name: str, value: str) -> None:
        self._note('add_fact', section, name, value)
        self.facts.setdefault(section, {})[name] = value

    def add(self, level: str, problem: str, fix: str | None = None) -> None:
        self._note('add', level, problem, fix)
        if (finding := Finding(level, problem, fix)) not in self.findings:
            self.findings.append(finding)

    def add_failure(self, level: str, step: str, problem: str) -> None:
        """Add the finding that a step of `doctor_trials` failed."""
        module = step.removeprefix('import ') if step.startswith('import ') else None
        spec = importlib.util.find_spec(module) if module else None
        file = spec.origin if spec else None
        self.add(level, f'{step} {problem}' + (f' ({module} is {file})' if file else ''),
                 find_fix(problem, module, file))

    def _note(self, *entry: Any) -> None:
        with open(self.notes, 'a', encoding='utf-8') as lines:
            lines.write(json.dumps(entry) + '\n')


def examine(config: str | None = None, timeout: float = 120.) -> Report:
    """Check versions, the machine, the libraries and, with ``config``, a config and its data.

    A step of the child process counts as hanging after ``timeout`` seconds.
    """
    report = Report()
    check_versions(report)
    check_machine(report)
    try_apart(report, config, timeout)
    return report


def check_versions(report: Report) -> None:
    """Compare the installed packages, by their metadata alone, with what is known to be bad."""
    report.add_fact('Versions', 'Python', f'{sys.version.split()[0]}, {sys.executable}')
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        report.add('warning', 'this version of Python is not tested; 3.11, 3.12 and 3.13 are',
                   'python3.11 -m venv .venv')
    packages = packages_distributions()
    for module in (*REQUIRED, *OPTIONAL, 'safetensors', 'simplejpeg', 'triton'):
        names = sorted({*packages.get(module, [])})
        found = ', '.join(f'{name} {version_of(name)}' for name in names)
        report.add_fact('Versions', module, found or 'not installed')
        if len(names) > 1 and module in SHARED:
            report.add('error' if SHARED[module] == INSTALL else 'warning',
                       f'{", ".join(names)} are installed together and overwrite each other\'s '
                       f'files', f'{PIP} uninstall -y {" ".join(names)} && {SHARED[module]}')
    for name, (why, fix) in MISSING.items():
        if version_of(name) is None:
            report.add('warning', f'{name} is missing, {why}', fix)
    if misfits := compat.find_misfits():
        report.add('error', *misfits)
    check_torchvision(report, version_of('torch') or '', version_of('torchvision') or '')
    numpy = version_of('numpy') or ''
    for name, first in NUMPY2.items() if release(numpy) >= (2,) else ():
        built = version_of(name)
        if built and release(built) < release(first):
            report.add('error', f'{name} {built} was built for numpy 1: importing it fails with '
                       f'numpy {numpy}', f'{PIP} install "{name}>={first}"')


def check_torchvision(report: Report, torch: str, vision: str) -> None:
    """Check that torchvision was built for the installed torch; the versions may be ''."""
    number, (build, other) = release(torch), (name.partition('+')[2] for name in (torch, vision))
    if number[:1] == (2,) and vision and (release(vision)[:2] != (0, number[1] + 15) or
                                          (build and other and build != other)):
        report.add('warning', f'torchvision {vision} was not built for torch {torch}: its '
                   'operators (nms, roi_align) fail, and so does importing it, timm or mmpretrain '
                   'before mmseg_edaformer',
                   reinstall('torchvision', f'0.{number[1] + 15}.*', build))


def reinstall(name: str, version: str, build: str = '') -> str:
    """Return the command that installs a version again, for a build of torch."""
    return f'{PIP} install --force-reinstall --no-deps "{name}=={version}"' + (
        f' --index-url https://download.pytorch.org/whl/{build}' if build else '')


def check_machine(report: Report) -> None:
    """Check the shared memory, the disk and the compiler."""
    if os.path.isdir('/dev/shm') and shutil.disk_usage('/dev/shm').free < 2 ** 29:
        report.add('warning', 'the shared memory (/dev/shm) has less than 0.5 GiB free, so data '
                   'loader workers die with "Bus error". In Docker give the container more, or '
                   'train without workers: --cfg-options train_dataloader.num_workers=0 '
                   'train_dataloader.persistent_workers=False and the same with val_ and '
                   'test_dataloader', 'docker run --shm-size=8g ...')
    if shutil.disk_usage('.').free < 2 ** 31:
        report.add('warning', 'the disk of this folder has less than 2 GiB free: free some space, '
                   'or write elsewhere', '--work-dir FOLDER')
    if shutil.which(compiler := os.environ.get('CXX', 'g++')) is None:
        report.add('warning', f'the C++ compiler {compiler} is not on the PATH: prediction on the '
                   'CPU is slower, and --compile cannot work', 'sudo apt-get install g++')


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
    if re.search(r'^Timeout \(.*\)!$', said, re.M):
        problem = f'does not end within {timeout:g} s (--timeout waits longer)'
    elif code == -signal.SIGKILL:
        problem = 'was killed, as happens where memory runs out'
    else:
        how = signal.Signals(-code).name if code < 0 else f'exit code {code}'
        problem = f'crashes ({how})' + ''.join(f': {line}' for line in said.splitlines()[-1:])
    report.add_failure('error', step, problem)


def find_fix(problem: str, module: str | None = None, file: str | None = None) -> str | None:
    """Return the command for a step that failed, and that imported a module, or None."""
    for pattern, fix in FIXES.items():
        if re.search(pattern, problem):
            return fix
    if module is None:
        return None
    if missing := re.search(r"No module named '(\w+)", problem):
        return f'{PIP} install {missing[1]}' if module in OPTIONAL else INSTALL
    places = filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))
    if file and any(Path(file).resolve().is_relative_to(Path(place).resolve())
                    for place in places):
        return 'unset PYTHONPATH'
    for name in packages_distributions().get(module, []) if module != 'mmseg_edaformer' else ():
        version = version_of(name) or ''
        return reinstall(name, version, version.partition('+')[2] if 'torch' in name else '')
    return INSTALL


def as_json(report: Report) -> str:
    """Return the whole report as JSON."""
    findings = [finding._asdict() for finding in report.findings]
    return json.dumps(dict(ready=report.ready, findings=findings, facts=report.facts), indent=2)


def show(report: Report) -> None:
    """Print the report."""
    for section, facts in report.facts.items():
        print(section)
        for name, value in facts.items():
            print(f'  {name:24}{value}')
        print()
    for level, problem, fix in sorted(report.findings, key=lambda finding: finding.level):
        print(f'{level}: {problem}' + (f'\nhow to fix: {fix}' if fix else '') + '\n')
    print('Training and testing can run here.' if report.ready else
          'Training or testing cannot run here: fix each error above.')
