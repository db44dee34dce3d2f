"""What documents, messages and tools promise about the place where this package runs."""
import ast
import re

import pytest

from mmseg_edaformer import doctor
from tests.conftest import ROOT

DOCUMENTS = [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]
MODULES = [*ROOT.glob('mmseg_edaformer/**/*.py'), *ROOT.glob('tools/*.*')]


def test_nothing_installs_this_package_by_its_name():
    """No package index has it: pip would find no distribution."""
    assert len(DOCUMENTS) > 15
    for path in [*DOCUMENTS, *MODULES]:
        found = re.search(r'pip install [^\n]*["\' ]mmseg_edaformer(?!\[[\w,-]+\] @)',
                          path.read_text(encoding='utf-8'))
        assert found is None, f'{path}: {found[0]}'


def test_extras_in_documents_exist():
    extras = set(re.findall(r"^        '([\w-]+)': \[", (ROOT / 'setup.py').read_text(
        encoding='utf-8'), re.M))
    named = {extra for path in DOCUMENTS for names in re.findall(
        r'"\.\[([\w,-]+)\]"', path.read_text(encoding='utf-8')) for extra in names.split(',')}
    assert {'demo', 'export', 'cluster', 'pretrain', 'openmmlab', 'fork'} <= named <= extras


def test_all_name_the_same_versions_of_python(monkeypatch):
    read = {name: (ROOT / name).read_text(encoding='utf-8') for name in (
        'README.md', 'setup.py', 'pyproject.toml', '.github/workflows/ci.yml')}
    [(first, last)] = {*re.findall(r'Python 3\.(\d+) to 3\.(\d+)', read['README.md'])}
    assert f"python_requires='>=3.{first}'" in read['setup.py']
    assert f"target-version = 'py3{first}'" in read['pyproject.toml']
    assert f"python_version = '3.{first}'" in read['pyproject.toml']
    tested = set(map(int, re.findall(r"'3\.(\d+)'", read['.github/workflows/ci.yml'])))
    assert tested == set(range(int(first), int(last) + 1))
    for minor in range(int(first) - 1, int(last) + 2):
        monkeypatch.setattr('sys.version_info', (3, minor, 0))
        report = doctor.Report()
        doctor.check_versions(report)
        assert ('is not tested' in str(report.findings)) == (minor not in tested)


@pytest.mark.parametrize('path', sorted(ROOT.glob('tools/*.py')), ids=lambda path: path.name)
def test_tools_import_this_package_before_what_needs_a_home(path):
    """`compat.provide_home` must run before mmengine is imported."""
    names = [getattr(node, 'module', None) or node.names[0].name
             for node in ast.parse(path.read_text(encoding='utf-8')).body
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    roots = [name.partition('.')[0] for name in names]
    others = [place for place, root in enumerate(roots) if root in ('mmengine', 'mmseg', 'mmcv')]
    assert all('mmseg_edaformer' in roots[:place] for place in others)
