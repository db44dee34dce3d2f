"""Parity: whether a written file predicts what PyTorch predicts, on which images, how fast."""
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample
from prettytable import PrettyTable
from torch import Tensor

from .. import compat
from ..data.drawing import draw_scene
from ..engine.run_config import load_config
from ..errors import ConfigError, RatioError, UserError, first_line
from ..isr import ISRRatio
from ..predict.inputs import find_images
from ..predict.segmenter import Segmenter
from .graph import Deployed, multipliers
from .runtimes import OPENVINO, Run

LEAST_EQUAL = {False: 0.999, True: 0.9}
"""Least share of PyTorch's labels that a file, in int8 or not, must give to be written.

Of a file in int8 whose ratio is an input, this is for ratio none; the report names ratios that are
worse.
"""
FARTHEST = 0.01
"""Maximum logit error relative to the largest logit; not in int8."""
FARTHEST_OPEN = 1e-4
"""The same for a file whose ratio is an input, and for the logits of labels that differ."""
TRIALS = (('none', 'none'), ('optimal', '2'), ('2', 'none'), ('4', '3'), ('', '2'))
"""Ratios of keys and of queries at which such a file is compared; '' stands for an uneven one."""

_CHECKED = 8
_DRAWN = (360, 480)


@dataclass(frozen=True)
class Parity:
    """How near a file is to PyTorch on the same images.

    ``equal`` is the share of equal labels. ``difference`` is the largest of logits, ``relative`` to
    the largest logit; of a file that gives labels it is how much less the file's class has, in
    PyTorch's logits, where the labels differ. ``inputs`` are the shapes that were run, N x H x W.
    """
    equal: float
    difference: float
    relative: float
    inputs: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Measured:
    """One way to predict: its parity with PyTorch and its cost.

    ``ms`` is the median time of an image, ``relative`` the median ratio to PyTorch's time in the
    same turn, ``spread`` the lower and the upper quartile of that ratio, ``miou`` in percent,
    ``to_fixed`` the same ratio and quartiles to a file with the ratio fixed.
    """
    name: str
    parity: Parity | None
    ms: float
    relative: float
    spread: tuple[float, float]
    miou: float | None
    to_fixed: tuple[float, tuple[float, float]] | None = None


@dataclass(frozen=True)
class ExportReport:
    """What `export` measured of the file that it wrote."""
    path: Path
    metadata: dict[str, Any]
    rows: tuple[Measured, ...]
    timing: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        metadata = self.metadata
        table = PrettyTable(['', 'labels equal', 'logits apart', 'ms', 'time', 'to fixed', 'mIoU'],
                            align='r')
        table.align[''] = 'l'
        for row in self.rows:
            parity, (low, high) = row.parity, row.spread
            table.add_row([row.name, f'{100 * parity.equal:.4f} %' if parity else '',
                           f'{parity.difference:.2g}' if parity else '', f'{row.ms:.1f}',
                           f'x {row.relative:.3g}' + (
                               f' ({low:.3g} to {high:.3g})' if parity else ''),
                           'x {:.3g} ({:.3g} to {:.3g})'.format(
                               row.to_fixed[0], *row.to_fixed[1]) if row.to_fixed else '',
                           '' if row.miou is None else f'{row.miou:.2f}'])
        if all(row.miou is None for row in self.rows):
            table.del_column('mIoU')
        if all(row.to_fixed is None for row in self.rows):
            table.del_column('to fixed')
        shapes = next(row.parity.inputs for row in self.rows if row.parity)
        checked = ', '.join(f'{n}x{h}x{w}' for n, h, w in dict.fromkeys(shapes))
        size = 'x'.join(map(str, metadata['size'] or metadata['minimum']))
        megabytes = sum(path.stat().st_size for path in (
            self.path, *([self.path.with_suffix('.bin')] if self.path.suffix == OPENVINO else []))
        ) / 1e6
        lines = [
            f'{self.path} ({megabytes:.1f} MB): {len(metadata["classes"])} classes, ISR '
            f'{metadata["isr_ratio"]}, {metadata["output"]}, images ' +
            (f'of {size}' if metadata['size'] else f'from {size} up') + ', any number at once',
            str(table),
            f'Compared on {len(shapes)} inputs of {checked}; {self.timing}.']
        unsteady = [row.name for row in self.rows if row.spread[1] > 1.5 * row.spread[0]]
        if unsteady:
            lines.append(f'The times of {"; ".join(unsteady)} are useless, because their ratio to '
                         'PyTorch differs too much from turn to turn: export again while nothing '
                         'else runs here, or with fewer --threads.')
        if metadata['output'] == 'labels':
            lines.append("Logits apart: where labels differ, PyTorch's logit of its own label less "
                         "that of the file's.")
        versions = [f'{name} {compat.version_of(name)}' for name in (
            'torch', 'onnx', 'onnxruntime', 'openvino', 'nncf') if compat.version_of(name)]
        return '\n'.join([*lines, *dict.fromkeys(self.notes), ', '.join(versions)])


@torch.no_grad()
def reference(deployed: Deployed, images: np.ndarray) -> np.ndarray:
    """Return what PyTorch predicts for the graph's input, in the same way as `Segmenter`."""
    model: Any = deployed.model
    size = images.shape[1:3]
    samples = [SegDataSample(metainfo=dict(img_shape=size, ori_shape=size)) for _ in images]
    data = model.data_preprocessor(dict(data_samples=samples, inputs=[
        torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy()) for image in images]), False)
    if not deployed.labels:
        return model._forward(data['inputs']).float().numpy()
    mode, model.test_cfg.mode = model.test_cfg.mode, 'whole'
    try:
        return torch.stack(model.predict_labels(**data)).numpy()
    finally:
        model.test_cfg.mode = mode


def compare(run: Run, deployed: Deployed, inputs: Sequence[np.ndarray]) -> Parity:
    """Run a file, and the model that it was made from, on batches of N x H x W x 3."""
    equal = pixels = 0
    difference = largest = 0.
    for images in inputs:
        wanted, got = reference(deployed, images), run(images)
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise ConfigError(f'it gives {got.dtype} of {got.shape} for images of {images.shape}, '
                              f'PyTorch {wanted.dtype} of {wanted.shape}')
        if not deployed.labels:
            far = np.abs(got.astype(np.float64) - wanted)
            # NaN is as far as can be, and max would pass over it in one order of the arguments.
            difference = max(difference, float(np.nan_to_num(far, nan=np.inf).max()))
            largest = max(largest, float(np.abs(wanted).max()))
            wanted, got = wanted.argmax(1), got.argmax(1)
        elif (got != wanted).any():
            with torch.no_grad():
                logits = deployed.full_logits(torch.from_numpy(images))
            largest = max(largest, float(logits.abs().max()))
            own, other = (logits.gather(1, torch.from_numpy(labels.astype(np.int64))[:, None].clamp(
                0, logits.shape[1] - 1)) for labels in (wanted, got))
            difference = max(difference, float((own - other).max()))
        equal += int((wanted == got).sum())
        pixels += wanted.size
    return Parity(equal / pixels, difference, difference / max(largest, 1e-30), tuple(
        (images.shape[0], images.shape[1], images.shape[2]) for images in inputs))


def trial_ratios(deployed: Deployed, fixed: ISRRatio) -> list[ISRRatio]:
    """Return the ratios at which a file is checked: the fixed one, or `TRIALS` that fit."""
    if not deployed.dials:
        return [fixed]
    uneven = '-'.join(','.join(islice(cycle('352'), sum(
        stage.startswith(kind) for stage in deployed.stages) or 1)) + ','
        for kind in ('encoder', 'decoder'))
    ratios = []
    for keys, queries in TRIALS:
        ratio = ISRRatio.parse(keys or uneven) if 'isr_ratio' in deployed.dials else fixed
        ratio = ratio.with_queries(queries if 'query_ratio' in deployed.dials else fixed.queries)
        with suppress(RatioError):
            multipliers(ratio, deployed.stages)
            ratios.append(ratio)
    return list(dict.fromkeys(ratios))


def settings_of(deployed: Deployed, ratio: ISRRatio) -> dict[str, Any]:
    """Return the arguments of `Exported` that set the ratios that are inputs."""
    values = dict(isr_ratio=ratio.with_queries(1), query_ratio=ratio.queries)
    return {name: values[name] for name in deployed.dials}


def check(path: Path, out: Path, deployed: Deployed, inputs: Sequence[np.ndarray],
          ratio: ISRRatio, *, int8: bool, least: float,
          load: Callable[[Path], Run]) -> tuple[Run, Parity]:
    """Load a file again and check its parity with PyTorch, at a ratio if that is its input.

    ``least`` is the share of PyTorch's labels that it must give.
    """
    try:
        run = partial(load(path), **settings_of(deployed, ratio))
        parity = compare(run, deployed, inputs)
    except UserError as error:
        raise ConfigError(f'{out} is not written: {error}') from error
    except Exception as error:  # of the runtime
        raise ConfigError(f'{out} is not written: its runtime cannot run it ({first_line(error)}). '
                          'Give one size with --size H,W, or try another --format') from error
    far = not int8 and not parity.relative <= (
        FARTHEST_OPEN if deployed.dials else math.inf if deployed.labels else FARTHEST)
    if far or not parity.equal >= least:
        raise ConfigError(
            f'{out} is not written: {"in int8 " if int8 else ""}it gives '
            f"{100 * parity.equal:.2f} % of PyTorch's labels, and at least "
            f'{100 * least:g} % are required; the largest difference of logits is '
            f'{parity.difference:.2g}. ' + (
                'Calibrate on more images, like those that the model will see, or export without '
                '--int8' if int8 else
                'Try another --format or one --size H,W, and please report this'))
    return run, parity


class TestImages:
    """Images on which a file is compared with PyTorch: of a folder, or the model's test set.

    The pipeline of the segmenter prepares them. At most ``samples`` of them are labelled.
    """
    __test__ = False  # no test of pytest

    def __init__(self, segmenter: Segmenter, model: Any, folder: str | Path | None,
                 samples: int) -> None:
        self.segmenter, self.samples = segmenter, samples
        self.notes: list[str] = []
        self.dataset = self._find_dataset(model)
        self.order = np.random.default_rng(0).permutation(len(self.dataset or ())).tolist()
        self.images: list[np.ndarray] = []
        if folder is not None:
            self.images = read_images(segmenter, folder, _CHECKED)
        elif self.dataset is not None:
            self.images = [_to_rgb(self.dataset[index]) for index in self.order[:_CHECKED]]
        if not self.images:
            print_log('There are no test images, so drawn ones are compared. Give some of your own '
                      'with --images FOLDER', logger='current', level=logging.WARNING)
            self.notes.append('The compared images are drawn, so they tell little about real ones.')
            self.images = [draw_scene(np.random.default_rng(i), _DRAWN)[0] for i in range(4)]

    def _find_dataset(self, model: Any) -> Any:
        """Return the test set of the model's config, or None where there is none, or no data."""
        if isinstance(model, torch.nn.Module):
            return None
        model = Path(model)
        config = next(iter(sorted(model.glob('*.py'))), None) if model.is_dir() else model
        if config is None or config.suffix != '.py':
            return None
        cfg = load_config(config)
        loader = cfg.get('test_dataloader') or cfg.get('val_dataloader')
        try:
            dataset = DATASETS.build(loader.dataset) if loader else ()
            return dataset if len(dataset) else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # any data set's own
            self.notes.append(f'The test set of {config} cannot be read: {first_line(error)}')
            return None

    def inputs(self, size: tuple[int, int] | None, minimum: tuple[int, int],
               open_ratio: bool = False) -> list[np.ndarray]:
        """Return batches of one image and of two; for an open size also of another, odd size.

        For a file whose ratio is an input, these are few, and one is as small as it can be.
        """
        images = [fit(image, size, minimum) for image in self.images]
        if size is None and any(one.shape != other.shape for one, other in zip(
                images, self.images)):
            self.notes.append('Smaller images were enlarged.')
        batches = [image[None] for image in images]
        height, width = images[0].shape[:2]

        def pair(sides: tuple[int, int]) -> np.ndarray:
            return np.stack([fit(images[i % len(images)], sides, minimum) for i in range(2)])

        batches.append(pair((height, width)))
        if size is None:
            other = max(minimum[0], 3 * height // 4 | 1), max(minimum[1], 4 * width // 5 | 1)
            both = pair((height + 20 | 1, width + 30 | 1) if other == (height, width) else other)
            batches += [both, both[:1]]
        if open_ratio:
            batches = [batches[0], batches[-2], pair(minimum)[:1]]
        return batches

    def areas(self, calls: dict[str, Run], size: tuple[int, int] | None,
              minimum: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return intersections and unions of each class by each call, N x 2 x C; {} unlabelled."""
        areas: dict[str, list[np.ndarray]] = {name: [] for name in calls}
        for index in self.order[:self.samples]:
            data = self.dataset[index]
            truth = data['data_samples'].get('gt_sem_seg')
            if truth is None:
                break
            truth = truth.data.squeeze().long()
            image = fit(_to_rgb(data), size, minimum)[None]
            for name, call in calls.items():
                areas[name].append(torch.stack(IoUMetric.intersect_and_union(
                    _to_labels(call(image), truth.shape), truth, len(self.segmenter.classes),
                    255)[:2]).numpy())
        if not areas['PyTorch']:
            self.notes.append('The mIoU of int8 is unknown, because there are no labelled test '
                              'images. Give a work dir or a config whose data is there.')
            return {}
        return {name: np.stack(parts) for name, parts in areas.items()}


def _to_labels(output: np.ndarray, size: tuple[int, int]) -> Tensor:
    if output.ndim == 4:
        return F.interpolate(torch.from_numpy(output), size, None, 'bilinear').argmax(1)[0]
    return F.interpolate(torch.from_numpy(output).float()[None], size)[0, 0].long()


def read_images(segmenter: Segmenter, source: str | Path, most: int) -> list[np.ndarray]:
    """Return up to ``most`` images, evenly chosen, as the model takes them: H x W x 3, RGB."""
    files = [file for file, _ in find_images(source)]
    chosen = np.unique(np.linspace(0, len(files) - 1, min(most, len(files))).astype(int))
    preprocessor = segmenter.model.data_preprocessor
    return [_to_rgb(segmenter.load(files[index])[1], preprocessor) for index in chosen]


def _to_rgb(data: dict[str, Any], preprocessor: Any = None) -> np.ndarray:
    """Return an image as a graph takes it, of what a pipeline gives: raw, BGR, or normalised."""
    inputs = data['inputs']
    if inputs.is_floating_point():
        inputs = (inputs * preprocessor.std + preprocessor.mean).round().clamp(0, 255).byte()
        if compat.swaps_channels(preprocessor):
            inputs = inputs.flip(0)
    return np.ascontiguousarray(inputs.numpy().transpose(1, 2, 0)[..., ::-1])


def fit(image: np.ndarray, size: tuple[int, int] | None, minimum: tuple[int, int]) -> np.ndarray:
    """Resize an image to the size of the file, or if that is open, to at least its minimum."""
    sides = image.shape[:2]
    height, width = size or (max(sides[0], minimum[0]), max(sides[1], minimum[1]))
    return image if (height, width) == sides else cv2.resize(image, (width, height))
