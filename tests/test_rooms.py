"""The rooms of the package: imports go down only, in no circle, and each module stands alone."""
import ast
import graphlib
import sys

from tests.conftest import ROOT, run

PACKAGE = ROOT / 'mmseg_edaformer'
ROOMS = ('', 'isr', 'models', 'data', 'pretraining', 'engine', 'predict', 'analysis', 'export',
         'serve')
"""From the lowest to the highest; the first holds the modules that lie in no folder."""
TOP = {'registered': 'engine', 'safe_defaults': 'engine', 'doctor': 'export',
       'doctor_trials': 'export'}
"""Modules in no folder that stand in, or directly above, a room."""
LIGHT = {'torch', 'numpy', 'safetensors'}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob('*.py'))
           if '.mim' not in path.parts}


def imports(name, path):
    """Modules that a module imports, also within its functions, except for type checkers alone."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    tree = ast.parse(path.read_text(encoding='utf-8'))
    typing = {id(node) for test in ast.walk(tree)
              if isinstance(test, ast.If) and ast.unparse(test.test) == 'TYPE_CHECKING'
              for node in ast.walk(test)}
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[:len(package.split('.')) - node.level + 1]
            base = '.'.join([*above, *filter(None, [node.module])]) if node.level else node.module
            for alias in node.names:
                inner = f'{base}.{alias.name}'
                yield inner if inner in MODULES else base


def room_of(name):
    parts = name.split('.')[1:]
    if not parts:
        return ''
    if len(parts) > 1 or MODULES[name].name == '__init__.py':
        return parts[0]
    return TOP.get(parts[0], '')


def own_imports():
    return {name: {other for other in imports(name, path) if other in MODULES and other != name}
            for name, path in MODULES.items()}


def test_imports_go_down_only():
    wrong = [f'{name} imports {other}' for name, others in own_imports().items()
             for other in sorted(others)
             if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))]
    assert wrong == []


def test_there_are_no_circles():
    graph = own_imports()
    del graph['mmseg_edaformer']  # it loads names on demand
    graphlib.TopologicalSorter({name: others - {'mmseg_edaformer'}
                                for name, others in graph.items()}).prepare()


def test_isr_needs_torch_alone():
    allowed = {'torch', 'mmseg_edaformer', *sys.stdlib_module_names}
    for name, path in MODULES.items():
        if room_of(name) == 'isr':
            assert {other.partition('.')[0] for other in imports(name, path)} <= allowed, name


def test_each_module_can_be_imported_alone():
    """Each in a fork of a process that has imported what they need from elsewhere and no more."""
    names = [name for name in MODULES if not name.endswith('.triton_kernels')]
    lines = run('-c', f'''
import os, sys
import mmseg_edaformer.registered, mmseg.apis, matplotlib.pyplot
for name in [name for name in sys.modules if name.partition(".")[0] == "mmseg_edaformer"]:
    del sys.modules[name]
from mmengine.fileio.backends import registry_utils
from mmengine.registry import Registry
Registry._register_module = lambda *_, **__: None  # their names are taken
registry_utils._register_backend = lambda *_, **__: None
for name in {names}:
    if os.fork() == 0:
        try:
            __import__(name)
        except BaseException as error:
            print(name, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    os.wait()
''').stdout.splitlines()
    assert lines == []
