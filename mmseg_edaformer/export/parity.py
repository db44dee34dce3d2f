"""What a written file is compared with PyTorch on, and what was found."""
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dataset import Compose
from mmengine.logging import print_log
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample
from prettytable import PrettyTable
from torch import Tensor

from ..data.drawing import draw_scene
from ..engine.run_config import load_config
from ..errors import ConfigError, UserError
from ..predict.inputs import find_images
from ..predict.segmenter import Segmenter
from .graph import Deployed
from .runtimes import OPENVINO, Exported, Run

LEAST_EQUAL = {False: 0.999, True: 0.9}
"""The share of PyTorch's labels that a file, in int8 or not, must give: less is not written."""
FARTHEST = 0.01
"""How far a logit may be from PyTorch's, of the largest one; not in int8."""
UNSTEADY = 1.5
"""A ratio of times whose upper quartile is this many times the lower one says nothing."""

_CHECKED = 8
_DRAWN = (360, 480)


@dataclass(frozen=True)
class Agreement:
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
class Row:
    """One way to predict: its agreement with PyTorch, milliseconds of an image, their median ratio
    to PyTorch's in the same turn, the lower and the upper quartile of that ratio (``spread``), and
    the mIoU in percent, where there are labelled images."""
    name: str
    agreement: Agreement | None
    ms: float
    relative: float
    spread: tuple[float, float]
    miou: float | None


@dataclass(frozen=True)
class Report:
    """What `export` found of the file that it wrote."""
    path: Path
    metadata: dict[str, Any]
    rows: tuple[Row, ...]
    timed: tuple[int, int]
    labelled: int
    threads: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        told = self.metadata
        table = PrettyTable(['', 'labels equal', 'logits apart', 'ms', 'time', 'mIoU'], align='r')
        table.align[''] = 'l'
        for row in self.rows:
            near = row.agreement
            table.add_row([row.name, '' if near is None else f'{100 * near.equal:.4f} %',
                           '' if near is None else f'{near.difference:.2g}', f'{row.ms:.1f}',
                           f'x {row.relative:.3g}' + (
                               f' ({row.spread[0]:.3g} to {row.spread[1]:.3g})' if near else ''),
                           '' if row.miou is None else f'{row.miou:.2f}'])
        if all(row.miou is None for row in self.rows):
            table.del_column('mIoU')
        shapes = next(row.agreement.inputs for row in self.rows if row.agreement)
        checked = ', '.join(f'{n}x{h}x{w}' for n, h, w in dict.fromkeys(shapes))
        unsteady = [row.name for row in self.rows if row.spread[1] > UNSTEADY * row.spread[0]]
        size = told['size'] and 'x'.join(map(str, told['size']))
        return '\n'.join([
            f'{self.path} ({_megabytes(self.path):.1f} MB): {len(told["classes"])} classes, ISR '
            f'{told["isr_ratio"]}, {told["output"]}, ' +
            (f'images of {size}' if size else
             f'images from {"x".join(map(str, told["minimum"]))} up') + ', any number at once',
            str(table),
            f'Compared on {len(shapes)} inputs of {checked}; times of 1x{self.timed[0]}x'
            f'{self.timed[1]} in turn (with quartiles), {self.threads} '
            f'thread{"s" if self.threads > 1 else ""}' +
            (f'; mIoU of {self.labelled} labelled images' if self.labelled else '') + '.',
            *([f'The times of {" and ".join(unsteady)} say nothing: their ratio to PyTorch differs '
               'too much from turn to turn. Export again while nothing else runs here, or with '
               'fewer --threads.'] if unsteady else ()),
            *(() if told['output'] == 'logits' else (
                "Logits apart: PyTorch's of its own label and of the file's, where they differ.",)),
            *self.notes, _versions()])


@torch.no_grad()
def reference(deployed: Deployed, images: np.ndarray) -> np.ndarray:
    """What PyTorch predicts, by the way that `Segmenter` takes, from the graph's input."""
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


def compare(run: Run, deployed: Deployed, inputs: Sequence[np.ndarray]) -> Agreement:
    """Run a file and PyTorch on the same images.

    Args:
        run: The file.
        deployed: The model that it was made from.
        inputs: Images, each N x H x W x 3.
    """
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
            count = logits.shape[1]
            own, other = (logits.gather(1, torch.from_numpy(found.astype(np.int64))[:, None].clamp(
                0, count - 1)) for found in (wanted, got))
            difference = max(difference, float((own - other).max()))
        equal += int((wanted == got).sum())
        pixels += wanted.size
    return Agreement(equal / pixels, difference, difference / max(largest, 1e-30), tuple(
        (images.shape[0], images.shape[1], images.shape[2]) for images in inputs))


def check(path: Path, out: Path, deployed: Deployed, inputs: Sequence[np.ndarray],
           int8: bool) -> tuple[Run, Agreement]:
    """Load a file again and see that it predicts as PyTorch does.

    Raises:
        ConfigError: It does not.
    """
    try:
        run = Exported(path)
        found = compare(run, deployed, inputs)
    except UserError as error:
        raise ConfigError(f'{out} is not written: {error}') from error
    except Exception as error:  # of the runtime
        raise ConfigError(f'{out} is not written: its runtime cannot run it ('
                          f'{(str(error).strip() or repr(error)).splitlines()[0][:200]}). Give one '
                          'size with --size H,W, or try another --format') from error
    far = not int8 and not deployed.labels and not found.relative <= FARTHEST
    if far or not found.equal >= LEAST_EQUAL[int8]:
        raise ConfigError(
            f'{out} is not written: {"in int8 " if int8 else ""}it gives {100 * found.equal:.2f} % '
            f"of PyTorch's labels (at least {100 * LEAST_EQUAL[int8]:g} % are wanted), the largest "
            f'difference of logits is {found.difference:.2g}. ' + (
                'Calibrate on more images, like those that it will see, or export without --int8'
                if int8 else 'Try another --format or one --size H,W, and please report this'))
    return run, found


class Pictures:
    """What a file is compared on.

    Args:
        segmenter: Whose pipeline makes pictures ready.
        model: As given to `export`: its config names a test set.
        folder: Pictures to compare on instead.
        samples: Labelled images at most.
    """

    def __init__(self, segmenter: Segmenter, model: Path, folder: str | Path | None,
                 samples: int) -> None:
        self.segmenter, self.samples = segmenter, samples
        self.notes: list[str] = []
        self.set = _test_set(model)
        self.images: list[np.ndarray] = []
        if folder is not None:
            self.images = read_images(segmenter, folder, _CHECKED)
        elif self.set is not None:
            self.images = [_rgb(self.set[index]) for index in self._order(_CHECKED)]
        if not self.images:
            _warn('There are no test images: compared on drawn ones. Give some of your own with '
                  '--images FOLDER')
            self.notes.append('The images are drawn: what is compared says little of real ones.')
            self.images = [draw_scene(np.random.default_rng(i), _DRAWN)[0] for i in range(4)]

    def _order(self, count: int) -> list[int]:
        assert self.set is not None
        order = np.random.default_rng(0).permutation(len(self.set))
        return [int(index) for index in order[:count]]

    def inputs(self, size: tuple[int, int] | None,
               minimum: tuple[int, int]) -> list[np.ndarray]:
        """One image at a time and two, where the size is open also of another, ragged one."""
        images = [fit(image, size, minimum) for image in self.images]
        if size is None and any(one.shape != other.shape for one, other in zip(
                images, self.images)):
            self.notes.append('Smaller images were enlarged.')
        height, width = images[0].shape[:2]
        other = max(minimum[0], 3 * height // 4 | 1), max(minimum[1], 4 * width // 5 | 1)
        if other == (height, width):
            other = height + 20 | 1, width + 30 | 1
        found = [image[None] for image in images]
        for sides in ((height, width), *(() if size else (other,))):
            pair = [fit(images[i % len(images)], sides, minimum) for i in range(2)]
            found += [np.stack(pair), *(() if sides == (height, width) else (pair[0][None],))]
        return found

    def areas(self, calls: dict[str, Run], size: tuple[int, int] | None,
              minimum: tuple[int, int]) -> dict[str, np.ndarray]:
        """Intersections and unions of each class by each call, N x 2 x C; none without labels."""
        classes = len(self.segmenter.classes)
        found: dict[str, list[np.ndarray]] = {name: [] for name in calls}
        for index in self._order(self.samples) if self.set is not None else ():
            data = self.set[index]
            truth = data['data_samples'].get('gt_sem_seg')
            if truth is None:
                break
            truth = truth.data.squeeze()
            image = fit(_rgb(data), size, minimum)[None]
            for name, call in calls.items():
                got = call(image)
                labels = _labels(got, (truth.shape[0], truth.shape[1]))
                found[name].append(np.stack([each.numpy() for each in (
                    IoUMetric.intersect_and_union(labels, truth.long(), classes, 255)[:2])]))
        if not found['PyTorch']:
            self.notes.append('What int8 costs in mIoU is not known: there are no labelled test '
                              'images. Give a work dir or a config whose data is there.')
            return {}
        return {name: np.stack(each) for name, each in found.items()}


def _labels(found: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Labels of one image at a size, from labels or from logits."""
    if found.ndim == 4:
        return F.interpolate(torch.from_numpy(found), size, None, 'bilinear').argmax(1)[0]
    return F.interpolate(torch.from_numpy(found).float()[None], size)[0, 0].long()


def _test_set(model: Path) -> Any:
    """The test set of the config that is meant, or None where there is none, or no data."""
    config = next(iter(sorted(model.glob('*.py'))), None) if model.is_dir() else model
    if config is None or config.suffix != '.py':
        return None
    cfg = load_config(config)
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    if not loader:
        return None
    try:
        found = DATASETS.build(loader.dataset)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if len(found) else None


def read_images(segmenter: Segmenter, source: str | Path, most: int) -> list[np.ndarray]:
    """Pictures of a folder as the model takes them, H x W x 3, RGB; so many of them, evenly."""
    files = [file for file, _ in find_images(source)]
    ready = Compose(segmenter.description.pipeline)
    chosen = np.unique(np.linspace(0, len(files) - 1, min(most, len(files))).astype(int))
    return [_rgb(ready(dict(img_path=str(files[index])))) for index in chosen]


def _rgb(data: dict[str, Any]) -> np.ndarray:
    """The image of a packed sample, 3 x H x W and BGR, as H x W x 3 and RGB."""
    return np.ascontiguousarray(data['inputs'].numpy().transpose(1, 2, 0)[..., ::-1])


def fit(image: np.ndarray, size: tuple[int, int] | None, minimum: tuple[int, int]) -> np.ndarray:
    """An image at the size of the file, or where that is open at least as large as it must be."""
    sides = image.shape[:2]
    height, width = size or (max(sides[0], minimum[0]), max(sides[1], minimum[1]))
    return image if (height, width) == sides else cv2.resize(image, (width, height))


def _megabytes(path: Path) -> float:
    weights = path.with_suffix('.bin')
    return (path.stat().st_size + (weights.stat().st_size if path.suffix == OPENVINO
                                   else 0)) / 1e6


def _versions() -> str:
    found = []
    for name in ('torch', 'onnx', 'onnxruntime', 'openvino', 'nncf'):
        with suppress(metadata.PackageNotFoundError):
            found.append(f'{name} {metadata.version(name)}')
    return ', '.join(found)


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)
