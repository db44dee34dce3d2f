"""The dial on models of other libraries: what it says, refuses and survives."""
import copy
import json
import warnings

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import nn

from mmseg_edaformer import apply_isr, isr, register_isr, remove_isr, report_isr
from mmseg_edaformer.cost import count_macs
from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import Window
from mmseg_edaformer.isr.registry import find_attention
from tests.conftest import ROOT, run


@pytest.fixture
def mit():
    model = MODELS.build(dict(type='MixVisionTransformer', embed_dims=8, num_layers=[1, 1, 2, 1],
                              num_heads=[1, 2, 4, 8], sr_ratios=[8, 4, 2, 1]))
    return model.eval()


class StrangeAttention(nn.Module):
    """An attention that no table knows."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x, size):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Strange(nn.Module):
    """A network around it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.attention = StrangeAttention()

    def forward(self, x):
        x = self.stem(x)
        return self.attention(x.flatten(2).transpose(1, 2), x.shape[2:])


def test_a_ratio_for_other_stages_lists_what_was_found(mit):
    with pytest.raises(RatioError, match=r'3 multipliers for the encoder, which has 4 stages.*'
                       r'Found: encoder stage 1: 1 x EfficientMultiheadAttention; .* stage 3: 2 x'):
        apply_isr(mit, '222-2')
    assert not any('isr_reduction' in vars(module) for module in mit.modules())


def test_stages_get_their_own_ratio(mit):
    apply_isr(mit, '2311-1')
    found = find_attention(mit).parts[0].stages
    assert [{layer.setting.isr_ratio for layer in layers} for layers in found.values()] == [
        {2}, {3}, {1}, {1}]
    assert 'isr_ratio=3' in repr(mit.layers[1])
    with isr(mit, 4):
        assert {layer.setting.isr_ratio for layer in found[1]} == {4}
    assert [layer.setting.isr_ratio for layer in (*found[1], *found[2], *found[3])] == [2, 3, 1, 1]


def test_unknown_attention_is_named_and_strictly_an_error(mit):
    with pytest.raises(RatioError, match=r'Found: attention: StrangeAttention is not known'):
        apply_isr(Strange(), 2)
    both = nn.ModuleDict(dict(mit=mit, strange=Strange()))
    apply_isr(both, 2)
    with pytest.raises(RatioError, match=r'strange\.attention: StrangeAttention is not known'):
        apply_isr(both, 2, strict=True)


def test_three_lines_make_it_known():
    model, image = Strange().eval(), torch.randn(1, 3, 40, 56)
    before = model(image)
    register_isr(StrangeAttention, grid='size')
    apply_isr(model, 2)
    assert not torch.equal(model(image), before)
    report = report_isr(model, 2, (40, 56))
    assert [(stage.stage, stage.keys) for stage in report.stages] == [('encoder 1', (35, 12))]
    # By hand: the stem, q k v, and the two products with 35 queries.
    fixed = 35 * 8 * 3 * 64 + 35 * 8 * 24
    assert report.macs == (fixed + 2 * 35 * 35 * 8, fixed + 2 * 35 * 12 * 8)
    remove_isr(model)
    assert torch.equal(model(image), before)


def test_projections_run_on_what_is_left():
    model, image = Strange().eval(), torch.randn(1, 3, 40, 56)
    register_isr(StrangeAttention, grid='size')
    with isr(model, 2):
        expected = model(image)
    # A fused layer by another name than qkv makes keys and values alone, so this one is renamed.
    register_isr(StrangeAttention, grid='size', projections=('qkv',))
    with isr(model, 2):
        torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-5)
        assert count_macs(model, (40, 56)) == (
            35 * 8 * 3 * 64 + 35 * 8 * 8 + 12 * 8 * 16 + 2 * 35 * 12 * 8)


def test_what_has_nothing_to_reduce_is_said_so(mit):
    register_isr(StrangeAttention, irreducible='it is strange')
    both = nn.Sequential(Strange(), nn.Identity())
    with pytest.raises(RatioError, match=r'Found: 0\.attention: StrangeAttention: it is strange'):
        apply_isr(both, 2, strict=True)
    with pytest.raises(RatioError, match='not both'):
        register_isr(StrangeAttention)


def test_keys_on_no_grid():
    model = Strange().eval()
    register_isr('StrangeAttention', grid=Window('window'))
    model.attention.window = 3
    apply_isr(model, 2)
    with pytest.warns(UserWarning, match=r'its 35 keys lie on no grid that ISR finds \(3x3\)'):
        model(torch.randn(1, 3, 40, 56))
    with pytest.raises(RatioError, match=r'reduces nothing in Strange: attention: .* 35 keys'):
        report_isr(model, 2, (40, 56))
    apply_isr(model, 2, strict=True)
    with pytest.raises(RatioError, match='StrangeAttention cannot be reduced'):
        model(torch.randn(1, 3, 40, 56))


def test_a_report_names_what_keeps_its_keys():
    model = MODELS.build(dict(type='SwinTransformer', embed_dims=24, depths=[2, 2, 1, 1],
                              num_heads=[1, 2, 3, 4]))
    text = str(report_isr(model, 3, (112, 112)))
    assert '49 -> 9' in text
    assert 'stages.0.blocks.1.attn.w_msa and 1 more: WindowMSA: cells of 3 would mix' in text


@torch.no_grad()
def test_auto_follows_the_size(mit):
    crop = torch.randn(1, 3, 64, 64)
    before = mit(crop)[-1]
    with isr(mit, 'auto', crop_size=(64, 64)):
        assert torch.equal(mit(crop)[-1], before)
    report = report_isr(mit, 'auto', (128, 192), crop_size=(64, 64))
    assert [(stage.pool, stage.keys) for stage in report.stages] == [((1, 2), (24, 6))] * 4


@torch.no_grad()
def test_compiled_whole(mit):
    """One graph, and never an old one."""
    image = torch.randn(1, 3, 64, 96)
    compiled = torch.compile(mit, fullgraph=True, backend='eager')
    for ratio in (1, 2, 1, 2):
        apply_isr(mit, ratio)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            expected = copy.deepcopy(mit)(image)[-1]
        torch.testing.assert_close(compiled(image)[-1], expected, atol=1e-5, rtol=1e-5)


def test_any_config_of_mmseg(tmp_path, scenes):
    """A config that knows nothing of this package, tested with the flags."""
    config, weights = tmp_path / 'swin.py', tmp_path / 'swin.pth'
    config.write_text(f'''
norm = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 96), pad_val=0, seg_pad_val=255),
    backbone=dict(type='SwinTransformer', embed_dims=24, depths=[2, 2, 1, 1],
                  num_heads=[1, 2, 3, 4]),
    decode_head=dict(type='UPerHead', in_channels=[24, 48, 96, 192], in_index=[0, 1, 2, 3],
                     channels=16, num_classes=8, norm_cfg=norm),
    test_cfg=dict(mode='whole'))
default_scope = 'mmseg'
test_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler'),
    dataset=dict(type='SyntheticDataset', data_root='{scenes}', pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation')))
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_cfg = dict(type='TestLoop')
''')
    torch.save(MODELS.build(Config.fromfile(config).model).state_dict(), weights)
    done = run(ROOT / 'tools' / 'test.py', config, weights, '--isr-ratio', 2, '--isr-method', 'max',
               '--work-dir', tmp_path / 'work', '--json', tmp_path / 'figures.json')
    assert '49 -> 16' in done.stdout + done.stderr
    figures = json.loads((tmp_path / 'figures.json').read_text())
    assert (figures['isr_ratio'], figures['isr_method']) == ('2', 'max')


class BrokenAttention(StrangeAttention):
    """One that torch.compile cannot take in one piece."""

    def forward(self, x, size):
        q, k, v = self.qkv(x).unflatten(-1, (3, 8)).unbind(-2)
        scores = q @ k.transpose(-2, -1)
        torch._dynamo.graph_break()
        return scores.softmax(-1) @ v


@torch.no_grad()
def test_a_graph_break_within_is_an_error_not_a_wrong_result():
    register_isr('StrangeAttention', grid='size')
    model = Strange().eval()
    model.attention = BrokenAttention()
    image = torch.randn(1, 3, 40, 56)
    compiled = torch.compile(model, backend='eager')
    torch.testing.assert_close(compiled(image), model(image))
    apply_isr(model, 2)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(image)


@torch.no_grad()
def test_exported(mit):
    image = torch.randn(1, 3, 72, 104)
    apply_isr(mit, 2)
    exported = torch.export.export(mit, (image,)).module()
    torch.testing.assert_close(exported(image)[-1], mit(image)[-1])
