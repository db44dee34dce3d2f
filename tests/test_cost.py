"""Costs by hand: what is counted is what is written down here."""
import pytest
import torch
from mmseg.registry import MODELS
from torch import nn

from mmseg_edaformer.cost import count_macs
from mmseg_edaformer.isr import isr, report_isr


def half(keys, ratio):
    return -(-keys // ratio)


def block(queries, keys, width, hidden, projected=None):
    """One block: projections, scores and weighted values, feed-forward without convolution.

    ``projected`` tokens become keys and values; by default as many as the queries meet.
    """
    return (2 * queries + 2 * (projected or keys)) * width ** 2 + 2 * queries * keys * width + (
        2 * queries * width * hidden)


@pytest.mark.parametrize('ratio', [1, 2, 3])
def test_vision_transformer(ratio):
    """With a class token: keys are 1 + ceil(6 / r) ceil(10 / r); 60 patches of 16 x 16."""
    model = MODELS.build(dict(type='VisionTransformer', embed_dims=48, num_layers=2, num_heads=4,
                              img_size=(96, 160), patch_size=16, mlp_ratio=2, final_norm=False))
    tokens = 1 + 6 * 10
    keys = 1 + half(6, ratio) * half(10, ratio)
    patches = 60 * 16 * 16 * 3 * 48
    # Keys and values are projected from reduced tokens.
    expected = patches + 2 * block(tokens, keys, 48, 96)
    with isr(model, ratio):
        assert count_macs(model, (96, 160)) == expected
    assert report_isr(model, ratio, (96, 160)).macs == (patches + 2 * block(tokens, tokens, 48, 96),
                                                        expected)


@pytest.mark.parametrize('ratio', [1, 2, 3])
def test_mit(ratio):
    """One stage of 24 x 40 tokens, whose keys a convolution of stride 4 makes 6 x 10."""
    model = MODELS.build(dict(type='MixVisionTransformer', embed_dims=16, num_stages=1,
                              num_layers=[2], num_heads=[1], patch_sizes=[7], strides=[4],
                              sr_ratios=[4], mlp_ratio=2, out_indices=(0,)))
    tokens, keys = 24 * 40, 6 * 10
    patches = tokens * 7 * 7 * 3 * 16
    per_block = block(tokens, half(6, ratio) * half(10, ratio), 16, 32) + (
        keys * 4 * 4 * 16 * 16 + tokens * 3 * 3 * 32)  # the stride, and the feed-forward's
    with isr(model, ratio):
        assert count_macs(model, (96, 160)) == patches + 2 * per_block


@pytest.mark.parametrize('ratio', [1, 2, 3])
def test_swin(ratio):
    """Windows of 7 on a map of 21 x 28; the second block is shifted by 3, where 3 does not fit."""
    model = MODELS.build(dict(type='SwinTransformer', embed_dims=24, depths=[2], num_heads=[2],
                              strides=(4,), mlp_ratio=2, out_indices=(0,)))
    windows, tokens = 3 * 4, 21 * 28
    patches = tokens * 4 * 4 * 3 * 24
    expected = patches
    for shifted in (False, True):
        keys = half(7, 1 if shifted and ratio == 3 else ratio) ** 2
        # Each query meets the keys of its own window.
        expected += block(tokens, keys, 24, 48, projected=windows * keys)
    with isr(model, ratio):
        assert count_macs(model, (84, 112)) == expected


class Asking(nn.Module):
    """An attention over the tokens that a mask lets through, which takes the mask's values."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.scale = attention, nn.Parameter(torch.ones(1))
        self.register_buffer('step', torch.zeros((), dtype=torch.long))

    def forward(self, image):
        tokens = (image.flatten(2).transpose(1, 2)[..., :1] * self.scale).expand(-1, -1, 8)
        tokens = tokens[:, torch.where(tokens[0, :, 0] < 1e9 + self.step)[0]].contiguous()
        if isinstance(self.attention, nn.Module):
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.attention(*[tokens.unsqueeze(1)] * 3)


@pytest.mark.parametrize('attention', [nn.functional.scaled_dot_product_attention,
                                       nn.MultiheadAttention(8, 2, batch_first=True)], ids=str)
def test_a_model_that_takes_values(attention):
    """It runs with its own weights, which stay as they are; no fused attention hides its cost."""
    model = Asking(attention).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = 2 * 48 * 48 * 8
    if isinstance(attention, nn.Module):
        expected += 4 * 48 * 8 * 8
    assert count_macs(model, (6, 8)) == expected
    with pytest.raises(NotImplementedError):
        count_macs(model, (6, 8), compute=False)
    assert all(torch.equal(value, state[name]) and value.device.type == 'cpu'
               for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_fails():
    """The error is the model's own, not that of the meta device."""
    class Failing(nn.Module):
        def forward(self, image):
            if image.sum().item():
                raise KeyError('its own')

    with pytest.raises(KeyError, match='its own'):
        count_macs(Failing(), (6, 8))
