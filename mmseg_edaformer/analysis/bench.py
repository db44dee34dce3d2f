"""A segmentor at several ISR ratios on the same images: the measurements that a sweep reports."""
import hashlib
import json
import math
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmseg.evaluation import IoUMetric
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import DATASETS

from ..engine import launch
from ..engine.allocator import keep_freed_memory
from ..errors import ConfigError, DataError, RatioError
from ..files import replacing
from ..isr import ISRRatio, isr
from ..isr.ratio import StageRatio
from ..isr.registry import find_attention
from ..predict.run import progress_bar
from ..predict.segmenter import Segmenter
from .labelled import IGNORED, LabelledImages
from .loading import NONE, count_windows, load_model
from .timing import milliseconds, peak_bytes, relative, time_call

Dial = TypeVar('Dial', bound=StageRatio)

SCALE = 'scale '


@dataclass(frozen=True)
class InputScale:
    """A smaller input instead of fewer keys or queries: the plainest way to save.

    Raises:
        RatioError: The scale is not above 0.
    """
    scale: float

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise RatioError('give a scale above 0')

    def __str__(self) -> str:
        return f'{SCALE}{self.scale:g}'

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Scale what the backbone sees; the logits are resized from there as ever."""
        handle = model.backbone.register_forward_pre_hook(self._shrink)
        try:
            yield
        finally:
            handle.remove()

    def _shrink(self, module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        size = [max(32, round(side * self.scale / 32) * 32) for side in args[0].shape[-2:]]
        return (F.interpolate(args[0], size, mode='bilinear', antialias=True), *args[1:])


class Rival(Protocol):
    """A way to predict for less that is no ratio: hashable, with a name of its own as ``str``."""

    def applied(self, model: Any) -> AbstractContextManager[None]:
        """Predict this way within the block, and as trained after it."""


Way = ISRRatio | Rival
"""A way to predict for less."""

_CACHE = 2**30  # bytes of loaded images that are kept for the next pass
_LOOK = 25  # images whose sizes are looked at
_SAVE_SECONDS = 60.


class Bench:
    """A segmentor, images, and what was measured of them.

    Args:
        model: In eval mode, on its device.
        dataset: Its test set, with labels.
        metric: ``classes``, ``ignore_index`` and ``nan_to_num`` of the IoUMetric.
        samples: Number of images, drawn at random but always the same ones; by default all.
        store: A .npz file that keeps what is measured.
        subject: A digest of what is measured; a file of another one is not used.
        look: Number of images whose median size is the `size` that costs are counted for.

    Attributes:
        measured: Intersections and unions of each class, and then the seconds of the prediction and
            of that at the trained ratio in the same turn, 2 x (C + 1), for each image, by ratio.

    Raises:
        RatioError: The model holds no attention that ISR can reduce.
    """

    def __init__(self, model: Any, dataset: Any, metric: dict[str, Any], *,
                 samples: int | None = None, store: Path | None = None, subject: str = '',
                 look: int = _LOOK) -> None:
        self.model, self.dataset, self.metric = model, dataset, metric
        self.device = next(model.parameters()).device
        with isr(model, 1):
            pass  # fail early if it cannot be reduced
        self.stages = {part.kind: len(part.stages) for part in find_attention(model).parts}
        try:
            with isr(model, 1, query_ratio=2):
                self.has_queries = True
        except RatioError:
            self.has_queries = False
        # The first images of one order: a larger sample holds a smaller one.
        order = np.random.default_rng(0).permutation(len(dataset))
        self.order = [int(index) for index in order[:samples]]
        self.store, self.subject = store, subject
        self.measured = {} if store is None else _read(store, subject)
        self.saved = time.monotonic()
        self.cache: dict[int, Any] = {}
        self.cached = 0
        self.warm: set[str] = set()
        self.macs: dict[Way, float] = {}
        self.example, self.size = self._middle_image(look)

    def way(self, name: str) -> Way:
        """Read what `str` of a way gives."""
        return InputScale(float(name.removeprefix(SCALE))) if name.startswith(SCALE) else (
            self.ratio(name))

    def applied(self, way: Way | str) -> AbstractContextManager[None]:
        """Predict this way within the block."""
        return isr(self.model, way) if isinstance(way, (ISRRatio, str)) else way.applied(self.model)

    def ratio(self, value: ISRRatio | int | str) -> ISRRatio:
        """Read a ratio for this model; ratios that do the same are the same.

        Raises:
            RatioError: It cannot be parsed, or does not fit.
        """
        ratio = ISRRatio.parse(value)
        with isr(self.model, ratio):
            pass
        return self._shorten(ratio).with_queries(self._shorten(ratio.queries))

    def _shorten(self, ratio: Dial) -> Dial:
        if ratio.auto:
            return ratio
        parts = {kind: ratio.for_stages(kind, count) for kind, count in self.stages.items()}
        multipliers = {multiplier for part in parts.values() for multiplier in part}
        if len(multipliers) == 1:
            return type(ratio).parse(multipliers.pop())
        return type(ratio)(parts.get('encoder', (1,)), parts.get('decoder', (1,)))

    def gmacs(self, ratio: Way) -> float:
        """Return billions of multiply-adds of one image of `size`, all of its windows counted."""
        if ratio not in self.macs:
            with self.applied(ratio):
                self.macs[ratio] = count_windows(self.model, self.size) / 1e9
        return self.macs[ratio]

    def miou(self, ratio: Way) -> float:
        """Return the mIoU, in percent, of the images that all have been measured on."""
        return float(mean_iou(self.areas(ratio).sum(0), self.metric['nan_to_num']))

    def areas(self, ratio: Way) -> np.ndarray:
        """Return intersections and unions of those images, N x 2 x C."""
        return np.stack(self.measured[str(ratio)][:self.images])[..., :-1]

    def seconds(self, ratio: Way | str) -> np.ndarray:
        """Return the times on those images, and those of the trained ratio beside them, N x 2."""
        return np.stack(self.measured[str(ratio)][:self.images])[..., -1]

    def relative(self, ratio: Way) -> float:
        """Return the median ratio of the time to that of the trained ratio in the same turn."""
        return relative(*self.seconds(ratio).T)

    def milliseconds(self, ratio: Way) -> float:
        """Return the time of one prediction; see `Row.ms`."""
        return self.relative(ratio) * milliseconds(self.seconds(NONE)[:, 0])

    def count(self, ratio: Way | str) -> int:
        """Return how many images a ratio was measured on."""
        return len(self.measured.get(str(ratio), ()))

    @property
    def images(self) -> int:
        """How many images are measured: all, or so far in the first pass."""
        if self.count('none') >= len(self.order):
            return len(self.order)
        return min(map(len, self.measured.values()), default=0)

    @torch.no_grad()
    def measure(self, ratios: Sequence[Way], *, title: str = '',
                seconds: float = math.inf) -> None:
        """Predict each image at every ratio in turn, the trained one among them for the times.

        What has been measured before is not measured again. No further image begins after so many
        ``seconds``. With a ``title`` a progress bar is shown.
        """
        missing = {str(ratio): ratio for ratio in ratios if self.count(ratio) < len(self.order)}
        if not missing:
            return
        text = f'{title}: {len(missing)} ratio{"s" if len(missing) > 1 else ""}'
        end = time.monotonic() + seconds
        try:
            with (progress_bar(text, len(self.order)) if title else
                  nullcontext(lambda done: None)) as advance:
                for position in range(len(self.order)):
                    self._take_turns(position, {name: ratio for name, ratio in missing.items()
                                                if self.count(name) == position})
                    if time.monotonic() - self.saved >= _SAVE_SECONDS:
                        self._save()
                    advance(position + 1)
                    if time.monotonic() > end:
                        break
        finally:
            self._save()

    def _take_turns(self, position: int, due: dict[str, Way]) -> None:
        if not due:
            return
        data = self._load(position)
        turn = list({'none': NONE, **due}.items())
        first = position % len(turn)  # none of them is always the one after loading
        done = {name: self._predict(data, name, ratio)
                for name, ratio in (*turn[first:], *turn[:first])}
        for name in due:
            areas, seconds = done[name]
            self.measured.setdefault(name, []).append(
                np.column_stack([areas, (seconds, done['none'][1])]))

    def _predict(self, data: Any, name: str, ratio: Way) -> tuple[np.ndarray, float]:
        """Return intersections and unions of a prediction (2 x C), and the seconds it took."""
        with self.applied(ratio):
            if name not in self.warm:
                self.model.test_step(data)
                self.warm.add(name)
            seconds, [sample] = time_call(lambda: self.model.test_step(data), self.device)
        if 'gt_sem_seg' not in sample:
            raise DataError(f'{sample.img_path} has no labels to compare with: its pipeline needs '
                            'LoadAnnotations, and test_dataloader.dataset.data_prefix a '
                            'seg_map_path')
        predicted = sample.pred_sem_seg.data.squeeze()
        areas = IoUMetric.intersect_and_union(
            predicted, sample.gt_sem_seg.data.squeeze().to(predicted), self.metric['classes'],
            self.metric['ignore_index'])
        return torch.stack(areas[:2]).round().double().numpy(), seconds

    def _load(self, position: int) -> Any:
        """Return a batch of one image; it is kept for the next pass while there is room."""
        if position in self.cache:
            return self.cache[position]
        data = pseudo_collate([self.dataset[self.order[position]]])
        # Beside three bytes a pixel are eight of its label.
        self.cached += 4 * data['inputs'][0].nbytes
        if self.cached <= _CACHE:
            self.cache[position] = data
        return data

    @torch.no_grad()
    def takes(self, scale: InputScale) -> bool:
        """Return whether the model predicts at an input scale, which some networks refuse."""
        if isinstance(self.model, EncoderDecoder):
            return True
        try:
            with self.applied(scale):
                self.model.test_step(self.example)
        except (RuntimeError, ValueError):
            return False
        return True

    def _middle_image(self, look: int) -> tuple[Any, tuple[int, int]]:
        """Return the middle one by size of the first images, with its size in the network."""
        sized = []
        for position in range(min(len(self.order), look)):
            inputs = self.model.data_preprocessor(self._load(position), False)['inputs']
            sized.append((math.prod(inputs.shape[-2:]), position, tuple(inputs.shape[-2:])))
        _, position, size = sorted(sized)[len(sized) // 2]
        return self._load(position), size

    def _save(self) -> None:
        if self.store is not None and self.measured:
            with replacing(self.store) as partial:
                measured: dict[str, Any] = {ratio: np.stack(rows)
                                            for ratio, rows in self.measured.items()}
                np.savez_compressed(partial, subject=np.array(self.subject), **measured)
            self.saved = time.monotonic()

    @torch.no_grad()
    def peak_mib(self, ratio: Way) -> float:
        """Return the most memory at once of a prediction of `size`, with the weights."""
        with self.applied(ratio):
            return peak_bytes(lambda: self.model.test_step(self.example), [
                *self.model.parameters(), *self.model.buffers()], self.device) / 2**20


def _read(path: Path, subject: str) -> dict[str, list[np.ndarray]]:
    """Read what `Bench` measured; nothing from a file that is damaged or of another subject."""
    content: dict[str, np.ndarray] = {}
    with suppress(OSError, EOFError, ValueError, zipfile.BadZipFile), np.load(path) as file:
        content = dict(file)
    if str(content.pop('subject', '')) != subject:
        return {}
    return {ratio: list(rows) for ratio, rows in content.items()}


def open_bench(cfg: Config, checkpoint: str, folder: Path | None = None,
               samples: int | None = None) -> Bench:
    """Load the checkpoint and the test set of a config; a ``folder`` keeps the measurements."""
    if samples is not None and samples < 1:
        raise ConfigError(f'--samples {samples}: give 1 or more')
    metric = _iou_metric(cfg)
    launch.prepare_test(cfg, checkpoint)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if device.type == 'cpu':
        keep_freed_memory()
    torch.backends.cudnn.benchmark = bool((cfg.get('env_cfg') or {}).get('cudnn_benchmark'))
    model = load_model(cfg, checkpoint).to(device)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    return Bench(model, dataset, metric, samples=samples, store=folder and folder / 'sweep.npz',
                 subject=_digest(cfg, checkpoint, dataset, metric, device) if folder else '')


def _digest(cfg: Config, checkpoint: str, dataset: BaseDataset, metric: dict[str, Any],
            device: torch.device) -> str:
    """Return what changes with all that the measurements depend on."""
    files = [os.path.abspath(dataset.get_data_info(i)['img_path']) for i in range(len(dataset))]
    weights = os.stat(checkpoint) if os.path.exists(checkpoint) else None
    text = json.dumps([
        'areas and seconds', cfg.model, cfg.test_dataloader.dataset, metric, files,
        os.path.realpath(checkpoint), weights and (weights.st_size, weights.st_mtime_ns),
        torch.__version__, torch.get_num_threads(), str(device)], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_folders(segmenter: Segmenter, images: str | Path, masks: str | Path, *,
                 reduce_zero_label: bool = False, folder: Path | None = None,
                 samples: int | None = None) -> Bench:
    """Return a bench of any model on a folder of images and one of masks with the same names."""
    dataset = LabelledImages(segmenter, images, masks, reduce_zero_label)
    subject = hashlib.sha256(json.dumps([
        segmenter.fingerprint(), [(str(path), path.stat().st_mtime_ns) for path in dataset.files],
        os.path.realpath(masks), reduce_zero_label, torch.__version__, torch.get_num_threads(),
        str(segmenter.device)]).encode()).hexdigest()[:16]
    metric = dict(classes=len(segmenter.classes), ignore_index=IGNORED, nan_to_num=None)
    return Bench(segmenter.model, dataset, metric, samples=samples, subject=subject,
                 store=folder and folder / 'sweep.npz')


def _iou_metric(cfg: Config) -> dict[str, Any]:
    evaluators = cfg.get('test_evaluator') or []
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        if evaluator.get('type') in ('IoUMetric', IoUMetric):
            head = cfg.model.get('decode_head') or {}
            head = head[-1] if isinstance(head, (list, tuple)) else head
            return dict(classes=head.get('num_classes'),
                        ignore_index=evaluator.get('ignore_index', 255),
                        nan_to_num=evaluator.get('nan_to_num'))
    raise ConfigError(f'{cfg.filename} has no IoUMetric as test_evaluator, and mIoU is what '
                      'is measured here: run tools/test.py at each ratio')


def mean_iou(areas: np.ndarray, nan_to_num: float | None = None) -> np.ndarray:
    """Return the mIoU in percent of intersections and unions ... x 2 x C, as mmseg's IoUMetric.

    A class that does not occur is left out, or counts as ``nan_to_num``.
    """
    with np.errstate(invalid='ignore', divide='ignore'):
        iou = areas[..., 0, :] / areas[..., 1, :]
    if nan_to_num is not None:
        iou = np.nan_to_num(iou, nan=nan_to_num)
    return 100 * np.nanmean(iou, -1)
