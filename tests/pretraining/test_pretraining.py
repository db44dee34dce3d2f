"""Pretraining as a classifier: the recipe's statistics, the checks, and runs that survive."""
import json
import os
import re
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmpretrain', reason='mmpretrain, which pretrains the encoder, is not there')

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, init_default_scope
from mmpretrain.datasets.samplers import repeat_aug
from mmpretrain.registry import DATASETS, MODELS, TRANSFORMS
from torch.utils.data import BatchSampler

from mmseg_edaformer.analysis.pipeline import measure_pipeline
from mmseg_edaformer.cost import count_macs
from mmseg_edaformer.engine import checks, launch
from mmseg_edaformer.engine.loop import CountedBatches, SeededIndices
from mmseg_edaformer.errors import ConfigError, DataError, RatioError
from mmseg_edaformer.isr import ISRRatio
from mmseg_edaformer.pretraining import crops as drawn, folders
from tests.conftest import ROOT
from tests.engine.training import differences, run_to_end, state, train
from tests.processes import done, finish, in_child


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmpretrain')
    np.random.seed(0)


@pytest.fixture(scope='module')
def whole(classifier, tmp_path_factory):
    """The work dir of a run of 12 steps that nothing interrupted; read-only."""
    work = tmp_path_factory.mktemp('whole') / 'work'
    run_to_end(classifier, work)
    return work


def recipe(size='t'):
    return Config.fromfile(ROOT / 'configs' / f'eft_{size}_in1k.py')


@pytest.mark.parametrize(('size', 'parameters', 'gmacs'), [('t', 3.7, 0.6), ('b', 25.4, 4.2)])
def test_size_and_cost(size, parameters, gmacs):
    """With the classifier, as ImageNet models are counted."""
    model = MODELS.build(recipe(size).model)
    model.init_weights()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()  # distributed training needs all
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == parameters
    assert round(count_macs(model, (224, 224)) / 1e9, 1) == gmacs


def test_exactly_norms_and_biases_do_not_decay():
    cfg = recipe()
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {id(parameter): group['weight_decay'] for group in optimizer.param_groups
             for parameter in group['params']}
    for module in model.modules():
        norm = 'norm' in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            assert decay[id(parameter)] == (0 if norm or name == 'bias' else 0.05)


def test_schedule():
    """8 x 128 images, 300 epochs of which 5 warm up from 1e-6 to 1e-3, a cosine to 1e-5."""
    cfg = recipe()
    loader, optimizer = cfg.train_dataloader, cfg.optim_wrapper.optimizer
    warm_up, cosine = cfg.param_scheduler
    epoch = 1_281_167 // 1024
    assert cfg.auto_scale_lr.base_batch_size == 1024 == 8 * loader.batch_size
    assert cfg.train_cfg.max_iters == 300 * epoch
    assert (warm_up.begin, warm_up.end, warm_up.start_factor) == (0, 5 * epoch, 1e-3)
    assert (cosine.begin, cosine.end, cosine.eta_min) == (5 * epoch, 300 * epoch, 1e-5)
    assert not warm_up.by_epoch
    assert not cosine.by_epoch
    assert (optimizer.lr, optimizer.eps, optimizer.betas) == (1e-3, 1e-8, (0.9, 0.999))
    assert (loader.sampler.type, loader.sampler.num_repeats, loader.drop_last) == (
        'RepeatAugSampler', 3, True)
    assert cfg.optim_wrapper.get('clip_grad') is None
    assert {cfg.model.backbone.drop_path_rate, recipe('b').model.backbone.drop_path_rate} == {0.1}


def test_repeated_augmentation(monkeypatch):
    """A third of the images has its turn, each three times, each time with other numbers."""
    images, batch, ranks = 960, 8, 8
    drawn = []
    for rank in range(ranks):
        monkeypatch.setattr(repeat_aug, 'get_dist_info', lambda rank=rank: (rank, ranks))
        # A seed of its own each: the run's is what counts.
        sampler = repeat_aug.RepeatAugSampler(range(images), seed=100 + rank)
        counted = CountedBatches(BatchSampler(sampler, batch, drop_last=True), rank, ranks)
        counted.seed = 7
        steps = iter(counted)
        epoch = [pair for _ in range(images // ranks // batch) for indices in [next(steps)]
                 for pair in zip(list.copy(indices), indices.keys)]
        assert len({index for index, _ in epoch}) == len(epoch)  # never twice on one
        drawn += epoch
    assert Counter(Counter(index for index, _ in drawn).values()) == {3: images // 3}
    assert len({key for _, key in drawn}) == len(drawn)


def test_ranks_see_other_augmentations_of_an_image(classifier):
    dataset = DATASETS.build(Config.fromfile(classifier).train_dataloader.dataset)
    views = []
    for key in ((7, 1, 0), (7, 1, 1), (7, 1, 2), (7, 1, 0)):
        views += [dataset[index]['inputs'] for index in SeededIndices([11], [key])]
    assert torch.equal(views[0], views[3])
    assert not any(torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_augmentation():
    """rand-m9-mstd0.5-inc1: two of fifteen, each done half of the time, at 9 +- 0.5 of 10."""
    cfg = recipe()
    crop, flip, augment, erase = map(TRANSFORMS.build, cfg.train_pipeline[1:-1])
    assert (crop.scale, crop.backend, crop.interpolation) == ((224, 224), 'pillow', 'bicubic')
    assert (crop.crop_ratio_range, crop.aspect_ratio_range) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert flip.prob == 0.5
    assert len(augment.transforms) == 15
    assert {step.prob for step in augment.transforms} == {0.5}
    assert (augment.num_policies, augment.magnitude_level, augment.magnitude_std) == (2, 9, 0.5)
    # Noise that is standard normal after normalisation.
    mean, std = (cfg.model.data_preprocessor[name][::-1] for name in ('mean', 'std'))
    assert (erase.erase_prob, erase.fill_color, erase.fill_std) == (0.25, mean, std)
    assert cfg.model.train_cfg.augments == [dict(type='Mixup', alpha=0.8),
                                            dict(type='CutMix', alpha=1.0)]
    assert cfg.model.head.loss.label_smooth_val == 0.1


def test_every_step_of_a_pipeline_is_timed():
    cfg, threads = recipe(), torch.get_num_threads()
    steps = measure_pipeline(cfg, (64, 96), images=3)
    assert [step for step, _ in steps] == [
        *(step.type for step in cfg.train_dataloader.dataset.pipeline), 'collate', 'total']
    assert min(time for _, time in steps) >= 0
    assert steps[-1][1] == pytest.approx(sum(time for _, time in steps[:-1]))
    assert torch.get_num_threads() == threads


@HOOKS.register_module()
class KillHook(Hook):
    """End this process at once, before a step."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_and_resumed(classifier, whole, tmp_path):
    """Bit for bit: repeated and random augmentation, mixup, drop path; in the second epoch."""
    work = tmp_path / 'work'
    pid = in_child(train, classifier, work, log=tmp_path / 'log',
                   before=lambda cfg: cfg.custom_hooks.append(dict(type='KillHook')))
    assert finish(pid) == -signal.SIGKILL
    log = run_to_end(classifier, work, options={
        'train_dataloader.num_workers': 2, 'train_dataloader.persistent_workers': True})
    assert 'iter: 6' in log
    assert differences(state(whole), state(work)) == []
    assert (work / 'best_accuracy_top1_iter_6.pth').exists() == (
        whole / 'best_accuracy_top1_iter_6.pth').exists()


@pytest.mark.soak
def test_it_learns(classifier, tmp_path):
    """The whole recipe with a small encoder: far from chance, a tenth, after 150 steps."""
    data = str(drawn.draw_crops(tmp_path / 'data', train=24, val=10))
    log = run_to_end(classifier, tmp_path / 'work', options={
        'train_dataloader.batch_size': 32, 'train_dataloader.dataset.data_root': data,
        'val_dataloader.dataset.data_root': data, 'optim_wrapper.optimizer.lr': 2e-3,
        'param_scheduler': [
            dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, T_max=150)],
        'auto_scale_lr.base_batch_size': 32, 'train_cfg.max_iters': 150,
        'train_cfg.val_interval': 150, 'default_hooks.checkpoint.interval': 150})
    top1, = map(float, re.findall(r'accuracy/top1: ([\d.]+)', log))
    assert top1 > 25


def test_isr(classifier, whole, tmp_path):
    output = done(
        'tools/test.py', classifier, whole / 'iter_12.pth', '--work-dir', tmp_path / 'work',
        '--isr-ratio', '2211', '--json', tmp_path / 'figures.json')
    figures = json.loads((tmp_path / 'figures.json').read_text())
    assert figures['isr_ratio'] == '2211-111'
    assert figures['metrics'].keys() == {'accuracy/top1', 'accuracy/top5'}
    assert figures['images'] == 10
    assert 'on 64x64 pixels' in output
    keys = [line.split('|')[4].strip() for line in output.splitlines() if '| encoder' in line]
    assert keys == ['4 -> 1', '4 -> 1', '4', '4']


def test_ratios_of_an_encoder():
    assert ISRRatio.parse_encoder('2,2,1,1') == ISRRatio.parse_encoder('optimal')
    for text in ('22x1', '0', ''):
        with pytest.raises(RatioError):
            ISRRatio.parse_encoder(text)


def test_flags_of_segmentation(classifier, whole):
    for flag in ('out', 'tta', 'show', 'show_dir', 'bf16', 'skip_bad_files'):
        with pytest.raises(ConfigError, match=f'--{flag.replace("_", "-")}: only for segment'):
            launch.prepare_test(Config.fromfile(classifier), str(whole / 'iter_12.pth'),
                                **{flag: 'x'})


def data_config(config, root):
    cfg = Config.fromfile(config)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(root)
    return cfg


def test_missing_and_wrong_folders(classifier, crops, tmp_path):
    checks.check_data(data_config(classifier, crops), 'train', 'val')
    with pytest.raises(DataError, match=r'train set is not where the config says: .*nowhere'):
        checks.check_data(data_config(classifier, tmp_path / 'nowhere'), 'train', 'val')
    with pytest.raises(DataError, match='needs one folder per class'):
        checks.check_data(data_config(classifier, tmp_path), 'train', 'val')
    for split in ('train', 'val'):
        for name in drawn.CROPS:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / 'a.JPEG').touch()
    cfg = data_config(classifier, tmp_path)
    checks.check_data(cfg, 'train', 'val')
    (tmp_path / 'val' / 'tree').rename(tmp_path / 'val' / 'shrub')
    with pytest.raises(DataError, match='different class folders, such as shrub'):
        checks.check_data(cfg, 'train', 'val')
    (tmp_path / 'train' / 'sky' / 'a.JPEG').unlink()
    with pytest.raises(DataError, match=r'no image in 1 of its 10 class folders .* such as sky'):
        checks.check_data(cfg, 'train', 'val')
    cfg.model.head.num_classes = 1000
    with pytest.raises(ConfigError, match=r'has 10 classes, .* the model 1000'):
        checks.check_data(cfg, 'train', 'val')


def test_mmpretrain_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'mmpretrain.models', None)
    with pytest.raises(ConfigError, match=r'needs mmpretrain.*\[pretrain(-fork)?\]'):
        checks.check_data(recipe(), 'train')


def test_crops_are_drawn_reproducibly(crops, capsys):
    assert sorted(path.name for path in (crops / 'train').iterdir()) == list(drawn.CROPS)
    image = np.asarray(Image.open(crops / 'val' / 'car' / '00000.png'))
    again = drawn.draw_crop(np.random.default_rng((0, 1, 1, 0)), 'car')
    np.testing.assert_array_equal(image, again)
    folders.prepare(folders.FOLDERS['crops'], crops)
    assert 'train: 40 images in 10 folders' in capsys.readouterr().out
    with pytest.raises(DataError, match='instead of 1,000'):
        folders.prepare(folders.FOLDERS['imagenet'], crops)
