"""Models of other libraries behind the interface of this package's segmentors.

A folder or a hub name of transformers or segmentation-models-pytorch, or a module in memory.
Loading and preprocessing are the library's own, and so are the labels: where it resizes logits and
takes the largest, `label_maps` makes the same ones without logits at full size.
"""
import importlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.datasets import ADE20KDataset, CityscapesDataset, COCOStuffDataset, PascalVOCDataset
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..compat import install_command
from ..engine.single_file import Description, name_classes
from ..errors import CheckpointError, ConfigError, UserError, first_line
from ..models.label_map import label_maps
from ..models.resize import Chain
from ..models.segformer_head import FusedSegformerHead

_DATASETS: tuple[Any, ...] = (ADE20KDataset, CityscapesDataset, COCOStuffDataset, PascalVOCDataset)
_MULTIPLE = 32  # pixels that sides are rounded up to where a processor is told the size
_IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_Parts = tuple['Foreign', dict[str, Any], Sequence[str]]  # a model, a step of the pipeline, classes


class Foreign(nn.Module):
    """A network of another library that predicts label maps as `StreamedEncoderDecoder` does.

    Args:
        network: Takes images, N x 3 x H x W, and returns logits, N x C x h x w, an object that
            holds them as ``logits``, or what ``post_process`` takes.
        divisor: Sides of images are padded to a multiple of it, with zeros.
        threshold: Of networks with one channel, the value above which a pixel is class 1.
        post_process: ``post_process_semantic_segmentation`` of models that predict masks.
        task: What OneFormer takes beside images, 1 x T.
        tile: Height and width of the tiles that images are cut into, side by side in the input.
        note: A sentence for people about what the network sees.
    """
    task: Tensor | None

    def __init__(self, network: nn.Module, *, divisor: int = 1, threshold: float = 0.,
                 post_process: Callable[..., Any] | None = None, task: Tensor | None = None,
                 tile: tuple[int, int] | None = None, note: str = '') -> None:
        super().__init__()
        self.network, self.divisor, self.threshold = network.eval(), divisor, threshold
        self.post_process, self.note = post_process, note
        self.register_buffer('task', task, persistent=False)
        self.test_cfg = dict(mode='slide', crop_size=tile, stride=tile) if tile else {}

    @property
    def backbone(self) -> nn.Module:
        """The network, as what takes the images."""
        return self.network

    def data_preprocessor(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Stack and pad images of one size, on the device and in the dtype of the network."""
        inputs = torch.stack(data['inputs']).to(next(self.network.parameters()))
        height, width = inputs.shape[2:]
        return dict(data, inputs=F.pad(
            inputs, (0, -width % self.divisor, 0, -height % self.divisor)))

    def forward(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None,
                mode: str = 'tensor', **features: Any) -> Any:
        """Return logits, or samples with label maps with ``mode='predict'``."""
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        if self.task is not None:
            features['task_inputs'] = self.task.expand(len(inputs), -1)
        output = self.network(inputs, **features)
        if self.post_process is not None:
            return output
        logits = getattr(output, 'logits', output)
        logits = logits[0] if isinstance(logits, tuple) else logits  # beside an image's classes
        return logits if logits.shape[1] > 1 else torch.cat(
            [torch.full_like(logits, self.threshold), logits], 1)

    def predict_labels(self, inputs: Tensor,
                       data_samples: list[SegDataSample] | None = None) -> list[Tensor]:
        """Predict label maps of the size of the images, uint8, or int16 beyond 256 classes.

        Without ``data_samples`` the size is that of the input.
        """
        size = inputs.shape[2], inputs.shape[3]
        metas = [sample.metainfo for sample in data_samples or ()] or [
            dict(ori_shape=size, img_shape=size)] * len(inputs)
        if self.post_process is None:
            return label_maps(self(inputs), [_chain(size, **meta) for meta in metas])
        network: Any = self.network
        dtype, maps = torch.uint8 if network.config.num_labels <= 256 else torch.int16, []
        for image, meta in zip(inputs, metas):
            features = {name: value.to(inputs.device) if isinstance(value, Tensor) else value
                        for name, value in meta.get('features', {}).items()}
            output = self(torch.stack(image.chunk(meta.get('tiles', 1), -1)), **features)
            labels = self.post_process(output, target_sizes=[tuple(meta['ori_shape'])])[0]
            maps.append(labels.to(dtype))
        return maps

    def predict(self, inputs: Tensor,
                data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """Predict label maps as ``pred_sem_seg`` of samples."""
        maps = self.predict_labels(inputs, data_samples)
        samples = data_samples or [SegDataSample() for _ in maps]
        for sample, labels in zip(samples, maps):
            sample.pred_sem_seg = PixelData(data=labels[None].long())
        return samples

    def test_step(self, data: dict[str, Any]) -> list[SegDataSample]:
        """Predict what a data loader gives."""
        return self.predict(**self.data_preprocessor(data))


def _chain(size: tuple[int, int], ori_shape: tuple[int, int], img_shape: tuple[int, int],
           **_: Any) -> Chain:
    """One resize of logits to the image; of padded inputs, after their padding is cropped."""
    padding = 0, size[1] - img_shape[1], 0, size[0] - img_shape[0]
    out = ori_shape[0], ori_shape[1]
    return Chain(size, padding, ori_shape=out) if any(padding) else Chain(out)


class Preprocess:
    """The last step of a pipeline: what a library's own preprocessing makes of an image.

    Args:
        processor: Called with ``images``, and ``size`` if it is not to choose the size itself.
        options: Further arguments of every call.
        short_side: The shorter side that images are resized to, with their ratio kept.
        max_side: Larger images are scaled down to so many pixels on the longer side.
        multiple: Sides are rounded up to a multiple of it, if the size is given.
    """

    def __init__(self, processor: Callable[..., Any], options: dict[str, Any] | None = None,
                 short_side: int | None = None, max_side: int | None = None,
                 multiple: int = 1) -> None:
        self.processor, self.options, self.multiple = processor, options or {}, multiple
        self.short_side, self.max_side = short_side, max_side

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a `Foreign` and the sample of an image, H x W x 3, BGR."""
        image = np.ascontiguousarray(results['img'][..., ::-1])
        shape, options = image.shape[:2], dict(self.options)
        max_side = self.max_side and results['max_side']
        if self.short_side or max_side:
            scale = min(self.short_side / min(shape) if self.short_side else 1.,
                        (max_side or math.inf) / max(shape))
            options['size'] = dict(zip(('height', 'width'), (
                max(1, -(-round(side * scale) // self.multiple)) * self.multiple
                for side in shape)))
        features = dict(self.processor(images=image, **options))
        tiles = features.pop('pixel_values')
        features.pop('task_inputs', None)  # which `Foreign` holds
        return dict(inputs=torch.cat(tuple(tiles), -1), data_samples=SegDataSample(metainfo=dict(
            img_path=results.get('img_path'), ori_shape=shape, img_shape=tuple(tiles.shape[2:]),
            features=features, tiles=len(tiles))))

    def normalisation(self) -> tuple[list[float], list[float], bool]:
        """Return mean and deviation of channels from 0 to 255, and whether they become BGR.

        Raises:
            ConfigError: The processor does more than resize, pad and normalise each channel.
        """
        def middle(*colour: int) -> Tensor:
            inputs = self(dict(img=np.full((64, 64, 3), colour[::-1], np.uint8)))['inputs']
            values: Tensor = inputs[:, inputs.shape[1] // 2, inputs.shape[2] // 2].double()
            return values

        black, is_bgr = middle(0, 0, 0), bool(middle(255, 0, 0)[0] == middle(0, 0, 0)[0])
        std = 255 / (middle(255, 255, 255) - black)
        mean = -black * std
        colour = torch.tensor([30., 90., 200.])
        expected = ((colour.flip(0) if is_bgr else colour) - mean) / std
        if not torch.allclose(middle(30, 90, 200), expected, atol=1e-4):
            raise ConfigError(f'the {type(self.processor).__name__} changes colours otherwise than '
                              'by a mean and a deviation of each channel, which a graph cannot '
                              'hold: export a model with another processor')
        return (mean + 0).tolist(), std.tolist(), is_bgr


class Normalisation:
    """A processor that only normalises, by mean and deviation of red, green and blue."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], input_space: str = 'RGB',
                 input_range: Sequence[float] = (0, 1)) -> None:
        scale = 255 / input_range[1]
        self.mean, self.std = (np.array(values, np.float32) * scale for values in (mean, std))
        self.step = -1 if input_space == 'BGR' else 1

    def __repr__(self) -> str:
        return f'{vars(self)}'

    def __call__(self, images: np.ndarray, size: dict[str, int] | None = None) -> dict[str, Tensor]:
        """Return ``pixel_values``, 1 x 3 x H x W, of an image, H x W x 3, uint8, RGB."""
        if size is not None and tuple(size.values()) != images.shape[:2]:
            images = cv2.resize(images, (size['width'], size['height']),
                                interpolation=cv2.INTER_AREA)
        values = (images[..., ::self.step] - self.mean) / self.std
        return dict(pixel_values=torch.from_numpy(values).permute(2, 0, 1)[None].float())


def load_foreign(model: str | nn.Module, *, classes: Sequence[str] | None = None,
                 mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                 keep_ratio: bool = False, max_side: int | None = None
                 ) -> tuple[Description, Foreign, str]:
    """Return the description of a model of another library, the model, and where it is from.

    Arguments are those of `Segmenter`.
    """
    given = model if isinstance(model, nn.Module) else None
    source = str(getattr(model, 'name_or_path', '') if given is not None else model)
    name = source or type(model).__name__
    settings = _read_config(source) if given is None else {}
    package = type(model).__module__.partition('.')[0] if given is not None else (
        'transformers' if 'model_type' in settings else 'segmentation_models_pytorch')
    if (given is None and mean is not None) or (
            package in ('transformers', 'segmentation_models_pytorch') and
            (mean is None) != (std is None)):
        raise ConfigError(f'{name}: mean= and std= go together, and are for a module in memory')
    try:
        if package == 'transformers' and source and mean is None:
            loaded, step, names = _load_transformers(source, given, settings, keep_ratio, max_side)
        else:
            loaded, step, names = _load_plain(given, source, package, classes is None,
                                              dict(mean=mean, std=std), max_side)
    except UserError:
        raise
    except ImportError as error:
        raise ConfigError(f'{name} needs {package}, which cannot be imported '
                          f'({first_line(error)}): {install_command("backbones")}') from error
    except Exception as error:  # of files that anyone may have written
        raise CheckpointError(f'{name} cannot be loaded by {package} ({first_line(error)}): check '
                              'that it is complete, as save_pretrained of the model and of its '
                              'processor writes it') from error
    if classes is not None and len(classes) != len(names):
        raise ConfigError(f'{name} predicts {len(names)} classes, and classes= names '
                          f'{len(classes)}')
    names = classes or names
    colours = next((known.METAINFO['palette'] for known in _DATASETS
                    if _are_same(known.METAINFO['classes'], names)), None)
    described = dict(type=type(loaded.network).__name__,
                     config=str(getattr(loaded.network, 'config', '')))
    return Description(described, [dict(type='LoadImageFromFile'), step],
                       *name_classes(names, colours, len(names))), loaded, name


def _read_config(name: str) -> dict[str, Any]:
    """Return the config.json of a folder or a hub name."""
    path = Path(name, 'config.json')
    try:
        if not path.exists():
            path = Path(importlib.import_module('huggingface_hub').hf_hub_download(
                name, 'config.json'))
        text = path.read_text(encoding='utf-8')
    except Exception as error:  # of the network and of whatever lies between
        raise CheckpointError(f'no such model: {name}: it is no folder or file here, and the hub '
                              f'does not give its config.json ({first_line(error)}): check the '
                              'name and the network, or give a folder with the files') from error
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f'{path} is damaged ({first_line(error)}): copy it again') from error


def _load_transformers(name: str, given: Any, settings: dict[str, Any], keep_ratio: bool,
                       max_side: int | None) -> _Parts:
    """Load a model of transformers, or take the given one, and its processor."""
    transformers: Any = importlib.import_module('transformers')
    kind = given.config.model_type if given is not None else settings['model_type']
    if kind not in transformers.CONFIG_MAPPING:
        own = 'asks for code of its own, which is never run' if 'auto_map' in settings else (
            f'is a {kind}, which transformers {transformers.__version__} does not know')
        raise CheckpointError(f'{name} {own}: give a model that transformers itself has')
    load = next((auto for auto in (transformers.AutoModelForSemanticSegmentation,
                                   transformers.AutoModelForUniversalSegmentation)
                 if transformers.CONFIG_MAPPING[kind] in auto._model_mapping), None)
    if load is None:
        raise CheckpointError(f'{name} is a {kind}, of which transformers has no model for '
                              'semantic segmentation: give another one')
    if Path(name).is_dir() and not any(Path(name, f'{file}_config.json').exists()
                                       for file in ('preprocessor', 'processor')):
        raise CheckpointError(f'{name} lacks preprocessor_config.json, which says how images are '
                              'resized and normalised: save the processor there, too')
    safe = dict(trust_remote_code=False)
    network = given
    if network is None:
        bars = transformers.logging
        with ExitStack() as stack:
            if Path(name).is_dir() and bars.is_progress_bar_enabled():  # a download keeps its bar
                bars.disable_progress_bar()
                stack.callback(bars.enable_progress_bar)
            network, info = load.from_pretrained(name, weights_only=True, output_loading_info=True,
                                                 ignore_mismatched_sizes=True, **safe)
        wrong = [str(key[0] if isinstance(key, tuple) else key)
                 for what in ('missing_keys', 'mismatched_keys') for key in info[what]]
        if wrong:
            raise CheckpointError(
                f'the weights of {name} are not those of a {type(network).__name__} with '
                f'{network.config.num_labels} classes: {min(wrong)} and {len(wrong) - 1} more are '
                'missing or of another size: give a model trained for segmentation, with its own '
                'config.json')
        network.float().eval()
    options: dict[str, Any] = dict(return_tensors='pt', input_data_format='channels_last')
    if kind == 'oneformer':
        processor = transformers.OneFormerProcessor.from_pretrained(name, **safe)
        options['task_inputs'] = ['semantic']
    else:
        processor = transformers.AutoImageProcessor.from_pretrained(name, **safe)
    images = getattr(processor, 'image_processor', processor)
    trial = processor(images=np.zeros((64, 128, 3), np.uint8), **options)
    try:
        with torch.no_grad():
            images.post_process_semantic_segmentation(
                network(**trial.to(network.device)), target_sizes=[(64, 128)])
    except Exception as error:  # of a class that does not expect this
        raise CheckpointError(f'the processor of {name}, a {type(images).__name__}, cannot make '
                              f'label maps of a {type(network).__name__} ({first_line(error)}): '
                              'give the preprocessor_config.json that the model was trained with'
                              ) from error
    count, _, height, width = trial['pixel_values'].shape
    step: dict[str, Any] = dict(type=Preprocess, processor=processor, options=options)
    names = [str(network.config.id2label[index]) for index in range(network.config.num_labels)]
    squeezes, note = count == 1 and width < 1.5 * height, ''
    if load is transformers.AutoModelForUniversalSegmentation:
        if max_side is not None or (keep_ratio and squeezes):
            raise ConfigError(f'{"keep_ratio" if max_side is None else f"max_side {max_side}"}: '
                              f'the processor of {name} chooses the size of images itself, since '
                              'the model predicts masks: leave it out, or change size in its '
                              'preprocessor_config.json')
        return Foreign(network, post_process=images.post_process_semantic_segmentation,
                       task=trial.get('task_inputs'),
                       tile=(height, width) if count > 1 else None), step, names
    if max_side is not None or (keep_ratio and squeezes):
        short = min(height, width) if keep_ratio else None
        step |= dict(short_side=short, max_side=max_side, multiple=_MULTIPLE,
                     options=options | dict(do_resize=True, do_center_crop=False))
        sides = [f'{short} pixels on the shorter side'] * bool(short) + [
            f'at most {max_side} on the longer one'] * bool(max_side)
        note = f'images keep their ratio, with {" and ".join(sides)}'
    elif squeezes:
        note = (f'its processor makes all images {width}x{height}, whatever their shape: '
                '--keep-ratio (keep_ratio) keeps it')
    if given is None and kind == 'segformer' and network.config.reshape_last_stage:
        network.decode_head = FusedSegformerHead.fold(network.decode_head)
    return Foreign(network, note=note), step, names


def _load_plain(given: Any, source: str, package: str, nameless: bool, norm: dict[str, Any],
                max_side: int | None) -> _Parts:
    """Load a model of segmentation-models-pytorch, or take a module that gives logits."""
    name, note, divisor, threshold = source or type(given).__name__, '', 1, 0.
    if package == 'segmentation_models_pytorch':
        smp: Any = importlib.import_module(package)
        given = smp.from_pretrained(source, encoder_weights=None) if given is None else given
        if given.requires_divisible_input_shape:
            divisor = given.encoder.output_stride
        threshold = 0.5 if given.config.get('activation') else 0.
        if norm['mean'] is None:
            try:
                norm = smp.encoders.get_preprocessing_params(given.config['encoder_name'])
            except (OSError, ValueError):
                norm, note = _IMAGENET, ("images are normalised as ImageNet's, because the "
                                         'settings of the encoder cannot be read')
    elif nameless or None in norm.values():
        raise ConfigError(f'{name} does not say its classes and how images are normalised: give '
                          'classes=, and mean= and std= of red, green and blue from 0 to 1; or the '
                          'name or folder that transformers loads it from')
    model = Foreign(given, divisor=divisor, threshold=threshold, note=note)
    with torch.no_grad():
        channels = model(next(given.parameters()).new_zeros(1, 3, 64, 64)).shape[1]
    names = ['background', 'foreground'] if channels == 2 else [
        f'class {index}' for index in range(channels)]
    return model, dict(type=Preprocess, processor=Normalisation(**norm), max_side=max_side), names


def _are_same(known: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether these are the classes of a data set, though some may be spelt otherwise."""
    one, other = ([name.partition(',')[0].strip().lower() for name in part]
                  for part in (known, names))
    return len(one) == len(other) and 2 * sum(map(str.__eq__, one, other)) > len(one)
