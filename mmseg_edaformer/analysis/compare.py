"""A few ISR ratios of one checkpoint, side by side: figures and predictions."""
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmseg.registry import DATASETS
from prettytable import PrettyTable

from ..data.classification import is_classifier
from ..data.drawing import CLASSES, draw_dataset
from ..data.transforms import IGNORED
from ..engine import checks, launch
from ..engine.run_config import load_config
from ..errors import ConfigError
from ..files import replacing
from ..isr import ISRRatio, apply_isr, isr, remove_isr
from ..isr.pooling import check_method
from .bench import Bench, open_bench
from .loading import count_windows, load_model
from .sheets import below, beside, captioned, legend, resized
from .sweep import make_rows
from .timing import Prepare, milliseconds, number, relative, take_turns, thread_text

Setting = tuple[ISRRatio, Mapping[str, Any]]
"""A ratio, and other arguments of `isr`."""

_COLUMNS = {'accuracy/top1': 'top-1', 'accuracy/top5': 'top-5', 'mIoU': 'mIoU'}
"""Metrics of classifiers and of segmentors, and how the table names them."""
_FIELDS: dict[str, Any] = dict(config=str, checkpoint=str, isr_ratio=(str, int), metrics=dict)
_TITLES = ('test set', 'larger worlds')
_LARGE, _ORDINARY = (1024, 1024), 192
"""Size of the larger worlds, and the height of the scenes whose objects are as large."""
_ROUNDS = 30
_PANEL = 260  # pixels of the width of a panel


@dataclass(frozen=True)
class Result:
    """What `tools/test.py --json` wrote of one ratio."""
    config: str
    checkpoint: str
    isr_ratio: ISRRatio
    method: str
    metrics: dict[str, float]


def compare_results(files: Sequence[str | Path], picture: str | Path | None = None,
                    cfg_options: Mapping[str, Any] | Sequence[str] | None = None) -> str:
    """Put what `tools/test.py --json` wrote of one checkpoint side by side, and time the ratios.

    Returns a table for a terminal, what chance would give, and how it was measured.

    Raises:
        UserError: A file does not hold such results, they do not belong together, or the
            checkpoint or the data does not exist or fit.
    """
    results = _read_results(files)
    cfg = load_config(results[0].config, cfg_options=cfg_options)
    classifies = is_classifier(cfg)
    if classifies:
        checks.check_classifier_flags({'--picture': picture})
    metrics = _metrics(files, results, 'accuracy/top1' if classifies else 'mIoU')
    launch.prepare_test(cfg, results[0].checkpoint)
    model = load_model(cfg, results[0].checkpoint)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    # A segmentor's preprocessor knows the size of its crops.
    crop_size = cfg.get('crop_size') if classifies else None
    settings: list[Setting] = [(result.isr_ratio, dict(method=result.method, crop_size=crop_size))
                               for result in results]
    gmacs = []
    for ratio, options in settings:
        with isr(model, ratio, **options):
            gmacs.append(count_windows(model, tuple(dataset[0]['inputs'].shape[1:])) / 1e9)
    times = _time_ratios(model, dataset, settings)
    table = PrettyTable(['isr_ratio', *(_COLUMNS[name] for name in metrics), 'GMACs',
                         'ms per image', 'time'], align='r')
    names = [_name(result, classifies) for result in results]
    for i, result in enumerate(results):
        table.add_row([names[i], *(f'{result.metrics[name]:.1f}' for name in metrics),
                       f'{gmacs[i]:.3f}', f'{milliseconds(times[i]):.1f}',
                       f'x {relative(times[i], times[0]):.2f}'])
    if picture:
        _draw(model, [dataset], list(zip(names, settings)), picture)
    return '\n'.join([
        str(table), _chance_line(dataset, classifies),
        f'{len(dataset)} images, batch 1, {thread_text()}, '
        f'torch {torch.__version__}; time is the median ratio to the first row.',
        *([f'Picture: {picture}'] if picture else [])])


def compare_checkpoint(config: str, checkpoint: str, isr_ratios: Sequence[str], *, large: int = 0,
                       picture: str | Path | None = None,
                       cfg_options: Mapping[str, Any] | Sequence[str] | None = None) -> str:
    """Test a checkpoint at several ratios in one process, all of them in turn on each image.

    Args:
        config: Config of a segmentor.
        checkpoint: Its weights.
        isr_ratios: What `ISRRatio.parse` reads; the times are compared with the first.
        large: Number of larger drawn worlds to test on too; for a model of drawn scenes.
        picture: PNG file for predictions.
        cfg_options: Settings of the config to override.

    Raises:
        UserError: The config, the checkpoint, the data or a ratio cannot be used.
    """
    cfg = load_config(config, cfg_options=cfg_options)
    if is_classifier(cfg):
        raise ConfigError(f'{config} trains a classifier: test it with tools/test.py --json at '
                          'each ratio, and give those files to this tool')
    bench = open_bench(cfg, checkpoint)
    benches = [bench]
    ratios = list(dict.fromkeys(map(bench.ratio, isr_ratios)))
    with tempfile.TemporaryDirectory() as folder:
        if large:
            benches.append(_large_bench(cfg, bench, Path(folder), large))
        for one, title in zip(benches, _TITLES):
            one.measure([bench.ratio('none'), *ratios], title=title)
        if picture:
            _draw(bench.model, [one.dataset for one in benches],
                  [(str(ratio), (ratio, {})) for ratio in ratios], picture)
        lines = [_dial_table(benches, ratios), *(
            f'{title.capitalize()}: {one.images} images of {one.size[0]},{one.size[1]} pixels. '
            f'{_chance_line(one.dataset, False)}' for one, title in zip(benches, _TITLES))]
    if len(ratios) > 1:
        lines.append(_meaning(benches[-1], *ratios))
    return '\n'.join([
        *lines,
        f'ms: median and quartiles, image to labels, batch 1, {bench.device.type}, '
        f'{thread_text()}; the ratios take turns on each image.',
        f'time: median ratio to {ratios[0]!s} in the same turn.',
        *([f'Picture: {picture}'] if picture else [])])


def _large_bench(cfg: Config, bench: Bench, folder: Path, number: int) -> Bench:
    """Draw larger worlds, whose objects have as many pixels as those of ordinary scenes."""
    if tuple(bench.dataset.metainfo['classes']) != CLASSES:
        raise ConfigError('--large draws scenes, whose classes are not those of '
                          f'{cfg.filename}: leave it out')
    draw_dataset(folder / 'large', train=1, val=number, size=_LARGE, seed=1,
                 scale=_ORDINARY / _LARGE[0])
    dataset = dict(cfg.test_dataloader.dataset, data_root=str(folder / 'large'))
    return Bench(bench.model, DATASETS.build(dataset), bench.metric)


def _dial_table(benches: Sequence[Bench], ratios: Sequence[ISRRatio]) -> str:
    table = PrettyTable(align='r')
    table.add_column('isr_ratio', list(map(str, ratios)), align='l')
    for bench, note in zip(benches, ('', ' ')):  # names of columns are unique
        height, width = bench.size
        rows = {row.isr_ratio: row for row in make_rows(bench, ratios, memory=False)}
        shown = [rows[str(ratio)] for ratio in ratios]
        times = [bench.seconds(ratio)[:, 0] for ratio in ratios]
        for name, cells in (
                (f'mIoU {height},{width}', [f'{row.miou:.1f}' for row in shown]),
                ('GMACs', [f'{row.gmacs:.2f}' for row in shown]),
                ('ms', ['{} ({}-{})'.format(*(
                    number(milliseconds(own, share)) for share in (0.5, 0.25, 0.75)))
                    for own in times]),
                ('time', [f'x {relative(own, times[0]):.2f}' for own in times])):
            table.add_column(name + note, cells, align='r')
    return str(table)


def _meaning(bench: Bench, first: ISRRatio, *others: ISRRatio) -> str:
    factor, fastest = max(((relative(bench.seconds(first)[:, 0], bench.seconds(ratio)[:, 0]), ratio)
                           for ratio in others), key=lambda pair: pair[0])
    change = bench.miou(fastest) - bench.miou(first)
    return (f'All rows have the same weights. At {bench.size[0]},{bench.size[1]} pixels '
            f'--isr-ratio {fastest!s} is {factor:.2f} times as fast as '
            f'{first!s}, at {change:+.1f} mIoU.')


def _read_results(files: Sequence[str | Path]) -> list[Result]:
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
            raise ConfigError(f'{file} was not written by tools/test.py --json, it lacks '
                              f'{", ".join(lacking) or "numbers as metrics"}: test again')
        result = Result(content['config'], content['checkpoint'],
                        ISRRatio.parse(content['isr_ratio']),
                        check_method(content.get('isr_method', 'average')), content['metrics'])
        results.append(result)
        for name in ('config', 'checkpoint'):
            first, other = getattr(results[0], name), getattr(result, name)
            if os.path.realpath(first) != os.path.realpath(other):
                raise ConfigError(f'{files[0]} and {file} differ in the {name}, {first} and '
                                  f'{other}: compare results of one')
    return results


def _metrics(files: Sequence[str | Path], results: Sequence[Result], main: str) -> list[str]:
    metrics = [name for name in _COLUMNS
               if name == main or any(name in result.metrics for result in results)]
    for file, result in zip(files, results):
        for name in metrics:
            if name not in result.metrics:
                raise ConfigError(f'{file} lacks the metric {name}, it has '
                                  f'{", ".join(result.metrics) or "none"}: test again with '
                                  f'the test_evaluator of {result.config}')
    return metrics


@torch.no_grad()
def _time_ratios(model: Any, dataset: BaseDataset,
                 settings: Sequence[Setting]) -> dict[int, list[float]]:
    def in_turn(setting: Setting) -> Prepare:
        numbers = count()

        def prepare() -> Any:
            data = pseudo_collate([dataset[next(numbers) % len(dataset)]])
            apply_isr(model, setting[0], **setting[1])
            return lambda: model.test_step(data)
        return prepare

    times = take_turns(dict(enumerate(map(in_turn, settings))), next(model.parameters()).device,
                       repeats=_ROUNDS, seconds=600., warm_up=3)
    remove_isr(model)
    return times


def _name(result: Result, classifies: bool) -> str:
    """Return the ratio, a classifier's without decoder, and the method if it is not the default."""
    name = str(result.isr_ratio)
    if classifies:
        name = name.partition('-')[0].rstrip(',')
    return name if result.method == 'average' or name == 'none' else f'{name} {result.method}'


def _chance_line(dataset: BaseDataset, classifies: bool) -> str:
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
def _draw(model: Any, datasets: Sequence[BaseDataset],
          settings: Sequence[tuple[str, Setting]], path: str | Path) -> None:
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
        for name, (ratio, options) in settings:
            with isr(model, ratio, **options):
                labels = model.test_step(data)[0].pred_sem_seg.data.squeeze(0).cpu()
            panels['prediction' if name == 'none' else f'ISR {name}'] = colours[labels]
        height, width = panels['image'].shape[:2]
        rows.append(beside([captioned(resized(panel, (_PANEL, _PANEL * height // width)), title)
                            for title, panel in panels.items()]))
    rows.append(legend([(name, (r, g, b)) for name, (r, g, b) in zip(classes, palette)],
                       rows[0].width))
    with replacing(path) as partial:
        below(rows, gap=14).save(partial, 'PNG')
