"""How long a config's pipeline takes for an image on one core, step by step."""
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
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
from ..data.transforms import without_checks
from ..errors import ConfigError

_DRAWN = 8
"""Different images; drawing one takes longer than reading it."""


def measure_pipeline(cfg: Config, size: tuple[int, int] | None = None, images: int = 20,
                     mode: str = 'train') -> list[tuple[str, float]]:
    """Time each step of a pipeline on drawn JPEG images, with PNG labels or a class.

    Runs in one thread, as a worker does, and counts the time of its core: waiting for the disk,
    other work on the machine and handing batches over are left out.

    Args:
        cfg: Config whose pipeline, batch size and collate function are used.
        size: Height and width of the drawn images in pixels; by default those of ADE20K, about
            512x683, and for classifiers those of ImageNet, about 375x500, with as much grain as
            makes files of about 110 kB.
        images: Number of timed images.
        mode: 'train', or 'eval' for the test pipeline without labels.

    Returns:
        The name of each step and its mean time in milliseconds per image, then ``collate`` and
        ``total``.

    Raises:
        ConfigError: The config has no such pipeline, or it does not load an image.
    """
    if is_classifier(cfg):
        check_library()
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    name = 'test_dataloader' if mode == 'eval' else 'train_dataloader'
    loader: Any = cfg.get(name) or {}
    dataset: Any = loader.get('dataset') or {}
    while 'pipeline' not in dataset and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset.get('dataset') or dataset['datasets'][0]
    types = [without_checks(step)['type'] for step in dataset.get('pipeline') or ()]
    if 'LoadImageFromFile' not in types:
        raise ConfigError(f'{cfg.filename} has no {name}.dataset.pipeline that loads images')
    first = types.index('LoadImageFromFile')
    pipeline = [step for name, step in zip(types[first:], dataset.pipeline[first:])
                if mode == 'train' or name != 'LoadAnnotations']
    steps = [TRANSFORMS.build(step) for step in pipeline]
    options = dict(loader.get('collate_fn') or {})
    kind = options.pop('type', pseudo_collate)
    collate = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
    seconds = np.zeros((images + 1, len(steps)))
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(cv2.setNumThreads, cv2.getNumThreads())
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        size = size or ((375, 500) if is_classifier(cfg) else (512, 683))
        files = [draw_files(folder, index, size, 18. if is_classifier(cfg) else 0.)
                 for index in range(min(_DRAWN, images))]
        count = min(loader.batch_size, images)
        samples: deque[Any] = deque(maxlen=count)  # frees memory as a worker does
        for image in range(-1, images):  # the first warms up, and is not counted
            sample = dict(files[image % len(files)], seg_fields=[], reduce_zero_label=False,
                          label_map=None, gt_label=0)
            for index, step in enumerate(steps):
                start = time.thread_time()
                sample = step(sample)
                seconds[image, index] = time.thread_time() - start
            samples.append(sample)
        start = time.thread_time()
        collate(samples, **options)
        means = [*seconds[:images].mean(0), (time.thread_time() - start) / count]
    names = [*(step['type'] for step in pipeline), 'collate', 'total']
    return [(name, 1000 * mean) for name, mean in zip(names, (*means, sum(means)))]


def describe_pipelines(cfgs: Sequence[Config], size: tuple[int, int] | None = None,
                       images: int = 200, rounds: int = 5) -> str:
    """Measure training pipelines in turn; return their tables, and how many cores a GPU needs."""
    measured = [[measure_pipeline(cfg, size, -(-images // rounds)) for cfg in cfgs]
                for _ in range(rounds)]
    parts = []
    for cfg, turns in zip(cfgs, zip(*measured)):
        table = PrettyTable(['step of the training pipeline', 'ms per image', 'share'], align='r')
        table.align[table.field_names[0]] = 'l'
        times = np.mean([[ms for _, ms in turn] for turn in turns], 0)
        for (name, _), ms in zip(turns[0], times):
            table.add_row([name, f'{ms:.3f}', f'{ms / times[-1]:.0%}'])
        rate = 1000 / times[-1]
        parts += [str(cfg.filename), table.get_string(),
                  f'{rate:,.0f} images/s on one core: a GPU needs {1000 / rate:.1f} cores for '
                  'every 1,000 images/s that it trains at\n']
    parts.append('Drawn JPEG images in one thread, counted by the time of its core: without '
                 'waiting for the disk\nand without handing batches over. num_workers is per GPU; '
                 'the training process needs a core too.')
    return '\n'.join(parts)


def draw_files(folder: Path, index: int, size: tuple[int, int], grain: float = 0.
               ) -> dict[str, Any]:
    """Draw a JPEG image and its labels, of two classes, into a folder."""
    rng = np.random.default_rng(index)
    image, labels = draw_scene(rng, size)
    if grain:
        image = np.clip(image + rng.normal(0, grain, image.shape), 0, 255).astype(np.uint8)
    paths = dict(img_path=str(folder / f'{index}.jpg'), seg_map_path=str(folder / f'{index}.png'))
    Image.fromarray(image).save(paths['img_path'], quality=92)
    Image.fromarray(labels % 2).save(paths['seg_map_path'])
    return paths
