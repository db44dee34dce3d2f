"""ISR on decoders of queries, whose cross attention is masked and reads maps of several scales."""
from functools import partial

import pytest
import torch

from mmseg_edaformer.isr import isr, report_isr
from mmseg_edaformer.isr.registry import find_attention

from .check import TOLERANCE, first, layers, lively
from .masked import check_decoder, check_report, plain_attention
from .oracle import Oracle, membership, within

transformers = pytest.importorskip('transformers', reason='this checks models of transformers')

SWIN = dict(embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4], window_size=7,
            image_size=224, out_features=['stage1', 'stage2', 'stage3', 'stage4'])

SIZES = pytest.mark.parametrize('size', [(128, 192), (112, 200)], ids=str)


class Wrapped(torch.nn.Module):
    """A model whose outputs are all tensors of some depth; with a task where it asks for one."""

    def __init__(self, model, *more):
        super().__init__()
        self.model = model
        self.more = more

    def forward(self, image):
        more = [x.to(image.device) for x in self.more]
        out = self.model(image, *[x[:len(image)] for x in more])
        return out.class_queries_logits, out.masks_queries_logits


def mask2former(**config):
    return Wrapped(transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN), feature_size=32, mask_feature_size=32,
        hidden_dim=32, num_attention_heads=4, encoder_feedforward_dim=32, dim_feedforward=32,
        encoder_layers=1, decoder_layers=5, num_queries=9, num_labels=5, **config)))


def levels(size, strides=(32, 16, 8)):
    return [tuple(-(-side // stride) for side in size) for stride in strides]


@pytest.mark.parametrize('pre_norm', [False, True])
@SIZES
def test_mask2former(size, pre_norm):
    check_decoder(mask2former(pre_norm=pre_norm), torch.randn(2, 3, *size), levels(size),
                  'cross_attn', rest=4)


@SIZES
def test_maskformer(size):
    """Keys are the last map of the backbone, its own kind of Swin here."""
    model = transformers.MaskFormerForInstanceSegmentation(transformers.MaskFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN), fpn_feature_size=32, mask_feature_size=32,
        decoder_config=transformers.MaskFormerDetrConfig(
            d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32,
            num_queries=9), num_labels=5))
    model = lively(Wrapped(model))
    image = torch.randn(2, 3, *size)
    found = layers(model)
    assert len(found) == 4 + 2
    assert not find_attention(model).unknown
    grids = [(7, 7), *levels(size)]
    for ratio in (2, 3):
        with isr(model, ratio, strict=True), torch.no_grad():
            reduced = first(model(image))
        undo = within(found.values(), [Oracle(partial(by_count, grids), ratio) for _ in found])
        with torch.no_grad():
            exact = first(model(image))
            undo()
            before = first(model(image))
        assert (reduced - before).abs().max() > 100 * TOLERANCE
        assert (reduced - exact).abs().max() < TOLERANCE * max(1, exact.abs().max().item())
    report = report_isr(model, 2, size)
    assert len(report.untouched) == 2
    assert all('queries of the decoder' in reason for reason in report.untouched.values())


def by_count(grids, total):
    return next((grid for grid in grids if grid[0] * grid[1] == total), None)


def oneformer():
    model = transformers.OneFormerForUniversalSegmentation(transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN), conv_dim=32, mask_dim=32, hidden_dim=32,
        num_attention_heads=4, encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1,
        decoder_layers=4, query_dec_layers=2, num_queries=9, num_classes=5, task_seq_len=7,
        is_training=False))
    return Wrapped(model, torch.ones(2, 7))


@SIZES
def test_oneformer(size):
    """Masked layers, and two without a mask that read the finest map."""
    check_decoder(oneformer(), torch.randn(2, 3, *size),
                  [*levels(size), tuple(side // 4 for side in size)], 'multihead_attn', rest=4)


@pytest.mark.parametrize(('model', 'blocks', 'untouched'), [
    (mask2former, 4, 4 + 1), (oneformer, 2 + 3, 2 + 3 + 1)])
def test_reports(model, blocks, untouched):
    """OneFormer looks for masks that hide everything, which takes values: so it is computed."""
    check_report(model().eval(), blocks, untouched)


@torch.no_grad()
@pytest.mark.parametrize('implementation', ['sdpa', 'eager'])
@pytest.mark.parametrize('side', [96, 112])
def test_eomt(side, implementation):
    """Queries join the sequence, in front, in the last blocks, which are masked there."""
    model = transformers.EomtForUniversalSegmentation(transformers.EomtConfig(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        image_size=side, patch_size=16, num_register_tokens=2, num_blocks=2, num_queries=7,
        num_labels=5))
    model.set_attn_implementation(implementation)
    model = lively(Wrapped(model))
    image, found = torch.randn(2, 3, side, side), layers(model)
    assert len(found) == 4
    before = first(model(image))
    for ratio in (2, 3):
        with isr(model, ratio, strict=True):
            reduced = first(model(image))
        for module in found.values():
            module.forward = partial(plain_eomt, module, ratio, (side // 16, side // 16))
        exact = first(model(image))
        for module in found.values():
            del module.forward
        assert (reduced - before).abs().max() > 100 * TOLERANCE
        assert (reduced - exact).abs().max() < TOLERANCE * max(1, exact.abs().max().item())
    assert torch.equal(first(model(image)), before)
    report = report_isr(model, 2, (side, side))
    assert not report.untouched
    assert report.macs[1] < report.macs[0]


def plain_eomt(module, ratio, grid, hidden_states, attention_mask=None):
    heads = [layer(hidden_states).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
             for layer in (module.q_proj, module.k_proj, module.v_proj)]
    scores = heads[0] @ heads[1].transpose(-2, -1) * module.scale
    masked = None
    if attention_mask is not None:
        masked = attention_mask < -1e8
        # Its mask adds 1 to what is seen.
        scores = scores + 1.
    total = hidden_states.shape[1]
    member = membership(grid, ratio, total - grid[0] * grid[1], total)
    out = plain_attention(scores, heads[2], member, masked)
    return module.out_proj(out.transpose(1, 2).flatten(2)), None
