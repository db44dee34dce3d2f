"""How long a config's training images take on one core, step by step."""
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import FUNCTIONS, TRANSFORMS, init_default_scope
from PIL import Image
from prettytable import PrettyTable

from ..data.classification import check_library, is_classifier
from ..data.drawing import draw_scene
from ..errors import ConfigError

_DRAWN = 8
"""Different images; drawing one takes longer than reading it."""


def measure_pipeline(cfg: Config, size: tuple[int, int] | None = None,
                     images: int = 20) -> list[tuple[str, float]]:
    """Time each step of the training pipeline on drawn JPEG images, with PNG labels or a class.

    Runs on one thread, as a worker does, and counts the time of its core alone: other work on the
    machine and waiting for the disk are left out, and so is handing a batch over to the process
    that trains.

    Args:
        cfg: The config; of its training dataloader the pipeline, batch size and collate function.
        size: Height and width of the drawn images in pixels; by default those of ADE20K, about
            512x683, and for classifiers those of ImageNet, about 375x500, with as much grain as
            makes files of about 110 kB. Cityscapes has 1024x2048.
        images: How many images are timed.

    Returns:
        The name of each step and its mean time in milliseconds per image, then ``collate`` and
        ``total``; 1000 / total is the number of images per second and core.

    Raises:
        ConfigError: The config has no training pipeline.
    """
    if is_classifier(cfg):
        check_library()
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    loader: Any = cfg.get('train_dataloader') or {}
    dataset: Any = loader.get('dataset') or {}
    while 'pipeline' not in dataset and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset.get('dataset') or dataset['datasets'][0]
    if not dataset.get('pipeline'):
        raise ConfigError(f'{cfg.filename} has no train_dataloader.dataset.pipeline to be timed')
    steps = [TRANSFORMS.build(step) for step in dataset.pipeline]
    options = dict(loader.get('collate_fn') or {})
    kind = options.pop('type', pseudo_collate)
    collate = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
    grain = 18. if is_classifier(cfg) else 0.
    size = size or ((375, 500) if is_classifier(cfg) else (512, 683))
    seconds = np.zeros((images + 1, len(steps)))
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = [_draw(Path(folder), index, size, grain)
                     for index in range(min(_DRAWN, images))]
            count = min(loader.batch_size, images)
            samples: deque[Any] = deque(maxlen=count)  # frees memory as a worker does
            for image in range(-1, images):  # the first warms up, and is not counted
                sample = dict(files[image % len(files)], seg_fields=[], reduce_zero_label=False,
                              gt_label=0)
                for index, step in enumerate(steps):
                    start = time.thread_time()
                    sample = step(sample)
                    seconds[image, index] = time.thread_time() - start
                samples.append(sample)
            start = time.thread_time()
            collate(samples, **options)
            last = (time.thread_time() - start) / count
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    means = [*seconds[:images].mean(0), last]
    names = [*(step['type'] for step in dataset.pipeline), 'collate']
    return [(name, 1000 * mean) for name, mean in (*zip(names, means), ('total', sum(means)))]


def describe_pipelines(cfgs: Sequence[Config], size: tuple[int, int] | None = None,
                       images: int = 200, rounds: int = 5) -> str:
    """Measure pipelines in turn and say what they cost.

    Args:
        cfgs: The configs.
        size: Of the images, see `measure_pipeline`.
        images: How many images of each are timed.
        rounds: The configs take turns so often.

    Returns:
        A table of each config, and how many cores a GPU keeps busy.
    """
    measured = [[measure_pipeline(cfg, size, -(-images // rounds)) for cfg in cfgs]
                for _ in range(rounds)]
    parts = []
    for cfg, found in zip(cfgs, zip(*measured)):
        table = PrettyTable(['step of the training pipeline', 'ms per image', 'share'])
        table.align.update({'ms per image': 'r', 'share': 'r', table.field_names[0]: 'l'})
        times = np.mean([[ms for _, ms in each] for each in found], 0)
        for (name, _), ms in zip(found[0], times):
            table.add_row([name, f'{ms:.3f}', f'{ms / times[-1]:.0%}'])
        rate = 1000 / times[-1]
        parts += [str(cfg.filename), table.get_string(),
                  f'{rate:,.0f} images/s on one core: a GPU needs {1000 / rate:.1f} cores for '
                  'every 1,000 images/s that it trains at\n']
    parts.append('Drawn JPEG images, one thread, the time of its core alone: without waiting for '
                 'the disk and\nwithout handing batches over. num_workers is per GPU; the process '
                 'that trains needs a core besides.')
    return '\n'.join(parts)


def _draw(folder: Path, index: int, size: tuple[int, int], grain: float) -> dict[str, Any]:
    """Draw an image and its labels into a folder."""
    rng = np.random.default_rng(index)
    image, labels = draw_scene(rng, size)
    if grain:
        image = np.clip(image + rng.normal(0, grain, image.shape), 0, 255).astype(np.uint8)
    paths = dict(img_path=str(folder / f'{index}.jpg'), seg_map_path=str(folder / f'{index}.png'))
    Image.fromarray(image).save(paths['img_path'], quality=92)
    Image.fromarray(labels).save(paths['seg_map_path'])
    return paths
