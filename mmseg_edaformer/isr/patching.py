"""Install interception in a module and remove it: the module's class becomes a subclass of itself.

Nothing wraps the module, so names, state dicts, ``isinstance`` and hooks stay as they were, and
copies, pickles and ``torch.compile`` find an ordinary forward.
"""
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RatioError
from .intercept import Interception
from .pooling import Grid
from .reduction import Reduction

_forward_eager: Any = None


def install(module: nn.Module, reduction: Reduction) -> None:
    """Reduce a module's keys from now on."""
    before = vars(module).get('isr_reduction')
    reduction.ran = before is not None and before.ran
    if before is not None and before.owners != reduction.owners:
        uninstall(module)
    vars(module)['isr_reduction'] = reduction
    if not reduction.rule.traceable:
        _provide_eager_forward()
    cls: Any = type(module)
    if hasattr(cls, 'isr_original'):
        return
    module.__class__ = _subclass(cls, _forward_reduced)
    for owner in reduction.recorded():
        vars(owner)['isr_users'] = vars(owner).get('isr_users', 0) + 1
        if vars(owner)['isr_users'] == 1:
            owner_class: Any = type(owner)
            owner.__class__ = _subclass(owner_class, _forward_recorded)


def uninstall(module: nn.Module) -> None:
    """Undo `install`, also in the modules whose maps no other layer needs."""
    reduction = module.__dict__.pop('isr_reduction', None)
    if reduction is None:
        return
    _give_back_class(module)
    for owner in reduction.recorded():
        owner.__dict__['isr_users'] -= 1
        if owner.__dict__['isr_users'] == 0:
            owner.__dict__.pop('isr_grids', None)
            del owner.__dict__['isr_users']
            _give_back_class(owner)


def _give_back_class(module: nn.Module) -> None:
    cls: Any = type(module)
    if 'isr_original' in vars(cls):  # parametrizing makes a subclass of it
        module.__class__ = cls.isr_original


def _forward_reduced(original: Any, module: Any, args: tuple[Any, ...],
                     kwargs: dict[str, Any]) -> Any:
    if any(isinstance(x, torch.fx.Proxy) for x in (*args, *kwargs.values())):
        raise RatioError(f'torch.fx cannot trace {original.__name__} while ISR reduces it: use '
                         'torch.export, or call remove_isr first')
    module.isr_reduction.ran = True
    intercept = module.isr_reduction.interception or Interception
    interception = intercept(module, module.isr_reduction, args, kwargs)
    if torch.compiler.is_compiling():
        if not module.isr_reduction.rule.traceable:
            return _forward_eager(original, module, args, kwargs)
        if not hasattr(torch._dynamo, 'error_on_graph_break'):
            raise RatioError(f'to compile {original.__name__} with ISR, torch must be 2.9 or newer')
        # After a graph break within, the interception would have forgotten what it saw.
        with torch._dynamo.error_on_graph_break(True), interception:
            out = original.forward(module, *args, **kwargs)
    else:
        with interception, interception.explained():
            out = original.forward(module, *args, **kwargs)
    interception.finish()
    return out


def _provide_eager_forward() -> None:
    """Make `_forward_eager`; not at import, because torch's compiler takes a second to load."""
    global _forward_eager
    _forward_eager = _forward_eager or torch.compiler.disable(_forward_reduced)


def _forward_recorded(original: Any, module: Any, args: tuple[Any, ...],
                      kwargs: dict[str, Any]) -> Any:
    out = original.forward(module, *args, **kwargs)
    module.isr_grids = list(_maps(out))
    return out


def _maps(output: Any) -> Iterator[Grid]:
    """Sizes of all maps within an output, in nested containers too."""
    if isinstance(output, Tensor):
        if output.dim() == 4:
            yield output.shape[-2], output.shape[-1]
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _maps(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _maps(value)


@functools.cache
def _subclass(cls: Any, run: Any) -> type[nn.Module]:
    """A subclass whose forward is ``run``, under the same name so that libraries recognise it."""
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(cls, self, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # The subclass cannot be imported, so tell pickle and copy how it is made.
        _, arguments, *state = cls.__reduce_ex__(self, protocol)
        return _restore, (cls, run, *arguments[1:]), *state

    def extra_repr(self: nn.Module) -> str:
        reduction = self.__dict__.get('isr_reduction')
        ratio = reduction and f'isr_ratio={reduction.setting.isr_ratio}'
        return ', '.join(filter(None, (cls.extra_repr(self), ratio)))

    def prepare_scriptable(self: nn.Module) -> None:
        raise RatioError(f'torch.jit.script cannot compile {cls.__name__} while ISR reduces it: '
                         'use torch.export or torch.jit.trace, or call remove_isr first')

    return type(cls.__name__, (cls,), {
        '__prepare_scriptable__': prepare_scriptable,
        '__module__': cls.__module__, '__qualname__': cls.__qualname__, '__doc__': cls.__doc__,
        'forward': forward, '__reduce_ex__': reduce, 'extra_repr': extra_repr, 'isr_original': cls,
        'isr_parameters': tuple(inspect.signature(cls.forward).parameters)[1:]})


def _restore(cls: Any, run: Any, *args: Any) -> nn.Module:
    _provide_eager_forward()
    subclass: Any = _subclass(cls, run)
    return subclass.__new__(subclass, *args)
