"""Find out where a model puts the tokens of its map among the keys of an attention.

The name of an attention does not tell what it is given: a class token in front of the patches,
detection tokens behind them, the patches of two images, or shuffled ones. So noise is added to some
of the tokens that the patch embedding makes, and the keys that change are those tokens. Two passes
for each bit of a token's number add noise to the tokens without the bit and to those with it; the
pass that changes a key more gives that bit of its token's number. Attention outputs zeros in these
passes, so that no token learns of another.
"""
import functools
import sys
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..cost import Inputs, example_image, on_meta, run, with_weights
from .intercept import Interception
from .pooling import Grid
from .reduction import Reduction, Setting, resolve
from .registry import ForeignLayer, find_attention, is_foreign
from .rules import AttentionRule
from .scores import SOFTMAX

Mark = Callable[[Tensor], Tensor]
"""Tells by their numbers which tokens to mark."""

SILENT = 1e-3
"""A change below this fraction of the largest one counts as none."""


class _Probe(Interception):
    """Collects the keys of an attention, and makes it output zeros."""

    def __init__(self, module: nn.Module, reduction: Reduction, args: tuple[Any, ...],
                 kwargs: dict[str, Any], notes: list[Tensor]) -> None:
        super().__init__(module, reduction, args, kwargs)
        self.notes = notes

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if name in SOFTMAX:
            return torch.zeros_like(args[0] if args else kwargs['input'])
        out = super().__torch_function__(func, types, args, kwargs)
        if name == 'multi_head_attention_forward':
            return torch.zeros_like(out[0]), out[1]
        return out

    def _fused(self, func: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
               *args: Any, **kwargs: Any) -> Tensor:
        self._find(key)
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    def _find(self, keys: Tensor, queries: int | None = None) -> None:
        self.notes.append(keys.float())
        self.seen.append(keys.shape[-2])


class _Marker:
    """A forward hook that adds noise to some of the tokens of the map that a module outputs."""

    def __init__(self) -> None:
        self.grids: set[Grid | None] = set()
        self.mark: Mark | None = None
        self.maps: list[Tensor] = []
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Tensor | None:
        if not isinstance(out, Tensor) or out.dim() != 4:
            self.grids.add(None)
            return None
        grid = out.shape[-2], out.shape[-1]
        self.grids.add(grid)
        self.calls += 1
        if len(self.maps) < self.calls:
            self.maps.append(out.clone())  # the model may add to it in place
        if self.mark is None:
            return None
        # The map of the first pass, for this one may be made from tokens that were marked before,
        # whose noise a convolution has spread (UniFormer).
        out = self.maps[self.calls - 1]
        noise = torch.randn_like(out) * (out.std() + 0.1)
        marked = self.mark(torch.arange(grid[0] * grid[1], device=out.device))
        return out + noise * marked.view(grid)


def locate(model: nn.Module,
           inputs: Inputs | None = None) -> dict[str, tuple[int, int] | AttentionRule | str]:
    """Find out how many tokens stand around a map, for the layers whose rule does not tell.

    A copy of the model that shares its weights runs about 20 times on the inputs, or once if a
    library's own model within it calls all of these layers.

    Returns:
        By name of the layer, one of three: the numbers of keys in front of the map and behind it;
        its rule, if a library's own model, which declares its tokens, calls it; or the reason why
        it must be left alone.
    """
    try:
        with on_meta(model) as shadow, torch.random.fork_rng(), torch.no_grad():
            return _locate(shadow, [layer.name for layer in _foreign(model)], inputs)
    except Exception as error:  # of whatever model this is
        reason = (f'to find out where its tokens stand, {type(model).__name__} was run on an '
                  f'example and failed ({type(error).__name__}: {error}): give it what it takes as '
                  'example_inputs=')
        return {layer.name: reason for layer in _foreign(model) if layer.rule.prefix is None}


def _locate(shadow: nn.Module, names: list[str],
            inputs: Inputs | None) -> dict[str, tuple[int, int] | AttentionRule | str]:
    with_weights(shadow)
    inputs = example_image(shadow) if inputs is None else inputs
    notes: dict[str, list[Tensor]] = {}
    markers: dict[nn.Module, _Marker] = {}
    sources: dict[str, _Marker] = {}
    trusted: dict[str, AttentionRule | None] = {}
    for name, layer in zip(names, _foreign(shadow)):
        layer.setting = Setting()
        notes[name] = []
        layer.module.forward = functools.partial(_silenced, layer, layer.module.forward,
                                                 notes[name])
        if layer.rule.prefix is not None:
            continue
        owner = layer.owners[str(layer.rule.grid.owner)]
        sources[name] = markers.setdefault(owner, _Marker())
        model = _model_of(layer, shadow)
        if layer.declared is not None and model is not None:
            layer.module.register_forward_pre_hook(functools.partial(
                _trust, trusted, name, layer.declared, model))
    for owner, marker in markers.items():
        owner.register_forward_hook(marker)

    def keys(inputs: Inputs, mark: Mark | None = None,
             grids: Set[Grid | None] = frozenset()) -> dict[str, list[Tensor]]:
        for collected in notes.values():
            collected.clear()
        for marker in markers.values():
            marker.mark, marker.calls = mark if marker.grids == grids else None, 0
        torch.manual_seed(0)
        run(shadow, inputs)
        return {name: list(notes[name]) for name in sources}

    before = keys(inputs)
    places: dict[str, tuple[int, int] | AttentionRule | str] = {
        name: rule for name, rule in trusted.items() if rule is not None}
    sources = {name: marker for name, marker in sources.items() if name not in places}
    if not sources:
        return places
    before = {name: before[name] for name in sources}
    other = _changes(keys(tree_map_only(Tensor, _another, inputs)), before)
    # Maps of one size at a time: the next one is made from the marked tokens of this.
    for grids in {frozenset(marker.grids) for marker in markers.values()}:
        changes = [other]
        tokens = max((grid[0] * grid[1] for grid in grids if grid), default=1)
        for bit in range((tokens - 1).bit_length()):
            for value in (0, 1):
                mark = functools.partial(_has_bit, bit, value)
                changes.append(_changes(keys(inputs, mark, grids), before))
        places |= {name: _place(grids, [change[name] for change in changes])
                   for name, marker in sources.items() if marker.grids == grids}
    return places


def _model_of(layer: ForeignLayer, shadow: nn.Module) -> nn.Module | None:
    """The library's model that has the layer's patch embedding; None if it is no library's."""
    path = str(layer.rule.grid.owner)
    models = [module for module in shadow.modules() if any(
        resolve(module, way)[1] is layer.owners.get(path) for way in path.split('|'))]
    return models[-1] if models and not is_foreign(models[-1]) else None


def _trust(trusted: dict[str, AttentionRule | None], name: str, rule: AttentionRule,
           model: nn.Module, *call: Any) -> None:
    """Trust what a library's model declares if its own code calls the layer."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_locals.get('self') is model and (
                frame.f_globals['__name__'] == type(model).__module__):
            trusted.setdefault(name, rule)
            return
    trusted[name] = None  # for good, though another call may come from there


def _foreign(model: nn.Module) -> list[ForeignLayer]:
    return [layer for part in find_attention(model).parts for layers in part.stages.values()
            for layer in layers if isinstance(layer, ForeignLayer)]


def _silenced(layer: ForeignLayer, forward: Callable[..., Any], notes: list[Tensor], *args: Any,
              **kwargs: Any) -> Any:
    with _Probe(layer.module, Reduction(Setting(), layer.rule, layer.owners), args, kwargs, notes):
        return forward(*args, **kwargs)


def _has_bit(bit: int, value: int, numbers: Tensor) -> Tensor:
    return (numbers >> bit & 1) == value


def _another(x: Tensor) -> Tensor:
    """Another image for an image; other tensors as they are."""
    if x.dim() < 3 or x.dtype == torch.bool:
        return x
    return torch.randn_like(x) if x.is_floating_point() else x.flip(-1)


def _changes(after: dict[str, list[Tensor]],
             before: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """How much each key changed, heads x N, for each attention that a layer ran."""
    return {name: [(new - old).norm(dim=-1).flatten(0, -2).cpu()
                   for new, old in zip(after[name], before[name], strict=True)]
            for name in before}


def _place(grids: Set[Grid | None], changes: list[list[Tensor]]) -> tuple[int, int] | str:
    """Numbers of keys in front of and behind a map, or the reason why the layer must stay.

    ``changes`` tells how much each key changed, by pass (another image; tokens without bit 0, with
    bit 0; without bit 1; ...) and by attention of the layer.
    """
    grid = next(iter(grids), None)
    if len(grids) != 1 or grid is None:
        return 'its tokens come from more than one map, or from none'
    numbers = torch.arange(grid[0] * grid[1])
    places: set[tuple[int, int]] = set()
    for another, *marked in zip(*changes):
        unset, set_ = torch.stack(marked[::2]), torch.stack(marked[1::2])
        reached = torch.stack(marked).amax(0)
        alive = reached > SILENT * reached.amax(-1, keepdim=True)
        if not alive.any(-1).all():
            ran = places or alive.any() or any((change[1] > 0).any() for change in zip(*changes))
            return 'it also attends to some tokens of no map' if ran else 'it was not run'
        bits = 2 ** torch.arange(len(set_))
        heads = ((set_ > unset) * bits.view(-1, 1, 1)).sum(0).where(alive, -1)
        tokens, alive = heads[0], alive.any(0)
        another = (another / another.amax(-1, keepdim=True).clamp(min=1e-30)).amax(0)
        front = next((front for front in range(len(tokens) - len(numbers) + 1)
                      if torch.equal(tokens[front:front + len(numbers)], numbers)), None)
        if front is None or (heads[:, front:front + len(numbers)] != numbers).any():
            return 'the tokens of its map do not stand row by row among its keys'
        behind = len(tokens) - front - len(numbers)
        beside = torch.ones_like(alive)
        beside[front:front + len(numbers)] = False
        if (beside & (alive | (another > SILENT * another.max()))).any():
            return 'the tokens beside those of its map depend on the image too'
        places.add((front, behind))
    if len(places) != 1:
        return 'it was not run on an example' if not places else (
            'its attentions have different tokens beside those of its map')
    return places.pop()
