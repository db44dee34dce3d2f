"""A few ISR ratios of one checkpoint, side by side: figures and predictions."""
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmseg.registry import DATASETS

from ..data.drawing import CLASSES, draw_dataset
from ..engine.run_config import load_config
from ..errors import ConfigError
from ..files import replacing
from ..isr import ISRRatio, isr
from ..predict.outputs import draw_legend
from .bench import Bench, open_bench
from .sheets import below, beside, captioned, resized
from .sweep import make_rows
from .sweep_report import table
from .timing import size_text, thread_text

_LARGE, _ORDINARY = (1024, 1024), 192
"""Size of the larger worlds, and the height of the scenes whose objects are as large."""
_PANEL = 260  # pixels of the width of a panel


def compare_checkpoint(config: str, checkpoint: str, isr_ratios: Sequence[str], *, large: int = 0,
                       picture: str | Path | None = None,
                       cfg_options: Mapping[str, Any] | Sequence[str] | None = None) -> str:
    """Test a checkpoint at several ratios in one process, all of them in turn on each image.

    Args:
        config: Config of a segmentor.
        checkpoint: Its weights.
        isr_ratios: What `ISRRatio.parse` reads; they are compared with the trained ratio.
        large: Number of larger drawn worlds to test on too; for a model of drawn scenes.
        picture: PNG file for predictions.
        cfg_options: Settings of the config to override.

    Raises:
        UserError: The config, the checkpoint, the data or a ratio cannot be used.
    """
    cfg = load_config(config, cfg_options=cfg_options)
    bench = open_bench(cfg, checkpoint)
    benches = {'test set': bench}
    ratios = list(dict.fromkeys(map(bench.ratio, ['none', *isr_ratios])))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        if large:
            benches['larger worlds'] = _large_bench(cfg, bench, Path(folder), large)
        for title, one in benches.items():
            one.measure(ratios, title=title)
            rows = make_rows(one, ratios, memory=False)
            lines += [f'{title.capitalize()}: {one.images} images of {size_text(one.size)} pixels',
                      table(rows, {row.isr_ratio for row in rows})]
        if picture:
            _draw(bench.model, [one.dataset for one in benches.values()], ratios, picture)
    fastest = min(rows, key=lambda row: row.time_vs_none)
    if fastest.isr_ratio != 'none':
        lines.append(
            f'All rows have the same weights. At {size_text(one.size)} pixels --isr-ratio '
            f'{fastest.isr_ratio} is {1 / fastest.time_vs_none:.2f} times as fast as none, at '
            f'{fastest.change:+.1f} mIoU.')
    return '\n'.join([
        *lines, f'ms: image to labels, batch 1, {bench.device.type}, {thread_text()}; time: median '
        'ratio to none in the same turn.', *([f'Picture: {picture}'] if picture else [])])


def _large_bench(cfg: Config, bench: Bench, folder: Path, number: int) -> Bench:
    """Draw larger worlds, whose objects have as many pixels as those of ordinary scenes."""
    if tuple(bench.dataset.metainfo['classes']) != CLASSES:
        raise ConfigError('--large draws scenes, whose classes are not those of '
                          f'{cfg.filename}: leave it out')
    draw_dataset(folder / 'large', train=1, val=number, size=_LARGE, seed=1,
                 scale=_ORDINARY / _LARGE[0])
    dataset = dict(cfg.test_dataloader.dataset, data_root=str(folder / 'large'))
    return Bench(bench.model, DATASETS.build(dataset), bench.metric)


@torch.no_grad()
def _draw(model: Any, datasets: Sequence[BaseDataset], ratios: Sequence[ISRRatio],
          path: str | Path) -> None:
    """Draw image, truth and the prediction at each ratio, a row for each image, as a PNG."""
    samples = [datasets[0][index] for index in (0, 2, 7) if index < len(datasets[0])]
    samples += [dataset[0] for dataset in datasets[1:]]
    classes, palette = (datasets[0].metainfo[name] for name in ('classes', 'palette'))
    colours = np.zeros((256, 3), np.uint8)
    colours[:len(palette)] = np.array(palette)[:, ::-1]
    rows = []
    for sample in samples:
        data = pseudo_collate([sample])
        panels = {'image': sample['inputs'].permute(1, 2, 0).numpy(),
                  'truth': colours[sample['data_samples'].gt_sem_seg.data.squeeze(0).numpy()]}
        for ratio in ratios:
            with isr(model, ratio):
                labels = model.test_step(data)[0].pred_sem_seg.data.squeeze(0).cpu()
            panels[f'ISR {ratio!s}'] = colours[labels]
        height, width = panels['image'].shape[:2]
        rows.append(beside([captioned(resized(panel, (_PANEL, _PANEL * height // width)), title)
                            for title, panel in panels.items()]))
    rows.append(draw_legend([(name, (r, g, b)) for name, (r, g, b) in zip(classes, palette)],
                            rows[0].width))
    with replacing(path) as partial:
        below(rows, gap=14).save(partial, 'PNG')
