"""What must hold for ISR on any model, checked against the oracle."""
import copy
import io
import pickle
from functools import partial

import pytest
import torch

from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import apply_isr, isr, remove_isr, report_isr
from mmseg_edaformer.isr.registry import find_attention

from .oracle import Oracle, tokens

TOLERANCE = 2e-5


def layers(model):
    """Names and modules of the attention that ISR reduces."""
    return {layer.name: layer.module for part in find_attention(model).parts
            for stage in part.stages.values() for layer in stage}


def strengthen(model):
    """Weights with which attention is far from even, so that a wrong key shows."""
    generator = torch.Generator().manual_seed(1)
    for module in layers(model).values():
        for parameter in module.parameters():
            with torch.no_grad():
                if parameter.dim() > 1:
                    fan_in = parameter[0].numel()
                    parameter.normal_(0, 2 / fan_in ** 0.5, generator=generator)
                else:
                    parameter.add_(torch.empty_like(parameter).normal_(0, 0.2,
                                                                       generator=generator))
    return model.eval()


def awake(model):
    """Norms and layer scales of 1, for models that start near zero."""
    for name, parameter in model.named_parameters():
        if 'gamma' in name:
            torch.nn.init.ones_(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
    return model


def sizes(height, width, reductions=(1,), strides=(4, 8, 16, 32)):
    """Grids of the keys: the maps of each stage, reduced by strided convolutions that round down.

    Patch embeddings round up.
    """
    return [(-(-height // stride) // reduction, -(-width // stride) // reduction)
            for stride, reduction in zip(strides, reductions * len(strides))]


def reduced(height, width):
    return sizes(height, width, (8, 4, 2, 1))


def patches(height, width):
    return [(height // 16, width // 16)]


def row(make, images, grids, expected=2, *, name, compiled=False, gpu=False, queries=None,
        **checks):
    """Tests of one model, one for each size of its images: `make`, size, grids and `check_adapter`.

    Args:
        make: A function of the size and of its number in ``images`` that returns the model.
        images: Sizes.
        grids: As for `check_adapter`, or a function of height and width.
        expected: As for `check_adapter`.
        name: What it is called.
        compiled: Compile the first one.
        gpu: Mark them so.
        queries: As for `check_adapter`, or a function of height and width.
        checks: Other arguments of `check_adapter`.
    """
    for number, size in enumerate(images):
        yield pytest.param(
            partial(make, size, number), size, grids(*size) if callable(grids) else grids,
            dict(expected=expected, compiled=compiled and not number,
                 queries=queries(*size) if callable(queries) else queries, **checks),
            marks=[pytest.mark.gpu] * gpu, id=f'{name}-{number}-{size}')


ROWS = ('make', 'size', 'grids', 'checks')
SQUARE, TALL, WIDE = (96, 96), (80, 112), (128, 192)
PLAIN, REDUCED = [SQUARE, TALL], [WIDE, (136, 200)]


def check_report(model, size, blocks, *reasons):
    """The report of a decoder counts its costs and tells why it leaves other attention alone."""
    report = report_isr(model.eval(), '1-2', size)
    assert [(stage.stage, stage.blocks) for stage in report.stages
            if stage.keys[0] != stage.keys[1]] == [('decoder 1', blocks)]
    assert report.macs[1] < report.macs[0]
    assert sorted(reason.split(':')[1].strip() for reason in report.untouched.values()) == sorted(
        reasons)


def lively(model):
    """Weights with which the image matters to the end, for models that start near zero."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and 'embed' not in name:
            torch.nn.init.normal_(parameter, 0, 1.4 / parameter[0].numel() ** 0.5)
    return strengthen(model)


def first(output):
    """All tensors of an output, flattened into one: a tensor, a tuple of maps, a dict."""
    if isinstance(output, torch.Tensor):
        return output.flatten()
    values = output.values() if hasattr(output, 'values') else output
    return torch.cat([first(value) for value in values
                      if isinstance(value, torch.Tensor) or (isinstance(value, (tuple, list)) and
                                                             len(value))])


@torch.no_grad()
def check_adapter(model, image, grids, *, prefix=0, ratios=(2, 3), expected=None, compiled=True,
                  order=None, masked=None, suffix=0, pickled=True, plain=None, decoder='',
                  irreducible=None, queries=None):
    """Everything that ISR promises, on one model and one image.

    Layers in a shifted window get a ratio of 1 where cells would mix its regions.

    Args:
        model: The model; its attention gets new weights, and it is moved to the image's device.
        image: Its input.
        grids: The grids that its keys lie on; the number of keys tells which. Or a function of
            the layer's name that returns them, or an attribute of the layer that is its one grid.
        prefix: Single tokens in front of the grid; None for whatever the grid leaves over.
        ratios: The ratios to try.
        expected: Number of layers that are found and reduced.
        compiled: Also compare with the compiled model.
        order: The order of its tokens, for the model and a grid, as for `Oracle`; or None.
        masked: As for `Oracle`; or None.
        suffix: Single tokens behind the grid; or a function of the layer's name that says so.
        pickled: Also compare with pickled models; False where the library's own cannot be pickled
            once they have run.
        plain: In place of the oracle: what a layer computes at a ratio, from both and the arguments
            of its forward.
        decoder: Part of the names of a decoder's layers, which are then reduced alone. Where it
            makes masks by a threshold, the encoder must be the same to the last bit.
        irreducible: The one reason why the model's other attention is left alone.
        queries: The grids that queries lie on, to average them too, at the first ratio and cells
            of 2; the number of queries tells which. An empty list if that must be refused.
    """
    strengthen(model)
    model.to(image.device)
    tolerance = TOLERANCE if image.device.type == 'cpu' else 1e-4
    found = layers(model)
    assert len(found) == expected, find_attention(model)
    if irreducible:
        assert set(find_attention(model).irreducible.values()) == {irreducible}
    state = copy.deepcopy(model.state_dict())
    before = first(model(image))
    found = {name: layer for name, layer in found.items() if decoder in name}
    if queries == []:
        with pytest.raises(RatioError, match='no attention whose queries are known'):
            apply_isr(model, 1, query_ratio=2)
    for ratio, side in [*((ratio, 1) for ratio in ratios), *([(ratios[0], 2)] * bool(queries))]:
        asked = f'1-{ratio}' if decoder else ratio
        asked = f'{asked}+q{side}' if side > 1 else asked
        apply_isr(model, asked, strict=side == 1)
        reduced = first(model(image))
        apply_isr(model, asked, strict=side == 1)
        assert torch.equal(first(model(image)), reduced), 'applying twice is applying once'
        for copied in _copies(model, pickled) if ratio == ratios[0] else ():
            copied.to(image.device)
            assert torch.equal(first(copied(image)), reduced), 'a copy is reduced alike'
            remove_isr(copied)
            assert torch.equal(first(copied(image)), before), 'a copy can be restored'
        if compiled and ratio == ratios[0]:
            torch._dynamo.reset()
            out = first(torch.compile(model, backend='eager')(image))
            torch.testing.assert_close(out, reduced, atol=tolerance / 2, rtol=1e-4)
        remove_isr(model)
        assert torch.equal(first(model(image)), before), 'removed bit for bit'

        oracles = []
        for name, layer in found.items():
            behind = suffix(name) if callable(suffix) else suffix
            on = grids(name) if callable(grids) else grids
            if isinstance(on, str):
                on = [tuple(getattr(layer, on))]
            oracles.append(Oracle(_by_count(on, prefix, behind), _unmixed(model, name, ratio),
                                  prefix, order and partial(order, model), masked, behind,
                                  (_by_count(queries or [], prefix, behind), side)))
            layer.forward = (partial(plain, layer, ratio) if plain else
                             partial(_within, layer.forward, oracles[-1]))
        exact = first(model(image))
        for layer in found.values():
            del layer.forward
        assert plain or all(oracle.hits for oracle in oracles), 'the oracle reaches every layer'
        assert side == 1 or any(oracle.averaged for oracle in oracles), 'queries are averaged'
        assert (reduced - before).abs().max() > 100 * TOLERANCE, 'a reduction that shows'
        scale = max(1, exact.abs().max().item())
        assert (reduced - exact).abs().max() < tolerance * scale
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    with isr(model, 1):
        assert torch.equal(first(model(image)), before), 'a ratio of 1 is the model'


def _within(forward, oracle, *args, **kwargs):
    with oracle:
        return forward(*args, **kwargs)


def _unmixed(model, name, ratio):
    """The ratio, or 1 where its cells would mix the regions of a shifted window."""
    path = name.split('.')
    around = [model.get_submodule('.'.join(path[:end])) for end in range(len(path), 0, -1)]
    sides, shifts = (next((getattr(module, size) for module in around if hasattr(module, size)), 0)
                     for size in ('window_size', 'shift_size'))
    pairs = [value if isinstance(value, (tuple, list)) else (value, value)
             for value in (sides, shifts)]
    mixed = any(shift and (side - shift) % ratio for side, shift in zip(*pairs))
    return 1 if mixed else ratio


def _copies(model, pickled):
    yield copy.deepcopy(model)
    if not pickled:
        return
    yield pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


def _by_count(grids, prefix, suffix):
    def find(total):
        total -= suffix
        fitting = [grid for grid in grids if tokens(grid) == total - (prefix or 0) or
                   (prefix is None and tokens(grid) <= total)]
        return fitting[0] if fitting else None
    return find
