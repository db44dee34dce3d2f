"""Masked attention in a plain form, and what must hold for decoders that use it."""
from functools import partial

import torch
from torch.nn import functional as F

from mmseg_edaformer.isr import apply_isr, isr, remove_isr, report_isr
from mmseg_edaformer.isr.registry import find_attention

from .check import TOLERANCE, first, layers, lively
from .oracle import membership


def plain_attention(scores, values, member, masked=None):
    """Each cell has the mean key, bias and value of its members; masked if all of them are.

    Args:
        scores: ... x Nq x N.
        values: ... x N x d.
        member: N x M, as `membership` gives it.
        masked: ... x Nq x N, True where a query does not see a key.
    """
    n = member.sum(0)
    if masked is None:
        masked = torch.zeros_like(scores, dtype=torch.bool)
    means = scores @ (member / n) + n.log()
    gone = ((~masked).float() @ member) == 0
    return means.masked_fill(gone, -torch.inf).softmax(-1) @ ((member / n).T @ values)


def plain_multihead(module, ratio, grids, query, key, value, attn_mask=None, **kwargs):
    """``nn.MultiheadAttention``, N x B x C, whose keys lie on the one of ``grids`` that fits."""
    grid = next(grid for grid in grids if grid[0] * grid[1] == len(key))
    heads = [F.linear(x, weight, bias).unflatten(-1, (module.num_heads, -1)).permute(1, 2, 0, 3)
             for x, weight, bias in zip((query, key, value), module.in_proj_weight.chunk(3),
                                        module.in_proj_bias.chunk(3))]
    scores = heads[0] @ heads[1].transpose(-2, -1) * heads[0].shape[-1] ** -0.5
    masked = None if attn_mask is None else attn_mask.reshape(scores.shape)
    if masked is not None:
        assert masked.dtype == torch.bool
    out = plain_attention(scores, heads[2], membership(grid, ratio, 0, len(key)), masked)
    return module.out_proj(out.permute(2, 0, 1, 3).flatten(2)), None


def check_report(model, blocks, untouched):
    """The report counts costs and names every attention of a decoder of queries."""
    report = report_isr(model, 2, (128, 192))
    assert report.stages[-1].stage.startswith('decoder')
    assert report.stages[-1].blocks == blocks
    assert report.macs[1] < report.macs[0]
    assert len(report.untouched) == untouched
    assert {reason.split(':')[1].strip() for reason in report.untouched.values()} == {
        'its keys are the queries of the decoder, which lie on no grid', 'deformable attention'}


@torch.no_grad()
def check_decoder(model, image, grids, chosen, rest=0):
    """Reduce the decoder alone and compare with the plain form.

    Args:
        model: The model.
        image: Its input.
        grids: Grids that its keys lie on.
        chosen: Part of the names of the layers that are compared.
        rest: Layers of the encoder.
    """
    lively(model)
    cross = {name: module for name, module in layers(model).items() if chosen in name}
    assert len(layers(model)) == len(cross) + rest, find_attention(model)
    assert not find_attention(model).unknown
    before = first(model(image))
    for ratio in (2, 3):
        with isr(model, f'1-{ratio}', strict=True):
            reduced = first(model(image))
        assert torch.equal(first(model(image)), before)
        # mmcv keeps torch's module within its own.
        inner = [getattr(module, 'attn', module) for module in cross.values()]
        for module in inner:
            module.forward = partial(plain_multihead, module, ratio, grids)
        exact = first(model(image))
        for module in inner:
            del module.forward
        assert (reduced - before).abs().max() > 100 * TOLERANCE
        assert (reduced - exact).abs().max() < TOLERANCE * max(1, exact.abs().max().item())
        apply_isr(model, ratio, strict=True)
        whole = first(model(image))
        remove_isr(model)
        assert torch.equal(first(model(image)), before)
        assert torch.equal(whole, reduced) == (not rest)
