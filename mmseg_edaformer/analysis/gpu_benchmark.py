"""A few minutes of measurements on a GPU, the most telling first: `make bench-gpu`.

Each part states the seconds that it may take. A part that no longer fits into the budget is left
out and named, one that fails is named with its error, and the JSON is written after each.
"""
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from prettytable import PrettyTable, TableStyle
from torch import Tensor

from ..engine import launch
from ..engine.run_config import load_config
from ..errors import ConfigError
from ..files import write_file
from ..models import label_map as labels, loss
from ..models.resize import Chain
from . import benchmark
from .benchmark import Contender, Plan, Subject
from .loading import NONE
from .pipeline import draw_files
from .roofline import Work, rooflines
from .timing import Rates, environment, measure_rates, number, render

ROOT = Path(__file__).parents[2]
CONFIGS = {
    'EDAFormer-T': 'configs/edaformer_t_ade.py', 'plain T': 'tests/configs/plain_t_ade.py',
    'EDAFormer-B': 'configs/edaformer_b_ade.py', 'plain B': 'tests/configs/plain_b_ade.py',
    'SegFormer-B0': 'configs/segformer_b0_ade.py'}
RATIOS = ('none', 'optimal', '2')
_DRAWN = 24
"""Different images to train on; drawing one takes longer than reading it."""


Row = dict[str, Any]
_COLUMNS: dict[str, Callable[[Row], Any]] = {
    'size': lambda row: f'{row["height"]}x{row["width"]}',
    'batch': lambda row: row['batch_size'], 'dtype': lambda row: row['dtype'],
    'model': lambda row: row['config'], 'ISR': lambda row: row['isr_ratio'],
    'mode': lambda row: 'prediction' if row['mode'] == 'eval' else 'training',
    'execution': lambda row: row['execution'],
    'network': lambda row: number(row.get('network_ms')),
    'total': lambda row: ('out of memory' if row['status'] == 'OOM' else
                          number(row.get('total_ms'))),
    'p95': lambda row: number(row.get('total_p95_ms')),
    'images/s': lambda row: number(row.get('images_per_s')),
    'MiB': lambda row: number(row.get('peak_mib')),
    'speed': lambda row: f'{1 / row["time_vs_first"]:.2f}x' if 'time_vs_first' in row else '',
    'operator': lambda row: f'`{row["name"]}`', 'sizes': lambda row: row['shapes'],
    'calls': lambda row: row['calls'], 'ms': lambda row: number(row['ms']),
    'GFLOP': lambda row: number(row['gflop']), 'MB': lambda row: number(row['mb']),
    'limit, ms': lambda row: number(row['limit_ms']), 'bound by': lambda row: row['bound'],
    'ms / limit': lambda row: number(row['ms'] / row['limit_ms'])}


@dataclass(frozen=True)
class Settings:
    """The flags of `tools/benchmark_gpu.py`; sizes and batch sizes have the smallest first."""
    sizes: Sequence[tuple[int, int]]
    batch_sizes: Sequence[int]
    train_batch: int
    seconds: float
    workers: int
    repeats: int
    steps: int
    gemm: int
    out: Path


class Part(NamedTuple):
    """One measurement: its name, the seconds that it takes at most, and the function."""
    name: str
    seconds: float
    measure: Callable[[], None]


class Suite:
    """Measures one part after the other, and keeps the ``content`` of the JSON."""

    def __init__(self, settings: Settings) -> None:
        for path in CONFIGS.values():
            if not (ROOT / path).is_file():
                raise ConfigError(f'{ROOT} lacks {path}: the benchmark needs a checkout of the '
                                  'repository')
        if not torch.cuda.is_available():
            raise ConfigError('no GPU is visible here: check CUDA_VISIBLE_DEVICES and the '
                              'installed torch. `make bench-gpu FAKE_CUDA=1` tries it on a CPU')
        self.settings = settings
        self.plan = Plan(device='cuda', repeats=settings.repeats, seconds=1.5, costs=False)
        self.device = torch.device('cuda')
        self.content: dict[str, Any] = dict(
            environment={}, settings=asdict(settings) | dict(out=settings.out.name), seconds={},
            failed={}, left_out=[], rows=[], rates={}, training={}, rooflines={})

    def run(self, say: Callable[[str], None] = print) -> bool:
        """Measure what fits into the budget; return whether nothing failed."""
        began = time.perf_counter()
        self.models = {}
        for name, path in CONFIGS.items():
            options: dict[str, Any] = dict(isr_ratios=RATIOS)
            if name == 'SegFormer-B0':
                options = dict(cfg_options={'model.type': 'EncoderDecoder'})
            [contender] = benchmark.load_contenders(str(ROOT / path), **options)
            self.models[name] = replace(contender, name=name)
        for part in self.parts():
            left = self.settings.seconds - (time.perf_counter() - began)
            if part.seconds > left:
                self.content['left_out'].append(part.name)
                say(f'{part.name}: left out, {left:.0f} s are left of {self.settings.seconds:g}')
                continue
            start = time.perf_counter()
            try:
                part.measure()
            except Exception as error:  # the others are still worth their minutes
                reason = f'{type(error).__name__}: {error}'.strip().splitlines()[0]
                self.content['failed'][part.name] = reason
                say(f'{part.name}: failed: {reason}')
            torch.cuda.empty_cache()
            self.content['seconds'][part.name] = round(time.perf_counter() - start, 1)
            say(f'{part.name}: {self.content["seconds"][part.name]} s')
            self.content['environment'] = environment('cuda')
            write_file(self.settings.out, json.dumps(self.content, indent=1) + '\n')
        return not self.content['failed']

    def parts(self) -> Iterator[Part]:
        """Yield all parts; the first ones are those that a short budget should not miss."""
        small, largest = self.settings.sizes[0], self.settings.sizes[-1]
        one, many = self.settings.batch_sizes[0], self.settings.batch_sizes[-1]
        cells = list(product(self.settings.sizes, self.settings.batch_sizes))
        yield Part('rates', 10, self._rates)
        for batch in dict.fromkeys((one, many)):
            yield self._prediction('T', small, batch)
        yield self._executed('graphed', 'T', small, one, ('none', 'optimal'))
        yield self._prediction('B', small, one)
        yield self._executed('graphed', 'B', small, one)
        yield self._training('T', 30)
        yield Part('roofline of predicting', 20, lambda: self._roofline('eval'))
        yield Part('training T from files', 45, self._training_from_files)
        if largest != small:
            yield self._prediction('T', largest, one)
            yield self._executed('graphed', 'T', largest, one, ('auto',))
        if many != one:
            yield self._executed('graphed', 'T', small, many)
            yield self._prediction('B', small, many)
        for batch in dict.fromkeys((one, many)):
            yield self._executed('compiled', 'T', small, batch)
        yield self._training('T', 90, 'compiled')
        yield Part('roofline of training', 25, lambda: self._roofline('train'))
        yield self._prediction('T', small, one, 'float32')
        yield self._executed('compiled', 'B', small, one)
        done = {(small, one), (small, many)}
        yield from (self._prediction('T', *cell) for cell in cells
                    if cell not in done | {(largest, one)})
        yield from (self._prediction('B', *cell) for cell in cells if cell not in done)
        yield self._training('B', 40)
        yield from (self._prediction('T', *cell, 'float32') for cell in cells[1:])

    def _prediction(self, model: str, size: tuple[int, int], batch: int,
                    dtype: str = 'bfloat16') -> Part:
        ours, plain, others = self._models(model)
        ratios = RATIOS if size == self.settings.sizes[0] else (*RATIOS, 'auto')
        cell = [plain.run_as(ratios=['none', 'optimal']), *others,
                ours.run_as(ratios=ratios), ours.run_as(kernels=False, ratios=['none'])]
        megapixels = batch * size[0] * size[1] / 2 ** 20
        if megapixels > 40:  # the plain version would take seconds a call, or not fit
            cell = [ours.run_as(ratios=['none', 'optimal', 'auto'])]
        return self._timed(dtype, 12 + megapixels, model, cell, size, batch, dtype)

    def _executed(self, execution: str, model: str, size: tuple[int, int], batch: int,
                  ratios: Sequence[str] = ('none',)) -> Part:
        ours, plain, _ = self._models(model)
        seconds = 10 + 12 * len(ratios) if execution == 'graphed' else dict(T=75, B=120)[model]
        return self._timed(execution, seconds, model, [
            plain.run_as(ratios=['none']), ours.run_as(execution, ratios=ratios)], size, batch)

    def _training(self, model: str, seconds: float, execution: str = 'eager') -> Part:
        ours, plain, others = self._models(model)
        cell = [plain, ours.run_as(execution)]
        if execution == 'eager':
            cell += [ours.run_as(kernels=False), *others]
        return self._timed(f'training, {execution}', seconds, model, cell, self.settings.sizes[0],
                           self.settings.train_batch, mode='train')

    def _models(self, model: str) -> tuple[Contender, Contender, list[Contender]]:
        return (self.models[f'EDAFormer-{model}'], self.models[f'plain {model}'],
                [self.models['SegFormer-B0']] if model == 'T' else [])

    def _timed(self, title: str, seconds: float, model: str, cell: Sequence[Contender],
               size: tuple[int, int], batch: int, dtype: str = 'bfloat16',
               mode: str = 'eval') -> Part:
        """Make a part of a cell; speeds are shown where its first contender is the plain one."""
        plan = replace(self.plan, sizes=[size], batch_sizes=[batch], dtypes=[dtype], modes=[mode])
        hidden = () if cell[0].name.startswith('plain') else ('time_vs_first',)

        def measure() -> None:
            for rows in benchmark.run(cell, plan):
                self.content['rows'] += [{
                    name: value for name, value in asdict(row).items()
                    if value is not None and name not in hidden} for row in rows]
        return Part(f'{model}, {size[0]}x{size[1]}, batch {batch}, {title}', seconds, measure)

    def _rates(self) -> None:
        for dtype in benchmark.DTYPES:
            self.content['rates'][dtype] = asdict(
                measure_rates(self.device, getattr(torch, dtype), self.settings.gemm))

    def _training_from_files(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.content['training'] = train_from_files(
                ROOT / CONFIGS['EDAFormer-T'], Path(folder), self.settings.train_batch,
                self.settings.workers, crop=self.settings.sizes[0], steps=self.settings.steps)

    def _roofline(self, mode: str) -> None:
        size = self.settings.sizes[0]
        batch = self.settings.batch_sizes[-1] if mode == 'eval' else self.settings.train_batch
        subject = Subject(self.models['EDAFormer-T'], mode, 'bfloat16', self.device)
        inputs = torch.randn(batch, 3, *size, device=self.device)
        call = subject.calls(NONE, inputs)['total']
        logits = torch.randn(batch, subject.model.num_classes, size[0] // 8, size[1] // 8,
                             device=self.device).to(memory_format=torch.channels_last)
        others = dict([_labels_work(logits, size) if mode == 'eval' else _loss_work(logits, size)])
        rows, total = rooflines(call(), Rates(**self.content['rates']['bfloat16']), self.device,
                                others=others)
        begin = time.perf_counter()
        call()()
        torch.cuda.synchronize()
        self.content['rooflines'][mode] = dict(
            height=size[0], width=size[1], batch_size=batch, operators_ms=total,
            rows=[asdict(row) for row in rows], pass_ms=1e3 * (time.perf_counter() - begin))


def _labels_work(logits: Tensor, size: tuple[int, int]) -> tuple[str, Work]:
    """Label maps from logits N x C x h x w: each pixel of each class from four logits."""
    pixels = len(logits) * size[0] * size[1]
    chains = [Chain(size)] * len(logits)
    return 'label maps', Work(lambda: lambda: labels.label_maps(logits, chains),
                              8 * pixels * logits.shape[1], logits.nbytes + 2 * pixels)


def _loss_work(logits: Tensor, size: tuple[int, int]) -> tuple[str, Work]:
    """Loss and its gradient: the logits of each pixel twice, and their gradients."""
    target = torch.randint(logits.shape[1], (len(logits), *size), device=logits.device)
    logits = logits.requires_grad_()
    return 'loss with its gradient', Work(
        lambda: lambda: loss.resize_cross_entropy(logits, target, ignore_index=255),
        24 * target.numel() * logits.shape[1], 2 * logits.nbytes + target.nbytes)


def train_from_files(config: Path, folder: Path, batch_size: int, workers: int, *,
                     crop: tuple[int, int] = (512, 512), steps: int = 60) -> dict[str, float]:
    """Train as `tools/train.py --amp` does, on drawn JPEG images of the size of ADE20K's.

    Images and log go to ``folder``. The first third of the steps is not counted.
    """
    (folder / 'data').mkdir()
    for index in range(_DRAWN):
        draw_files(folder / 'data', index, (512, 683))
    cfg = load_config(config, cfg_options={
        'train_dataloader.batch_size': batch_size, 'train_dataloader.num_workers': workers,
        'train_dataloader.persistent_workers': workers > 0,
        'train_dataloader.dataset.data_root': str(folder / 'data'),
        'train_dataloader.dataset.data_prefix': dict(img_path='', seg_map_path=''),
        'train_cfg.max_iters': steps,
        'train_cfg.val_interval': steps + 1, 'default_hooks.logger.interval': 1,
        'log_processor.window_size': 1, 'default_hooks.checkpoint.interval': steps + 1,
        'default_hooks.checkpoint.save_last': False, 'default_hooks.checkpoint.save_best': None,
        'auto_scale_lr.base_batch_size': batch_size, 'report': False,
        'train_dataloader.dataset.pipeline.3.crop_size': crop,
        'model.data_preprocessor.size': crop})
    cfg.work_dir = str(folder / 'work')
    for name in ('val_dataloader', 'val_cfg', 'val_evaluator', 'test_dataloader', 'test_cfg',
                 'test_evaluator'):
        cfg[name] = None
    launch.prepare_train(cfg, amp=True)
    launch.train(cfg)
    lines = [json.loads(line) for log in (folder / 'work').rglob('scalars.json')
             for line in log.read_text(encoding='utf-8').splitlines()][steps // 3:]
    seconds, waited = (float(np.mean([line[name] for line in lines]))
                       for name in ('time', 'data_time'))
    return dict(images_per_s=batch_size / seconds, step_ms=1e3 * seconds, waited_ms=1e3 * waited,
                share=waited / seconds, batch_size=batch_size, workers=workers)


def page(content: dict[str, Any]) -> str:
    """Write the Markdown page of a ``content``."""
    rows = content['rows']
    predicted = sorted((row for row in rows if row['mode'] == 'eval'), key=lambda row: (
        row['dtype'], row['height'] * row['width'], row['batch_size']))
    return render('gpu.md.jinja', **content, number=number, table=_table, predicted=predicted,
                  fastest=_fastest(rows), trained=[row for row in rows if row['mode'] == 'train'])


def _fastest(rows: Sequence[Row]) -> list[Row]:
    """Choose the fastest way to run our models at the trained ratio, for each size and batch."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        model = row['config'].partition(',')[0]
        if model.startswith('EDAFormer') and 'plain' not in row['config'] and (
                row['isr_ratio'] == 'none' and 'time_vs_first' in row):
            cell = model, *(row[name] for name in ('mode', 'dtype', 'height', 'width',
                                                   'batch_size'))
            if cell not in best or row['time_vs_first'] < best[cell]['time_vs_first']:
                best[cell] = row | dict(config=model)
    return list(best.values())


def _table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    table = PrettyTable(list(columns), align='l')
    table.add_rows([[_COLUMNS[name](row) for name in columns] for row in rows])
    table.set_style(TableStyle.MARKDOWN)
    return table.get_string()
