"""ISR on torchvision's transformers, and on the encoder of segmentation-models-pytorch."""
import pytest
import torch

import mmseg_edaformer  # noqa: F401  makes torchvision importable
from mmseg_edaformer.isr.registry import find_attention

from .check import check_adapter, lively, reduced

pytest.importorskip('torchvision', reason='torchvision is not installed')


@pytest.mark.parametrize('stem', [False, True])
@pytest.mark.parametrize('side', [96, 80])
def test_vit(side, stem):
    """Its attention is torch's, batch first."""
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer
    convolutions = [ConvStemConfig(16, 3, 2)] * 4 if stem else None
    model = VisionTransformer(side, 16, 2, 4, 48, 64, conv_stem_configs=convolutions)
    torch.nn.init.normal_(model.heads.head.weight)
    check_adapter(model, torch.randn(2, 3, side, side), [(side // 16, side // 16)], prefix=1,
                  expected=2, compiled=not stem and side == 80)


@pytest.mark.parametrize('size', [(112, 112), (100, 132)], ids=str)
@pytest.mark.parametrize('version', [1, 2])
def test_swin(version, size):
    """Windows of one function's own; each second block's are shifted by 3."""
    from torchvision.models import swin_transformer as swin
    block, merging = [(swin.SwinTransformerBlock, swin.PatchMerging),
                      (swin.SwinTransformerBlockV2, swin.PatchMergingV2)][version - 1]
    model = swin.SwinTransformer([4, 4], 24, [2, 2], [1, 2], [7, 7], block=block,
                                 downsample_layer=merging)
    check_adapter(model, torch.randn(1, 3, *size), [(7, 7)], expected=4, compiled=False)


def test_maxvit():
    """Windows, and grids of tokens that lie far apart."""
    from torchvision.models.maxvit import MaxVit
    model = lively(MaxVit((96, 96), 8, 3, [16, 24], [1, 1], 8, 0.))
    check_adapter(model, torch.randn(1, 3, 96, 96), [(3, 3)], expected=4, compiled=False)


@pytest.mark.parametrize('size', [(128, 192), (160, 224)], ids=str)
def test_segformer_of_smp(size):
    """Its MiT is a copy, whose arguments have other names."""
    smp = pytest.importorskip('segmentation_models_pytorch',
                              reason='segmentation-models-pytorch is not installed')
    model = smp.Segformer('mit_b0', encoder_weights=None, decoder_segmentation_channels=16)
    check_adapter(model, torch.randn(1, 3, *size), reduced(*size), expected=8,
                  compiled=size == (160, 224))


def test_nothing_in_volumes():
    """Keys of several frames are left alone."""
    from torchvision.models.video import mvit_v2_s, swin3d_t
    for model in mvit_v2_s, swin3d_t:
        with torch.device('meta'):
            found = find_attention(model())
        assert not found.parts
        assert not found.unknown
        assert all('volume' in reason for reason in found.irreducible.values())
