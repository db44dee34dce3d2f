"""What models cost, side by side: time, memory, multiply-adds.

All variants of a run, each a config at an ISR ratio, take turns call by call, so that whatever else
the machine does falls on all of them alike.
"""
import copy
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.structures import PixelData
from mmseg.registry import MODELS, TRANSFORMS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .. import __version__
from ..cost import count_macs, windows
from ..data.drawing import draw_scene
from ..engine.allocator import keep_freed_memory
from ..engine.compile import compile_model
from ..engine.run_config import load_config
from ..errors import CheckpointError, ConfigError, RatioError
from ..isr import ISRRatio, apply_isr
from ..models.cpu_kernels import allow_kernels
from .memory import count_activations, peak_bytes

NONE = ISRRatio.parse('none')
MODES, DTYPES, DEVICES = ('eval', 'train'), ('float32', 'bfloat16'), ('cpu', 'cuda', 'meta')
EXECUTIONS = {'eager': {}, 'graphed': dict(graphs=True), 'compiled': dict(fixed_size=True)}
"""Ways to run a network, and what `compile_model` is told for them."""
_LEAST_ROUNDS = 5

Key = TypeVar('Key', bound=Hashable)
Prepare = Callable[[], Callable[[], Any]]
"""Makes ready, untimed, and returns the call to time."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        sizes: Heights and widths of the images in pixels.
        batch_sizes: Images per call.
        modes: Of `MODES`. Training runs at the trained ratio alone.
        dtypes: Of `DTYPES`.
        device: 'cpu', 'cuda', or 'meta' for costs without any timing.
        repeats: Most rounds of a cell.
        seconds: No round is started after these, once there are five.
        limits: Measure the machine's rates too.
        keep_memory: Keep freed memory on the CPU, for the rest of the process, as trainings and
            tests do.
        costs: Count multiply-adds, and time the input pipelines.

    Raises:
        ConfigError: A number is below 1, or there is no GPU.
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
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise ConfigError('--device cuda: no GPU is visible here; check CUDA_VISIBLE_DEVICES '
                              'and the installed torch, or use --device cpu')


@dataclass(frozen=True)
class Contender:
    """One config of a run.

    Attributes:
        name: Unique within a run.
        model: In eval mode, on the CPU.
        ratios: What it runs at.
        execution: One of `EXECUTIONS`.
        kernels: Whether this project's own kernels may be used.
    """
    name: str
    cfg: Config
    model: nn.Module
    ratios: tuple[ISRRatio, ...]
    execution: str = 'eager'
    kernels: bool = True

    def run_as(self, execution: str = 'eager', *, kernels: bool = True,
               ratios: Sequence[str] | None = None) -> 'Contender':
        """The same model run in another way, under a name that says so."""
        told = [*([] if execution == 'eager' else [execution]),
                *([] if kernels else ['plain kernels'])]
        return replace(self, name=', '.join([self.name, *told]), execution=execution,
                       kernels=kernels, ratios=self.ratios if ratios is None else tuple(
                           map(ISRRatio.parse, ratios)))


@dataclass(frozen=True)
class Row:
    """One variant in one cell. None is what was not measured; times are medians.

    Attributes:
        windows: Windows that the config's sliding inference makes of the image; 1 for the whole.
        status: 'ok', 'OOM', or 'costs' where nothing was to be timed.
        pipeline_ms: The config's transforms, from the file on, per image.
        network_ms: Batch of images to logits, at the resolution of the decoder.
        total_ms: Batch of images to label maps in eval; one optimizer step in training.
        post_ms: ``total_ms - network_ms``.
        time_vs_first: Time relative to the cell's first variant, round by round: below 1 is faster.
        gmacs: Billions of multiply-adds of one image, forward.
        compute_limit_ms: What the multiply-adds of the batch take at the measured GEMM rate.
        memory_limit_ms: What the bytes of the batch take at the measured copy rate.
        network_share: ``compute_limit_ms / network_ms``; ``total_share`` likewise.
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
    network_p95_ms: float | None = None
    post_ms: float | None = None
    total_ms: float | None = None
    total_p95_ms: float | None = None
    images_per_s: float | None = None
    time_vs_first: float | None = None
    peak_mib: float | None = None
    peak_mib_per_image: float | None = None
    compute_limit_ms: float | None = None
    memory_limit_ms: float | None = None
    network_share: float | None = None
    total_share: float | None = None


@dataclass(frozen=True)
class Rates:
    """What the machine reaches in one dtype: billions of multiply-adds and of bytes per second."""
    gmacs_per_s: float
    gb_per_s: float


@dataclass(frozen=True)
class _Cost:
    windows: int
    macs: int
    activations: int


def parse_size(text: str) -> tuple[int, int]:
    """Read '512' or '512x1024', height before width.

    Raises:
        ConfigError: It is neither.
    """
    sides = text.lower().split('x')
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 32 for side in sides):
        raise ConfigError(f"--size '{text}': use pixels from 32 up, as 512 or, height before "
                          'width, 512x1024')
    return int(sides[0]), int(sides[-1])


def ratio_name(ratio: ISRRatio) -> str:
    """How tables name a ratio."""
    return 'none' if ratio == NONE else str(ratio)


def load_contenders(config: str, checkpoint: str | None = None, compare: Sequence[str] = (),
                    ratios: Sequence[str] = ('none',),
                    cfg_options: dict[str, Any] | None = None,
                    execution: str = 'eager') -> list[Contender]:
    """Build the models of a run.

    Args:
        config: The config that the others are compared with.
        checkpoint: Its weights; the others, and it without one, have random ones.
        compare: More configs, of any mmseg segmentor. One that ISR cannot act on runs as it is.
        ratios: What `ISRRatio.parse` reads.
        cfg_options: Settings of ``config`` to replace.
        execution: One of `EXECUTIONS`.

    Raises:
        ConfigError: A config cannot be read.
        CheckpointError: The checkpoint is missing, damaged or of another model.
        RatioError: A ratio means nothing, or does not fit a model.
    """
    wanted = tuple(dict.fromkeys(map(ISRRatio.parse, ratios)))
    contenders: list[Contender] = []
    for i, path in enumerate([config, *compare]):
        cfg = load_config(path, cfg_options=None if i else cfg_options)
        init_default_scope(cfg.get('default_scope') or 'mmseg')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # mmseg's, of its own defaults
            model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
        if not i and checkpoint:
            try:
                load_checkpoint(model, checkpoint, map_location='cpu', strict=True, logger='silent')
            except RuntimeError as error:
                raise CheckpointError(f'{checkpoint} does not fit {path}: {error}') from error
        own = wanted if not i or _can_reduce(model) else (NONE,)
        for ratio in (*own, NONE):
            set_ratio(model, ratio)
        taken = Counter(contender.name.partition(' #')[0] for contender in contenders)
        name = Path(path).stem
        contenders.append(Contender(f'{name} #{taken[name] + 1}' if name in taken else name, cfg,
                                    model, own, execution))
    return contenders


def left_out(contenders: Sequence[Contender]) -> list[str]:
    """Say which configs do not run at all the ratios of the first."""
    return [f'{contender.name} holds no attention that ISR can reduce: it runs at ratio none only'
            for contender in contenders[1:]
            if contender.ratios != contenders[0].ratios]


def _can_reduce(model: nn.Module) -> bool:
    if hasattr(model, 'set_isr'):
        return True
    try:
        apply_isr(model, NONE)
    except RatioError:
        return False
    return True


def set_ratio(model: Any, ratio: ISRRatio) -> None:
    """Apply a ratio: by the model's own ``set_isr(ratio)`` if it has one, else by `apply_isr`.

    Raises:
        RatioError: It does not fit the model.
    """
    if hasattr(model, 'set_isr'):
        model.set_isr(ratio)
    elif ratio != NONE or _can_reduce(model):
        apply_isr(model, ratio)


def run(contenders: Sequence[Contender], plan: Plan) -> Iterator[list[Row]]:
    """Measure cell by cell.

    Yields:
        The rows of one cell: every config at every ratio, of one mode, dtype, size and batch.
    """
    costs = {(contender.name, ratio, size): _count(contender, ratio, size)
             for contender in contenders for ratio in contender.ratios for size in plan.sizes
             } if plan.costs else {}
    if plan.device == 'meta':
        for size in plan.sizes:
            yield [_row(contender, ratio, costs[contender.name, ratio, size], '', '', size, 1)
                   for contender in contenders for ratio in contender.ratios]
        return
    if plan.keep_memory and plan.device == 'cpu':
        keep_freed_memory()
    torch.backends.cudnn.benchmark = bool(
        (contenders[0].cfg.get('env_cfg') or {}).get('cudnn_benchmark'))
    device = torch.device(plan.device)
    pipelines = {(mode, size): time_pipelines(contenders, mode, size) if plan.costs else {}
                 for mode in plan.modes for size in plan.sizes}
    for dtype in plan.dtypes:
        rates = measure_rates(device, getattr(torch, dtype)) if plan.limits else None
        for mode in plan.modes:
            subjects = {contender.name: Subject(contender, mode, dtype, plan)
                        for contender in contenders}
            for size, batch_size in product(plan.sizes, plan.batch_sizes):
                try:
                    rows = _measure(contenders, subjects, plan, (mode, dtype, size, batch_size),
                                    costs, rates, pipelines[mode, size])
                finally:
                    allow_kernels(True)
                yield rows
            subjects.clear()
            _free(device)


def _count(contender: Contender, ratio: ISRRatio, size: tuple[int, int]) -> _Cost:
    set_ratio(contender.model, ratio)
    views = windows(contender.model, size)
    cost = _Cost(len(views), len(views) * count_macs(contender.model, views[0]),
                 len(views) * count_activations(contender.model, views[0]))
    set_ratio(contender.model, NONE)
    return cost


class Subject:
    """A contender's model on the device, ready for one mode and dtype."""

    def __init__(self, contender: Contender, mode: str, dtype: str, plan: Plan) -> None:
        self.device = torch.device(plan.device)
        self.ratios = contender.ratios if mode == 'eval' else (NONE,)
        self.model: Any = copy.deepcopy(contender.model).to(self.device)
        self.kernels = contender.kernels
        self.autocast = dtype == 'bfloat16'
        self.input_dtype = torch.float32
        if mode == 'train':
            self.model.train()
            self.optim = build_optim_wrapper(self.model, _optim_cfg(contender))
        elif self.autocast and _casts_inputs(self.model):
            self.model.bfloat16()
            self.autocast, self.input_dtype = False, torch.bfloat16
        self.compiled = contender.execution != 'eager'
        if self.compiled:
            _compile(self.model, frozen=mode == 'eval', **EXECUTIONS[contender.execution])

    def calls(self, mode: str, ratio: ISRRatio, inputs: Tensor) -> dict[str, Prepare]:
        """What to time: the network and the whole, in training the whole alone."""
        size = (inputs.shape[2], inputs.shape[3])
        views = windows(self.model, size)

        def network() -> Callable[[], Any]:
            self.prepare(ratio)
            images = inputs.to(self.input_dtype)

            def call() -> Any:
                with torch.no_grad(), self.precision():
                    return [self.model(images[:, :, :rows, :columns]) for rows, columns in views]
            return call

        def predict() -> Callable[[], Any]:
            self.prepare(ratio)
            images, samples = inputs.to(self.input_dtype), data_samples(size, len(inputs))

            def call() -> Any:
                with torch.no_grad(), self.precision():
                    return self.model(images, samples, mode='predict')
            return call

        def train() -> Callable[[], Any]:
            self.prepare(ratio)
            self.optim.zero_grad()  # of a step that ran out of memory
            labels = torch.randint(self.model.num_classes, (len(inputs), 1, *size),
                                   device=self.device)
            samples = data_samples(size, len(inputs), labels)

            def call() -> None:
                with self.optim.optim_context(self.model), self.precision():
                    losses = self.model(inputs, samples, mode='loss')
                    loss, _ = self.model.parse_losses(losses)
                self.optim.update_params(loss)
            return call

        return dict(total=train) if mode == 'train' else dict(network=network, total=predict)

    def prepare(self, ratio: ISRRatio) -> None:
        """Turn to this subject's ratio and kernels, of which others in turn may have others."""
        set_ratio(self.model, ratio)
        allow_kernels(self.kernels)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def resident(self) -> Iterator[Tensor]:
        """Weights, buffers and the optimizer's states."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        if hasattr(self, 'optim'):
            for state in self.optim.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def _casts_inputs(model: nn.Module) -> bool:
    """Whether a segmentor takes float32 images with bfloat16 weights."""
    return any(cls.__name__ == 'StreamedEncoderDecoder' for cls in type(model).__mro__)


def _optim_cfg(contender: Contender) -> dict[str, Any]:
    """The config's optimizer in a plain wrapper: the run, not the config, chooses the dtype."""
    settings = contender.cfg.get('optim_wrapper')
    if not settings:
        raise ConfigError(f'{contender.cfg.filename} has no optim_wrapper, which --mode train '
                          'needs')
    return dict({name: value for name, value in copy.deepcopy(settings).items()
                 if name not in ('loss_scale', 'dtype', 'use_fsdp', 'accumulative_counts')},
                type='OptimWrapper')


def _compile(model: nn.Module, **how: bool) -> None:
    """Compile backbone and decoder, and keep a compiled version for each ratio."""
    settings = torch._dynamo.config
    limit = 'recompile_limit' if hasattr(settings, 'recompile_limit') else 'cache_size_limit'
    setattr(settings, limit, max(getattr(settings, limit), 64))
    compile_model(model, **how)


def data_samples(size: tuple[int, ...], count: int,
                 labels: Tensor | None = None) -> list[SegDataSample]:
    """Samples of images that were neither resized nor padded."""
    meta = dict(ori_shape=size, img_shape=size, pad_shape=size, padding_size=[0, 0, 0, 0])
    samples = [SegDataSample(metainfo=meta) for _ in range(count)]
    if labels is not None:
        for sample, label in zip(samples, labels):
            sample.gt_sem_seg = PixelData(data=label)
    return samples


def _measure(contenders: Sequence[Contender], subjects: Mapping[str, Subject], plan: Plan,
             cell: tuple[str, str, tuple[int, int], int],
             costs: Mapping[tuple[str, ISRRatio, tuple[int, int]], _Cost], rates: Rates | None,
             pipelines: Mapping[str, float | None]) -> list[Row]:
    mode, dtype, size, batch_size = cell
    device = torch.device(plan.device)
    compiled = any(subject.compiled for subject in subjects.values())
    if compiled:
        torch._dynamo.reset()  # every cell compiles for its own size
    inputs = torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(device)
    variants = [(contender, ratio) for contender in contenders
                for ratio in subjects[contender.name].ratios]
    calls = {(contender.name, ratio, phase): prepare for contender, ratio in variants
             for phase, prepare in subjects[contender.name].calls(mode, ratio, inputs).items()}
    # A CUDA graph is compiled in the first round, and recorded in the next ones.
    times = take_turns(calls, device, repeats=plan.repeats, seconds=plan.seconds,
                       warm_up=4 if compiled else 2)
    first = times.get((variants[0][0].name, variants[0][1], 'total'))
    rows = []
    for contender, ratio in variants:
        cost, subject = costs.get((contender.name, ratio, size)), subjects[contender.name]
        network, total = (times.get((contender.name, ratio, phase))
                          for phase in ('network', 'total'))
        network_ms, total_ms = _median_ms(network), _median_ms(total)
        peak = None
        if total is not None and not subject.compiled:  # neither of the two sees into that
            peak = _peak(calls[contender.name, ratio, 'total'], subject, inputs)
        compute = memory = None
        if rates is not None and cost is not None:
            # A training step computes the gradients of inputs and of weights besides.
            macs = batch_size * cost.macs * (1 if mode == 'eval' else 3)
            compute = macs / rates.gmacs_per_s / 1e6
            numbers = inputs.numel() + 2 * batch_size * cost.activations + sum(
                parameter.numel() for parameter in contender.model.parameters())
            if mode == 'eval':
                memory = numbers * getattr(torch, dtype).itemsize / rates.gb_per_s / 1e6
        rows.append(_row(
            contender, ratio, cost, mode, dtype, size, batch_size,
            status='OOM' if total is None else 'ok', rounds=total and len(total),
            pipeline_ms=pipelines.get(contender.name),
            network_ms=network_ms, network_p95_ms=_p95_ms(network), total_ms=total_ms,
            post_ms=network_ms and total_ms and total_ms - network_ms,
            total_p95_ms=_p95_ms(total), images_per_s=total_ms and 1e3 * batch_size / total_ms,
            time_vs_first=None if total is None or first is None else statistics.median(
                own / base for own, base in zip(total, first)),
            peak_mib=peak and peak / 2**20, peak_mib_per_image=peak and peak / 2**20 / batch_size,
            compute_limit_ms=compute, memory_limit_ms=memory,
            network_share=compute and network_ms and compute / network_ms,
            total_share=compute and total_ms and compute / total_ms))
    return rows


def _row(contender: Contender, ratio: ISRRatio, cost: _Cost | None, mode: str, dtype: str,
         size: tuple[int, int], batch_size: int, **measured: Any) -> Row:
    params = sum(parameter.numel() for parameter in contender.model.parameters())
    return Row(contender.name, ratio_name(ratio), mode, dtype, *size, batch_size,
               len(windows(contender.model, size)), None if cost is None else cost.macs / 1e9,
               params / 1e6,
               contender.execution, **measured)


def _peak(prepare: Prepare, subject: Subject, inputs: Tensor) -> int | None:
    try:
        return peak_bytes(prepare(), [*subject.resident(), inputs], subject.device)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    _free(subject.device)
    return None


def take_turns(calls: Mapping[Key, Prepare], device: torch.device, *, repeats: int = 50,
               seconds: float = 20., warm_up: int = 2) -> dict[Key, list[float]]:
    """Time calls in turn, round by round.

    Args:
        calls: What to time.
        device: What to wait for before and after each call.
        repeats: Most rounds.
        seconds: No round is started after these, once there are five.
        warm_up: Untimed rounds before.

    Returns:
        Seconds of each round; a call that ran out of memory is left out.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    began = time.perf_counter()
    for i in range(-warm_up, repeats):
        if i == 0:
            began = time.perf_counter()
        if i >= _LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for key in list(times):
            try:
                elapsed = _time(calls[key](), device)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                del times[key]
            else:
                if i >= 0:
                    times[key].append(elapsed)
                continue
            _free(device)
    return times


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds from an idle device to an idle device."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize()


def _free(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
        sign in str(error) for sign in ('DefaultCPUAllocator', 'CUBLAS_STATUS_ALLOC_FAILED'))


def _median_ms(seconds: Sequence[float] | None) -> float | None:
    return None if seconds is None else 1e3 * statistics.median(seconds)


def _p95_ms(seconds: Sequence[float] | None) -> float | None:
    return None if seconds is None else 1e3 * float(np.percentile(seconds, 95))


def measure_rates(device: torch.device, dtype: torch.dtype, side: int | None = None) -> Rates:
    """The best rates of a square matrix product and of a copy that no cache holds.

    A copy of n bytes reads n and writes n. ``side`` is that of the matrices.
    """
    large = device.type == 'cuda'
    side, size = side or (8192 if large else 2048), 2**30 if large else 2**28
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    with torch.no_grad():
        times = take_turns(dict(gemm=lambda: lambda: left @ right,
                                copy=lambda: lambda: target.copy_(source)),
                           device, repeats=20, seconds=2.)
    return Rates(side**3 / min(times['gemm']) / 1e9, 2 * size / min(times['copy']) / 1e9)


def time_pipelines(contenders: Sequence[Contender], mode: str, size: tuple[int, int],
                   repeats: int = 20, seconds: float = 3.) -> dict[str, float | None]:
    """Milliseconds that the transforms of each config take for one drawn JPEG of this size.

    From LoadImageFromFile on, in one thread, as in one worker of a DataLoader. A test pipeline
    reads no labels. None where the config has no such pipeline.
    """
    init_default_scope('mmseg')
    image, labels = draw_scene(np.random.default_rng(0), size)
    pipelines = {contender.name: _pipeline(contender.cfg, mode) for contender in contenders}
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        picture, mask = os.path.join(folder, 'image.jpg'), os.path.join(folder, 'mask.png')
        cv2.imwrite(picture, image[..., ::-1])
        cv2.imwrite(mask, labels % 2)
        def prepare(transforms: Compose) -> Callable[[], Any]:
            return partial(transforms, dict(img_path=picture, seg_map_path=mask, label_map=None,
                                            reduce_zero_label=False, seg_fields=[]))

        times = take_turns({name: partial(prepare, transforms)
                            for name, transforms in pipelines.items() if transforms is not None},
                           torch.device('cpu'), repeats=repeats, seconds=seconds)
    return {name: _median_ms(times.get(name)) for name in pipelines}


def _pipeline(cfg: Config, mode: str) -> Compose | None:
    loader = cfg.get('test_dataloader' if mode == 'eval' else 'train_dataloader') or {}
    dataset = loader.get('dataset') or {}
    while 'pipeline' not in dataset and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset.get('dataset') or dataset['datasets'][0]
    steps = dataset.get('pipeline') or []
    names = [step['type'] for step in steps]
    if 'LoadImageFromFile' not in names:
        return None
    return Compose([TRANSFORMS.build(step) for step in steps[names.index('LoadImageFromFile'):]
                    if mode == 'train' or step['type'] != 'LoadAnnotations'])


@contextmanager
def _one_thread() -> Iterator[None]:
    before = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def environment(plan: Plan) -> dict[str, str]:
    """Where the figures come from: device, threads, settings, versions, commit."""
    device = {'cuda': torch.cuda.get_device_name, 'cpu': _cpu_name,
              'meta': lambda: 'none (costs are counted)'}[plan.device]()
    found = dict(device=device, threads=str(torch.get_num_threads()))
    if plan.device == 'cpu':
        found['freed_memory'] = 'kept' if plan.keep_memory else 'left to the system'
    if plan.device == 'cuda':
        found.update(
            float32_matmul='TF32' if torch.backends.cuda.matmul.allow_tf32 else 'full',
            float32_conv='TF32' if torch.backends.cudnn.allow_tf32 else 'full',
            cudnn_benchmark='yes' if torch.backends.cudnn.benchmark else 'no')
    found.update(python=platform.python_version(), torch=torch.__version__)
    for package in ('mmengine', 'mmcv', 'mmsegmentation'):
        found[package] = next(filter(None, map(_version, (
            package, f'{package}-lite', f'onedl-{package}'))), 'unknown')
    return dict(found, mmseg_edaformer=__version__, commit=_commit())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return f'{names[0] if names else platform.machine()} CPU'


def _commit() -> str:
    """The commit of this package's files; '+' after it means that they were changed since."""
    def git(*command: str) -> str:
        return subprocess.run(['git', *command], cwd=Path(__file__).parent, text=True, check=True,
                              capture_output=True).stdout.strip()
    try:
        return git('rev-parse', '--short', 'HEAD') + (
            '+' if git('status', '--porcelain', '--untracked-files=no') else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
