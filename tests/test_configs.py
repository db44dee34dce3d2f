"""Every config builds, and trains with the paper's recipe."""
import itertools
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmseg.registry import DATASETS, MODELS, TRANSFORMS

from mmseg_edaformer.engine.convert import rename_key
from mmseg_edaformer.models import EmbeddingFreeAttention
from tests import plain
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
PAPER = [f'edaformer_{size}_{data}{tuned}' for size in 'tb'
         for data in ('ade', 'cityscapes', 'cocostuff') for tuned in ('', '_isr40k')]


def load(name):
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


def test_all_named_configs_are_there():
    assert {path.stem for path in CONFIGS} == {
        *PAPER, 'edaformer_t_synthetic', 'edaformer_t_camvid', 'segformer_b0_ade',
        'segformer_b0_camvid',
        'custom_dataset'}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_it_builds_and_agrees_with_itself(path):
    cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports[0] == 'mmseg_edaformer'
    MODELS.build(dict(cfg.tta_model, module=cfg.model))
    crop = tuple(cfg.crop_size)
    assert tuple(cfg.model.data_preprocessor.size) == crop
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        # An absent folder is met when the data is read, not before.
        dataset = DATASETS.build(dict(loader.dataset, lazy_init=True))
        assert len(dataset.metainfo['classes']) == cfg.model.decode_head.num_classes
        tta = list(itertools.chain(*cfg.tta_pipeline[1].transforms))
        for pipeline in (loader.dataset.pipeline, tta):
            labels = [step for step in pipeline if step.type == 'LoadAnnotations']
            assert [step.num_classes for step in labels] == [cfg.model.decode_head.num_classes]
    for step in cfg.tta_pipeline:
        TRANSFORMS.build(step)
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters


@pytest.mark.parametrize('name', PAPER)
def test_recipe(name):
    cfg = load(name)
    data, tuned = name.split('_')[2], name.endswith('isr40k')
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
        'RandomCrop', (side, side), 0.75)
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
        assert steps[1:3] == ['Resize', 'ResizeToMultiple']
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    pools = [layer.pool_ratio for layer in model.modules()
             if isinstance(layer, EmbeddingFreeAttention)]
    factor = 2 if tuned else 1
    assert sorted(set(pools)) == [factor * pool for pool in (1, 2, 4, 8)]
    if tuned:
        assert Path(cfg.load_from) == Path('work_dirs') / name[:-7] / 'iter_160000.pth'


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


def test_the_template_is_short():
    lines = (ROOT / 'configs' / 'custom_dataset.py').read_text().splitlines()
    assert len(lines) < 40
