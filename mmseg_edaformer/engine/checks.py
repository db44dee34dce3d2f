"""What is cheaper to find before a run than days into it."""
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import is_cuda_available
from mmengine.fileio import list_dir_or_file
from mmengine.logging import MMLogger, print_log
from mmengine.registry import init_default_scope
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from ..command_line import check_checkpoint
from ..data.audit import check_samples, inner_datasets
from ..data.classification import check_library, is_classifier
from ..errors import ConfigError, DataError
from ..files import write_file
from ..pretraining.folders import check_folders, check_same_classes


def check_work_dir(work_dir: str) -> None:
    """Check that checkpoints can be written."""
    try:
        # Processes of one run may try at once.
        write_file(Path(work_dir) / '.writable', '')
        Path(work_dir, '.writable').unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f'the work dir {work_dir} cannot be written to: '
                          f'{error.strerror or error}. Make room or give another --work-dir'
                          ) from error


def check_amp(cfg: Config) -> None:
    """Check that mixed precision can run here."""
    wrapper = cfg.optim_wrapper.get('wrapped', cfg.optim_wrapper.type)
    if wrapper == 'AmpOptimWrapper' and not is_cuda_available():
        raise ConfigError('--amp (AmpOptimWrapper) needs a GPU, and none is visible here: train '
                          'without it, or check CUDA_VISIBLE_DEVICES and the installed torch')


def check_programs(cfg: Config) -> None:
    """Check that what compiles networks and draws curves is installed."""
    types = [backend['type'] for backend in cfg.get('visualizer', {}).get('vis_backends') or ()]
    for wanted, what, package in (
            (cfg.get('compile') and is_cuda_available(), '--compile on a GPU', 'triton'),
            ('TensorboardVisBackend' in types, 'TensorboardVisBackend', 'tensorboard'),
            ('WandbVisBackend' in types, 'WandbVisBackend', 'wandb')):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f'{what} needs {package}: python -m pip install {package}')
    compiler = os.environ.get('CXX', 'g++')
    if cfg.get('compile') and not is_cuda_available() and shutil.which(compiler) is None:
        raise ConfigError(f'--compile needs a C++ compiler, and {compiler} is not on the PATH: '
                          'install it, name another in CXX, or run without it')


def check_batch_size(cfg: Config, world_size: int) -> None:
    """Warn if the learning rate was chosen for another number of images per step."""
    base = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    per_gpu = cfg.train_dataloader.batch_size
    total = per_gpu * world_size
    if not base or total == base:
        return
    if cfg.auto_scale_lr.get('enable'):
        _warn(f'{world_size} x {per_gpu} = {total} images per step instead of {base}: the '
              f'learning rate is scaled by {total / base:g}')
        return
    exact = (f', or keep the recipe with --cfg-options train_dataloader.batch_size='
             f'{base // world_size}' if base % world_size == 0 else '')
    _warn(f'{world_size} x {per_gpu} = {total} images per step, but the learning rate of this '
          f'config is for {base}: pass --auto-scale-lr to scale it by {total / base:g}{exact}')


def check_epochs(iterations: int, per_step: int, images: int) -> None:
    """Log the number of epochs, and warn of a schedule for far more images."""
    epochs = iterations * per_step / images
    text = (f'{iterations:,} iterations of {per_step} images are {epochs:,.1f} epochs of the '
            f'{images:,} training images')
    if epochs > 1000:
        _warn(f'{text}: lower train_cfg.max_iters, and the ends in param_scheduler with it, as '
              'configs/_base_/schedules/small.py does')
    else:
        MMLogger.get_current_instance().info(text)


def check_start(cfg: Config) -> None:
    """Check the checkpoint that a training starts from, and warn of an encoder without any."""
    source = cfg.get('load_from')
    check_checkpoint(source or None)
    pretrained = cfg.model.backbone.get('init_cfg') is not None or any(
        hook['type'] == 'BackboneWeightsHook' for hook in cfg.get('custom_hooks') or ())
    if cfg.model.backbone.get('type') == 'EFT' and not (source or cfg.get('resume') or pretrained):
        _warn('The encoder starts from random weights, so expect much less than the paper\'s mIoU, '
              'which needs one pretrained on ImageNet: --backbone-weights FILE. In a small case it '
              'costs 3 mIoU after 200 steps, see docs/pretraining.md')


def check_classifier_flags(flags: Mapping[str, Any]) -> None:
    """Check that a classifier is asked for nothing that needs a prediction per pixel."""
    given = ' and '.join(flag for flag, value in flags.items() if value)
    if given:
        raise ConfigError(f'{given}: only for segmentation, and this config trains a classifier. '
                          'Leave it out')


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the data of the splits is there and has the classes that the model predicts."""
    if is_classifier(cfg):
        check_library()
    model = cfg.model.get('module', cfg.model)  # test-time augmentation wraps it
    head = model.get('decode_head', model.get('head'))
    num_classes = head.get('num_classes') if isinstance(head, dict) else None  # cascades: a list
    folders: dict[str, list[str]] = {}
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        inner = list(inner_datasets(loader.dataset)) if loader else []
        for _, dataset_cfg in inner:
            _check_colours(split, loader, dataset_cfg)
            if not os.path.isdir(dataset_cfg.get('data_root') or '.'):
                raise DataError(_missing(split, dataset_cfg.data_root))
            try:
                dataset = DATASETS.build({**dataset_cfg, 'lazy_init': True})
            except ValueError as error:  # such as classes that the data set does not have
                raise ConfigError(f'the {split} set cannot be built: {error}') from error
            if isinstance(dataset, BaseSegDataset):
                classes = dataset.metainfo.get('classes')
                if None not in (classes, num_classes) and len(classes) != num_classes:
                    raise ConfigError(
                        f'the {split} set {type(dataset).__name__} has {len(classes)} classes, the '
                        f'model {num_classes}: set model.decode_head.num_classes={len(classes)}, '
                        "or the data set's metainfo.classes")
            if os.environ.get('RANK', '0') != '0':  # the first process looks at files for all
                continue
            if isinstance(dataset, BaseSegDataset):
                _check_files(split, dataset)
                check_samples(cfg, split, dataset, alone=len(inner) == 1)
            elif is_classifier(cfg):
                folders[split] = check_folders(split, dataset, num_classes)
    check_same_classes(folders)


def _check_colours(split: str, loader: Any, dataset_cfg: Any) -> None:
    if (loader.get('collate_fn') or {}).get('photometric') is not None and any(
            step['type'] == 'PhotoMetricDistortion' for step in dataset_cfg.get('pipeline') or ()):
        raise ConfigError(f'the {split} images would be distorted twice: remove '
                          'PhotoMetricDistortion from the pipeline, or set '
                          f'{split}_dataloader.collate_fn.photometric=None')


def _check_files(split: str, dataset: BaseSegDataset) -> None:
    """Check that the images and the masks are the same ones by name."""
    prefix = dataset.data_prefix
    if any('://' in (path or '') for path in prefix.values()):
        return
    images, masks = prefix.get('img_path') or '', prefix.get('seg_map_path')
    for folder in filter(None, (images, masks)):
        if not os.path.isdir(folder):
            raise DataError(_missing(split, folder))
    if dataset.ann_file:
        if not os.path.isfile(dataset.ann_file):
            raise DataError(_missing(split, dataset.ann_file))
        return
    stems = _stems(images, dataset.img_suffix)
    if not stems:
        raise DataError(f'the {split} set has no image that ends in {dataset.img_suffix} '
                        f'under {images}')
    if masks is None:
        return
    labelled = _stems(masks, dataset.seg_map_suffix)
    for kind, alone, folder, suffix in (('images', stems - labelled, masks, dataset.seg_map_suffix),
                                        ('masks', labelled - stems, images, dataset.img_suffix)):
        if alone:
            wanted = ', '.join(os.path.join(folder, stem + suffix) for stem in sorted(alone)[:3])
            raise DataError(f'{kind} of the {split} set without a partner: {len(alone)}. Missing: '
                            f'{wanted}{", ..." if len(alone) > 3 else ""}')


def _stems(folder: str, suffix: str) -> set[str]:
    return {name.removesuffix(suffix) for name in list_dir_or_file(
        folder, list_dir=False, suffix=suffix, recursive=True)}


def _missing(split: str, path: str) -> str:
    return (f'the {split} set is not where the config says: {path} does not exist (from '
            f'{os.getcwd()}). Set {split}_dataloader.dataset.data_root with --cfg-options, or '
            'link your data there; tools/prepare_data.py says what belongs where')


def _warn(message: str) -> None:
    print_log(message, logger='current', level=30)
