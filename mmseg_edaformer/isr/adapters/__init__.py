"""Where each library keeps the attention whose keys ISR reduces: one file per library.

A file is a table of attention classes, by name, so that no library is imported that the model does
not come from. ``Outer:path`` stands for the module at a path below a class, with * for any index;
it comes before the module's own class.
"""
import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from ...errors import RatioError
from ..intercept import Reduction, Setting, resolve
from ..key_layout import Arguments, GridSource, Patches
from ..patching import install, uninstall
from ..registry import AttentionRule, Irreducible, Rule
from . import edaformer, mmpretrain, mmseg, research, timm, torchvision, transformers

_registered: dict[str, Rule] = {}


def register_isr(attention_class: type[nn.Module] | str, *,
                 grid: GridSource | str | tuple[str, str] | None = None,
                 prefix: int | str | tuple[int | str, ...] | None = 0, suffix: int | str = 0,
                 projections: tuple[str, ...] = (), traceable: bool = True,
                 irreducible: str | None = None) -> None:
    """Tell ISR of an attention module of your own; docs/isr.md takes one from nothing to tested.

    Args:
        attention_class: The class whose forward computes the attention; subclasses are meant too.
            Or its full name, ``package.module.Class``, or its bare name. Or a place, such as
            ``Decoder:blocks.*.attn``: what is there in a class, whatever class it has itself.
        grid: Where its keys lie: the name of the argument of its forward that holds (h, w), the
            names of two arguments, or one of `Arguments`, `InputMap`, `OwnMaps`, `Patches` and
            `Window`. Maps that its own convolutions make are found in any case but the last two.
        prefix: Tokens in front of the grid that must stay, such as a class token: a number, or the
            name of the module's attribute that holds it. Several of these in a tuple, from the grid
            outward, may be missing in some layers, the outermost first; names may then be of
            modules around, and hold the tokens themselves: ``('register_tokens', 'cls_token')``.
            None finds them out, on both sides: `apply_isr` marks tokens of the map of `Patches` and
            looks where they come out; see `locate`.
        suffix: Tokens behind the grid that must stay: a number, or the name of the attribute that
            holds it, of the module or of one around it.
        projections: Attributes that are Linear layers to keys and values, such as ``('kv',)`` or
            ``('k', 'v')``; of one called ``qkv`` the first third makes queries. Then they run on
            reduced tokens as well. Only where nothing but a reshape stands between them and the
            product: no norm, rotation or convolution on keys or values.
        traceable: False if torch.compile cannot take its forward as one graph: then the module runs
            outside of the compiled graphs while it is reduced.
        irreducible: Why it has no keys to reduce, in place of a grid.

    Raises:
        RatioError: Neither a grid nor a reason, or both; or ``prefix=None`` for another grid than
            `Patches`.
    """
    if (grid is None) == (irreducible is None):
        raise RatioError('register_isr takes a grid, or why there is nothing to reduce; not both')
    if grid is not None and prefix is None and not isinstance(grid, Patches):
        raise RatioError('register_isr finds the tokens around a grid (prefix=None) with '
                         f'grid=Patches(...) alone, not with {grid!r}: give their number')
    name = attention_class if isinstance(attention_class, str) else _names(attention_class)[0]
    if irreducible is not None or grid is None:
        _registered[name] = Irreducible(irreducible or '')
        return
    if isinstance(grid, str):
        grid = Arguments((grid,))
    elif isinstance(grid, tuple):
        grid = Arguments(grid)
    _registered[name] = AttentionRule(grid, prefix, suffix, projections, traceable)


class Layer(Protocol):
    """One attention layer: its name in the model and what ISR is set to."""
    name: str
    module: nn.Module
    setting: Setting


@dataclass
class ForeignLayer:
    """A layer of a library, which the rule of its class reduces.

    ``declared`` is that rule with the tokens that the library's models declare, also where these
    are not to be trusted and ``rule`` waits for `locate`.
    """
    name: str
    module: nn.Module
    rule: AttentionRule
    owners: dict[str, nn.Module] = field(default_factory=dict)
    declared: AttentionRule | None = None

    @property
    def setting(self) -> Setting:
        reduction = self.module.__dict__.get('isr_reduction')
        return reduction.setting if reduction else Setting()

    @setting.setter
    def setting(self, setting: Setting) -> None:
        if setting.off:
            uninstall(self.module)
        else:
            self.watch(setting)

    def watch(self, setting: Setting) -> None:
        """Intercept, though the setting may change nothing."""
        install(self.module, Reduction(setting, self.rule, self.owners))


@dataclass
class Part:
    """An encoder or a decoder with its attention layers, stage by stage, shallow to deep.

    ``stages`` maps the stage's number in the backbone, from 1, to its attention layers.
    """
    kind: str
    stages: dict[int, list[Layer]]


@dataclass
class Attentions:
    """All attention of a model: what can be reduced, what cannot and why, what is not known."""
    parts: list[Part] = field(default_factory=list)
    irreducible: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def refuse(self, layer: Layer, reason: str) -> None:
        """Leave a layer alone after all."""
        for part in self.parts:
            for layers in part.stages.values():
                layers[:] = (other for other in layers if other is not layer)
        self.parts = [part for part in self.parts if any(part.stages.values())]
        self.unknown[layer.name] = f'{type(layer.module).__name__}: {reason}'

    def __str__(self) -> str:
        lines = [f'{part.kind} stage {number}: {len(layers)} x '
                 f'{type(layers[0].module).__name__}' if layers else
                 f'{part.kind} stage {number}: nothing to reduce'
                 for part in self.parts for number, layers in part.stages.items()]
        lines += [f'{name}: {reason}' for name, reason in (*self.irreducible.items(),
                                                           *self.unknown.items())]
        return '; '.join(lines) or 'no attention'


def find_attention(model: nn.Module) -> Attentions:
    """All attention within a model, wrapped or not."""
    found = Attentions()
    inside: set[nn.Module] = set()  # of parts and layers, whose own modules are theirs
    layers: list[ForeignLayer] = []
    for name, path in _walk(model):
        module = path[-1]
        if not inside.isdisjoint(path):
            continue
        own = list(edaformer.find(name, module))
        if own:
            found.parts += [Part(kind, {number: list(stage) for number, stage in stages.items()})
                            for kind, stages in own]
            inside.add(module)
            continue
        rule = _rule_of_place(name, path) or _rule(module)
        if isinstance(rule, AttentionRule):
            owners, missing = _owners(rule, path)
            if missing:
                found.unknown[name] = (f'{type(module).__name__}: no {missing} around it to read '
                                       'its grid from')
            else:
                layers.append(ForeignLayer(name, module, _unless_foreign(rule, path), owners, rule))
            inside.add(module)
        elif rule is not None:
            found.irreducible[name] = f'{type(module).__name__}: {rule.reason}'
            inside.add(module)
        elif _looks_like_attention(module):
            found.unknown[name] = f'{type(module).__name__} is not known to ISR'
    for kind, group in itertools.groupby(layers, lambda layer: _kind(layer.name)):
        found.parts.append(Part(kind, {
            number: list(stage) for number, (_, stage) in enumerate(
                itertools.groupby(group, lambda layer: _width(layer.module)), 1)}))
    return found


def _walk(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Every module once, with its name and the modules around it, from the outermost to itself."""
    seen: set[nn.Module] = set()

    def visit(name: str, path: list[nn.Module]) -> Iterator[tuple[str, list[nn.Module]]]:
        if path[-1] in seen:
            return
        seen.add(path[-1])
        yield name, path
        for key, child in path[-1].named_children():
            yield from visit(f'{name}.{key}' if name else key, [*path, child])

    yield from visit('', [model])


_tables = (_registered, edaformer.RULES, mmseg.RULES, timm.RULES, transformers.RULES,
           mmpretrain.RULES, torchvision.RULES)
_places = {place for table in _tables for place in table if ':' in place}


def _rule_of_place(name: str, path: list[nn.Module]) -> Rule | None:
    """The rule for what is at this place in a module around; the nearest one counts."""
    keys = ['*' if key.isdigit() else key for key in name.split('.')]
    ends = f':{keys[-1]}', f'.{keys[-1]}'
    places = {place for place in (*_places, *_registered) if ':' in place and place.endswith(ends)}
    for depth in reversed(range(len(path) - 1)) if places else ():
        for outer in _names(type(path[depth])):
            for known in outer, outer.rpartition('.')[2]:
                place = f'{known}:{".".join(keys[depth:])}'
                if place in places:
                    return next(table[place] for table in _tables if place in table)
    return None


def _unless_foreign(rule: AttentionRule, path: list[nn.Module]) -> AttentionRule:
    """A rule of a library that says which tokens its models have, if this is one of its models.

    What somebody else builds from a library's attention may give it its tokens in any order.
    """
    if not (isinstance(rule.grid, Patches) and isinstance(rule.prefix, tuple)) or any(
            rule is own for own in _registered.values()):
        return rule
    foreign = any(is_foreign(module) for module in path[:-1])
    return dataclasses.replace(rule, prefix=None, suffix=0) if foreign else rule


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is not of a library whose models are known, or only of its pretraining."""
    package, *rooms = type(module).__module__.split('.')
    # mmpretrain's pretraining shuffles tokens and drops some.
    return package not in _KNOWN or 'selfsup' in rooms


_KNOWN = research.LIBRARIES | {'mmengine', 'mmseg_edaformer'}


def _rule(module: nn.Module) -> Rule | None:
    names = _names(type(module))
    for name in names:
        for table in _tables:
            if name in table:
                return _unless_overridden(table[name], module, name)
        short = name.rpartition('.')[2]
        if short in _registered:
            return _registered[short]
    return research.find(module)


def _unless_overridden(rule: Rule, module: nn.Module, name: str) -> Rule:
    """Without projections if the module's class has another forward than the one of the rule."""
    if not isinstance(rule, AttentionRule) or not rule.projections:
        return rule
    classes = [c for c in type(module).__mro__ if 'isr_original' not in vars(c)]
    known = next(c for c in classes if f'{c.__module__}.{c.__qualname__}' == name)
    same = getattr(classes[0], 'forward', None) is getattr(known, 'forward', None)
    own = classes[0].__module__.partition('.')[0] in _KNOWN
    return rule if same or own else dataclasses.replace(rule, projections=())


def _names(cls: type) -> list[str]:
    """Full names of a class and those that it inherits from; not of reduced subclasses."""
    return [f'{c.__module__}.{c.__qualname__}' for c in cls.__mro__
            if 'isr_original' not in vars(c)]


def _owners(rule: AttentionRule, path: list[nn.Module]) -> tuple[dict[str, nn.Module], str]:
    """The modules that a rule reads from, and the name of one that is not there, if any."""
    names = [rule.grid.owner, rule.grid.beside,
             f'@{rule.suffix}' if isinstance(rule.suffix, str) else None]
    owners = {name: _owner(name, path) for name in names if name}
    missing = next((name for name in owners if owners[name] is None), '')
    if isinstance(rule.prefix, tuple):
        owners |= {f'@{part}': _around(part, path)[0] for part in rule.prefix
                   if isinstance(part, str)}
    return {name: owner for name, owner in owners.items() if owner is not None}, missing


def _owner(owner: str, path: list[nn.Module]) -> nn.Module | None:
    """The module that a grid is read from, as `GridSource` names it; None if it is not there."""
    if owner.startswith('@'):
        return _around(owner[1:], path)[0]
    return _around(owner, path, nn.Module)[1]


def _around(ways: str, path: list[nn.Module], kind: type = object) -> tuple[nn.Module | None, Any]:
    """The nearest module around with something at one of several paths, and what; None if none."""
    for module in reversed(path):
        for way in ways.split('|'):
            there, target = resolve(module, way)
            if there and isinstance(target, kind):
                return module, target
    return None, None


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether a module is called attention and holds no other that is."""
    def called(m: nn.Module) -> bool:
        return re.search(r'attention|attn|msa(v\d)?$', type(m).__name__.lower()) is not None

    return called(module) and any(True for _ in module.parameters()) and not any(
        called(child) for child in module.modules() if child is not module)


def _kind(name: str) -> str:
    """Whether a module belongs to the encoder or to the decoder, by its path."""
    decoder = any('decode' in key or key in ('transformer_module', 'panoptic_head')
                  for key in name.split('.'))
    return 'decoder' if decoder else 'encoder'


def _width(module: nn.Module) -> int:
    """Channels that an attention layer gives: they tell the stages of a backbone apart."""
    last = getattr(module, 'proj', None)
    if isinstance(last, nn.Linear):
        return last.out_features
    return max((getattr(m, 'out_features', getattr(m, 'out_channels', 0))
                for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))), default=0)
