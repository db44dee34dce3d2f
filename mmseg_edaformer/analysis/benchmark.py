"""What models cost, side by side: time, memory, multiply-adds.

All variants of a run, each a config at an ISR ratio, take turns call by call, so that other load on
the machine falls on all of them alike.
"""
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..cost import windows
from ..engine.allocator import keep_freed_memory
from ..engine.compile import compile_model
from ..engine.run_config import load_config
from ..errors import ConfigError
from ..isr import ISRRatio
from ..models.cpu_kernels import allow_kernels
from . import timing
from .loading import NONE, can_reduce, count_windows, load_model, set_ratio
from .pipeline import measure_pipeline

DTYPES = ('float32', 'bfloat16')
EXECUTIONS = {'eager': {}, 'graphed': dict(graphs=True), 'compiled': dict(fixed_size=True)}
"""Ways to run a network, and the arguments of `compile_model` for each."""


@dataclass(frozen=True)
class Plan:
    """What to measure: the flags of `tools/benchmark.py`.

    Without ``costs``, neither multiply-adds are counted nor input pipelines timed.
    """
    sizes: Sequence[tuple[int, int]] = ((512, 512),)
    batch_sizes: Sequence[int] = (1,)
    modes: Sequence[str] = ('eval',)
    dtypes: Sequence[str] = ('float32',)
    device: str = 'cpu'
    repeats: int = 50
    seconds: float = 20.
    limits: bool = False
    keep_memory: bool = False
    costs: bool = True

    def __post_init__(self) -> None:
        if min(*self.batch_sizes, self.repeats) < 1:
            raise ConfigError('--batch-size and --repeats must be 1 or more')
        for height, width in self.sizes:
            if min(height, width) < 32:
                raise ConfigError(f'--size {height},{width}: use 32 pixels or more')
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise ConfigError('--device cuda: no GPU is visible here; check CUDA_VISIBLE_DEVICES '
                              'and the installed torch, or use --device cpu')


@dataclass(frozen=True)
class Contender:
    """One config of a run, with its model in eval mode on the CPU, and how it is run.

    Without ``kernels`` this project's own are not used.
    """
    name: str
    cfg: Config
    model: nn.Module
    ratios: tuple[ISRRatio, ...]
    execution: str = 'eager'
    kernels: bool = True

    def run_as(self, execution: str = 'eager', *, kernels: bool = True,
               ratios: Sequence[str] | None = None) -> 'Contender':
        """Return the same model run in another way, under a name that says so."""
        notes = [*([] if execution == 'eager' else [execution]),
                 *([] if kernels else ['plain kernels'])]
        return replace(self, name=', '.join([self.name, *notes]), execution=execution,
                       kernels=kernels, ratios=self.ratios if ratios is None else tuple(
                           map(ISRRatio.parse, ratios)))

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class Figures:
    """Figures of one variant in one cell; None is what was not measured, times are medians.

    ``status`` is 'ok', 'OOM', or 'costs' where nothing was to be timed; docs/benchmark.md has the
    rest. The limits are the times of the multiply-adds and of the bytes at the measured rates, and
    the shares ``compute_limit_ms`` over network and over total.
    """
    config: str
    isr_ratio: str
    mode: str
    dtype: str
    height: int
    width: int
    batch_size: int
    windows: int
    gmacs: float | None
    params_m: float
    execution: str = 'eager'
    status: str = 'costs'
    rounds: int | None = None
    pipeline_ms: float | None = None
    network_ms: float | None = None
    post_ms: float | None = None
    total_ms: float | None = None
    total_p95_ms: float | None = None
    images_per_s: float | None = None
    time_vs_first: float | None = None
    peak_mib: float | None = None
    compute_limit_ms: float | None = None
    memory_limit_ms: float | None = None
    network_share: float | None = None
    total_share: float | None = None


@dataclass(frozen=True)
class _Cell:
    plan: Plan
    mode: str
    dtype: str
    size: tuple[int, int]
    batch_size: int
    rates: timing.Rates | None
    pipelines: Mapping[tuple[str, str, tuple[int, int]], float]


def load_contenders(config: str, checkpoint: str | None = None, compare: Sequence[str] = (),
                    isr_ratios: Sequence[str] = ('none',),
                    cfg_options: Mapping[str, Any] | Sequence[str] | None = None,
                    execution: str = 'eager') -> list[Contender]:
    """Build the models of a run; without a checkpoint, and in ``compare``, with random weights.

    A model in ``compare`` that ISR cannot act on runs as it is. ``cfg_options`` are of ``config``.
    """
    wanted = tuple(dict.fromkeys(map(ISRRatio.parse, isr_ratios)))
    contenders: list[Contender] = []
    names: Counter[str] = Counter()
    for i, path in enumerate([config, *compare]):
        cfg = load_config(path, cfg_options=None if i else cfg_options)
        model = load_model(cfg, None if i else checkpoint)
        ratios = wanted if not i or can_reduce(model) else (NONE,)
        for ratio in (*ratios, NONE):
            set_ratio(model, ratio)
        name = Path(path).stem
        names[name] += 1
        contenders.append(Contender(name if names[name] == 1 else f'{name} #{names[name]}', cfg,
                                    model, ratios, execution))
    return contenders


def run(contenders: Sequence[Contender], plan: Plan) -> Iterator[list[Figures]]:
    """Yield the figures of one cell after the other, each of every config at every ratio."""
    if plan.device == 'meta':
        for size in plan.sizes:
            cell = _Cell(plan, '', '', size, 1, None, {})
            yield [_figures(contender, ratio, cell)
                   for contender in contenders for ratio in contender.ratios]
        return
    if plan.keep_memory and plan.device == 'cpu':
        keep_freed_memory()
    torch.backends.cudnn.benchmark = bool(
        (contenders[0].cfg.get('env_cfg') or {}).get('cudnn_benchmark'))
    device = torch.device(plan.device)
    pipelines: dict[tuple[str, str, tuple[int, int]], float] = {}
    for mode, size, contender in product(plan.modes, plan.sizes, contenders) if plan.costs else ():
        with suppress(ConfigError):  # none that begins with a file
            steps = measure_pipeline(contender.cfg, size, images=10, mode=mode)
            pipelines[contender.name, mode, size] = steps[-1][1]
    for dtype in plan.dtypes:
        rates = timing.measure_rates(device, getattr(torch, dtype)) if plan.limits else None
        for mode in plan.modes:
            subjects = {contender.name: Subject(contender, mode, dtype, device)
                        for contender in contenders}
            for size, batch_size in product(plan.sizes, plan.batch_sizes):
                try:
                    figures = _measure(contenders, subjects, _Cell(
                        plan, mode, dtype, size, batch_size, rates, pipelines))
                finally:
                    allow_kernels(True)
                yield figures
            subjects.clear()
            timing.free(device)


class Subject:
    """A contender's model on the device, ready for one mode and dtype."""

    def __init__(self, contender: Contender, mode: str, dtype: str, device: torch.device) -> None:
        self.device, self.mode = device, mode
        self.ratios = contender.ratios if mode == 'eval' else (NONE,)
        self.model: Any = copy.deepcopy(contender.model).to(device)
        self.kernels = contender.kernels
        self.autocast = dtype == 'bfloat16'
        self.input_dtype = torch.float32
        if mode == 'train':
            self.model.train()
            self.optim = build_optim_wrapper(self.model, _optim_cfg(contender))
        elif self.autocast and any(cls.__name__ == 'StreamedEncoderDecoder'
                                   for cls in type(self.model).__mro__):
            # It takes float32 images with bfloat16 weights.
            self.model.bfloat16()
            self.autocast, self.input_dtype = False, torch.bfloat16
        self.compiled = contender.execution != 'eager'
        if self.compiled:
            torch._dynamo.config.cache_size_limit = 64  # a compiled version for each ratio
            compile_model(self.model, frozen=mode == 'eval', **EXECUTIONS[contender.execution])

    def calls(self, ratio: ISRRatio, inputs: Tensor) -> dict[str, timing.Prepare]:
        """Return what to time: the network and the whole, in training the whole only."""
        size = (inputs.shape[2], inputs.shape[3])
        views = windows(self.model, size)
        height, width = views[0]
        precision = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=self.autocast)

        def prepare() -> None:  # since others in turn may have other ones
            set_ratio(self.model, ratio)
            allow_kernels(self.kernels)

        def network() -> Callable[[], Any]:
            prepare()
            window = inputs[:, :, :height, :width].to(self.input_dtype)

            def call() -> Any:
                with torch.no_grad(), precision():
                    return [self.model(window) for _ in views]
            return call

        def predict() -> Callable[[], Any]:
            prepare()
            images, samples = inputs.to(self.input_dtype), data_samples(size, len(inputs))

            def call() -> Any:
                with torch.no_grad(), precision():
                    return self.model(images, samples, mode='predict')
            return call

        def train() -> Callable[[], Any]:
            prepare()
            self.optim.zero_grad()  # of a step that ran out of memory
            labels = torch.randint(self.model.num_classes, (len(inputs), 1, *size),
                                   device=self.device)
            samples = data_samples(size, len(inputs), labels)

            def call() -> None:
                with self.optim.optim_context(self.model), precision():
                    losses = self.model(inputs, samples, mode='loss')
                    loss, _ = self.model.parse_losses(losses)
                self.optim.update_params(loss)
            return call

        return dict(total=train) if self.mode == 'train' else dict(network=network, total=predict)

    def peak(self, prepare: timing.Prepare, inputs: Tensor) -> int | None:
        """Return the most bytes at once of a call; None where they are too many or not seen."""
        if self.compiled:
            return None
        resident = [*self.model.parameters(), *self.model.buffers(), inputs]
        if hasattr(self, 'optim'):
            resident += [value for state in self.optim.optimizer.state.values()
                         for value in state.values() if isinstance(value, Tensor)]
        try:
            return timing.peak_bytes(prepare(), resident, self.device)
        except (RuntimeError, MemoryError) as error:
            if not timing.is_out_of_memory(error):
                raise
        timing.free(self.device)
        return None


def _optim_cfg(contender: Contender) -> dict[str, Any]:
    """Return the config's optimizer in a plain wrapper: the run chooses the dtype."""
    settings = contender.cfg.get('optim_wrapper')
    if not settings:
        raise ConfigError(f'{contender.cfg.filename} has no optim_wrapper, which --mode train '
                          'needs')
    return dict({name: value for name, value in copy.deepcopy(settings).items()
                 if name not in ('loss_scale', 'dtype', 'use_fsdp', 'accumulative_counts')},
                type='OptimWrapper')


def data_samples(size: tuple[int, ...], count: int,
                 labels: Tensor | None = None) -> list[SegDataSample]:
    """Make samples of images that were neither resized nor padded."""
    meta = dict(ori_shape=size, img_shape=size, pad_shape=size, padding_size=[0, 0, 0, 0])
    samples = [SegDataSample(metainfo=meta) for _ in range(count)]
    if labels is not None:
        for sample, label in zip(samples, labels):
            sample.gt_sem_seg = PixelData(data=label)
    return samples


def _measure(contenders: Sequence[Contender], subjects: Mapping[str, Subject],
             cell: _Cell) -> list[Figures]:
    device = torch.device(cell.plan.device)
    compiled = any(subject.compiled for subject in subjects.values())
    if compiled:
        torch._dynamo.reset()  # every cell compiles for its own size
    inputs = torch.randn(cell.batch_size, 3, *cell.size, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(device)
    variants = [(contender, ratio) for contender in contenders
                for ratio in subjects[contender.name].ratios]
    calls = {(contender.name, ratio, phase): prepare for contender, ratio in variants
             for phase, prepare in subjects[contender.name].calls(ratio, inputs).items()}
    # A CUDA graph is compiled in the first round, and recorded in the next ones.
    times = timing.take_turns(calls, device, repeats=cell.plan.repeats, seconds=cell.plan.seconds,
                              warm_up=4 if compiled else 2)
    first = times.get((variants[0][0].name, variants[0][1], 'total'))
    rows = []
    for contender, ratio in variants:
        network, total = (times.get((contender.name, ratio, phase))
                          for phase in ('network', 'total'))
        network_ms, total_ms = (None if seconds is None else timing.milliseconds(seconds)
                                for seconds in (network, total))
        peak = None if total is None else subjects[contender.name].peak(
            calls[contender.name, ratio, 'total'], inputs)
        row = _figures(
            contender, ratio, cell, status='OOM' if total is None else 'ok',
            rounds=total and len(total),
            pipeline_ms=cell.pipelines.get((contender.name, cell.mode, cell.size)),
            network_ms=network_ms, total_ms=total_ms,
            post_ms=network_ms and total_ms and total_ms - network_ms,
            total_p95_ms=None if total is None else timing.milliseconds(total, 0.95),
            images_per_s=total_ms and 1e3 * cell.batch_size / total_ms,
            time_vs_first=None if total is None or first is None else timing.relative(total, first),
            peak_mib=peak and peak / 2**20)
        rows.append(_with_limits(row, contender, ratio, cell))
    return rows


def _figures(contender: Contender, ratio: ISRRatio, cell: _Cell, **measured: Any) -> Figures:
    gmacs = None
    if cell.plan.costs:
        set_ratio(contender.model, ratio)
        gmacs = count_windows(contender.model, cell.size) / 1e9
        set_ratio(contender.model, NONE)
    return Figures(contender.name, str(ratio), cell.mode, cell.dtype, *cell.size,
                   cell.batch_size, len(windows(contender.model, cell.size)), gmacs,
                   contender.parameters / 1e6, contender.execution, **measured)


def _with_limits(row: Figures, contender: Contender, ratio: ISRRatio, cell: _Cell) -> Figures:
    """Add what the multiply-adds and the bytes take at the rates of the machine."""
    if cell.rates is None or row.gmacs is None:
        return row
    # A training step computes the gradients of inputs and of weights besides.
    gmacs = cell.batch_size * row.gmacs * (1 if cell.mode == 'eval' else 3)
    compute, memory = 1e3 * gmacs / cell.rates.gmacs_per_s, None
    if cell.mode == 'eval':
        set_ratio(contender.model, ratio)
        activations = count_windows(contender.model, cell.size, timing.count_activations)
        set_ratio(contender.model, NONE)
        numbers = cell.batch_size * (3 * cell.size[0] * cell.size[1] + 2 * activations)
        memory = (numbers + contender.parameters) * getattr(torch, cell.dtype).itemsize / (
            1e6 * cell.rates.gb_per_s)
    return replace(row, compute_limit_ms=compute, memory_limit_ms=memory,
                   network_share=row.network_ms and compute / row.network_ms,
                   total_share=row.total_ms and compute / row.total_ms)
