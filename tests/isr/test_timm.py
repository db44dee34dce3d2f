"""ISR on timm's transformers."""
import copy
import itertools
import math

import pytest
import torch

import mmseg_edaformer  # noqa: F401  makes torchvision importable, which timm needs
from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import apply_isr
from mmseg_edaformer.isr.registry import find_attention

from .check import check_adapter, layers, lively

timm = pytest.importorskip('timm', reason='timm is not installed')

SMALL = dict(embed_dim=48, depth=2, num_heads=4, num_classes=0)


def build(name, fused=True, **kwargs):
    """A model with random weights and layer scales of 1.

    ``fused`` chooses between `scaled_dot_product_attention` and matrix products.
    """
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = fused
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
    for key, parameter in model.named_parameters():
        if 'gamma' in key:
            torch.nn.init.ones_(parameter)
    return model


def image(*size, device='cpu'):
    return torch.randn(1, 3, *size).to(device)


def on_gpu(*values):
    """Parameters of a case that stands for others on a GPU."""
    return pytest.param(*values, marks=pytest.mark.gpu)


PLAIN = [
    on_gpu('vit_tiny_patch16_224', 1, dict(dynamic_img_size=True, global_pool='token')),
    ('vit_tiny_patch16_224', 4, dict(dynamic_img_size=True, reg_tokens=3)),
    ('vit_tiny_patch16_224', 0, dict(dynamic_img_size=True, class_token=False,
                                     global_pool='avg')),
    ('vit_tiny_patch16_224', 0, dict(dynamic_img_size=True, class_token=False,
                                     global_pool='map')),
    ('deit_tiny_distilled_patch16_224', 2, dict(dynamic_img_size=True)),
    on_gpu('beit_base_patch16_224', 1, {}),
    ('beitv2_base_patch16_224', 1, dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)),
    ('eva02_tiny_patch14_224', 1, dict(patch_size=16)),
    ('vit_relpos_small_patch16_224', 0, {}),
    ('vit_relpos_base_patch32_plus_rpn_256', 0, dict(patch_size=16)),
]


SIZES = pytest.mark.parametrize('size', [(96, 96), (80, 112)], ids=str)
BOTH = pytest.mark.parametrize(('size', 'fused'), [((96, 96), True), ((80, 112), False)], ids=str)


@BOTH
@pytest.mark.parametrize(('name', 'prefix', 'kwargs'), PLAIN)
def test_vit(name, prefix, kwargs, size, fused, device):
    model = build(name, fused, img_size=size, **SMALL, **kwargs)
    check_adapter(model, image(*size, device=device), [(size[0] // 16, size[1] // 16)],
                  prefix=prefix, expected=3 if kwargs.get('global_pool') == 'map' else 2,
                  compiled=fused)


def windows(model):
    """Grids of each layer's window, and the ratio it gets if the block around is shifted."""
    found = layers(model)

    def grids(name):
        return [tuple(found[name].window_size)]

    def ratio(name, asked):
        shift = model.get_submodule(name.rpartition('.')[0]).shift_size
        free = all(not step or (side - step) % asked == 0
                   for side, step in zip(found[name].window_size, shift))
        return asked if free else 1

    return grids, ratio


SWIN = dict(embed_dim=24, depths=(2, 2, 1, 1), num_heads=(1, 2, 3, 4), num_classes=0)


@pytest.mark.parametrize(('name', 'size', 'kwargs', 'fused'), [
    on_gpu('swin_tiny_patch4_window7_224', (112, 112), {}, True),
    on_gpu('swin_tiny_patch4_window7_224', (104, 120), {}, False),
    on_gpu('swinv2_tiny_window8_256', (128, 128), {}, True),
    ('swinv2_tiny_window8_256', (96, 160), {}, True),
    ('swinv2_cr_tiny_224', (112, 112), dict(window_size=7), True),
])
def test_swin(name, size, kwargs, fused, device):
    model = build(name, fused, img_size=size, **SWIN, **kwargs)
    grids, ratio = windows(model)
    check_adapter(model, image(*size, device=device), grids, ratio_of=ratio, expected=6,
                  compiled=name == 'swinv2_cr_tiny_224')


def sizes(height, width, reductions=(1,), strides=(4, 8, 16, 32)):
    """Grids of the keys: the maps of each stage, reduced by strided convolutions."""
    return [(-(-height // stride) // reduction, -(-width // stride) // reduction)
            for stride, reduction in zip(strides, itertools.cycle(reductions))]


PYRAMID = dict(embed_dims=(8, 16, 32, 64), depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8),
               num_classes=0)


@BOTH
def test_davit(size, fused):
    model = build('davit_tiny', fused, **PYRAMID)
    check_adapter(model, image(*size), [(7, 7)], expected=5, compiled=False)
    reasons = set(find_attention(model).irreducible.values())
    assert reasons == {'ChannelAttention: its keys are channels, not tokens'}


@pytest.mark.parametrize(('size', 'fused'), [((128, 192), True), ((136, 200), False)], ids=str)
@pytest.mark.parametrize('name', ['pvt_v2_b0', 'pvt_v2_b2_li'])
def test_pvt_v2(name, size, fused):
    model = build(name, fused, **PYRAMID)
    grids = [(7, 7)] if name.endswith('li') else sizes(*size, (8, 4, 2, 1))
    check_adapter(model, image(*size), grids, expected=5,
                  compiled=fused and name == 'pvt_v2_b2_li')


@pytest.mark.parametrize(('size', 'fused'), [((128, 192), True), ((160, 96), False)], ids=str)
@pytest.mark.parametrize('name', ['twins_pcpvt_small', on_gpu('twins_svt_small')])
def test_twins(name, size, fused, device):
    model = build(name, fused, img_size=size, **PYRAMID)
    check_adapter(model, image(*size, device=device), [(7, 7), *sizes(*size, (8, 4, 2, 1))],
                  expected=5, compiled=fused and name == 'twins_svt_small')


@pytest.mark.parametrize('cls', [False, True])
@pytest.mark.parametrize('side', [96, 160])
def test_mvitv2(cls, side):
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
    model = MultiScaleVit(MultiScaleVitCfg(depths=(1, 2, 1, 1), embed_dim=(16, 32, 48, 64),
                                           num_heads=(1, 2, 3, 4), use_cls_token=cls),
                          img_size=side, num_classes=0)
    grids = [(math.ceil(side / 4 / stride),) * 2 for stride in (4, 2, 1)]
    check_adapter(model, image(side, side), grids, prefix=int(cls), expected=5,
                  compiled=not cls and side == 96)


def places(model):
    """The order of Hiera's tokens, by its own sorting of the number of each."""
    def order(grid):
        unroll = copy.copy(model.unroll)
        unroll.size = list(grid)
        steps = next(n for n in range(4) if grid in ((8 >> n, 8 >> n), (24 >> n, 32 >> n)))
        unroll.schedule = unroll.schedule[steps:]
        numbers = torch.arange(grid[0] * grid[1]).view(1, -1, 1)
        return unroll(numbers).flatten().argsort()
    return order


@pytest.mark.gpu
@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'explicit'])
def test_hiera(fused, device):
    """Windows of 8 and 4, then all tokens; the blocks that change the width see the larger ones."""
    model = build('hiera_tiny_224', fused, img_size=(96, 128), embed_dim=16, stages=(1, 2, 2, 1),
                  num_classes=0)
    grids = [(8, 8), (4, 4), (12, 16), (6, 8)]
    check_adapter(model, image(96, 128, device=device), grids, order=places(model), expected=6,
                  compiled=fused)


def test_hiera_that_a_mask_left_tokens_out_of():
    """A quarter of the tokens of one map are as many as all of the next one, but lie on none."""
    from mmseg_edaformer.isr.reduction import recording
    model = build('hiera_tiny_224', img_size=(64, 64), embed_dim=16, stages=(1, 1, 2, 1),
                  num_classes=0)
    mask = torch.tensor([[True, False, False, False]])
    apply_isr(model, 2)
    with recording() as records:
        model.forward_features(image(64, 64), mask=mask)
    assert [record.keys for record in records.values()] == [(64, 16)] * 2 + [(16, 4)] + [None] * 2


@pytest.mark.parametrize(('name', 'size', 'grids', 'prefix', 'expected', 'kwargs'), [
    ('cait_xxs24_224', (80, 112), [(5, 7)], None, 4, dict(img_size=(80, 112), **SMALL)),
    ('xcit_nano_12_p16_224', (80, 112), [(5, 7)], 1, 2, SMALL),
    ('sam2_hiera_tiny', (96, 128), [(8, 8), (4, 4), (12, 16), (14, 14)], 0, 5,
     dict(embed_dim=16, stages=(1, 2, 1, 1), global_att_blocks=(2,), num_classes=0)),
    ('tiny_vit_5m_224', (112, 96), [(7, 7), (14, 14)], 0, 4,
     dict(embed_dims=(16, 32, 32, 64), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4),
          num_classes=0)),
    ('samvit_base_patch16', (96, 96), [(4, 4), (6, 6)], 0, 2,
     dict(img_size=96, window_size=4, global_attn_indexes=(1,), **SMALL)),
    ('vit_base_patch16_siglip_224', (80, 112), [(5, 7)], 0, 3,
     dict(img_size=(80, 112), **SMALL)),
])
@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'explicit'])
def test_others(name, size, grids, prefix, expected, kwargs, fused):
    check_adapter(build(name, fused, **kwargs), image(*size), grids, prefix=prefix,
                  expected=expected, compiled=fused and name.startswith(('cait', 'samvit')))


CONVOLUTIONAL = [
    # What attends at the deeper stages of networks of convolutions.
    ('levit_128s', (112, 112), [(7, 7), (4, 4), (2, 2)], 11, dict(img_size=112)),
    ('coatnet_nano_rw_224', (128, 128), [(8, 8), (4, 4)], 9, dict(img_size=128)),
    ('maxvit_rmlp_pico_rw_256', (128, 128), [(4, 4)], 22, dict(img_size=128)),
    ('visformer_tiny', (128, 96), [(8, 6), (4, 3)], 8, dict(img_size=(128, 96))),
    ('fastvit_sa12', (128, 160), [(4, 5)], 2, {}),
    ('efficientformerv2_s0', (128, 128), [(8, 8), (4, 4)], 5, dict(img_size=128)),
    ('efficientvit_m0', (128, 128), [(7, 7), (4, 4), (2, 2)], 6, dict(img_size=128)),
    ('mobilenetv4_hybrid_medium', (128, 160), [(4, 5)], 8, {}),
    ('gcvit_xxtiny', (128, 128), [(4, 4), (8, 8)], 12, dict(img_size=128)),
    ('nest_tiny', (112, 112), [(7, 7)], 12, dict(img_size=112)),
    ('caformer_s18', (128, 160), [(8, 10), (4, 5)], 12, {}),
    ('efficientformer_l1', (224, 224), [(7, 7)], 1, {}),
    ('lowformer_b0', (224, 160), [(4, 3), (7, 5)], 7, {}),
    ('cpubone_b0_bfrobust', (224, 160), [(4, 3), (7, 5)], 7, {}),
]


@pytest.mark.parametrize(('name', 'size', 'grids', 'expected', 'kwargs'), CONVOLUTIONAL)
def test_convolutional(name, size, grids, expected, kwargs):
    model = build(name, False, num_classes=0, **kwargs)
    check_adapter(model, image(*size), grids, ratios=(3,), expected=expected, compiled=False)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(('name', 'size', 'grid', 'kwargs'), [
    ('bottleneck', (80, 112), (5, 7), dict(feat_size=(5, 7), scale_pos_embed=True)),
    ('bottleneck', (96, 96), (6, 6), dict(feat_size=(6, 6))),
    ('halo', (128, 192), (6, 6), dict(block_size=4, halo_size=1)),
])
def test_in_place_of_convolutions(name, size, grid, kwargs, stride):
    """Keys of a map, or of windows that overlap; relative positions follow from the queries."""
    attention = timm.layers.get_attn(name)(16, stride=stride, num_heads=4, **kwargs)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 16, 16), attention)
    check_adapter(model, image(*size), [grid], expected=1, compiled=False)


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'explicit'])
@pytest.mark.parametrize('separate', [True, False])
@pytest.mark.parametrize(('token', 'rotary'), [(False, False), (True, False), (False, True)])
def test_pooling_of_clip(token, rotary, separate, fused):
    """One query, behind a token of its own or the mean of the map, pools a map."""
    from timm.layers import AttentionPool2d, RotAttentionPool2d
    cls, feature = (RotAttentionPool2d, 'ref_feat_size') if rotary else (
        AttentionPool2d, 'feat_size')
    pool = cls(16, **{feature: (5, 7)}, num_heads=4, class_token=token, qkv_separate=separate)
    pool.fused_attn = fused
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 16, 16), pool)
    check_adapter(model, image(80, 112), [(5, 7)], prefix=1, expected=1, compiled=False)


def unfolded(height, width):
    """Every second token of the maps of a MobileViT."""
    return [(-(-height // stride), -(-width // stride)) for stride in (16, 32, 64)]


@pytest.mark.parametrize('size', [(128, 192), (136, 200)], ids=str)
def test_mobilevit(size):
    """Tokens at the same place of each patch of 2 x 2 see each other."""
    model = lively(build('mobilevit_xxs', False, num_classes=0))
    check_adapter(model, image(*size), unfolded(*size), expected=9, compiled=False)


@pytest.mark.parametrize('distilled', [True, False])
def test_pit(distilled):
    """Tokens and maps of three stages, pooled apart."""
    from timm.models.pit import PoolingVisionTransformer
    model = PoolingVisionTransformer((80, 112), 16, 8, 'overlap', (12, 12, 12), (1, 2, 1),
                                     (2, 4, 8), 2.0, distilled=distilled)
    check_adapter(model, image(80, 112), [(9, 13), (5, 7), (3, 4)], prefix=1 + distilled,
                  expected=4, compiled=False)


@pytest.mark.parametrize('convolutions', [True, False])
def test_crossvit(convolutions):
    """Patches of two sizes, whose class tokens see each other's."""
    from timm.models.crossvit import CrossVit
    model = CrossVit((72, 96), (1.0, 2 / 3), patch_size=(12, 16), embed_dim=(16, 24),
                     depth=((1, 2, 0), (1, 1, 1)), num_heads=(2, 2), multi_conv=convolutions)
    check_adapter(model, image(72, 96), [(6, 8), (3, 4)], prefix=1, expected=9, compiled=False)


@BOTH
def test_volo(size, fused):
    """Its class attention sees the map of its second stage; its outlook attention has no keys."""
    from timm.models.volo import VOLO
    model = VOLO((1, 1, 1), img_size=size, num_classes=5, embed_dims=(24, 48, 48),
                 num_heads=(2, 4, 4), downsamples=(True, False, False),
                 outlook_attention=(True, False, False), mlp_ratio=2.0, use_aux_head=False)
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = fused
    check_adapter(model, image(*size), [(size[0] // 16, size[1] // 16)], prefix=None, expected=4,
                  compiled=fused)
    reason = 'it has no keys: each query predicts the weights of its neighbours'
    assert list(find_attention(model).irreducible.values()) == [f'OutlookAttention: {reason}']


@BOTH
@pytest.mark.parametrize('kind', ['parallel', 'differential', 'both'])
def test_vit_blocks(kind, size, fused):
    from timm.layers import DiffAttention
    from timm.models import vision_transformer as vit
    kwargs = {'parallel': dict(block_fn=vit.ParallelScalingBlock),
              'both': dict(block_fn=vit.DiffParallelScalingBlock),
              'differential': dict(attn_layer=DiffAttention)}
    model = vit.VisionTransformer(img_size=size, **SMALL, **kwargs[kind])
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = fused
    check_adapter(model, image(*size), [(size[0] // 16, size[1] // 16)], prefix=1, expected=2,
                  compiled=fused)


@SIZES
def test_rotary_vit(size):
    from timm.models.eva import Eva
    model = Eva(img_size=size, use_rot_pos_emb=True, attn_type='rope', **SMALL)
    check_adapter(model, image(*size), [(size[0] // 16, size[1] // 16)], prefix=1, expected=2,
                  compiled=False)


@pytest.mark.parametrize('side', [96, 80])
def test_convit(side):
    """Its first blocks weigh by positions too; the others are plain attention."""
    model = build('convit_tiny', img_size=side, embed_dim=12, depth=3, num_heads=4,
                  local_up_to_layer=1, num_classes=0)
    check_adapter(model, image(side, side), [(side // 16, side // 16)], prefix=1, expected=2,
                  compiled=False)
    assert 'positions alone' in find_attention(model).irreducible['blocks.0.attn']


@SIZES
def test_attention_on_maps(size):
    from timm.layers import Attention2d
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 8, 8), Attention2d(16, num_heads=4))
    check_adapter(model, image(*size), [(size[0] // 8, size[1] // 8)], expected=1, compiled=False)


@pytest.mark.parametrize(('size', 'ratio'), [((96, 96), 2), ((80, 112), 3)], ids=str)
def test_backbone_of_mmseg(size, ratio):
    from mmseg.registry import MODELS
    model = MODELS.build(dict(
        type='TIMMBackbone', model_name='pvt_v2_b0', features_only=True, pretrained=False,
        embed_dims=PYRAMID['embed_dims'], depths=PYRAMID['depths'],
        num_heads=PYRAMID['num_heads']))
    check_adapter(model, image(*size), sizes(*size, (8, 4, 2, 1)), ratios=(ratio,), expected=5,
                  compiled=False)


@pytest.mark.parametrize(('name', 'reason'), [
    ('edgenext_xx_small', 'keys are channels'),
    ('nextvit_small', 'keys lie on no grid'),
    ('mobilevitv2_050', 'cost linear'),
    ('naflexvit_base_patch16_gap', 'no patch_embed.proj around it'),
    ('coat_tiny', 'cost linear'),
])
def test_nothing_to_reduce(name, reason):
    """A model without keys that ISR can reduce is refused, and says why."""
    with torch.device('meta'):
        model = timm.create_model(name)
    with pytest.raises(RatioError, match=reason):
        apply_isr(model, 2)


class Adapted(torch.nn.Linear):
    """A layer that adds to what its weights give, as low-rank adapters do."""

    def forward(self, x):
        return super().forward(x) + x.flip(-1).repeat(1, 1, self.out_features // x.shape[-1])


@pytest.mark.parametrize('change', ['adapter', 'hook', 'other forward'])
def test_what_is_no_plain_projection_sees_all_tokens(change):
    """Keys and values are then reduced after it, where the queries meet them."""
    model = build('vit_tiny_patch16_224', img_size=(80, 112), **SMALL)
    for block in model.blocks:
        linear = block.attn.qkv
        if change == 'adapter':
            block.attn.qkv = Adapted(linear.in_features, linear.out_features)
        elif change == 'hook':
            linear.register_forward_hook(scaled)
        else:
            block.attn.__class__ = Rotated
    check_adapter(model, image(80, 112), [(5, 7)], prefix=1, expected=2, compiled=False)


def scaled(module, args, out):
    return out * torch.linspace(1, 2, out.shape[1]).unsqueeze(-1)


class Rotated(timm.layers.Attention):
    """Keys that know where they are, in a class of somebody else."""

    def forward(self, x, *args, **kwargs):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        k = k * torch.linspace(1, 2, k.shape[-2]).unsqueeze(-1)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def test_stages():
    """Twins' two kinds of attention take turns within a stage."""
    model = build('twins_svt_small', **{**PYRAMID, 'depths': (2, 2, 2, 2)})
    parts = find_attention(model).parts
    assert [[len(stage) for stage in part.stages.values()] for part in parts] == [[2] * 4]
