"""How long a config's training images take on one core, step by step."""
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import FUNCTIONS, init_default_scope
from mmseg.registry import TRANSFORMS
from PIL import Image

from ..data.synthetic import draw_scene

_DRAWN = 8
"""Different images; drawing one takes longer than reading it."""


def measure_pipeline(cfg: Config, size: tuple[int, int] = (512, 683),
                     images: int = 20) -> list[tuple[str, float]]:
    """Time each step of the training pipeline on drawn JPEG images with PNG labels.

    Runs on one thread, as a worker does, and counts the time of its core alone: other work on the
    machine and waiting for the disk are left out, and so is handing a batch over to the process
    that trains.

    Args:
        cfg: The config; of its training dataloader the pipeline, batch size and collate function.
        size: Height and width of the drawn images in pixels; those of ADE20K are about 512x683,
            those of Cityscapes 1024x2048.
        images: How many images are timed.

    Returns:
        The name of each step and its mean time in milliseconds per image, then ``collate`` and
        ``total``; 1000 / total is the number of images per second and core.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    loader = cfg.train_dataloader
    steps = [TRANSFORMS.build(step) for step in loader.dataset.pipeline]
    options = dict(loader.get('collate_fn') or {})
    kind = options.pop('type', pseudo_collate)
    collate = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
    seconds = np.zeros((images + 1, len(steps)))
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = [_draw(Path(folder), index, size) for index in range(min(_DRAWN, images))]
            count = min(loader.batch_size, images)
            samples: deque[Any] = deque(maxlen=count)  # frees memory as a worker does
            for image in range(-1, images):  # the first warms up, and is not counted
                sample = dict(files[image % len(files)], seg_fields=[], reduce_zero_label=False)
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
    names = [*(step['type'] for step in loader.dataset.pipeline), 'collate']
    return [(name, 1000 * mean) for name, mean in (*zip(names, means), ('total', sum(means)))]


def _draw(folder: Path, index: int, size: tuple[int, int]) -> dict[str, Any]:
    """Draw an image and its labels into a folder."""
    image, labels = draw_scene(np.random.default_rng(index), size)
    paths = dict(img_path=str(folder / f'{index}.jpg'), seg_map_path=str(folder / f'{index}.png'))
    Image.fromarray(image).save(paths['img_path'], quality=92)
    Image.fromarray(labels).save(paths['seg_map_path'])
    return paths
