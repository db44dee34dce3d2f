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

from ..command_line import is_foreign
from ..cost import windows
from ..engine.allocator import keep_freed_memory
from ..engine.compile import compile_model
from ..engine.run_config import load_config
from ..errors import ConfigError
from ..isr import ISRRatio
from ..models.cpu_kernels import allow_kernels
from ..predict.foreign import load_foreign
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
        if is_foreign(path):
            if not i and (checkpoint or cfg_options):
                raise ConfigError(f'{path} has its own weights and settings: leave '
                                  f'{checkpoint or "--cfg-options"} out')
            cfg, model = Config(), load_foreign(path)[1]
        else:
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
            yield [_figures(contender, ratio, plan, size)
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
            subjects = [Subject(contender, mode, dtype, device) for contender in contenders]
            variants = [(subject, ratio) for subject in subjects for ratio in subject.ratios]
            for size, batch_size in product(plan.sizes, plan.batch_sizes):
                rows = [_figures(subject.contender, ratio, plan, size, rates, mode=mode,
                                 dtype=dtype, batch_size=batch_size, pipeline_ms=pipelines.get(
                                     (subject.contender.name, mode, size)))
                        for subject, ratio in variants]
                try:
                    measured = _measure(variants, rows, plan)
                finally:
                    allow_kernels(True)
                yield measured
            del subjects, variants
            torch.cuda.empty_cache()


class Subject:
    """A contender's model on the device, ready for one mode and dtype."""

    def __init__(self, contender: Contender, mode: str, dtype: str, device: torch.device) -> None:
        self.contender, self.device, self.mode = contender, device, mode
        self.ratios = contender.ratios if mode == 'eval' else (NONE,)
        self.model: Any = copy.deepcopy(contender.model).to(device)
        autocast, self.input_dtype = dtype == 'bfloat16', torch.float32
        if mode == 'train':
            self.model.train()
            self.optim = build_optim_wrapper(self.model, _optim_cfg(contender))
        elif autocast and any(cls.__name__ == 'StreamedEncoderDecoder'
                              for cls in type(self.model).__mro__):
            # It takes float32 images with bfloat16 weights.
            self.model.bfloat16()
            autocast, self.input_dtype = False, torch.bfloat16
        self.precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=autocast)
        self.compiled = contender.execution != 'eager'
        if self.compiled:
            torch._dynamo.config.cache_size_limit = 64  # a compiled version for each ratio
            compile_model(self.model, frozen=mode == 'eval', **EXECUTIONS[contender.execution])

    def calls(self, ratio: ISRRatio, inputs: Tensor) -> dict[str, timing.Prepare]:
        """Return what to time: the network and the whole, in training the whole only."""
        def prepared(make: Callable[[Tensor], Callable[[], Any]]) -> timing.Prepare:
            def prepare() -> Callable[[], Any]:
                set_ratio(self.model, ratio)  # since others in turn may have other ones
                allow_kernels(self.contender.kernels)
                return make(inputs)
            return prepare

        if self.mode == 'train':
            return dict(total=prepared(self._train))
        return dict(network=prepared(self._network), total=prepared(self._predict))

    def _network(self, inputs: Tensor) -> Callable[[], Any]:
        views = windows(self.model, (inputs.shape[2], inputs.shape[3]))
        height, width = views[0]
        window = inputs[:, :, :height, :width].to(self.input_dtype)
        return lambda: [self._infer(window) for _ in views]

    def _predict(self, inputs: Tensor) -> Callable[[], Any]:
        images, samples = inputs.to(self.input_dtype), data_samples(inputs.shape[2:], len(inputs))
        return lambda: self._infer(images, samples, mode='predict')

    def _infer(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self.precision():
            return self.model(*args, **kwargs)

    def _train(self, inputs: Tensor) -> Callable[[], Any]:
        self.optim.zero_grad()  # of a step that ran out of memory
        count, _, *size = inputs.shape
        labels = torch.randint(self.model.num_classes, (count, 1, *size), device=self.device)
        samples = data_samples(size, count, labels)

        def step() -> None:
            with self.optim.optim_context(self.model), self.precision():
                loss, _ = self.model.parse_losses(self.model(inputs, samples, mode='loss'))
            self.optim.update_params(loss)
        return step

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
        torch.cuda.empty_cache()
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


def data_samples(size: Sequence[int], count: int,
                 labels: Sequence[Tensor] | Tensor = ()) -> list[SegDataSample]:
    """Make samples of images that were neither resized nor padded."""
    size = tuple(size)
    meta = dict(ori_shape=size, img_shape=size, pad_shape=size, padding_size=[0, 0, 0, 0])
    samples = [SegDataSample(metainfo=meta) for _ in range(count)]
    for sample, label in zip(samples, labels):
        sample.gt_sem_seg = PixelData(data=label)
    return samples


def _measure(variants: Sequence[tuple[Subject, ISRRatio]], rows: Sequence[Figures],
             plan: Plan) -> list[Figures]:
    """Time the variants of a cell in turn, and add what was measured to their rows."""
    device = torch.device(plan.device)
    compiled = any(subject.compiled for subject, _ in variants)
    if compiled:
        torch._dynamo.reset()  # every cell compiles for its own size
    inputs = torch.randn(rows[0].batch_size, 3, rows[0].height, rows[0].width,
                         generator=torch.Generator().manual_seed(0)).to(device)
    calls = {(i, phase): prepare for i, (subject, ratio) in enumerate(variants)
             for phase, prepare in subject.calls(ratio, inputs).items()}
    # A CUDA graph is compiled in the first round, and recorded in the next ones.
    times = timing.take_turns(calls, device, repeats=plan.repeats, seconds=plan.seconds,
                              warm_up=4 if compiled else 2)
    measured = []
    for i, (row, (subject, _)) in enumerate(zip(rows, variants)):
        network = timing.milliseconds(times[i, 'network']) if (i, 'network') in times else None
        if (i, 'total') not in times:
            measured.append(replace(row, status='OOM', network_ms=network))
            continue
        seconds = times[i, 'total']
        total, peak = timing.milliseconds(seconds), subject.peak(calls[i, 'total'], inputs)
        limit = row.compute_limit_ms
        measured.append(replace(
            row, status='ok', rounds=len(seconds), network_ms=network, total_ms=total,
            post_ms=network and total - network,
            total_p95_ms=timing.milliseconds(seconds, 0.95),
            images_per_s=1e3 * row.batch_size / total,
            time_vs_first=timing.relative(seconds, times[0, 'total'])
            if (0, 'total') in times else None, peak_mib=peak and peak / 2**20,
            network_share=limit and network and limit / network,
            total_share=limit and limit / total))
    return measured


def _figures(contender: Contender, ratio: ISRRatio, plan: Plan, size: tuple[int, int],
             rates: timing.Rates | None = None, *, mode: str = '', dtype: str = '',
             batch_size: int = 1, pipeline_ms: float | None = None) -> Figures:
    """Return the figures of a variant that are counted, and the limits at the machine's rates."""
    gmacs = compute = memory = None
    set_ratio(contender.model, ratio)
    if plan.costs:
        gmacs = count_windows(contender.model, size) / 1e9
    if rates is not None and gmacs is not None:
        # A training step computes the gradients of inputs and of weights besides.
        compute = 1e3 * batch_size * gmacs * (3 if mode == 'train' else 1) / rates.gmacs_per_s
    if rates is not None and mode == 'eval':
        activations = count_windows(contender.model, size, timing.count_activations)
        numbers = batch_size * (3 * size[0] * size[1] + 2 * activations) + contender.parameters
        memory = numbers * getattr(torch, dtype).itemsize / (1e6 * rates.gb_per_s)
    set_ratio(contender.model, NONE)
    return Figures(contender.name, str(ratio), mode, dtype, *size, batch_size,
                   len(windows(contender.model, size)), gmacs, contender.parameters / 1e6,
                   contender.execution, pipeline_ms=pipeline_ms, compute_limit_ms=compute,
                   memory_limit_ms=memory)
