"""Every config builds, and trains with the paper's recipe."""
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS, TRANSFORMS

from mmseg_edaformer.engine import checks
from mmseg_edaformer.engine.convert import rename_key
from mmseg_edaformer.engine.run_config import load_config
from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.models import EmbeddedAttention, EmbeddingFreeAttention
from tests import plain
from tests.conftest import ROOT

CONFIGS = sorted(path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts)
ABLATIONS = [
    *(f'edaformer_t_ade_decoder_{name}' for name in (
        'conv', 'depthwise_conv', 'embedded', '1_2_3', '1_4_1', '2_2_2')),
    'edaformer_t_cityscapes_decoder_embedded',
    *(f'edaformer_{size}_cocostuff_trained_at_optimal' for size in 'tb')]
BACKBONES = [f'{name}_cityscapes' for name in (
    'cvt_13', 'davit_tiny', 'feedformer_b0', 'lvt', 'mit_b0', 'mvitv2_tiny', 'pvtv2_b0',
    'segformer_b0', 'swin_tiny')]
LIBRARIES = {'TimmMaps': 'timm', 'TransformersMaps': 'transformers'}
PAPER = [f'edaformer_{size}_{data}{tuned}' for size in 'tb'
         for data in ('ade', 'cityscapes', 'cocostuff') for tuned in ('', '_isr40k')]
RANGES = [f'{name}_range' for name in PAPER if name.endswith('isr40k')]
CLASSIFIERS = ['eft_t_in1k', 'eft_b_in1k', 'eft_t_crops']
SEGMENTORS = [path for path in CONFIGS if path.stem not in CLASSIFIERS]


def load(name):
    path, = (path for path in CONFIGS if path.stem == name)
    return Config.fromfile(path)


def build(cfg):
    """The model of a config; the test is skipped where its backbone's library is absent."""
    library = LIBRARIES.get(cfg.model.backbone.type)
    if library:
        pytest.importorskip(library, reason=f'its backbone comes from {library}')
    return MODELS.build(cfg.model)


def test_all_named_configs_are_there():
    assert {path.stem for path in CONFIGS} == {
        *PAPER, *RANGES, 'edaformer_t_synthetic', 'edaformer_t_camvid', 'edaformer_t_camvid_isr',
        'edaformer_t_camvid_isr_range', 'segformer_b0_ade', 'segformer_b0_camvid',
        'segformer_b0_synthetic', 'custom_dataset', *ABLATIONS, *BACKBONES, *CLASSIFIERS}
    for folder, names in (('ablations', ABLATIONS), ('isr_backbones', BACKBONES)):
        assert {path.stem for path in CONFIGS if path.parent.name == folder} == set(names)


@pytest.mark.parametrize('path', SEGMENTORS, ids=lambda path: path.stem)
def test_it_builds_and_agrees_with_itself(path):
    cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports[0] == 'mmseg_edaformer'
    MODELS.build(dict(cfg.tta_model, module=build(cfg)))
    crop = tuple(cfg.crop_size)
    assert tuple(cfg.model.data_preprocessor.size) == crop
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        # An absent folder is met when the data is read, not before.
        dataset = DATASETS.build(dict(loader.dataset, lazy_init=True))
        assert len(dataset.metainfo['classes']) == cfg.model.decode_head.num_classes
        tta = list(itertools.chain(*cfg.tta_pipeline[1].transforms))
        for pipeline in (loader.dataset.pipeline, tta):
            labels = [step for step in pipeline if step.type == 'LoadSegLabels']
            assert [step.num_classes for step in labels] == [cfg.model.decode_head.num_classes]
    for step in cfg.tta_pipeline:
        TRANSFORMS.build(step)
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_a_classifier_builds_and_agrees_with_itself(name):
    pytest.importorskip('mmpretrain', reason='it trains the classifiers')
    cfg = load(name)
    assert cfg.custom_imports.imports[0] == 'mmseg_edaformer'
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    classes = model.head.fc.out_features
    assert model.data_preprocessor.num_classes == model.head.loss_module.num_classes == classes
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        dataset = DATASETS.build(dict(loader.dataset, lazy_init=True))
        assert len(dataset.metainfo.get('classes', range(classes))) == classes
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters


@pytest.mark.parametrize('name', PAPER + RANGES + ABLATIONS + BACKBONES)
def test_recipe(name):
    cfg = load(name)
    data, = (word for word in name.split('_') if word in ('ade', 'cityscapes', 'cocostuff'))
    tuned = '_isr40k' in name
    assert cfg.train_cfg.max_iters == (40_000 if tuned else 160_000)
    warmup, poly = cfg.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.end) == ('LinearLR', 1e-6, 1500)
    assert (poly.type, poly.power, poly.eta_min, poly.begin) == ('PolyLR', 1.0, 0.0, 1500)
    total = 8 if data == 'cityscapes' else 16
    assert cfg.auto_scale_lr.base_batch_size == total == 4 * cfg.train_dataloader.batch_size
    assert cfg.sync_bn == 'torch'
    side = 1024 if data == 'cityscapes' else 512
    resize, crop = cfg.train_dataloader.dataset.pipeline[2:4]
    assert (resize.type, tuple(resize.scale), tuple(resize.ratio_range)) == (
        'RandomResize', (2048, side), (0.5, 2.0))
    assert (crop.type, tuple(crop.crop_size), crop.cat_max_ratio) == (
        'RandomSegCrop', (side, side), 0.75)
    ratios = {'ade': [0.75, 0.875, 1.0, 1.125, 1.25],
              'cityscapes': [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0],
              'cocostuff': [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]}[data]
    scales = [tuple(step.scale) for step in cfg.tta_pipeline[1].transforms[0]]
    assert scales == [(2048 * ratio, side * ratio) for ratio in ratios]
    steps = [step.type for step in cfg.test_dataloader.dataset.pipeline]
    if data == 'cityscapes':
        assert cfg.model.test_cfg == dict(mode='slide', crop_size=(1024, 1024), stride=(768, 768))
    else:
        assert cfg.model.test_cfg.mode == 'whole'
        assert steps[1:3] == ['SegResize', 'ResizeToMultiple']
    if tuned:
        trained = name.split('_isr40k')[0]
        assert Path(cfg.load_from) == Path('work_dirs') / trained / 'iter_160000.pth'


def pools(model):
    return [layer.pool_ratio for layer in model.modules()
            if isinstance(layer, EmbeddingFreeAttention)]


@pytest.mark.parametrize('name', [*PAPER, *RANGES, 'edaformer_t_camvid', 'edaformer_t_camvid_isr',
                                  'edaformer_t_camvid_isr_range'])
def test_pools(name):
    with torch.device('meta'):
        model = MODELS.build(load(name).model)
    factor = 2 if name.endswith(('isr40k', '_isr')) else 1
    ratios = model.isr_range.isr_ratios if model.isr_range else []
    assert [str(ratio) for ratio in ratios] == (
        ['2211-222', '2222-222', '4422-444', '2222-222+q2'] if name.endswith('_range') else [])
    assert sorted(set(pools(model))) == [factor * pool for pool in (1, 2, 4, 8)]


@pytest.mark.parametrize('name', BACKBONES)
def test_distributed_training_finds_no_unused_parameter(name):
    model = build(load(name))
    model.init_weights()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize('name', ABLATIONS)
def test_ablations_differ_in_what_they_say(name):
    """Tables 3 and 5."""
    model = build(load(name))
    depths = [len(level) for level in model.decode_head.levels]
    structure = tuple(map(int, name[-5:].split('_'))) if name[-1].isdecimal() else (3, 2, 1)
    assert tuple(depths[::-1]) == structure  # the paper prints deep to shallow
    mixers = {type(block.attn) for level in model.decode_head.levels for block in level}
    if 'trained_at' in name:
        assert set(pools(model.backbone)) == {16, 8, 2, 1}
        assert pools(model.decode_head) == [8, 4, 4, 2, 2, 2]
    if 'conv' in name:
        assert mixers == {torch.nn.Conv2d}
    else:
        assert mixers == {EmbeddedAttention if 'embedded' in name else EmbeddingFreeAttention}


def test_parameters_of_the_embedded_decoder():
    """Table 5(b): 4.9 M without embedding, 5.7 M with; the latter takes a spare classifier of
    150 classes along, as the released model does."""
    model = build(load('edaformer_t_ade_decoder_embedded'))
    parameters = sum(p.numel() for p in model.parameters())
    assert round((parameters + 150 * 129) / 1e6, 1) == 5.7


@pytest.mark.parametrize('size', ['tiny', 'base'])
def test_parameter_groups_are_those_of_the_released_names(size):
    """The recipe's rules, written out, on the names they were written for."""
    cfg = load(f'edaformer_{size[0]}_ade')
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: (group['lr'], group['weight_decay'])
             for group in optimizer.param_groups for parameter in group['params']}
    expected = {}
    for name, _ in plain.build(size).named_parameters():
        if 'head' in name:
            rule = (6e-4, 0.01)
        elif 'norm' in name or 'pos_block' in name:
            rule = (6e-5, 0.)
        else:
            rule = (6e-5, 0.01)
        expected[rename_key(name)] = rule
    assert found.keys() == expected.keys()
    for name, rule in expected.items():
        assert found[name] == pytest.approx(rule), name
    assert optimizer.defaults['betas'] == (0.9, 0.999)


def test_the_template_is_short_and_for_few_images_on_one_gpu():
    assert len((ROOT / 'configs' / 'custom_dataset.py').read_text().splitlines()) < 40
    cfg = load('custom_dataset')
    assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size == 4
    warmup, poly = cfg.param_scheduler
    assert warmup.end == poly.begin < cfg.train_cfg.val_interval
    assert poly.end == cfg.train_cfg.max_iters <= 5000
    assert cfg.default_hooks.checkpoint.interval == cfg.train_cfg.val_interval


@pytest.mark.parametrize('given', ['TensorboardVisBackend',
                                   ['LocalVisBackend', 'TensorboardVisBackend']])
def test_the_command_line_names_what_shows_the_progress(monkeypatch, given):
    cfg = load_config(f'{ROOT}/configs/edaformer_t_synthetic.py',
                      cfg_options={'visualizer.vis_backends': given})
    types = [backend['type'] for backend in cfg.visualizer.vis_backends]
    assert types == ([given] if isinstance(given, str) else given)
    packages = {'tensorboard': None}
    monkeypatch.setattr(importlib.util, 'find_spec', packages.get)
    with pytest.raises(ConfigError, match=r'VisBackend needs tensorboard: .*pip install'):
        checks.check_programs(cfg)
    packages['tensorboard'] = 'there'
    checks.check_programs(cfg)
