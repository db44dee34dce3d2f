"""One checkpoint at several ISR ratios, side by side: figures and pictures."""
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

from ..data.transforms import IGNORED
from ..isr import ISRRatio, isr
from .cost import count_macs

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.patches import Patch


@dataclass(frozen=True)
class RatioFigures:
    """What one ratio costs: GMACs of one image, and milliseconds, median and relative to none."""
    ratio: ISRRatio
    gmacs: float
    milliseconds: float
    relative: float


def load_model(cfg: Config, checkpoint: str) -> tuple[BaseModel, BaseDataset]:
    """The model of a config with the weights of a checkpoint, in eval mode, and its test set."""
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    model = MODELS.build(cfg.model)
    load_checkpoint(model, checkpoint, map_location='cpu', logger='silent')
    return model.eval(), DATASETS.build(cfg.test_dataloader.dataset)


@torch.no_grad()
def measure_ratios(model: BaseModel, dataset: BaseDataset, ratios: Sequence[ISRRatio],
                   rounds: int = 30) -> list[RatioFigures]:
    """Time whole predictions, from the decoded image to its label map, one image at a time.

    Each round predicts one image of the data set at every ratio in turn, so that whatever else
    the machine does falls on all of them alike; the first three rounds warm up.
    """
    seconds: dict[ISRRatio, list[float]] = {ratio: [] for ratio in ratios}
    for i in range(rounds + 3):
        data = pseudo_collate([dataset[i % len(dataset)]])
        for ratio in ratios:
            with isr(model, ratio):
                start = time.perf_counter()
                model.test_step(data)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if i >= 3:
                    seconds[ratio].append(time.perf_counter() - start)
    size = tuple(dataset[0]['inputs'].shape[1:])
    figures = []
    for ratio in ratios:
        with isr(model, ratio):
            macs = count_macs(model, size)
        figures.append(RatioFigures(
            ratio, macs / 1e9, 1e3 * statistics.median(seconds[ratio]), statistics.median(
                own / base for own, base in zip(seconds[ratio], seconds[ratios[0]]))))
    return figures


def table(figures: Sequence[RatioFigures], miou: Sequence[float]) -> str:
    """The figures as a short table for a terminal."""
    rows = PrettyTable(['isr_ratio', 'mIoU', 'GMACs', 'ms per image', 'time'], align='r')
    for row, value in zip(figures, miou):
        rows.add_row(['none' if str(row.ratio) == '1' else row.ratio, f'{value:.1f}',
                      f'{row.gmacs:.2f}', f'{row.milliseconds:.1f}', f'x {row.relative:.2f}'])
    return str(rows)


def chance(dataset: BaseDataset) -> tuple[str, float]:
    """The largest class and the share of the labelled pixels that it covers."""
    classes = dataset.metainfo['classes']
    counts = np.zeros(len(classes), int)
    for i in range(len(dataset)):
        labels = dataset[i]['data_samples'].gt_sem_seg.data.numpy()
        counts += np.bincount(labels[labels != IGNORED], minlength=len(classes))
    return classes[counts.argmax()], counts.max() / counts.sum()


@torch.no_grad()
def draw(model: BaseModel, dataset: BaseDataset, ratios: Sequence[ISRRatio], path: str | Path,
         indices: Sequence[int] = (0, 2, 7, 11)) -> None:
    """Draw image, truth and the prediction at each ratio, a row for each image, as a PNG."""
    classes, palette = dataset.metainfo['classes'], np.array(dataset.metainfo['palette'], np.uint8)
    colours = np.vstack([palette, np.zeros((256 - len(palette), 3), np.uint8)])
    titles = ['image', 'truth', *('prediction' if str(ratio) == '1' else f'ISR {ratio}'
                                  for ratio in ratios)]
    height, width = dataset[0]['inputs'].shape[1:]
    figure, axes = plt.subplots(
        len(indices), len(titles), squeeze=False, layout='constrained',
        figsize=(2.6 * len(titles), 2.6 * len(indices) * height / width + 0.7))
    for row, index in zip(axes, indices):
        data = pseudo_collate([dataset[index]])
        sample = data['data_samples'][0]
        panels = [mmcv.imread(sample.img_path, channel_order='rgb'),
                  colours[sample.gt_sem_seg.data.squeeze(0).numpy()]]
        for ratio in ratios:
            with isr(model, ratio):
                panels.append(colours[model.test_step(data)[0].pred_sem_seg.data.squeeze(0).cpu()])
        for axis, panel in zip(row, panels):
            axis.imshow(panel)
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=11)
    figure.legend(handles=[Patch(color=colour / 255, label=name)
                           for name, colour in zip(classes, palette)],
                  loc='outside lower center', ncols=len(classes), frameon=False, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
