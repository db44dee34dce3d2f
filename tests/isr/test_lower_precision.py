"""ISR in bfloat16, by the fused kernels of attention, and compiled for the device."""

import pytest
import torch
from mmseg.registry import MODELS
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmseg_edaformer.isr import isr
from tests.conftest import segmentor_config

from .check import first, strengthen

pytestmark = pytest.mark.gpu
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def build(name):
    """A small model and the size of its image."""
    if name.startswith('timm'):
        timm = pytest.importorskip('timm', reason='timm is not installed')
        if name == 'timm ViT':
            return timm.create_model('vit_tiny_patch16_224', img_size=96, embed_dim=64, depth=2,
                                     num_heads=4, num_classes=0), (96, 96)
        return timm.create_model(
            'swin_tiny_patch4_window7_224', img_size=112, embed_dim=32, depths=(2, 2, 1, 1),
            num_heads=(1, 2, 4, 8), num_classes=0), (112, 112)
    if name == 'SegFormer':
        transformers = pytest.importorskip('transformers', reason='transformers is not installed')
        return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
            decoder_hidden_size=32, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1],
            num_attention_heads=[1, 2, 4, 8])), (136, 200)
    if name == 'mmseg MiT':
        return MODELS.build(dict(
            type='MixVisionTransformer', num_stages=1, embed_dims=32, num_heads=[2],
            num_layers=[1], sr_ratios=[4], patch_sizes=[7], strides=[4], out_indices=(0,))), (
                104, 152)
    return MODELS.build(segmentor_config()), (128, 192)


MODEL_NAMES = ['timm ViT', 'timm Swin', 'SegFormer', 'mmseg MiT', 'EDAFormer']


@pytest.fixture
def case(request, device):
    """A model on the device, an image, and what float32 makes of it at ratio 2."""
    model, size = build(request.param)
    if request.param == 'EDAFormer':
        model.init_weights()
    model = strengthen(model).to(device)
    image = torch.randn(2, 3, *size).to(device)
    with torch.no_grad():
        with isr(model, 2, strict=True):
            reduced = first(model(image))
        assert error(first(model(image)), reduced) > 0.05, 'a reduction that shows'
    return model, image, reduced


def error(found, expected):
    """Mean difference relative to the standard deviation."""
    return (found.float() - expected).abs().mean() / expected.std()


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('case', MODEL_NAMES, indirect=True)
@torch.no_grad()
def test_bfloat16(case, autocast, device):
    """In fused kernels: PyTorch raises where none of them takes these shapes, types and masks."""
    model, image, expected = case
    if autocast:
        context = torch.autocast(device.type, torch.bfloat16)
    else:
        model, image, context = model.bfloat16(), image.bfloat16(), sdpa_kernel(FUSED)
    with context, isr(model, 2):
        assert error(first(model(image)), expected) < 0.03


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('case', ['timm ViT', 'mmseg MiT'], indirect=True)
@torch.no_grad()
def test_compiled(case, dynamic, device):
    """By inductor on a GPU; on a CPU that would take too long."""
    model, image, expected = case
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=dynamic,
                             backend='inductor' if device.type == 'cuda' else 'eager')
    with isr(model, 2):
        torch.testing.assert_close(first(compiled(image)), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(first(compiled(image)), first(model(image)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('case', MODEL_NAMES, indirect=True)
def test_reduced_models_train(case):
    model, image, _ = case
    with isr(model, 2):
        first(model.train()(image)).square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(grads) > 0.8 * len(list(model.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
