"""Have the registries of OpenMMLab find this package's classes, without importing either now.

mmengine's registries import their ``locations`` when they are first asked for a class. This adds a
location to them: this package's own list of modules, `mmseg_edaformer.registered`.
"""
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_LOCATION = 'mmseg_edaformer.registered'
_REGISTRIES = ('mmengine.registry', 'mmpretrain.registry', 'mmseg.registry')


class _AfterImport(MetaPathFinder):
    """Add the location to registries as soon as the module that makes them has been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in _REGISTRIES else None
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _add_location(module)

        loader.exec_module = exec_module
        return spec


def announce() -> None:
    """Add the location to the registries that exist, and to the others when they come."""
    sys.meta_path.insert(0, _AfterImport())
    for name in _REGISTRIES:
        if name in sys.modules:
            _add_location(sys.modules[name])


def _add_location(module: ModuleType) -> None:
    from mmengine.registry import Registry
    registries = [value for value in vars(module).values() if isinstance(value, Registry)]
    for registry in registries:
        registry._locations.insert(0, _LOCATION)  # before mmseg's own, whose warnings it silences
    if any(registry._imported for registry in registries):
        importlib.import_module(_LOCATION)
