"""Which attention a model holds, and the rule by which ISR reduces each layer.

Rules come from `register_isr`, from the tables of libraries in `adapters`, and, for research code,
from the names of classes and the attributes that they have.
"""
import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from ..errors import RatioError
from .adapters import mmpretrain, mmseg, research, timm, torchvision, transformers
from .key_layout import Arguments, GridSource, Patches
from .patching import install, uninstall
from .reduction import Reduction, Setting, resolve
from .rules import AttentionRule, Irreducible, Rule

_registered: dict[str, Rule] = {}


def register_isr(attention_class: type[nn.Module] | str, *,
                 grid: GridSource | str | tuple[str, str] | None = None,
                 prefix: int | str | tuple[int | str, ...] | None = 0, suffix: int | str = 0,
                 projections: tuple[str, ...] = (), traceable: bool = True, queries: bool = False,
                 irreducible: str | None = None) -> None:
    """Tell ISR about an attention module of your own; docs/isr.md shows one from start to test.

    Args:
        attention_class: The class whose forward computes the attention, which includes its
            subclasses; or its full name, ``package.module.Class``, or its bare name; or a place
            such as ``Decoder:blocks.*.attn``: the module at that path of a class, whatever its own
            class is.
        grid: Where the keys lie: the name of the forward's argument that holds (h, w), the names of
            two arguments, or one of `Arguments`, `InputMap`, `OwnMaps`, `Patches` and `Window`. All
            but the last two also find maps that the module's own convolutions make.
        prefix: Number of tokens in front of the grid that must stay, such as a class token, or the
            name of the module's attribute that holds it. A tuple lists several of these, from the
            grid outward; layers may lack the outermost ones, and names may be of modules around the
            layer and hold the tokens themselves: ``('register_tokens', 'cls_token')``. With None,
            `apply_isr` finds the tokens on both sides of a `Patches` grid by running an example.
        suffix: Number of tokens behind the grid that must stay, or the name of the attribute that
            holds it, of the module or of one around it.
        projections: Names of the Linear layers that make keys and values, such as ``('kv',)`` or
            ``('k', 'v')``; the first third of one called ``qkv`` makes queries. They then run on
            reduced tokens. Only valid if nothing but a reshape lies between them and the product:
            no norm, rotation or convolution on keys or values.
        traceable: False if torch.compile cannot take the forward as one graph; the module then runs
            outside of the compiled graphs while it is reduced.
        queries: True if the queries are the tokens of the same map as the keys before any pool of
            the module's own, so that a query_ratio can average them.
        irreducible: Why the module has no keys to reduce, in place of a grid.

    Raises:
        RatioError: There is neither a grid nor a reason, or both, or ``prefix=None`` stands with
            another grid than `Patches`.
    """
    if (grid is None) == (irreducible is None):
        raise RatioError('register_isr takes either a grid or irreducible, not both')
    if grid is not None and prefix is None and not isinstance(grid, Patches):
        raise RatioError('register_isr(prefix=None) works only with grid=Patches(...), not with '
                         f'{grid!r}: give the number of tokens in front of the grid')
    name = attention_class if isinstance(attention_class, str) else _names(attention_class)[0]
    if irreducible is not None or grid is None:
        _registered[name] = Irreducible(irreducible or '')
        return
    if isinstance(grid, str):
        grid = Arguments((grid,))
    elif isinstance(grid, tuple):
        grid = Arguments(grid)
    _registered[name] = AttentionRule(grid, prefix, suffix, projections, traceable, queries)


class Layer(Protocol):
    """One attention layer: its name in the model, its module and what ISR is set to."""
    name: str
    module: nn.Module
    setting: Setting


@dataclass
class ForeignLayer:
    """A layer of another library, reduced by the rule of its class.

    ``declared`` is that rule with the tokens that the library's own models declare, also where the
    model is another one and ``rule`` waits for `locate`.
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
        """Intercept the layer's forward, even if the setting changes nothing."""
        install(self.module, Reduction(setting, self.rule, self.owners))


@dataclass
class EmbeddingFreeLayer:
    """A layer of EFT or EDAFormerHead, which pools its keys itself."""
    name: str
    module: Any

    @property
    def setting(self) -> Setting:
        return Setting(self.module.isr_ratio, self.module.isr_method, self.module.isr_keys,
                       query_ratio=self.module.query_ratio, queries=self.module.isr_queries)

    @setting.setter
    def setting(self, setting: Setting) -> None:
        self.module.isr_ratio, self.module.isr_method = setting.isr_ratio, setting.method
        self.module.isr_keys = setting.keys
        self.module.query_ratio, self.module.isr_queries = setting.query_ratio, setting.queries


@dataclass
class Part:
    """An encoder or a decoder with its attention layers, by number of the stage, from 1."""
    kind: str
    stages: dict[int, list[Layer]]


@dataclass
class Attentions:
    """All attention of a model: what can be reduced, and by name what cannot and why."""
    parts: list[Part] = field(default_factory=list)
    irreducible: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def refuse(self, layer: Layer, reason: str) -> None:
        """Move a layer from those that can be reduced to those that are not known."""
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
    """Find all attention within a model, wrapped or not."""
    attentions = Attentions()
    inside: set[nn.Module] = set()  # parts and layers, whose submodules belong to them
    layers: list[ForeignLayer] = []
    for name, path in _walk(model):
        module = path[-1]
        if not inside.isdisjoint(path):
            continue
        own = _own_part(name, module)
        if own is not None:
            attentions.parts.append(own)
            inside.add(module)
            continue
        rule = _rule_of_place(name, path) or _rule(module)
        if isinstance(rule, AttentionRule):
            owners, missing = _owners(rule, path)
            if missing:
                attentions.unknown[name] = (f'{type(module).__name__}: no {missing} around it to '
                                            'read its grid from')
            else:
                layers.append(ForeignLayer(name, module, _unless_foreign(rule, path), owners, rule))
            inside.add(module)
        elif rule is not None:
            attentions.irreducible[name] = f'{type(module).__name__}: {rule.reason}'
            inside.add(module)
        elif _looks_like_attention(module):
            attentions.unknown[name] = f'{type(module).__name__} is not known to ISR'
    for kind, group in itertools.groupby(layers, lambda layer: _kind(layer.name)):
        attentions.parts.append(Part(kind, {
            number: list(stage) for number, (_, stage) in enumerate(
                itertools.groupby(group, lambda layer: _width(layer.module)), 1)}))
    return attentions


def _own_part(name: str, module: Any) -> Part | None:
    """The part that an EFT or an EDAFormerHead is; None for other modules."""
    classes = _names(type(module))
    if 'mmseg_edaformer.models.eft.EFT' in classes:
        kind, path, stages, numbers = 'encoder', 'stages', module.stages, range(len(module.stages))
    elif 'mmseg_edaformer.models.edaformer_head.EDAFormerHead' in classes:
        kind, path, stages, numbers = 'decoder', 'levels', module.levels, module.in_index
    else:
        return None
    prefix = f'{name}.{path}' if name else path
    return Part(kind, {number + 1: [
        EmbeddingFreeLayer(f'{prefix}.{index}.{inner}', layer)
        for inner, layer in stage.named_modules() if hasattr(layer, 'isr_ratio')]
        for index, (number, stage) in enumerate(zip(numbers, stages))})


def _walk(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield each module once: its name, and the modules from the outermost to itself."""
    seen: set[nn.Module] = set()

    def visit(name: str, path: list[nn.Module]) -> Iterator[tuple[str, list[nn.Module]]]:
        if path[-1] in seen:
            return
        seen.add(path[-1])
        yield name, path
        for key, child in path[-1].named_children():
            yield from visit(f'{name}.{key}' if name else key, [*path, child])

    yield from visit('', [model])


_tables = (_registered, mmseg.RULES, timm.RULES, transformers.RULES, mmpretrain.RULES,
           torchvision.RULES)
_places = {place for table in _tables for place in table if ':' in place}


def _rule_of_place(name: str, path: list[nn.Module]) -> Rule | None:
    """The rule for this place in a module around it; the nearest such module counts."""
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
    """The rule, without the tokens that it declares if the layer is in somebody else's model.

    A model that is built from a library's attention may give it its tokens in any order.
    """
    if not (isinstance(rule.grid, Patches) and isinstance(rule.prefix, tuple)) or any(
            rule is own for own in _registered.values()):
        return rule
    foreign = any(is_foreign(module) for module in path[:-1])
    return dataclasses.replace(rule, prefix=None, suffix=0) if foreign else rule


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is not from a library whose models declare their tokens."""
    package, *rooms = type(module).__module__.split('.')
    # mmpretrain's pretraining shuffles tokens and drops some.
    return package not in _KNOWN or 'selfsup' in rooms


_LIBRARIES = {'mmcv', 'mmdet', 'mmpretrain', 'mmseg', 'segmentation_models_pytorch', 'timm',
              'torch', 'torchvision', 'transformers'}
"""Libraries with tables of their own: a class of theirs must not be guessed by its name."""

_KNOWN = _LIBRARIES | {'mmengine', 'mmseg_edaformer'}


def _rule(module: nn.Module) -> Rule | None:
    names = _names(type(module))
    for name in names:
        for table in _tables:
            if name in table:
                return _unless_overridden(table[name], module, name)
        short = name.rpartition('.')[2]
        if short in _registered:
            return _registered[short]
    return research_rule(module)


def research_rule(module: nn.Module) -> Rule | None:
    """The rule of `research.RULES` whose class name and attributes a module has, if any."""
    original = getattr(type(module), 'isr_original', type(module))
    arguments = inspect.signature(original.forward).parameters.keys()

    def fits(rule: Rule, attributes: tuple[str, ...]) -> bool:
        grid = rule.grid if isinstance(rule, AttentionRule) else None
        if isinstance(grid, Arguments) and not set(grid.names) <= arguments:
            return False
        return all((name.lstrip('!') in arguments or hasattr(module, name.lstrip('!')))
                   is not name.startswith('!') for name in attributes)

    for cls in type(module).__mro__:
        if cls.__module__.partition('.')[0] not in _LIBRARIES:
            for attributes, rule in research.RULES.get(cls.__name__, ()):
                if fits(rule, attributes):
                    return rule
    return None


def _unless_overridden(rule: Rule, module: nn.Module, name: str) -> Rule:
    """The rule, without projections if the module has another forward than the rule's class."""
    if not isinstance(rule, AttentionRule) or not rule.projections:
        return rule
    classes = [c for c in type(module).__mro__ if 'isr_original' not in vars(c)]
    known = next(c for c in classes if f'{c.__module__}.{c.__qualname__}' == name)
    same = getattr(classes[0], 'forward', None) is getattr(known, 'forward', None)
    own = classes[0].__module__.partition('.')[0] in _KNOWN
    return rule if same or own else dataclasses.replace(rule, projections=())


def _names(cls: type) -> list[str]:
    """Full names of a class and its bases, without the subclasses that reduction makes."""
    return [f'{c.__module__}.{c.__qualname__}' for c in cls.__mro__
            if 'isr_original' not in vars(c)]


def _owners(rule: AttentionRule, path: list[nn.Module]) -> tuple[dict[str, nn.Module], str]:
    """The modules that a rule reads from, and the name of one that is missing, if any."""
    names = [rule.grid.owner, rule.grid.beside,
             f'@{rule.suffix}' if isinstance(rule.suffix, str) else None]
    owners = {name: _owner(name, path) for name in names if name}
    missing = next((name for name in owners if owners[name] is None), '')
    if isinstance(rule.prefix, tuple):
        owners |= {f'@{part}': _around(part, path)[0] for part in rule.prefix
                   if isinstance(part, str)}
    return {name: owner for name, owner in owners.items() if owner is not None}, missing


def _owner(owner: str, path: list[nn.Module]) -> nn.Module | None:
    """The module that a grid is read from, as `GridSource` names it; None if it is missing."""
    if owner.startswith('@'):
        return _around(owner[1:], path)[0]
    return _around(owner, path, nn.Module)[1]


def _around(ways: str, path: list[nn.Module], kind: type = object) -> tuple[nn.Module | None, Any]:
    """The nearest module around with something at one of several paths, and that; else None."""
    for module in reversed(path):
        for way in ways.split('|'):
            there, target = resolve(module, way)
            if there and isinstance(target, kind):
                return module, target
    return None, None


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether a module is named attention and holds no other that is."""
    def named(m: nn.Module) -> bool:
        return re.search(r'attention|attn|msa(v\d)?$', type(m).__name__.lower()) is not None

    return named(module) and any(True for _ in module.parameters()) and not any(
        named(child) for child in module.modules() if child is not module)


def _kind(name: str) -> str:
    """'encoder' or 'decoder', by the path of a module."""
    decoder = any('decode' in key or key in ('transformer_module', 'panoptic_head')
                  for key in name.split('.'))
    return 'decoder' if decoder else 'encoder'


def _width(module: nn.Module) -> int:
    """Output channels of an attention layer, which tell the stages of a backbone apart."""
    last = getattr(module, 'proj', None)
    if isinstance(last, nn.Linear):
        return last.out_features
    return max((getattr(m, 'out_features', getattr(m, 'out_channels', 0))
                for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))), default=0)
