"""One checkpoint at several ISR ratios, side by side: figures and pictures."""
import json
import os
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmseg.registry import DATASETS, MODELS
from prettytable import PrettyTable

from ..cost import count_macs
from ..data.classification import is_classifier
from ..data.transforms import IGNORED
from ..engine import checks, launch
from ..engine.checkpoint_loading import check_weights
from ..engine.run_config import load_config
from ..errors import ConfigError
from ..files import replacing
from ..isr import ISRRatio, isr
from ..isr.pooling import check_method

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

_COLUMNS = {'accuracy/top1': 'top-1', 'accuracy/top5': 'top-5', 'mIoU': 'mIoU'}
"""Metrics of classifiers and of segmentors, and how the table names them."""
_FIELDS: dict[str, Any] = dict(config=str, checkpoint=str, isr_ratio=(str, int), metrics=dict)


@dataclass(frozen=True)
class Result:
    """What `tools/test.py --json` wrote of one ratio."""
    config: str
    checkpoint: str
    ratio: ISRRatio
    method: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class RatioFigures:
    """What one ratio costs: GMACs of one image, and milliseconds, median and relative."""
    gmacs: float
    milliseconds: float
    relative: float


def compare(files: Sequence[str | Path], picture: str | Path | None = None,
            cfg_options: Mapping[str, Any] | None = None) -> str:
    """Put the results of one checkpoint at several ratios side by side.

    Args:
        files: What `tools/test.py --json` wrote for each ratio.
        picture: Where to draw predictions of a segmentor, as a PNG.
        cfg_options: Settings of the config that the tests were given.

    Returns:
        A table for a terminal, what chance would give, and how it was measured.

    Raises:
        ConfigError: A file is none of such results, they are of several checkpoints or lack a
            metric, or a picture of a classifier is asked for.
        UserError: The checkpoint or the data is not there, or does not fit.
    """
    results = read_results(files)
    cfg = load_config(results[0].config, cfg_options=cfg_options)
    classifies = is_classifier(cfg)
    if classifies:
        checks.check_classifier_flags({'--picture': picture})
    columns = _columns(files, results, 'accuracy/top1' if classifies else 'mIoU')
    launch.prepare_test(cfg, results[0].checkpoint)
    model, dataset = load_model(cfg, results[0].checkpoint)
    # A segmentor's preprocessor knows the size of its crops.
    figures = measure_ratios(model, dataset, results, cfg.get('crop_size') if classifies else None)
    if picture:
        draw(model, dataset, results, picture)
    return '\n'.join([
        table(results, figures, columns), _chance_line(dataset, classifies),
        f'{len(dataset)} images, batch 1, {torch.get_num_threads()} threads, '
        f'torch {torch.__version__}; time is the median ratio to the first row.',
        *([f'Picture: {picture}'] if picture else [])])


def read_results(files: Sequence[str | Path]) -> list[Result]:
    """Read what `tools/test.py --json` wrote.

    Raises:
        ConfigError: A file is missing or holds something else, or the results are not of one
            config and checkpoint.
        RatioError: A ratio or a method means nothing.
    """
    results: list[Result] = []
    for file in files:
        try:
            content = json.loads(Path(file).read_text(encoding='utf-8'))
        except OSError as error:
            raise ConfigError(f'{file} cannot be read: {error.strerror}') from error
        except ValueError:
            content = {}
        lacking = [name for name, kind in _FIELDS.items()
                   if not isinstance(content, dict) or not isinstance(content.get(name), kind)]
        if lacking or not all(isinstance(v, (int, float)) for v in content['metrics'].values()):
            raise ConfigError(f'{file} is not what tools/test.py --json writes, it lacks '
                              f'{", ".join(lacking) or "numbers as metrics"}: test again')
        result = Result(content['config'], content['checkpoint'],
                        ISRRatio.parse(content['isr_ratio']),
                        check_method(content.get('isr_method', 'average')), content['metrics'])
        results.append(result)
        for name in ('config', 'checkpoint'):
            first, other = getattr(results[0], name), getattr(result, name)
            if os.path.realpath(first) != os.path.realpath(other):
                raise ConfigError(f'{files[0]} and {file} are not of the same {name}, but of '
                                  f'{first} and {other}: compare results of one')
    return results


def _columns(files: Sequence[str | Path], results: Sequence[Result], main: str) -> list[str]:
    """The metrics to show: the main one, and of `_COLUMNS` what any of the results has.

    Raises:
        ConfigError: A result lacks one of them.
    """
    columns = [name for name in _COLUMNS
               if name == main or any(name in result.metrics for result in results)]
    for file, result in zip(files, results):
        for name in columns:
            if name not in result.metrics:
                raise ConfigError(f'{file} lacks the metric {name}, it has '
                                  f'{", ".join(result.metrics) or "none"}: test again with '
                                  f'the test_evaluator of {result.config}')
    return columns


def load_model(cfg: Config, checkpoint: str) -> tuple[BaseModel, BaseDataset]:
    """The model of a config with the weights of a checkpoint, in eval mode, and its test set.

    Raises:
        CheckpointError: The checkpoint is missing or damaged, or does not fit.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    # What mixes batches is for training, and mmpretrain logs what it implies.
    own = {**cfg.model, 'train_cfg': None} if is_classifier(cfg) else cfg.model
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # mmseg's, of its own defaults
        model = MODELS.build(own)
    loaded = load_checkpoint(model, checkpoint, map_location='cpu', logger='silent')
    check_weights(model, loaded)
    return model.eval(), DATASETS.build(cfg.test_dataloader.dataset)


@torch.no_grad()
def measure_ratios(model: BaseModel, dataset: BaseDataset, results: Sequence[Result],
                   crop_size: tuple[int, int] | None = None, rounds: int = 30
                   ) -> list[RatioFigures]:
    """Time whole predictions, from the decoded image to its labels, one image at a time.

    Each round predicts one image of the data set at every ratio in turn, so that whatever else
    the machine does falls on all of them alike; the first three rounds warm up.

    Args:
        model: A segmentor or a classifier.
        dataset: Its images.
        results: Ratios and methods; times are relative to the first.
        crop_size: See `apply_isr`.
        rounds: So many predictions at each ratio.
    """
    seconds: list[list[float]] = [[] for _ in results]
    for i in range(rounds + 3):
        data = pseudo_collate([dataset[i % len(dataset)]])
        for result, own in zip(results, seconds):
            with isr(model, result.ratio, method=result.method, crop_size=crop_size):
                start = time.perf_counter()
                model.test_step(data)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if i >= 3:
                    own.append(time.perf_counter() - start)
    size = tuple(dataset[0]['inputs'].shape[1:])
    figures = []
    for result, own in zip(results, seconds):
        with isr(model, result.ratio, method=result.method, crop_size=crop_size):
            macs = count_macs(model, size)
        figures.append(RatioFigures(macs / 1e9, 1e3 * statistics.median(own), statistics.median(
            each / base for each, base in zip(own, seconds[0]))))
    return figures


def table(results: Sequence[Result], figures: Sequence[RatioFigures],
          metrics: Sequence[str]) -> str:
    """The figures as a short table for a terminal."""
    rows = PrettyTable(['isr_ratio', *(_COLUMNS[name] for name in metrics), 'GMACs',
                        'ms per image', 'time'], align='r')
    for result, row in zip(results, figures):
        rows.add_row([_name(result, 'mIoU' not in metrics),
                      *(f'{result.metrics[name]:.1f}' for name in metrics),
                      f'{row.gmacs:.3f}', f'{row.milliseconds:.1f}', f'x {row.relative:.2f}'])
    return str(rows)


def _name(result: Result, classifies: bool) -> str:
    """The ratio, for a classifier of its encoder alone, and the method if it is not the usual."""
    name = str(result.ratio)
    if classifies:
        name = name.partition('-')[0].rstrip(',')
    return name if result.method == 'average' or name == 'none' else f'{name} {result.method}'


def _chance_line(dataset: BaseDataset, classifies: bool) -> str:
    """What it would give to predict the largest class everywhere."""
    classes = dataset.metainfo['classes']
    if classifies:
        counts = np.bincount([dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))])
    else:
        counts = np.zeros(len(classes), int)
        for i in range(len(dataset)):
            labels = dataset[i]['data_samples'].gt_sem_seg.data.numpy()
            counts += np.bincount(labels[labels != IGNORED], minlength=len(classes))
    share = counts.max() / counts.sum()
    text = f"Chance: '{classes[counts.argmax()]}' everywhere is right for {share:.1%} of the "
    return text + ('images.' if classifies else
                   f'pixels, mIoU {100 * share / len(classes):.1f}.')


@torch.no_grad()
def draw(model: BaseModel, dataset: BaseDataset, results: Sequence[Result], path: str | Path,
         indices: Sequence[int] = (0, 2, 7, 11)) -> None:
    """Draw image, truth and the prediction at each ratio, a row for each image, as a PNG."""
    indices = [index for index in indices if index < len(dataset)]
    classes, palette = dataset.metainfo['classes'], np.array(dataset.metainfo['palette'], np.uint8)
    colours = np.vstack([palette, np.zeros((256 - len(palette), 3), np.uint8)])
    titles = ['image', 'truth', *(
        'prediction' if str(result.ratio) == 'none' else f'ISR {_name(result, False)}'
        for result in results)]
    height, width = dataset[0]['inputs'].shape[1:]
    figure, axes = plt.subplots(
        len(indices), len(titles), squeeze=False, layout='constrained',
        figsize=(2.6 * len(titles), 2.6 * len(indices) * height / width + 0.7))
    for row, index in zip(axes, indices):
        data = pseudo_collate([dataset[index]])
        sample = data['data_samples'][0]
        panels = [mmcv.imread(sample.img_path, channel_order='rgb'),
                  colours[sample.gt_sem_seg.data.squeeze(0).numpy()]]
        for result in results:
            with isr(model, result.ratio, method=result.method):
                panels.append(colours[model.test_step(data)[0].pred_sem_seg.data.squeeze(0).cpu()])
        for axis, panel in zip(row, panels):
            axis.imshow(panel)
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=11)
    figure.legend(handles=[Patch(color=colour / 255, label=name)
                           for name, colour in zip(classes, palette)],
                  loc='outside lower center', ncols=len(classes), frameon=False, fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)
