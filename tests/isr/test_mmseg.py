"""ISR on mmsegmentation's own transformers."""
import pytest
import torch
from mmengine import ConfigDict
from mmseg.models.decode_heads import san_head
from mmseg.registry import MODELS

from .check import check_adapter


def sizes(height, width, reductions=(1,), strides=(4, 8, 16, 32)):
    """Grids of the keys: the maps of each stage, reduced by strided convolutions that round down.

    Patch embeddings round up.
    """
    return [(-(-height // stride) // reduction, -(-width // stride) // reduction)
            for stride, reduction in zip(strides, reductions * len(strides))]


SMALL = dict(embed_dims=8, num_heads=[1, 2, 4, 8])


@pytest.mark.gpu
@pytest.mark.parametrize('size', [(128, 192), (136, 200)], ids=str)
def test_mit(size, device):
    model = MODELS.build(dict(type='MixVisionTransformer', num_layers=[1, 1, 2, 1],
                              sr_ratios=[8, 4, 2, 1], **SMALL))
    check_adapter(model, torch.randn(2, 3, *size).to(device), sizes(*size, (8, 4, 2, 1)),
                  expected=5)


def shifted(name, ratio):
    """Windows of 7 that are shifted by 3 allow cells of 1, 2 and 4."""
    odd = int(name.split('.')[3]) % 2
    return 1 if odd and ratio == 3 else ratio


@pytest.mark.gpu
@pytest.mark.parametrize('size', [(112, 112), (100, 120)], ids=str)
def test_swin(size, device):
    model = MODELS.build(dict(type='SwinTransformer', embed_dims=24, depths=[2, 2, 2, 1],
                              num_heads=[1, 2, 3, 4]))
    check_adapter(model, torch.randn(1, 3, *size).to(device), [(7, 7)], ratio_of=shifted,
                  expected=7)


@pytest.mark.parametrize('size', [(96, 96), (80, 112)], ids=str)
@pytest.mark.parametrize('with_cls_token', [True, False])
def test_vit(size, with_cls_token):
    model = MODELS.build(dict(type='VisionTransformer', embed_dims=48, num_layers=2, num_heads=4,
                              img_size=(64, 64), patch_size=16, with_cls_token=with_cls_token,
                              output_cls_token=False))
    check_adapter(model, torch.randn(2, 3, *size), [(size[0] // 16, size[1] // 16)],
                  prefix=int(with_cls_token), expected=2)


@pytest.mark.parametrize('size', [(96, 96), (80, 112)], ids=str)
def test_beit(size):
    model = MODELS.build(dict(type='BEiT', embed_dims=48, num_layers=2, num_heads=4,
                              img_size=size))
    check_adapter(model, torch.randn(2, 3, *size), [(size[0] // 16, size[1] // 16)], prefix=1,
                  expected=2)


@pytest.mark.parametrize('size', [(128, 192), (136, 200)], ids=str)
def test_pcpvt(size):
    model = MODELS.build(dict(type='PCPVT', in_channels=3, embed_dims=[8, 16, 32, 64],
                              num_heads=[1, 2, 4, 8], patch_sizes=[4, 2, 2, 2],
                              strides=[4, 2, 2, 2], mlp_ratios=[2, 2, 2, 2],
                              depths=[1, 1, 1, 1], sr_ratios=[8, 4, 2, 1],
                              out_indices=(0, 1, 2, 3), norm_after_stage=False))
    check_adapter(model, torch.randn(2, 3, *size), sizes(*size, (8, 4, 2, 1)), expected=4)


@pytest.mark.parametrize('size', [(128, 192), (136, 200), (112, 136)], ids=str)
def test_svt(size):
    """Windows at the border are padded on both sides, which is masked, or on one, which is not."""
    model = MODELS.build(dict(type='SVT', in_channels=3, embed_dims=[8, 16, 32, 64],
                              num_heads=[1, 2, 4, 8], patch_sizes=[4, 2, 2, 2],
                              strides=[4, 2, 2, 2], mlp_ratios=[2, 2, 2, 2],
                              depths=[2, 2, 2, 2], sr_ratios=[8, 4, 2, 1],
                              windiow_sizes=[7, 7, 7, 7], out_indices=(0, 1, 2, 3),
                              norm_after_stage=False))
    check_adapter(model, torch.randn(2, 3, *size), [(7, 7), *sizes(*size, (8, 4, 2, 1))],
                  expected=8, masked=-500)


class SideAdapter(torch.nn.Module):
    """SAN's small transformer, without the features of CLIP that it can take in."""

    def __init__(self):
        super().__init__()
        self.network = san_head.SideAdapterNetwork(
            embed_dims=24, num_queries=5, fusion_index=[9],
            cfg_encoder=ConfigDict(num_encode_layer=2, num_heads=4, mlp_ratio=2),
            cfg_decoder=ConfigDict(num_heads=2, num_layers=1, embed_channels=8, mlp_channels=8,
                                   num_mlp=1, rescale=False))
        torch.nn.init.normal_(self.network.query_embed)

    def forward(self, image):
        return self.network.encode_feature(image, [None], [])[0]


@pytest.mark.parametrize('size', [(96, 96), (80, 112)], ids=str)
def test_side_adapter(size, monkeypatch):
    """Queries stand in front of the patches."""
    # The fork's class asks for an operator of mmcv that only its losses need.
    monkeypatch.setattr(san_head, 'point_sample', print, raising=False)
    check_adapter(SideAdapter(), torch.randn(2, 3, *size), [(size[0] // 16, size[1] // 16)],
                  prefix=5, expected=2, compiled=False)
