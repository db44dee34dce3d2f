"""A few minutes of measurements on a GPU, the most telling first: `make bench-gpu`.

Each part states the seconds that it may take. A part that no longer fits into the budget is left
out and named, one that fails is named with its error, and the files are written after each.
"""
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
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
from .timing import Rates, environment, measure_rates, number, render, size_text, time_call

ROOT = Path(__file__).parents[2]
CONFIGS = {
    'EDAFormer-T': 'configs/edaformer_t_ade.py', 'plain T': 'tests/configs/plain_t_ade.py',
    'EDAFormer-B': 'configs/edaformer_b_ade.py', 'plain B': 'tests/configs/plain_b_ade.py',
    'SegFormer-B0': 'configs/segformer_b0_ade.py'}
RATIOS = ('none', 'optimal', '2')
_DRAWN = 24
"""Different images to train on; drawing one takes longer than reading it."""


class Part(NamedTuple):
    """One measurement: its name, the seconds that it takes at most, and the function."""
    name: str
    seconds: float
    measure: Callable[[], None]


@dataclass
class Suite:
    """Measures one part after the other, and keeps the ``content`` of the JSON.

    The fields are the flags of `tools/benchmark_gpu.py`; sizes and batch sizes have the smallest
    first, and ``out`` is the folder for gpu.json and gpu.md.
    """
    sizes: Sequence[tuple[int, int]]
    batch_sizes: Sequence[int]
    train_batch: int
    seconds: float
    workers: int
    repeats: int
    steps: int
    gemm: int
    out: Path

    def __post_init__(self) -> None:
        for path in CONFIGS.values():
            if not (ROOT / path).is_file():
                raise ConfigError(f'{ROOT} lacks {path}: the benchmark needs a checkout of the '
                                  'repository')
        if not torch.cuda.is_available():
            raise ConfigError('no GPU is visible here: check CUDA_VISIBLE_DEVICES and the '
                              'installed torch. `make bench-gpu FAKE_CUDA=1` tries it on a CPU')
        self.device = torch.device('cuda')
        self.content: dict[str, Any] = dict(
            environment={}, settings=asdict(self) | dict(out=str(self.out)), seconds={},
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
            left = self.seconds - (time.perf_counter() - began)
            if part.seconds > left:
                self.content['left_out'].append(part.name)
                say(f'{part.name}: left out, {left:.0f} s are left of {self.seconds:g}')
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
            write_file(self.out / 'gpu.json', json.dumps(self.content, indent=1) + '\n')
            write_file(self.out / 'gpu.md', page(self.content))
        return not self.content['failed']

    def parts(self) -> list[Part]:
        """Return all parts; the first ones are those that a short budget should not miss."""
        small, largest = self.sizes[0], self.sizes[-1]
        one, many = self.batch_sizes[0], self.batch_sizes[-1]
        cells = list(product(self.sizes, self.batch_sizes))
        parts: dict[str, Part] = {}
        for part in (
                Part('rates', 10, self._rates),
                self._prediction('T', small, one), self._prediction('T', small, many),
                self._executed('graphed', 'T', small, one, ('none', 'optimal')),
                self._prediction('B', small, one), self._executed('graphed', 'B', small, one),
                self._training('T', 30),
                Part('roofline of predicting', 20, lambda: self._roofline('eval')),
                Part('training T from files', 45, self._training_from_files),
                self._prediction('T', largest, one),
                self._executed('graphed', 'T', largest, one, ('auto',)),
                self._executed('graphed', 'T', small, many), self._prediction('B', small, many),
                self._executed('compiled', 'T', small, one),
                self._executed('compiled', 'T', small, many),
                self._training('T', 90, 'compiled'),
                Part('roofline of training', 25, lambda: self._roofline('train')),
                self._prediction('T', small, one, 'float32'),
                self._executed('compiled', 'B', small, one),
                *(self._prediction('T', *cell) for cell in cells),
                *(self._prediction('B', *cell) for cell in cells),
                self._training('B', 40),
                *(self._prediction('T', *cell, 'float32') for cell in cells)):
            parts.setdefault(part.name, part)
        return list(parts.values())

    def _prediction(self, model: str, size: tuple[int, int], batch: int,
                    dtype: str = 'bfloat16') -> Part:
        ours, plain = self.models[f'EDAFormer-{model}'], self.models[f'plain {model}']
        ratios = RATIOS if size == self.sizes[0] else (*RATIOS, 'auto')
        megapixels = batch * size[0] * size[1] / 2 ** 20
        if megapixels > 40:  # the plain version would take seconds a call, or not fit
            contenders = [ours.run_as(ratios=['none', 'optimal', 'auto'])]
        else:
            contenders = [plain.run_as(ratios=['none', 'optimal']), *self._others(model),
                          ours.run_as(ratios=ratios), ours.run_as(kernels=False, ratios=['none'])]
        return self._timed(model, dtype, 12 + megapixels, contenders, size, batch, dtype)

    def _executed(self, execution: str, model: str, size: tuple[int, int], batch: int,
                  ratios: Sequence[str] = ('none',)) -> Part:
        seconds = 10 + 12 * len(ratios) if execution == 'graphed' else dict(T=75, B=120)[model]
        return self._timed(model, execution, seconds, [
            self.models[f'plain {model}'].run_as(ratios=['none']),
            self.models[f'EDAFormer-{model}'].run_as(execution, ratios=ratios)], size, batch)

    def _training(self, model: str, seconds: float, execution: str = 'eager') -> Part:
        ours = self.models[f'EDAFormer-{model}']
        contenders = [self.models[f'plain {model}'], ours.run_as(execution)]
        if execution == 'eager':
            contenders += [ours.run_as(kernels=False), *self._others(model)]
        return self._timed(model, f'training, {execution}', seconds, contenders, self.sizes[0],
                           self.train_batch, mode='train')

    def _others(self, model: str) -> list[Contender]:
        return [self.models['SegFormer-B0']] if model == 'T' else []

    def _timed(self, model: str, title: str, seconds: float, contenders: Sequence[Contender],
               size: tuple[int, int], batch: int, dtype: str = 'bfloat16',
               mode: str = 'eval') -> Part:
        """Make a part of a cell; speeds are shown where its first contender is the plain one."""
        plan = Plan(sizes=[size], batch_sizes=[batch], dtypes=[dtype], modes=[mode], costs=False,
                    device='cuda', repeats=self.repeats, seconds=1.5)
        hidden = {} if contenders[0].name.startswith('plain') else dict(time_vs_first=None)

        def measure() -> None:
            for rows in benchmark.run(contenders, plan):
                self.content['rows'] += [asdict(row) | hidden for row in rows]

        return Part(f'{model}, {size_text(size)}, batch {batch}, {title}', seconds, measure)

    def _rates(self) -> None:
        for dtype in benchmark.DTYPES:
            self.content['rates'][dtype] = asdict(
                measure_rates(self.device, getattr(torch, dtype), self.gemm))

    def _training_from_files(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.content['training'] = train_from_files(
                ROOT / CONFIGS['EDAFormer-T'], Path(folder), self.train_batch, self.workers,
                crop=self.sizes[0], steps=self.steps)

    def _roofline(self, mode: str) -> None:
        size = self.sizes[0]
        batch = self.batch_sizes[-1] if mode == 'eval' else self.train_batch
        subject = Subject(self.models['EDAFormer-T'], mode, 'bfloat16', self.device)
        inputs = torch.randn(batch, 3, *size, device=self.device)
        call = subject.calls(NONE, inputs)['total']
        logits = torch.randn(batch, subject.model.num_classes, size[0] // 8, size[1] // 8,
                             device=self.device).to(memory_format=torch.channels_last)
        others = dict([_labels_work(logits, size) if mode == 'eval' else _loss_work(logits, size)])
        rows, total = rooflines(call(), Rates(**self.content['rates']['bfloat16']), self.device,
                                others=others)
        seconds, _ = time_call(call(), self.device)
        self.content['rooflines'][mode] = dict(
            height=size[0], width=size[1], batch_size=batch, operators_ms=total,
            rows=rows, pass_ms=1e3 * seconds)


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
    data = folder / 'data'
    data.mkdir()
    for index in range(_DRAWN):
        draw_files(data, index, (512, 683))
    cfg = load_config(config, cfg_options={
        'train_dataloader.batch_size': batch_size, 'train_dataloader.num_workers': workers,
        'train_dataloader.persistent_workers': workers > 0,
        'train_dataloader.dataset.data_root': str(data),
        'train_dataloader.dataset.data_prefix': dict(img_path='', seg_map_path=''),
        'train_cfg.max_iters': steps, 'train_cfg.val_interval': steps + 1,
        'default_hooks.logger.interval': 1,
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
    names = 'dtype', 'height', 'width', 'batch_size'
    rows = sorted(content['rows'], key=lambda row: tuple(row[name] for name in names))
    own = [row for row in rows if row['config'].startswith('EDAFormer') and
           'plain' not in row['config'] and row['isr_ratio'] == 'none' and row['time_vs_first']]
    fastest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(own, key=lambda row: row['time_vs_first']):
        fastest.setdefault((row['config'].partition(',')[0], row['mode'],
                            *(row[name] for name in names)), row)
    return render('gpu.md.jinja', dict(number=number), **content, sorted_rows=rows,
                  fastest=[fastest[cell] for cell in sorted(fastest)])
