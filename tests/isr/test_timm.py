"""ISR on timm's transformers."""
import copy
import math
from functools import partial

import pytest
import torch

import mmseg_edaformer  # noqa: F401  makes torchvision importable, which timm needs
from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import apply_isr
from mmseg_edaformer.isr.registry import find_attention

from .check import (
    PLAIN,
    REDUCED,
    ROWS,
    SQUARE,
    TALL,
    WIDE,
    awake,
    check_adapter,
    lively,
    patches,
    reduced,
    row,
    sizes,
)

timm = pytest.importorskip('timm', reason='timm is not installed')

SMALL = dict(embed_dim=48, depth=2, num_heads=4, num_classes=0)


def build(name, fused=True, **kwargs):
    """A model with random weights, and fused kernels or matrix products."""
    return choose(awake(timm.create_model(name, **kwargs)), fused)


def choose(model, fused):
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = fused
    return model


def image(*size):
    return torch.randn(1, 3, *size)


def unfolded(height, width):
    """Every second token of the maps of a MobileViT."""
    return [(-(-height // stride), -(-width // stride)) for stride in (16, 32, 64)]


def mvit(size, number, cls):
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 1, 1), embed_dim=(16, 32, 48),
                                          num_heads=(1, 2, 3), use_cls_token=cls),
                         img_size=size[0], num_classes=0)


def pit(size, number, distilled):
    from timm.models.pit import PoolingVisionTransformer
    return PoolingVisionTransformer(size, 16, 8, 'overlap', (12, 12, 12), (1, 2, 1), (2, 4, 8),
                                    2.0, distilled=distilled)


def crossvit(size, number, convolutions):
    from timm.models.crossvit import CrossVit
    return CrossVit(size, (1.0, 2 / 3), patch_size=(12, 16), embed_dim=(16, 24),
                    depth=((1, 2, 0), (1, 1, 1)), num_heads=(2, 2), multi_conv=convolutions)


def volo(size, number):
    from timm.models.volo import VOLO
    return choose(VOLO(
        (1, 1, 1), img_size=size, num_classes=5, embed_dims=(24, 48, 48), num_heads=(2, 4, 4),
        downsamples=(True, False, False), outlook_attention=(True, False, False), mlp_ratio=2.0,
        use_aux_head=False), not number)


def vit_of(kind, size, number):
    from timm.layers import DiffAttention
    from timm.models import eva, vision_transformer as vit
    if kind == 'rotary':
        return eva.Eva(img_size=size, use_rot_pos_emb=True, attn_type='rope', **SMALL)
    kwargs = {'parallel': dict(block_fn=vit.ParallelScalingBlock),
              'both': dict(block_fn=vit.DiffParallelScalingBlock),
              'differential': dict(attn_layer=DiffAttention)}
    return choose(vit.VisionTransformer(img_size=size, **SMALL, **kwargs[kind]), not number)


def of_mmseg(size, number):
    from mmseg.registry import MODELS
    return MODELS.build(dict(
        type='TIMMBackbone', model_name='pvt_v2_b0', features_only=True, pretrained=False,
        embed_dims=PYRAMID['embed_dims'], depths=PYRAMID['depths'],
        num_heads=PYRAMID['num_heads']))


def stem(attention):
    """A network around one attention module."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 16, 16), attention)


def in_place(name, size, number, **kwargs):
    """What may stand in place of a convolution."""
    return stem(timm.layers.get_attn(name)(16, num_heads=4, **kwargs))


def clip_pool(size, number, token, rotary, separate, fused):
    """One query, behind a token of its own or the mean of the map, pools a map."""
    from timm.layers import AttentionPool2d, RotAttentionPool2d
    cls, feature = (RotAttentionPool2d, 'ref_feat_size') if rotary else (
        AttentionPool2d, 'feat_size')
    return choose(stem(cls(16, **{feature: (5, 7)}, num_heads=4, class_token=token,
                           qkv_separate=separate)), fused)


def convolutional(name, size, number, **kwargs):
    return build(name, False, num_classes=0, **kwargs)


def order_of_hiera(model, grid):
    """The order of its tokens, by its own sorting of the number of each."""
    unroll = copy.copy(model.unroll)
    unroll.size = list(grid)
    steps = next(n for n in range(4) if grid in ((8 >> n, 8 >> n), (24 >> n, 32 >> n)))
    unroll.schedule = unroll.schedule[steps:]
    return unroll(torch.arange(grid[0] * grid[1]).view(1, -1, 1)).flatten().argsort()


def named(name, kwargs, images, grids, expected=2, **checks):
    """Tests of a model of timm, by fused kernels at the first size and by products at others.

    Arguments of the model may be functions of the size.
    """
    def make(size, number):
        return build(name, not number, **{
            key: value(size) if callable(value) else value for key, value in kwargs.items()})
    return row(make, images, grids, expected, name=name, **checks)


def vit(name, prefix, expected=2, gpu=False, compiled=True, **kwargs):
    return named(name, dict(SIZED, **kwargs), PLAIN, patches, expected, prefix=prefix,
                 compiled=compiled, gpu=gpu, queries=patches)


PYRAMID = dict(embed_dims=(8, 16, 32, 64), depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8),
               num_classes=0)
SIZED = dict(SMALL, img_size=tuple)
SWIN = dict(img_size=tuple, embed_dim=24, depths=(2, 2, 1, 1), num_heads=(1, 2, 3, 4),
            num_classes=0)
CASES = [
    *vit('vit_tiny_patch16_224', 1, dynamic_img_size=True, global_pool='token', gpu=True),
    *vit('vit_tiny_patch16_224', 4, dynamic_img_size=True, reg_tokens=3, compiled=False),
    *(test for pool, layers in (('avg', 2), ('map', 3)) for test in vit(
        'vit_tiny_patch16_224', 0, layers, dynamic_img_size=True, class_token=False,
        global_pool=pool, compiled=pool == 'map')),
    *vit('deit_tiny_distilled_patch16_224', 2, dynamic_img_size=True, compiled=False),
    *vit('beit_base_patch16_224', 1, gpu=True),
    *vit('beitv2_base_patch16_224', 1, use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    *vit('eva02_tiny_patch14_224', 1, patch_size=16),
    *vit('vit_relpos_small_patch16_224', 0),
    *vit('vit_relpos_base_patch32_plus_rpn_256', 0, patch_size=16),
    *named('swin_tiny_patch4_window7_224', SWIN, [(112, 112), (104, 120)], 'window_size', 6,
           gpu=True),
    *named('swinv2_tiny_window8_256', SWIN, [(128, 128)], 'window_size', 6, gpu=True,
           queries=[(8, 8), (4, 4)]),
    *named('swinv2_tiny_window8_256', SWIN, [(96, 160)], 'window_size', 6),
    *named('swinv2_cr_tiny_224', dict(SWIN, window_size=7), [(112, 112)], 'window_size', 6,
           compiled=True),
    *named('davit_tiny', PYRAMID, PLAIN, [(7, 7)], 5,
           irreducible='ChannelAttention: its keys are channels, not tokens'),
    *named('pvt_v2_b0', PYRAMID, REDUCED, reduced, 5, queries=sizes),
    *named('pvt_v2_b2_li', PYRAMID, REDUCED, [(7, 7)], 5, compiled=True),
    *named('twins_pcpvt_small', dict(PYRAMID, img_size=tuple), [WIDE, (160, 96)], reduced, 5,
           queries=sizes),
    *named('twins_svt_small', dict(PYRAMID, img_size=tuple), [WIDE, (160, 96)],
           lambda *size: [(7, 7), *reduced(*size)], 5, compiled=True, gpu=True),
    *(test for cls in (False, True) for test in row(
        partial(mvit, cls=cls), [(96, 96), (160, 160)],
        lambda side, _: [(math.ceil(side / 4 / stride),) * 2 for stride in (4, 2, 1)], 3,
        queries=None if cls else sizes,
        name=f'mvit-{cls}', prefix=int(cls), compiled=not cls)),
    *named('cait_xxs24_224', SIZED, [TALL] * 2, patches, 4, prefix=None, compiled=True),
    *named('xcit_nano_12_p16_224', SMALL, [TALL] * 2, patches, prefix=1),
    # Windows of 8 and 4, then all tokens; the blocks that change the width see the larger ones.
    *named('hiera_tiny_224', dict(img_size=tuple, embed_dim=16, stages=(1, 2, 2, 1),
                                  num_classes=0),
           [(96, 128)] * 2, [(8, 8), (4, 4), (12, 16), (6, 8)], 6, order=order_of_hiera,
           compiled=True, gpu=True),
    *named('sam2_hiera_tiny', dict(embed_dim=16, stages=(1, 2, 1, 1), global_att_blocks=(2,),
                                   num_classes=0),
           [(96, 128)] * 2, [(8, 8), (4, 4), (12, 16), (14, 14)], 5),
    *named('tiny_vit_5m_224', dict(embed_dims=(16, 32, 32, 64), depths=(1, 2, 1, 1),
                                   num_heads=(1, 2, 2, 4), num_classes=0),
           [(112, 96)] * 2, [(7, 7), (14, 14)], 4),
    *named('samvit_base_patch16', dict(SMALL, img_size=96, window_size=4,
                                       global_attn_indexes=(1,)),
           [SQUARE] * 2, [(4, 4), (6, 6)], compiled=True),
    *named('vit_base_patch16_siglip_224', SIZED, [TALL] * 2, patches, 3),
    *row(lambda *_: lively(build('mobilevit_xxs', False, num_classes=0)), REDUCED, unfolded, 9,
         name='mobilevit'),
    *(test for number in (0, 1) for test in (
        *row(partial(pit, distilled=bool(number)), [TALL], [(9, 13), (5, 7), (3, 4)], 4,
             name=f'pit-{number}', prefix=1 + number),
        *row(partial(crossvit, convolutions=bool(number)), [(72, 96)], [(6, 8), (3, 4)], 9,
             name=f'crossvit-{number}', prefix=1))),
    *row(volo, PLAIN, patches, 4, name='volo', prefix=None, compiled=True, irreducible=(
        'OutlookAttention: it has no keys: each query predicts the weights of its neighbours')),
    *(test for kind in ('parallel', 'differential', 'both', 'rotary') for test in row(
        partial(vit_of, kind), PLAIN, patches, name=kind, prefix=1, compiled=kind != 'rotary')),
    *named('convit_tiny', dict(img_size=max, embed_dim=12, depth=3, num_heads=4,
                               local_up_to_layer=1, num_classes=0),
           [SQUARE, (80, 80)], patches, prefix=1, irreducible=(
               'GPSA: a part of its weights comes from positions alone, without keys')),
    *row(lambda size, _: stem(timm.layers.Attention2d(16, num_heads=4)), PLAIN, patches, 1,
         name='attention2d'),
    *row(of_mmseg, PLAIN, reduced, 5, name='mmseg', ratios=(2,)),
    # Keys of a map, or of windows that overlap; relative positions follow from the queries.
    *(test for stride in (1, 2) for name, size, grid, kwargs in (
        ('bottleneck', TALL, (5, 7), dict(feat_size=(5, 7), scale_pos_embed=True)),
        ('bottleneck', SQUARE, (6, 6), dict(feat_size=(6, 6))),
        ('halo', WIDE, (6, 6), dict(block_size=4, halo_size=1)))
      for test in row(partial(in_place, name, stride=stride, **kwargs), [size], [grid], 1,
                      name=f'{name}-{stride}')),
    *(test for token, rotary, separate, fused in (
        (0, 0, 1, 1), (1, 0, 0, 0), (1, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0))
      for test in row(partial(clip_pool, token=token, rotary=rotary, separate=separate,
                              fused=fused), [TALL], patches, 1,
                      name=f'clip-{token}{rotary}{separate}{fused}', prefix=1)),
    # What attends at the deeper stages of networks of convolutions.
    *(test for name, size, grids, expected, kwargs in (
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
        ('cpubone_b0_bfrobust', (224, 160), [(4, 3), (7, 5)], 7, {}))
      for test in row(partial(convolutional, name, **kwargs), [size], grids, expected, name=name,
                      ratios=(3,))),
]


@pytest.mark.parametrize(ROWS, CASES)
def test_reduced_exactly(make, size, grids, checks, device):
    check_adapter(make(), image(*size).to(device), grids, **checks)


def test_hiera_that_a_mask_left_tokens_out_of():
    """A quarter of the tokens of one map are as many as all of the next one, but lie on none."""
    from mmseg_edaformer.isr.reduction import recording
    model = build('hiera_tiny_224', img_size=(64, 64), embed_dim=16, stages=(1, 1, 2, 1),
                  num_classes=0)
    mask = torch.tensor([[True, False, False, False]])
    apply_isr(model, 2)
    with recording() as records:
        model.forward_features(image(64, 64), mask=mask)
    assert [record.keys for record in records.values()] == [
        (64, 16), (64, 16), (16, 4), (0, 0), (0, 0)]


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
