"""What must hold for ISR on any model, checked against the oracle."""
import copy
import io
import pickle

import torch

from mmseg_edaformer.isr import apply_isr, isr, remove_isr
from mmseg_edaformer.isr.registry import find_attention

from .oracle import Oracle, tokens, within

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
def check_adapter(model, image, grids, *, prefix=0, ratios=(2, 3), ratio_of=None, expected=None,
                  compiled=True, order=None, masked=None, suffix=0, pickled=True):
    """Everything that ISR promises, on one model and one image.

    Args:
        model: The model; its attention gets new weights, and it is moved to the image's device.
        image: Its input.
        grids: The grids that its keys lie on; the number of keys tells which. Or a function of
            the layer's name that returns them.
        prefix: Single tokens in front of the grid; None for whatever the grid leaves over.
        ratios: The ratios to try.
        ratio_of: The ratio that a layer gets, by name of the layer and ratio asked for, where
            that is another one.
        expected: Number of layers that are found and reduced.
        compiled: Also compare with the compiled model.
        order: As for `Oracle`; or None.
        masked: As for `Oracle`; or None.
        suffix: Single tokens behind the grid; or a function of the layer's name that says so.
        pickled: Also compare with pickled models; False where the library's own cannot be pickled
            once they have run.
    """
    strengthen(model)
    model.to(image.device)
    tolerance = TOLERANCE if image.device.type == 'cpu' else 1e-4
    found = layers(model)
    assert len(found) == expected, find_attention(model)
    state = copy.deepcopy(model.state_dict())
    before = first(model(image))
    for ratio in ratios:
        apply_isr(model, ratio, strict=True)
        reduced = first(model(image))
        apply_isr(model, ratio, strict=True)
        assert torch.equal(first(model(image)), reduced), 'applying twice is applying once'
        for copied in (copy.deepcopy(model), *(_pickled(model) if pickled else ())):
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

        behind = {name: suffix(name) if callable(suffix) else suffix for name in found}
        oracles = [Oracle(_by_count(grids(name) if callable(grids) else grids, prefix,
                                    behind[name]),
                          ratio_of(name, ratio) if ratio_of else ratio, prefix, order, masked,
                          behind[name])
                   for name in found]
        undo = within(found.values(), oracles)
        exact = first(model(image))
        undo()
        assert all(oracle.hits for oracle in oracles), 'the oracle reaches every layer'
        assert (reduced - before).abs().max() > 100 * TOLERANCE, 'a reduction that shows'
        scale = max(1, exact.abs().max().item())
        assert (reduced - exact).abs().max() < tolerance * scale
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    with isr(model, 1):
        assert torch.equal(first(model(image)), before), 'a ratio of 1 is the model'


def _pickled(model):
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
