"""ISR on the models of transformers: small ones with random weights."""
import math

import pytest
import torch

transformers = pytest.importorskip('transformers', reason='this checks models of transformers')

from mmseg_edaformer.errors import RatioError  # noqa: E402
from mmseg_edaformer.isr import apply_isr, report_isr  # noqa: E402
from mmseg_edaformer.isr.registry import find_attention  # noqa: E402

from .check import check_adapter, first, layers  # noqa: E402
from .test_mmseg import sizes  # noqa: E402
from .test_timm import unfolded  # noqa: E402

PLAIN = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
STAGES = dict(hidden_sizes=[8, 16, 32, 64], num_attention_heads=[1, 2, 4, 8], depths=[1, 1, 2, 1])
REDUCTIONS = (8, 4, 2, 1)
SWIN = dict(embed_dim=24, depths=[2, 2], num_heads=[1, 2], window_size=7, image_size=112)


def build(name, implementation='sdpa', **config):
    """A model by the name of its class, or of its class and configuration."""
    name, _, config_name = name.partition(' ')
    config_name = config_name or name.replace('Model', 'Config')
    model = getattr(transformers, name)(getattr(transformers, config_name)(**config))
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)):
            torch.nn.init.xavier_normal_(module.weight)
    if implementation == 'eager':
        model.set_attn_implementation('eager')
        assert {m.config._attn_implementation for m in model.modules()
                if hasattr(m, 'config')} == {'eager'}
    return model


def compiles(size, implementation='sdpa'):
    """Compiling takes long: once for each model, at its ragged size."""
    return implementation == 'sdpa' and size[0] not in (96, 112, 128)


def odd_keep(name, ratio):
    """Every other block is shifted: windows of 7, shifted by 3, allow cells of 1, 2 and 4."""
    block = [int(key) for key in name.split('.') if key.isdigit()][1]
    return 1 if block % 2 and ratio == 3 else ratio


PLAIN_VITS = {
    'ViTModel': dict(prefix=1, add=True),
    'DeiTModel': dict(prefix=2, add=True),
    'BeitModel': dict(prefix=1, add=True, use_relative_position_bias=True),
    'Dinov2Model': dict(prefix=1),
    'Dinov2WithRegistersModel': dict(prefix=4, num_register_tokens=3),
    'DINOv3ViTModel': dict(prefix=4, num_register_tokens=3),
}
IMPLEMENTATIONS = pytest.mark.parametrize('implementation', ['sdpa', 'eager'])


@IMPLEMENTATIONS
@pytest.mark.parametrize('size', [(96, 96), (80, 112)], ids=str)
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.gpu) if name == 'DINOv3ViTModel' else name
    for name in PLAIN_VITS])
def test_plain_vit(name, size, implementation, device):
    config = dict(PLAIN_VITS[name])
    prefix = config.pop('prefix')
    image_size = list(size) if config.pop('add', False) else 96
    model = build(name, implementation, image_size=image_size, patch_size=16, **PLAIN, **config)
    check_adapter(model, torch.randn(2, 3, *size).to(device), [(size[0] // 16, size[1] // 16)],
                  prefix=prefix, expected=2, compiled=compiles(size, implementation))


VISION = [
    # Copies of a plain ViT in larger models: tokens in front, and layers.
    ('AltCLIPVisionModel', 1, 2, {}),
    ('Aimv2VisionModel', 0, 3, {}),
    ('Blip2VisionModel', 1, 2, {}),
    ('BlipVisionModel', 1, 2, {}),
    ('ChineseCLIPVisionModel', 1, 2, {}),
    ('CLIPSegVisionModel', 1, 2, {}),
    ('CLIPVisionModel', 1, 2, {}),
    ('Data2VecVisionModel', 1, 2, dict(use_relative_position_bias=True)),
    ('FlavaImageModel', 1, 2, {}),
    ('GitVisionModel', 1, 2, {}),
    ('IJepaModel', 0, 2, {}),
    ('InstructBlipVisionModel', 1, 2, {}),
    ('InternVLVisionModel', 1, 2, {}),
    ('JanusVisionModel', 0, 2, dict(mlp_ratio=2.0)),
    ('MetaClip2VisionModel', 1, 2, {}),
    ('MgpstrModel', 1, 2, dict(image_size=[80, 80])),
    ('MLCDVisionModel', 1, 2, {}),
    ('Owlv2VisionModel', 1, 2, {}),
    ('OwlViTVisionModel', 1, 2, {}),
    ('PixioModel', 8, 2, {}),
    ('Sapiens2Backbone Sapiens2Config', 9, 2, {}),
    ('SiglipVisionModel', 0, 3, {}),
    ('Tipsv2VisionModel', 2, 2, {}),
    ('ViTMSNModel', 1, 2, {}),
    ('VitPoseBackbone VitPoseBackboneConfig', 0, 2, dict(image_size=[80, 80],
                                                         patch_size=[16, 16])),
    ('VitDetModel', 0, 2, dict(use_relative_position_embeddings=True)),
]


@pytest.mark.parametrize(('name', 'prefix', 'expected', 'config'), VISION)
def test_vision_models(name, prefix, expected, config):
    model = build(name, **{**PLAIN, 'image_size': 80, 'patch_size': 16, **config})
    check_adapter(model, torch.randn(2, 3, 80, 80), [(5, 5)], prefix=prefix, expected=expected,
                  compiled=False, pickled=False)


SAM = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=80, patch_size=16,
           window_size=3, global_attn_indexes=[1], mlp_dim=32, output_channels=8)


@IMPLEMENTATIONS
@pytest.mark.parametrize(('name', 'config'), [
    ('SamVisionModel', SAM),
    ('SamHQVisionModel', SAM),
    ('Sam2HieraDetModel Sam2HieraDetConfig', dict(
        hidden_size=16, num_attention_heads=1, image_size=[96, 96], blocks_per_stage=[1, 2, 1, 1],
        embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 6, 3], global_attention_blocks=[2],
        window_positional_embedding_background_size=[2, 2])),
    ('Sam3ViTModel', dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=80, patch_size=16,
        window_size=3, global_attn_indexes=[1], intermediate_size=32, pretrain_image_size=80)),
])
def test_sam(name, config, implementation):
    """Windows, padded, and whole maps; keys with relative positions or rotated."""
    model = build(name, implementation, **config)
    size = config['image_size'] if isinstance(config['image_size'], list) else [80, 80]
    grids = [(side, side) for side in (5, 3, 4, 8, 12, 6)]
    check_adapter(model, torch.randn(1, 3, *size), grids, expected=len(layers(model)),
                  compiled=False, pickled=False)


def test_beit_shared_bias():
    """One bias for all blocks, which the model adds to the mask of attention."""
    model = build('BeitModel', image_size=[80, 112], patch_size=16,
                  use_shared_relative_position_bias=True, **PLAIN)
    torch.nn.init.normal_(model.shared_position_bias.relative_position_bias_table)
    check_adapter(model, torch.randn(2, 3, 80, 112), [(5, 7)], prefix=1, expected=2)


@pytest.mark.gpu
@IMPLEMENTATIONS
@pytest.mark.parametrize('size', [(128, 192), (136, 200)], ids=str)
def test_segformer(size, implementation, device):
    model = build('SegformerForSemanticSegmentation SegformerConfig', implementation,
                  decoder_hidden_size=16, sr_ratios=REDUCTIONS, **STAGES)
    check_adapter(model, torch.randn(2, 3, *size).to(device), sizes(*size, REDUCTIONS),
                  expected=5, pickled=False, compiled=compiles(size, implementation))


@pytest.mark.parametrize('side', [128, 160])
def test_pvt(side):
    """With a class token in the last stage; it takes square images only."""
    model = build('PvtModel', image_size=side, sequence_reduction_ratios=REDUCTIONS,
                  mlp_ratios=[2, 2, 2, 2], **STAGES)
    grids = sizes(side, side, REDUCTIONS)
    check_adapter(model, torch.randn(2, 3, side, side),
                  lambda name: [grids[int(name.split('.')[2])]], prefix=None, expected=5)


@pytest.mark.parametrize('size', [(128, 192), (136, 200)], ids=str)
@pytest.mark.parametrize('linear', [False, True])
def test_pvt_v2(size, linear):
    model = build('PvtV2Model PvtV2Config', image_size=128, sr_ratios=REDUCTIONS,
                  mlp_ratios=[2, 2, 2, 2], linear_attention=linear, **STAGES)
    check_adapter(model, torch.randn(2, 3, *size), [(7, 7)] if linear else sizes(*size, REDUCTIONS),
                  expected=5, compiled=compiles(size))


@pytest.mark.parametrize('size', [(128, 192), (136, 200)], ids=str)
def test_cvt(size):
    """Keys of strided convolutions; a class token in the last stage."""
    model = build('CvtModel', embed_dim=[16, 32, 64], num_heads=[1, 2, 4], depth=[1, 2, 3])
    check_adapter(model, torch.randn(2, 3, *size),
                  lambda name: [tuple(math.ceil(side / 8 / 2 ** int(name.split('.')[2]))
                                      for side in size)], prefix=None, expected=6,
                  compiled=compiles(size))


@pytest.mark.gpu
@IMPLEMENTATIONS
@pytest.mark.parametrize('size', [(112, 112), (100, 120)], ids=str)
def test_swin(size, implementation, device):
    model = build('SwinModel', implementation, **SWIN)
    check_adapter(model, torch.randn(1, 3, *size).to(device), [(7, 7)], ratio_of=odd_keep,
                  expected=4, compiled=compiles(size, implementation))


@pytest.mark.parametrize('size', [(112, 112), (100, 120)], ids=str)
def test_swin_v2(size):
    check_adapter(build('Swinv2Model', **SWIN), torch.randn(1, 3, *size), [(7, 7)],
                  ratio_of=odd_keep, expected=4)


def test_upernet():
    """Segmentation with a backbone of another family."""
    backbone = transformers.SwinConfig(out_features=['stage1', 'stage2', 'stage3', 'stage4'],
                                       **{**SWIN, 'depths': [2, 2, 1, 1], 'num_heads': [1] * 4})
    model = build('UperNetForSemanticSegmentation UperNetConfig', backbone_config=backbone,
                  hidden_size=16, auxiliary_channels=16, auxiliary_in_channels=96,
                  pool_scales=[1, 2])
    check_adapter(model, torch.randn(1, 3, 200, 232), [(7, 7)], ratio_of=odd_keep, expected=6,
                  compiled=False, pickled=False)


DPT = dict(neck_hidden_sizes=[8, 16, 16, 16], fusion_hidden_size=16, num_labels=5,
           use_auxiliary_head=False)


@IMPLEMENTATIONS
def test_dpt(implementation):
    model = build('DPTForSemanticSegmentation DPTConfig', implementation, image_size=80,
                  patch_size=16, backbone_out_indices=[0, 1, 2, 3],
                  semantic_classifier_dropout=0., **{**PLAIN, **DPT, 'num_hidden_layers': 4})
    check_adapter(model, torch.randn(2, 3, 80, 80), [(5, 5)], prefix=1, expected=4, pickled=False)


def test_dpt_hybrid():
    """Patches are the maps of a convolutional network."""
    backbone = transformers.BitConfig(
        global_padding='same', layer_type='bottleneck', depths=[1, 1, 1], hidden_sizes=[8, 16, 32],
        embedding_size=8, num_groups=4, out_features=['stage1', 'stage2', 'stage3'],
        embedding_dynamic_padding=True)
    model = build('DPTModel', image_size=80, patch_size=16, is_hybrid=True,
                  backbone_config=backbone, backbone_featmap_shape=[1, 32, 5, 5], **PLAIN)
    check_adapter(model, torch.randn(2, 3, 80, 80), [(5, 5)], prefix=1, expected=2, pickled=False)


@pytest.mark.parametrize(('name', 'config'), [
    ('DonutSwinModel', SWIN),
    ('Swin2SRModel', dict(embed_dim=24, depths=[2, 2], num_heads=[1, 2], window_size=7,
                          image_size=28, patch_size=1)),
])
def test_other_swins(name, config):
    size = (28, 35) if name == 'Swin2SRModel' else (100, 120)
    check_adapter(build(name, **config), torch.randn(1, 3, *size), [(7, 7)], ratio_of=odd_keep,
                  expected=4, compiled=False)


@pytest.mark.parametrize('size', [(128, 192), (136, 200)], ids=str)
def test_glpn(size):
    model = build('GLPNModel', sr_ratios=REDUCTIONS, **STAGES)
    check_adapter(model, torch.randn(2, 3, *size), sizes(*size, REDUCTIONS), expected=5,
                  compiled=False)


def test_yolos():
    """Tokens for detections stand behind the patches."""
    model = build('YolosModel', image_size=[80, 112], patch_size=16, num_detection_tokens=3,
                  **PLAIN)
    check_adapter(model, torch.randn(2, 3, 80, 112), [(5, 7)], prefix=1, suffix=3, expected=2)


@pytest.mark.parametrize('name', ['Eomt', 'EomtDinov3'])
def test_eomt(name):
    """Queries join in the last block."""
    model = build(f'{name}ForUniversalSegmentation {name}Config', image_size=80, patch_size=16,
                  num_queries=6, num_register_tokens=3, num_blocks=1, num_upscale_blocks=1,
                  **PLAIN)
    model.attn_mask_probs.zero_()
    check_adapter(model, torch.randn(1, 3, 80, 80), [(5, 5)], prefix=None, expected=2,
                  compiled=False, pickled=False)


RESNET = dict(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 16], embedding_size=8,
              layer_type='basic', out_features=['stage4'])


@pytest.mark.parametrize('name', ['ConditionalDetr', 'DabDetr', 'Detr'])
def test_detr(name):
    """Its encoder's keys, and those that its queries see; the queries' own stay."""
    model = build(f'{name}Model', backbone_config=transformers.ResNetConfig(**RESNET),
                  use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                  d_model=32, hidden_size=32, encoder_layers=1, decoder_layers=2,
                  encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
                  decoder_ffn_dim=32, num_queries=5)
    check_adapter(model, torch.randn(1, 3, 160, 224), [(5, 7)], expected=3, compiled=False,
                  pickled=False)
    assert all('queries' in reason for reason in find_attention(model).irreducible.values())
    assert not find_attention(model).unknown


TOWERS = ['Aimv2', 'CLIP', 'CLIPSeg', 'MetaClip2', 'Owlv2', 'OwlViT', 'Siglip']


@pytest.mark.parametrize('name', TOWERS)
def test_words_stay(name):
    """Of a model for images and words, the tower for images is reduced alone."""
    tower = dict(PLAIN, image_size=80, patch_size=16, vocab_size=99, max_position_embeddings=9)
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


def test_hiera():
    """Windows of 8 and 4, then all tokens, sorted by windows."""
    from transformers.models.hiera.modeling_hiera import unroll

    def order(grid):
        steps = next(n for n in range(4) if grid in ((8 >> n, 8 >> n), (24 >> n, 32 >> n)))
        numbers = torch.arange(grid[0] * grid[1]).view(1, -1, 1)
        return unroll(numbers, grid, (1, 1), [[2, 2]] * (3 - steps)).flatten().argsort()

    model = build('HieraModel', image_size=[96, 128], embed_dim=16, depths=[1, 2, 2, 1])
    check_adapter(model, torch.randn(1, 3, 96, 128), [(8, 8), (4, 4), (12, 16), (6, 8)],
                  order=order, expected=6, compiled=False)


@pytest.mark.parametrize('size', [(128, 192), (136, 200)], ids=str)
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


def test_small_map_has_no_shift():
    """A map of one window is not shifted, so cells of 3 mix nothing there."""
    model = build('SwinModel', **{**SWIN, 'depths': [2, 2, 2, 2], 'num_heads': [1] * 4}).eval()
    report = report_isr(model, 3, (224, 224))
    last = [name for name in report.untouched if 'layers.3' in name]
    assert not last
    assert len([reason for reason in report.untouched.values() if 'mix' in reason]) == 3


def test_report_names_all():
    """Reports say stages, keys and costs."""
    model = build('SegformerModel', sr_ratios=REDUCTIONS, **STAGES).eval()
    report = report_isr(model, 2, (128, 192))
    assert [stage.keys for stage in report.stages] == [(24, 6), (24, 6), (24, 6), (24, 6)]
    assert not report.untouched
    assert report.macs[1] < report.macs[0]




@torch.no_grad()
def test_off_stage_keeps_the_others():
    """What is recorded for one layer is kept while another layer needs it."""
    model = build('ViTModel', image_size=96, patch_size=16, **PLAIN).eval()
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
