"""ISR on the models of transformers: small ones with random weights."""
import math
from functools import partial

import pytest
import torch

transformers = pytest.importorskip('transformers', reason='this checks models of transformers')

from mmseg_edaformer.errors import RatioError  # noqa: E402
from mmseg_edaformer.isr import apply_isr, report_isr  # noqa: E402
from mmseg_edaformer.isr.registry import find_attention  # noqa: E402

from .check import (  # noqa: E402
    PLAIN,
    REDUCED,
    ROWS,
    TALL,
    WIDE,
    check_adapter,
    check_report,
    first,
    lively,
    patches,
    reduced,
    row,
    sizes,
)
from .oracle import membership, weigh  # noqa: E402
from .test_timm import unfolded  # noqa: E402

WIDTHS = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
STAGES = dict(hidden_sizes=[8, 16, 32, 64], num_attention_heads=[1, 2, 4, 8], depths=[1, 1, 2, 1])
REDUCTIONS = (8, 4, 2, 1)
SWIN = dict(embed_dim=24, depths=[2, 2], num_heads=[1, 2], window_size=7, image_size=112)
SAM = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=80, patch_size=16,
           window_size=3, global_attn_indexes=[1], mlp_dim=32, output_channels=8)
RESNET = dict(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 16], embedding_size=8,
              layer_type='basic', out_features=['stage4'])
DETR = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32,
            hidden_size=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5)


OF_QUERIES = ['Mask2FormerForUniversalSegmentation', 'OneFormerForUniversalSegmentation',
              'MaskFormerForInstanceSegmentation', 'EomtForUniversalSegmentation']


def build(name, implementation='sdpa', **config):
    """A model by the name of its class, or of its class and configuration."""
    name, _, config_name = name.partition(' ')
    config_name = config_name or name.replace('Model', 'Config')
    model = getattr(transformers, name)(getattr(transformers, config_name)(**config))
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)):
            torch.nn.init.xavier_normal_(module.weight)
    if getattr(model, 'shared_position_bias', None):
        torch.nn.init.normal_(model.shared_position_bias.relative_position_bias_table)
    if implementation == 'eager':
        model.set_attn_implementation('eager')
        assert {m.config._attn_implementation for m in model.modules()
                if hasattr(m, 'config')} == {'eager'}
    return lively(Queries(model)) if name in OF_QUERIES else model


class Queries(torch.nn.Module):
    """What a decoder of queries predicts; with a task where it asks for one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        asked = self.model.config.model_type == 'oneformer'
        out = self.model(image, *[image.new_ones(len(image), 7)] * asked)
        return out.class_queries_logits, out.masks_queries_logits


def swin(_):
    """A small Swin as the backbone of another model."""
    return transformers.SwinConfig(
        embed_dim=24, depths=[2, 2, 1, 1], num_heads=[1, 2, 3, 4], window_size=7, image_size=224,
        out_features=['stage1', 'stage2', 'stage3', 'stage4'])


def case(name, images, grids, config, expected=2, *, eager=False, compiled=True, **checks):
    """Tests of one model: at each size, of each implementation of its attention.

    Values of ``config`` may be functions of the size; ``checks`` are those of `row`.
    """
    def make(size, number, implementation):
        return build(name, implementation, **{
            key: value(size) if callable(value) else value for key, value in config.items()})
    for implementation in ('sdpa', 'eager') if eager else ('sdpa',):
        yield from row(partial(make, implementation=implementation), images, grids, expected,
                       name=f'{name.partition(" ")[0]}-{implementation}',
                       compiled=compiled and implementation == 'sdpa', **checks)


def vit(name, prefix, *, images=PLAIN, **config):
    """A plain ViT with patches of 16."""
    checks = {key: config.pop(key) for key in ('eager', 'gpu', 'compiled', 'expected', 'pickled',
                                               'suffix') if key in config}
    return case(name, images, patches, dict(WIDTHS, patch_size=16, image_size=96) | config,
                prefix=prefix, queries=patches, **checks)


def tower(name, prefix, expected=2, **config):
    """A copy of a plain ViT in a larger model."""
    return vit(name, prefix, images=[(80, 80)], **dict(image_size=80) | config, expected=expected,
               compiled=False, pickled=False)


def of_queries(name, cross, decoder, config):
    """A decoder of queries behind Swin."""
    task = 'Instance' if name == 'MaskFormer' else 'Universal'
    return case(f'{name}For{task}Segmentation {name}Config', [WIDE, (112, 200)],
                lambda *size: [(7, 7), *sizes(*size)], dict(config, backbone_config=swin),
                expected=6 + cross, decoder=decoder, compiled=False, pickled=False)


MASKED = dict(hidden_dim=32, num_attention_heads=4, encoder_feedforward_dim=32, encoder_layers=1,
              num_queries=9, num_labels=5)
SWIN_SIZES = [(112, 112), (100, 120)]
CASES = [
    *vit('ViTModel', 1, eager=True, image_size=list),
    *vit('DeiTModel', 2, eager=True, compiled=False, image_size=list),
    *vit('BeitModel', 1, eager=True, image_size=list, use_relative_position_bias=True),
    # One bias for all blocks, which the model adds to the mask of attention.
    *vit('BeitModel', 1, images=[TALL], image_size=list, use_shared_relative_position_bias=True),
    *vit('Dinov2Model', 1, eager=True, compiled=False),
    *vit('Dinov2WithRegistersModel', 4, eager=True, compiled=False, num_register_tokens=3),
    *vit('DINOv3ViTModel', 4, eager=True, gpu=True, num_register_tokens=3),
    # Tokens for detections stand behind the patches.
    *vit('YolosModel', 1, images=[TALL], suffix=3, compiled=False, image_size=list,
         num_detection_tokens=3),
    *tower('AltCLIPVisionModel', 1), *tower('Aimv2VisionModel', 0, 3),
    *tower('Blip2VisionModel', 1), *tower('BlipVisionModel', 1),
    *tower('ChineseCLIPVisionModel', 1), *tower('CLIPSegVisionModel', 1),
    *tower('CLIPVisionModel', 1),
    *tower('Data2VecVisionModel', 1, use_relative_position_bias=True),
    *tower('FlavaImageModel', 1), *tower('GitVisionModel', 1), *tower('IJepaModel', 0),
    *tower('InstructBlipVisionModel', 1), *tower('InternVLVisionModel', 1),
    *tower('JanusVisionModel', 0, mlp_ratio=2.0), *tower('MetaClip2VisionModel', 1),
    *tower('MgpstrModel', 1, image_size=[80, 80]), *tower('MLCDVisionModel', 1),
    *tower('Owlv2VisionModel', 1), *tower('OwlViTVisionModel', 1), *tower('PixioModel', 8),
    *tower('Sapiens2Backbone Sapiens2Config', 9), *tower('SiglipVisionModel', 0, 3),
    *tower('Tipsv2VisionModel', 2), *tower('ViTMSNModel', 1),
    *tower('VitPoseBackbone VitPoseBackboneConfig', 0, image_size=[80, 80], patch_size=[16, 16]),
    *tower('VitDetModel', 0, use_relative_position_embeddings=True),
    # SAM: windows, padded, and whole maps; keys with relative positions or rotated.
    *(test for name, size, expected, config in (
        ('SamVisionModel', (80, 80), 2, SAM), ('SamHQVisionModel', (80, 80), 2, SAM),
        ('Sam2HieraDetModel Sam2HieraDetConfig', (96, 96), 5, dict(
            hidden_size=16, num_attention_heads=1, image_size=[96, 96],
            blocks_per_stage=[1, 2, 1, 1], embed_dim_per_stage=[16, 32, 64, 128],
            num_attention_heads_per_stage=[1, 2, 4, 8], window_size_per_stage=[8, 4, 6, 3],
            global_attention_blocks=[2], window_positional_embedding_background_size=[2, 2])),
        ('Sam3ViTModel', (80, 80), 2, dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=80,
            patch_size=16, window_size=3, global_attn_indexes=[1], intermediate_size=32,
            pretrain_image_size=80)))
      for test in case(name, [size], [(side, side) for side in (5, 3, 4, 8, 12, 6)], config,
                       eager=True, expected=expected, compiled=False, pickled=False)),
    *case('SegformerForSemanticSegmentation SegformerConfig', REDUCED,
          reduced, dict(
              decoder_hidden_size=16, sr_ratios=REDUCTIONS, **STAGES),
          eager=True, gpu=True, expected=5, pickled=False, queries=sizes),
    *case('GLPNModel', REDUCED, reduced, dict(
        sr_ratios=REDUCTIONS, **STAGES), expected=5, compiled=False, queries=sizes),
    # With a class token in the last stage; it takes square images only.
    *case('PvtModel', [(128, 128), (160, 160)], lambda *size: lambda name: [
        reduced(*size)[int(name.split('.')[2])]], dict(
            image_size=max, sequence_reduction_ratios=REDUCTIONS, mlp_ratios=[2, 2, 2, 2],
            **STAGES), prefix=None, expected=5, queries=sizes),
    *(test for linear in (False, True) for test in case(
        'PvtV2Model PvtV2Config', REDUCED,
        [(7, 7)] if linear else reduced, dict(
            image_size=128, sr_ratios=REDUCTIONS, mlp_ratios=[2, 2, 2, 2],
            linear_attention=linear, **STAGES), expected=5, queries=sizes)),
    # Keys of strided convolutions; a class token in the last stage.
    *case('CvtModel', REDUCED, lambda *size: lambda name: [tuple(
        math.ceil(side / 8 / 2 ** int(name.split('.')[2])) for side in size)], dict(
            embed_dim=[16, 32, 64], num_heads=[1, 2, 4], depth=[1, 2, 3]), prefix=None,
          expected=6, queries=sizes),
    *case('SwinModel', SWIN_SIZES, [(7, 7)], SWIN, eager=True, gpu=True,
          expected=4),
    *case('Swinv2Model', SWIN_SIZES, [(7, 7)], SWIN, expected=4),
    *case('DonutSwinModel', SWIN_SIZES[1:], [(7, 7)], SWIN, expected=4, compiled=False),
    *case('Swin2SRModel', [(28, 35)], [(7, 7)], dict(SWIN, image_size=28, patch_size=1),
          expected=4, compiled=False),
    # Segmentation with a backbone of another family.
    *case('UperNetForSemanticSegmentation UperNetConfig', [(200, 232)], [(7, 7)], dict(
        backbone_config=swin, hidden_size=16, auxiliary_channels=16, auxiliary_in_channels=96,
        pool_scales=[1, 2]), expected=6, compiled=False, pickled=False),
    *case('DPTForSemanticSegmentation DPTConfig', [(80, 80)], [(5, 5)], dict(
        WIDTHS, image_size=80, patch_size=16, backbone_out_indices=[0, 1, 2, 3],
        semantic_classifier_dropout=0., num_hidden_layers=4, neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=16, num_labels=5, use_auxiliary_head=False), eager=True, prefix=1,
        expected=4, pickled=False),
    # Patches are the maps of a convolutional network.
    *case('DPTModel', [(80, 80)], [(5, 5)], dict(
        WIDTHS, image_size=80, patch_size=16, is_hybrid=True,
        backbone_featmap_shape=[1, 32, 5, 5], backbone_config=lambda _: transformers.BitConfig(
            global_padding='same', layer_type='bottleneck', depths=[1, 1, 1],
            hidden_sizes=[8, 16, 32], embedding_size=8, num_groups=4,
            out_features=['stage1', 'stage2', 'stage3'], embedding_dynamic_padding=True)),
        prefix=1, pickled=False),
    # The encoder's keys, and those that queries see; the queries' own stay.
    *(test for name in ('ConditionalDetr', 'DabDetr', 'Detr') for test in case(
        f'{name}Model', [(160, 224)], [(5, 7)], dict(
            DETR, backbone_config=lambda _: transformers.ResNetConfig(**RESNET)),
        expected=3, compiled=False, pickled=False)),
    # Masked cross attention to maps of several scales; MaskFormer's reads the last map, and
    # OneFormer's begins with two layers without masks that read the finest one.
    *(test for norm in (False, True) for test in of_queries('Mask2Former', 4, 'cross_attn', dict(
        MASKED, decoder_layers=5, dim_feedforward=32, feature_size=32, mask_feature_size=32,
        pre_norm=norm))),
    *of_queries('OneFormer', 5, 'multihead_attn', dict(
        MASKED, decoder_layers=4, dim_feedforward=32, conv_dim=32, mask_dim=32, num_classes=5,
        query_dec_layers=2, task_seq_len=7, is_training=False)),
    *of_queries('MaskFormer', 2, '', dict(
        fpn_feature_size=32, mask_feature_size=32, num_labels=5,
        decoder_config=lambda _: transformers.MaskFormerDetrConfig(
            d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32,
            num_queries=9))),
]


@pytest.mark.parametrize(ROWS, CASES)
def test_reduced_exactly(make, size, grids, checks, device):
    model = make()
    check_adapter(model, torch.randn(2, 3, *size).to(device), grids, **checks)
    found = find_attention(model)
    if 'Detr' in type(model).__name__:
        assert all('queries' in reason for reason in found.irreducible.values())
        assert not found.unknown
    elif isinstance(model, Queries):
        cross = checks['expected'] - 6
        others = ['deformable attention'] * ('MaskFormer' not in type(model.model).__name__)
        check_report(model, (128, 192), cross, *[
            'its keys are the queries of the decoder, which lie on no grid'] * cross, *others)


@pytest.mark.parametrize('name', ['Eomt', 'EomtDinov3'])
def test_eomt(name):
    """Queries join in the last block."""
    model = build(f'{name}ForUniversalSegmentation {name}Config', image_size=80, patch_size=16,
                  num_queries=6, num_register_tokens=3, num_blocks=1, num_upscale_blocks=1,
                  **WIDTHS)
    (model.model if isinstance(model, Queries) else model).attn_mask_probs.zero_()
    check_adapter(model, torch.randn(1, 3, 80, 80), [(5, 5)], prefix=None, expected=2,
                  compiled=False, pickled=False)


@pytest.mark.parametrize('implementation', ['sdpa', 'eager'])
@pytest.mark.parametrize('side', [96, 112])
def test_eomt_with_masks(side, implementation):
    """They hide patches from the queries."""
    def plain(module, ratio, hidden_states, attention_mask=None):
        query, key, value = (
            layer(hidden_states).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for layer in (module.q_proj, module.k_proj, module.v_proj))
        total = hidden_states.shape[1]
        member = membership((side // 16,) * 2, ratio, total - (side // 16) ** 2, total)
        # The mask adds the same to everything that is seen.
        hidden = None if attention_mask is None else attention_mask < -1e8
        out = weigh(query @ key.mT * module.scale, member, hidden) @ value
        return module.out_proj(out.transpose(1, 2).flatten(2)), None

    model = build('EomtForUniversalSegmentation EomtConfig', implementation, image_size=side,
                  patch_size=16, num_register_tokens=2, num_blocks=2, num_queries=7, num_labels=5,
                  **WIDTHS | dict(num_hidden_layers=4))
    check_adapter(model, torch.randn(2, 3, side, side), [], plain=plain, expected=4,
                  compiled=False, pickled=False)
    report = report_isr(model, 2, (side, side))
    assert not report.untouched
    assert report.macs[1] < report.macs[0]


def test_hiera():
    """Windows of 8 and 4, then all tokens, sorted by windows."""
    from transformers.models.hiera.modeling_hiera import unroll

    def order(model, grid):
        steps = next(n for n in range(4) if grid in ((8 >> n, 8 >> n), (24 >> n, 32 >> n)))
        numbers = torch.arange(grid[0] * grid[1]).view(1, -1, 1)
        return unroll(numbers, grid, (1, 1), [[2, 2]] * (3 - steps)).flatten().argsort()

    model = build('HieraModel', image_size=[96, 128], embed_dim=16, depths=[1, 2, 2, 1])
    check_adapter(model, torch.randn(1, 3, 96, 128), [(8, 8), (4, 4), (12, 16), (6, 8)],
                  order=order, expected=6, compiled=False)


@pytest.mark.parametrize('size', REDUCED, ids=str)
def test_mobilevit(size):
    """Tokens at the same place of each patch of 2 x 2 see each other."""
    model = build('MobileViTModel', hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8] * 7,
                  num_attention_heads=4)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(4, 3, *size))  # norms that keep the image alive
    check_adapter(model, torch.randn(1, 3, *size), unfolded(*size), expected=9,
                  compiled=False, pickled=False)


TOWERS = ['Aimv2', 'CLIP', 'CLIPSeg', 'MetaClip2', 'Owlv2', 'OwlViT', 'Siglip']


@pytest.mark.parametrize('name', TOWERS)
def test_words_stay(name):
    """Of a model for images and words, the tower for images is reduced alone."""
    tower = dict(WIDTHS, image_size=80, patch_size=16, vocab_size=99, max_position_embeddings=9)
    model = getattr(transformers, f'{name}Model')(getattr(transformers, f'{name}Config')(
        text_config=tower, vision_config=tower))
    found = find_attention(model)
    assert not found.unknown
    assert sorted(found.irreducible) == sorted(
        key for key, _ in model.named_modules()
        if key.startswith('text_model') and key.rpartition('.')[2] in ('self_attn', 'attention'))
    apply_isr(model, 2, strict=True)
    words = torch.arange(7).expand(2, -1)
    assert model(input_ids=words, pixel_values=torch.randn(2, 3, 80, 80)).logits_per_image.isfinite(
        ).all()


@pytest.mark.parametrize(('name', 'reason'), [
    ('ViTMAEModel', 'shuffled'),
    ('TableTransformerModel', 'checks the number'),
    ('MobileViTV2Model', 'cost linear'),
    ('SwiftFormerModel', 'cost linear'),
    ('Siglip2VisionModel', 'Siglip2Attention is not known'),
])
def test_refused(name, reason):
    """What lies on no grid, or on one that ISR does not find, is refused and named."""
    with torch.device('meta'):
        model = build(name)
    with pytest.raises(RatioError, match=reason):
        apply_isr(model, 2)


@torch.no_grad()
def test_off_stage_keeps_the_others():
    """What is recorded for one layer is kept while another layer needs it."""
    model = build('ViTModel', image_size=96, patch_size=16, **WIDTHS).eval()
    image = torch.randn(1, 3, 96, 96)
    apply_isr(model, 2)
    reduced = first(model(image))
    layers = [layer for part in find_attention(model).parts for layer in part.stages[1]]
    setting = layers[0].setting
    layers[0].setting = type(setting)()
    half = first(model(image))
    layers[0].setting = setting
    assert torch.equal(first(model(image)), reduced)
    assert not torch.equal(half, reduced)
    layers[1].setting = type(setting)()
    assert model.embeddings.patch_embeddings.projection.isr_grids
    layers[0].setting = type(setting)()
    assert type(model.embeddings.patch_embeddings.projection) is torch.nn.Conv2d
