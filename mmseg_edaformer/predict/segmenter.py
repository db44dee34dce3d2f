"""A trained model that predicts images of any size."""
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmseg.registry import TRANSFORMS
from PIL import Image

from ..cost import count_macs, windows
from ..data.transforms import MAX_PIXELS, allow_pixels, with_checks
from ..errors import CheckpointError, ConfigError, DataError, first_line, shown
from ..isr import ISRRatio, QueryRatio, apply_isr, remove_isr
from ..isr.registry import find_attention
from .foreign import Foreign
from .inputs import Video, find_images, is_video, read_ahead, scale_down, to_array, to_bgr
from .loading import find_device, load_segmentor

LARGE = 2048 * 2048
"""Pixels of an image, and of what the network sees of it at once, above which the default ratio is
auto: attention is quadratic in them."""

_BATCH_PIXELS = 2 ** 23  # of the inputs that the network sees at once
_WINDOW_PIXELS = 2 ** 25  # of the images that wait for others of their size
_COUNTED_PIXELS = 2 ** 22  # at once
_QUICK = 2 ** 21  # pixels that are not worth an estimate
_LONG = 5.  # seconds for one image, from which on the estimate is worth a line
_MEGAPIXELS = f'{LARGE / 1e6:.1f} megapixels'
Loaded = tuple[np.ndarray, dict[str, Any]]
"""An image and the input of ``data_preprocessor``."""
_NONE, _AUTO = ISRRatio.parse('none'), ISRRatio.parse('auto')
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The prediction of one image."""
    labels: np.ndarray  # indices into classes, H x W, uint8, or int16 for more than 256 classes
    image: np.ndarray  # upright, H x W x 3, uint8, BGR
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # RGB

    @property
    def shares(self) -> dict[str, float]:
        """The share of the pixels of each class that occurs, the largest first."""
        return class_shares(count_pixels(self.labels, len(self.classes)), self.classes)

    @property
    def mask(self) -> Image.Image:
        """The labels as an image whose pixel values are labels, in the colours of the classes."""
        if self.labels.dtype != np.uint8:  # 16 bits, which have no palette
            return Image.fromarray(self.labels.astype(np.uint16))
        mask = Image.fromarray(self.labels)
        mask.putpalette(bytes(np.array(self.palette, np.uint8)))
        return mask

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """Return the image, tinted in the colours of the classes."""
        return Image.fromarray(self.draw(opacity)[..., ::-1])

    def draw(self, opacity: float = 0.5) -> np.ndarray:
        """Return the `overlay` as OpenCV has images, H x W x 3, BGR."""
        if self.labels.dtype == np.uint8:
            table = np.zeros((256, 1, 3), np.uint8)
            table[:len(self.palette), 0] = np.array(self.palette, np.uint8)[:, ::-1]
            colours = cv2.applyColorMap(self.labels, table)
        else:
            colours = np.array(self.palette, np.uint8)[self.labels, ::-1]
        return cv2.addWeighted(self.image, 1 - opacity, colours, opacity, 0)


def count_pixels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the number of pixels of each class."""
    counts = np.zeros(classes, np.int64)
    rows = max(1, _COUNTED_PIXELS // labels.shape[1])
    for start in range(0, len(labels), rows):  # bincount needs eight bytes for each pixel
        counts += np.bincount(labels[start:start + rows].ravel(), minlength=classes)[:classes]
    return counts


def class_shares(counts: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Return the share of the pixels of each class that occurs, the largest first."""
    shares: dict[str, float] = {}
    for index in np.argsort(-counts, kind='stable'):
        if counts[index]:
            share = round(float(counts[index] / counts.sum()), 6)
            shares[classes[index]] = shares.get(classes[index], 0.) + share
    return shares


def _refuse_isr(*_: Any) -> None:
    raise ConfigError('isr is not an argument or attribute of Segmenter: use isr_ratio')


class Segmenter:
    """Predicts images of any size, one or many, as mmseg's ``inference_model`` does.

    The label maps equal those of mmseg, and of `tools/test.py`, pixel for pixel. Threads may share
    a Segmenter, see `isr_ratio`: it predicts for one of them at a time.

    Args:
        model: A work dir, a config, or a .safetensors that tools/convert_checkpoint.py wrote,
            which needs nothing else. A folder of transformers' or segmentation-models-pytorch's
            ``save_pretrained``, or the name of such a model on the hub, ``org/name``; a name of
            mmseg's model zoo. Or a module from N x 3 x H x W to logits, in memory.
        checkpoint: Weights for a config; a work dir uses its best checkpoint by default, or else
            its last one.
        device: Such as 'cpu' or 'cuda:1'; by default the first GPU, if there is one.
        isr_ratio: What `ISRRatio.parse` reads; hooks of the config are ignored. The default is
            none, and auto for images of which the network sees more than `LARGE` pixels at once.
        query_ratio: What `QueryRatio.parse` reads; the default is that of ``isr_ratio``. If it is
            given alone, ``isr_ratio`` is none for images of all sizes.
        max_side: Larger images are scaled down for the network, to this many pixels on the longer
            side (up to 31 more, where the pipeline rounds); label maps keep the original size.
        batch_size: Most images of equal size that are predicted at once, by default 8 on a GPU and
            1 on a CPU, where more are not faster; fewer if they are large.
        keep_ratio: Whether images keep their ratio where the processor of a model of transformers
            makes all of them squares; their shorter side becomes that of the square.
        classes: Names of the classes of a module that does not know them.
        mean, std: Of a module, of red, green and blue from 0 to 1.

    Raises:
        UserError: The model, the checkpoint or the device cannot be used.
    """

    def __init__(self, model: str | Path | torch.nn.Module, checkpoint: str | Path | None = None, *,
                 device: str | None = None, isr_ratio: ISRRatio | int | str | None = None,
                 query_ratio: QueryRatio | int | str | None = None,
                 max_side: int | None = None, batch_size: int | None = None,
                 keep_ratio: bool = False, classes: Sequence[str] | None = None,
                 mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                 isr: None = None) -> None:
        if isr is not None:
            _refuse_isr()
        if not isinstance(model, (str, Path, torch.nn.Module)):
            raise ConfigError(f'model {model!r} is no path, name or module: give a work dir, a '
                              'config, a .safetensors, or a folder or hub name of transformers')
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f'batch_size {batch_size}: it must be 1 or more')
        if max_side is not None and max_side < 32:
            raise ConfigError(f'max_side {max_side}: give 32 or more pixels')
        allow_pixels(MAX_PIXELS)
        self.device = find_device(device)
        self.batch_size = batch_size or (1 if self.device.type == 'cpu' else 8)
        self.description, self.model, self.source = load_segmentor(
            model, checkpoint, classes=classes, mean=mean, std=std, keep_ratio=keep_ratio,
            max_side=max_side)
        is_single_file = Path(self.source).suffix == '.safetensors' and checkpoint is None
        self.model.to(self.device)
        init_default_scope('mmseg')
        self.max_side = max_side
        self._lock, self._own = threading.Lock(), threading.local()
        self._shared_ratio: ISRRatio | None = None
        self._applied = _NONE
        self._told: dict[ISRRatio, int] = {}
        self._reduced: dict[tuple[int, int], bool] = {}
        try:
            first, *rest = map(with_checks, self.description.pipeline)
            self._read_file = TRANSFORMS.build(first)
            steps: list[Any] = rest
            if max_side is not None and not isinstance(self.model, Foreign):
                # After what resizes for good, before multiples of 32.
                resized = [index for index, step in enumerate(steps, 1)
                           if 'Resize' in str(step['type']) and 'Multiple' not in str(step['type'])]
                steps.insert(max(resized, default=0), self._scale_down)
            self._prepare = Compose(steps)
            if is_single_file:  # whose values may fit no image at all
                data = self.load(np.zeros((64, 64, 3), np.uint8))[1]
                data['inputs'] = data['inputs'][:, :64, :64]
                self._predict_labels([data])
        except Exception as error:  # values that do not go together raise anything
            if not is_single_file:
                raise
            raise CheckpointError(f'{self.source} is refused: it cannot predict an image '
                                  f'({first_line(error)})') from error
        if query_ratio is not None:
            isr_ratio = ISRRatio.parse(isr_ratio or 1).with_queries(query_ratio)
        self.isr_ratio = isr_ratio  # type: ignore[assignment]
        del self._own.ratio  # this thread, too, follows others until it sets one

    @property
    def note(self) -> str:
        """What is worth knowing of how the model sees images, or an empty string."""
        return str(getattr(self.model, 'note', ''))

    def __str__(self) -> str:
        return (f'{shown(self.source)}, {len(self.classes)} classes, on {self.device}' +
                f'\n{self.note}' * bool(self.note))

    isr = property(_refuse_isr, _refuse_isr)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.description.classes

    @property
    def isr_ratio(self) -> ISRRatio:
        """The ISR ratio, which can be set at any time: an `ISRRatio` or what its parse reads.

        None restores the default. A thread that has set a ratio keeps it; the others follow the
        last one that any thread has set.
        """
        return self._ratio or _NONE

    @isr_ratio.setter
    def isr_ratio(self, ratio: ISRRatio | int | str | None) -> None:
        parsed = None if ratio is None else ISRRatio.parse(ratio)
        with self._lock:
            self._apply(parsed or _NONE)
            self._shared_ratio = self._own.ratio = parsed

    @property
    def _ratio(self) -> ISRRatio | None:
        """The ratio of this thread, None for the default."""
        ratio: ISRRatio | None = getattr(self._own, 'ratio', self._shared_ratio)
        return ratio

    def is_reduced(self, height: int, width: int) -> bool:
        """Return whether images of this size are predicted at auto by default."""
        if self._ratio is not None or height * width <= LARGE:
            return False
        if (height, width) not in self._reduced:
            self._reduced[height, width] = self._is_large(
                self.load(np.zeros((height, width, 3), np.uint8))[1])
        return self._reduced[height, width]

    def __call__(self, source: Any, skipped: dict[str, str] | None = None) -> Any:
        """Predict an image, or many one after the other.

        Args:
            source: An image: a path, an array (H x W x 3, uint8, BGR as in OpenCV and mmseg) or a
                PIL image. Or many: a list or any other iterable of them, a folder with everything
                below it, a pattern such as ``'photos/*.jpg'``, or a video.
            skipped: Collects the images that cannot be read, with the reasons; without it the first
                one raises a DataError.

        Returns:
            A `Segmentation`; for many images an iterator over them.
        """
        items, single = source, isinstance(source, (np.ndarray, Image.Image))
        if single:
            items = [source]
        elif isinstance(source, (str, Path)):
            is_file = os.path.isfile(source)
            single = is_file and not is_video(source)
            items = (Video(source) if is_file and not single else
                     [file for file, _ in find_images(source)])
        return next(self._results(items, None)) if single else self._results(items, skipped)

    def _results(self, items: Iterable[Any], skipped: dict[str, str] | None
                 ) -> Iterator[Segmentation]:
        for item, result in self.predict(items):
            if isinstance(result, Segmentation):
                yield result
            elif skipped is None:
                raise result
            else:
                skipped[str(item) if isinstance(item, (str, Path)) else 'an image'] = str(result)

    def predict(self, items: Iterable[Any]) -> Iterator[tuple[Any, Segmentation | DataError]]:
        """Yield each item in order with its segmentation, or with the reason why it has none.

        A thread reads a few items ahead, those of equal size are predicted together, and none is
        kept. Items are paths, arrays or PIL images.
        """
        window: list[tuple[Any, Loaded | DataError]] = []
        pixels = 0
        for item, ready in read_ahead(self.load, items, self.batch_size):
            try:
                window.append((item, ready.result()))
                pixels += math.prod(ready.result()[0].shape[:2])
            except DataError as error:
                window.append((item, error))
            if pixels >= _WINDOW_PIXELS or len(window) >= (
                    4 * self.batch_size if self.batch_size > 1 else 1):
                yield from self.predict_loaded(window)
                window, pixels = [], 0
        yield from self.predict_loaded(window)

    def fingerprint(self) -> str:
        """Return a hash of all that decides the labels: model, weights, ratio and max_side."""
        settings = [asdict(self.description), str(self._ratio or f'auto above {LARGE}'),
                    self.max_side]
        digest = hashlib.sha256(json.dumps(settings, default=str).encode())
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def load(self, item: Any, max_side: int | None = None) -> Loaded:
        """Return an image, H x W x 3, BGR, and the input of the model's ``data_preprocessor``.

        ``max_side`` may be lower than that of the segmenter, which must have one then.
        """
        if isinstance(item, (str, Path)):
            results = self._read_file(dict(img_path=str(item)))
            image = to_bgr(results['img'].astype(np.uint8, copy=False))
        else:
            image = to_array(item)
            results = dict(img_path=None, img=image, img_shape=image.shape[:2],
                           ori_shape=image.shape[:2])
        results['max_side'] = max_side or self.max_side
        return image, self._prepare(results)

    def predict_loaded(self, window: Sequence[tuple[Any, Loaded | DataError]]
                       ) -> Iterator[tuple[Any, Segmentation | DataError]]:
        """Do the same as `predict` for items that `load` has read."""
        results: dict[int, Segmentation | DataError] = {}
        sizes: dict[tuple[Any, ...], list[tuple[int, Loaded]]] = {}
        for index, (_, loaded) in enumerate(window):
            if isinstance(loaded, DataError):
                results[index] = loaded
            else:
                size = self._is_large(loaded[1]), *loaded[1]['inputs'].shape
                sizes.setdefault(size, []).append((index, loaded))
        for (_, *shape), group in sizes.items():
            step = max(1, min(self.batch_size, _BATCH_PIXELS // math.prod(shape[1:])))
            for start in range(0, len(group), step):
                batch = group[start:start + step]
                maps = self._predict_labels([data for _, (_, data) in batch])
                for (index, (image, _)), labels in zip(batch, maps):
                    results[index] = labels if isinstance(labels, DataError) else Segmentation(
                        labels, image, self.classes, self.description.palette)
        for index, (item, _) in enumerate(window):
            yield item, results[index]

    def _predict_labels(self, batch: Sequence[dict[str, Any]]
                        ) -> list[np.ndarray | DataError]:
        """Predict images of one size, in halves if they do not fit into memory."""
        data = {name: [item[name] for item in batch] for name in ('inputs', 'data_samples')}
        model: Any = self.model
        try:
            with self._lock, torch.no_grad():
                self._set_up(batch[0])
                if hasattr(model, 'predict_labels'):
                    maps = model.predict_labels(**model.data_preprocessor(data, False))
                else:
                    dtype = torch.uint8 if len(self.classes) <= 256 else torch.int16
                    maps = [sample.pred_sem_seg.data[0].to(dtype)
                            for sample in model.test_step(data)]
                return [labels.cpu().numpy() for labels in maps]
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                height, width = batch[0]['inputs'].shape[1:]
                return [DataError(f'an image of {width}x{height} pixels does not fit into the '
                                  f'memory of {self.device}: set isr_ratio to auto or a lower '
                                  'max_side, or use the device cpu')]
        half = len(batch) // 2
        return self._predict_labels(batch[:half]) + self._predict_labels(batch[half:])

    def tell_cost(self, item: Any) -> None:
        """Log how long one image will take, if that is long; predicting does so itself."""
        _, data = self.load(item)
        with self._lock, torch.no_grad():
            self._set_up(data)

    def _scale_down(self, results: dict[str, Any]) -> dict[str, Any]:
        """Apply ``max_side``, as a step of the pipeline."""
        results['img'] = scale_down(results['img'], results['max_side'])
        results['img_shape'] = results['img'].shape[:2]
        return results

    def _is_large(self, data: dict[str, Any]) -> bool:
        """Return whether the default ratio of an image is auto."""
        return (math.prod(data['data_samples'].ori_shape) > LARGE and
                math.prod(windows(self.model, data['inputs'].shape[1:])[0]) > LARGE and
                self._reducible)

    @property
    def _reducible(self) -> bool:
        return any(part.stages for part in find_attention(self.model).parts)

    def _apply(self, ratio: ISRRatio) -> None:
        if ratio == _NONE:  # works for models in which nothing can be reduced, too
            remove_isr(self.model)
        else:
            apply_isr(self.model, ratio)
        self._applied = ratio

    def _set_up(self, data: dict[str, Any]) -> None:
        """Give the model the ratio of this thread and image, and log what takes long."""
        ratio = self._ratio or (_AUTO if self._is_large(data) else _NONE)
        if ratio != self._applied:
            self._apply(ratio)
        pixels = math.prod(data['inputs'].shape[1:])
        if pixels <= self._told.get(ratio, _QUICK):
            return
        self._told[ratio] = 4 * pixels  # one line for all that are about as large
        views = windows(self.model, data['inputs'].shape[1:])
        seconds = len(views) * self._estimate(views[0])
        by_default = self._ratio is None and ratio == _AUTO
        if by_default or not seconds <= _LONG:
            duration = 'long' if math.isnan(seconds) else f'about {seconds:.0f} s'
            height, width = data['data_samples'].ori_shape
            text = (f'an image of {width}x{height} pixels takes {duration} on {self.device} at ISR '
                    f'ratio {ratio!s}')
            if by_default:
                text += (f', the default above {_MEGAPIXELS} (isr_ratio none or --isr-ratio none: '
                         'the model as trained)')
            advice = 'a smaller max_side (--max-side N) takes less'
            if ratio != _AUTO and len(views) == 1 and self._reducible:
                advice += ', and so may isr_ratio auto (--isr-ratio auto)'
            _LOG.warning('%s: %s', text, advice)

    def _estimate(self, view: tuple[int, int]) -> float:
        """Return the seconds of a pass: those of a small one, times the ratio of their MACs."""
        model: Any = self.model
        scale = max(2., math.sqrt(math.prod(view)) / 1024)
        rows, columns = (max(32, round(side / scale / 32) * 32) for side in view)
        try:
            for _ in range(2):  # the first one may compile
                start = time.perf_counter()
                getattr(model, 'predict_labels', model.predict)(
                    torch.zeros(1, 3, rows, columns, device=self.device))
                if self.device.type == 'cuda':
                    torch.cuda.synchronize(self.device)
                seconds = time.perf_counter() - start
            large, small = (count_macs(model, size, compute=False)
                            for size in (view, (rows, columns)))
        except Exception:  # which the prediction itself need not meet
            return math.nan
        return seconds * large / small
