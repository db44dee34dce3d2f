"""Models of other libraries behind the interface of this package's segmentors.

A folder or a hub name of transformers or segmentation-models-pytorch, or a module in memory.
Loading and preprocessing are the library's own, and so are the labels: where it resizes logits and
takes the largest, `label_maps` makes the same ones without logits at full size.
"""
import importlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
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


class Foreign(nn.Module):
    """A network of another library that predicts label maps as `StreamedEncoderDecoder` does.

    Args:
        network: Takes images, N x 3 x H x W, and returns logits, N x C x h x w, or an object that
            holds them as ``logits``, or whatever ``post_process`` takes.
        direct: Whether logits are resized to the image at once, as transformers does, and not to
            the network's input first.
        divisor: Sides of images are padded to a multiple of it, with zeros.
        threshold: Of networks with one channel, the value above which a pixel is class 1.
        post_process: ``post_process_semantic_segmentation`` of models that predict masks.
        task: Second argument of the network, which OneFormer takes, 1 x T.
        tile: Height and width of the tiles that images are cut into, side by side in the input.
        note: A sentence for people about what the network sees.
    """

    task: Tensor | None

    def __init__(self, network: nn.Module, *, direct: bool = False, divisor: int = 1,
                 threshold: float = 0., post_process: Callable[..., Any] | None = None,
                 task: Tensor | None = None, tile: tuple[int, int] | None = None,
                 note: str = '') -> None:
        super().__init__()
        self.network, self.direct, self.divisor = network, direct, divisor
        self.threshold, self.post_process, self.note = threshold, post_process, note
        self.register_buffer('task', task, persistent=False)
        self.test_cfg = dict(mode='slide', crop_size=tile, stride=tile) if tile else {}

    @property
    def backbone(self) -> nn.Module:
        """The network, as what takes the images."""
        return self.network

    def data_preprocessor(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Stack and pad images of one size, on the device of the network."""
        inputs = torch.stack(data['inputs']).to(next(self.network.parameters()).device)
        height, width = inputs.shape[2:]
        padded = F.pad(inputs, (0, -width % self.divisor, 0, -height % self.divisor))
        return dict(data, inputs=padded)

    def forward(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None,
                mode: str = 'tensor') -> Any:
        """Return logits, or label maps in samples with ``mode='predict'``."""
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        output = self._run(inputs)
        logits = getattr(output, 'logits', output)
        if isinstance(logits, tuple):  # with the classes of the whole image
            logits = logits[0]
        if isinstance(logits, Tensor) and logits.shape[1] == 1:
            logits = torch.cat([torch.full_like(logits, self.threshold), logits], 1)
        return logits

    def _run(self, inputs: Tensor, **features: Any) -> Any:
        if self.task is not None:
            features['task_inputs'] = self.task.expand(len(inputs), -1)
        return self.network(inputs.to(next(self.network.parameters()).dtype), **features)

    def predict_labels(self, inputs: Tensor,
                       data_samples: list[SegDataSample] | None = None) -> list[Tensor]:
        """Predict label maps H x W of the size of the images, uint8, or int16 beyond 256 classes.

        Without ``data_samples`` the size is that of the input.
        """
        size = inputs.shape[2], inputs.shape[3]
        metas = [sample.metainfo for sample in data_samples or ()] or [
            dict(ori_shape=size, img_shape=size)] * len(inputs)
        if self.post_process is None:
            chains = [self._chain(size, meta) for meta in metas]
            return label_maps(self(inputs), chains)
        maps = []
        for image, meta in zip(inputs, metas):
            features = {name: value.to(inputs.device) if isinstance(value, Tensor) else value
                        for name, value in meta.get('features', {}).items()}
            tiles = torch.stack(image.chunk(meta.get('tiles', 1), -1))
            labels = self.post_process(self._run(tiles, **features),
                                       target_sizes=[tuple(meta['ori_shape'])])[0]
            maps.append(labels.to(torch.uint8 if labels.max() < 256 else torch.int16))
        return maps

    def _chain(self, size: tuple[int, int], meta: dict[str, Any]) -> Chain:
        out, (height, width) = tuple(meta['ori_shape']), meta['img_shape']
        if self.direct:
            return Chain(out)
        padding = 0, size[1] - width, 0, size[0] - height
        return Chain(size, padding, ori_shape=None if out == (height, width) else out)

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
        size = image.shape[:2]
        options = dict(self.options)
        if self.short_side or self.max_side:
            scale = self.short_side / min(size) if self.short_side else 1.
            scale = min(scale, (self.max_side or math.inf) / max(size))
            height, width = (max(1, math.ceil(round(side * scale) / self.multiple)) * self.multiple
                             for side in size)
            options['size'] = dict(height=height, width=width)
        features = dict(self.processor(images=image, **options))
        tiles = features.pop('pixel_values')
        features.pop('task_inputs', None)  # which `Foreign` holds
        sample = SegDataSample(metainfo=dict(
            img_path=results.get('img_path'), ori_shape=size, img_shape=tuple(tiles.shape[2:]),
            features=features, tiles=len(tiles)))
        return dict(inputs=torch.cat(tuple(tiles), -1), data_samples=sample)


class Normalisation:
    """Images with the mean and deviation of a network, each of values from 0 to 1, in RGB."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], input_space: str = 'RGB',
                 input_range: Sequence[float] = (0, 1)) -> None:
        scale = 255 / input_range[1]
        self.mean, self.std = (np.array(values, np.float32) * scale for values in (mean, std))
        self.channels = slice(None, None, -1 if input_space == 'BGR' else 1)

    def __repr__(self) -> str:
        return f'{vars(self)}'

    def __call__(self, images: np.ndarray, size: dict[str, int] | None = None) -> dict[str, Tensor]:
        """Return ``pixel_values``, 1 x 3 x H x W, of an image, H x W x 3, uint8, RGB."""
        if size is not None and (size['height'], size['width']) != images.shape[:2]:
            images = cv2.resize(images, (size['width'], size['height']),
                                interpolation=cv2.INTER_AREA)
        values = (images[..., self.channels] - self.mean) / self.std
        return dict(pixel_values=torch.from_numpy(values).permute(2, 0, 1)[None].float())


def load_foreign(model: str | nn.Module, *, classes: Sequence[str] | None = None,
                 mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                 keep_ratio: bool = False, max_side: int | None = None
                 ) -> tuple[Description, Foreign, str]:
    """Return the description of a model of another library, the model, and where it is from."""
    if isinstance(model, nn.Module):
        package = type(model).__module__.partition('.')[0]
        source: Any = getattr(model, 'name_or_path', None)
        given: Any = model
        name = source or type(model).__name__
    else:
        name = source = model
        given, settings = None, _read_config(model)
        package = ('transformers' if 'model_type' in settings else
                   'segmentation_models_pytorch' if '_model_class' in settings else '')
        if not package:
            raise CheckpointError(f'{name} cannot be loaded: its config.json names neither a '
                                  'model_type, as transformers writes it, nor a _model_class, as '
                                  'segmentation-models-pytorch does: save it with save_pretrained')
    with _loading(name, package):
        if package == 'transformers' and source and mean is None:
            network, step, names, settings = _load_transformers(source, given, keep_ratio, max_side)
        else:
            network, step, names, settings = _load_plain(
                given, source, package, classes, mean, std, max_side)
    names = classes or names
    colours = next((known.METAINFO['palette'] for known in _DATASETS
                    if _are_same(known.METAINFO['classes'], names)), None)
    described = name_classes(names, colours, len(names))
    reading = dict(type='LoadImageFromFile')
    return Description(settings, [reading, step], *described), network.eval(), name


def _read_config(name: str) -> dict[str, Any]:
    """Return the config.json of a folder or a hub name."""
    path = Path(name, 'config.json')
    try:
        if not path.exists():
            path = Path(importlib.import_module('huggingface_hub').hf_hub_download(
                name, 'config.json'))
        settings = json.loads(path.read_text(encoding='utf-8'))
    except ImportError as error:
        raise ConfigError(f'no such model: {name}: give a folder or a file; names of the hub need '
                          f'transformers: {install_command("backbones")}') from error
    except Exception as error:  # of the network and of whatever lies between
        raise CheckpointError(f'no such model: {name}: it is no folder or file here, and the hub '
                              f'does not give its config.json ({first_line(error)}): check the '
                              'name and the network, or give a folder with the files') from error
    return settings if isinstance(settings, dict) else {}


@contextmanager
def _loading(name: str, package: str) -> Iterator[None]:
    """Turn what a library raises into one error that names the model."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise ConfigError(f'{name} needs {package}, which cannot be imported '
                          f'({first_line(error)}): {install_command("backbones")}') from error
    except Exception as error:  # of files that anyone may have written
        raise CheckpointError(f'{name} cannot be loaded by {package} ({first_line(error)}): check '
                              'that it is complete, as save_pretrained of the model and of its '
                              'processor writes it') from error


def _load_transformers(name: str, given: Any, keep_ratio: bool, max_side: int | None
                       ) -> tuple[Foreign, dict[str, Any], Sequence[str], dict[str, Any]]:
    """Load a model of transformers, or take the given one, and its processor."""
    transformers: Any = importlib.import_module('transformers')
    safe = dict(trust_remote_code=False)
    config_type = _read_type(transformers, name) if given is None else type(given.config)
    kinds = (transformers.AutoModelForSemanticSegmentation,
             transformers.AutoModelForUniversalSegmentation)
    kind = next((kind for kind in kinds if config_type in kind._model_mapping), None)
    if kind is None:
        raise CheckpointError(f'{name} is a {config_type.model_type}, of which transformers has no '
                              'model for semantic segmentation: give another one')
    if Path(name).is_dir() and not any(Path(name, f'{file}_config.json').exists()
                                       for file in ('preprocessor', 'processor')):
        raise CheckpointError(f'{name} lacks preprocessor_config.json, which says how images are '
                              'resized and normalised: save the processor there, too')
    config = given.config if given is not None else transformers.AutoConfig.from_pretrained(
        name, **safe)
    network = given
    if network is None:
        with _silent(transformers):
            network, info = kind.from_pretrained(
                name, config=config, weights_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **safe)
        wrong = sorted(str(key[0]) if isinstance(key, tuple) else key for what in (
            'missing_keys', 'mismatched_keys') for key in info[what])
        if wrong:
            raise CheckpointError(
                f'the weights of {name} are not those of a {type(network).__name__} with '
                f'{config.num_labels} classes: {", ".join(wrong[:3])}{", ..." * (len(wrong) > 3)} '
                'are missing or of another size: give a model trained for segmentation, with its '
                'own config.json')
    is_oneformer = config.model_type == 'oneformer'
    load = transformers.OneFormerProcessor if is_oneformer else transformers.AutoImageProcessor
    processor = load.from_pretrained(name, **safe)
    image_processor = processor.image_processor if is_oneformer else processor
    post_process = None if kind is kinds[0] else image_processor.post_process_semantic_segmentation
    _check_processor(name, image_processor, network, config.num_labels)
    options: dict[str, Any] = dict(return_tensors='pt', input_data_format='channels_last')
    if is_oneformer:
        options['task_inputs'] = ['semantic']
    probe = dict(processor(images=np.zeros((64, 128, 3), np.uint8), **options))
    tiles = probe['pixel_values']
    height, width = tiles.shape[2:]
    squeezes = len(tiles) == 1 and width < 1.5 * height
    step: dict[str, Any] = dict(type=Preprocess, processor=processor, options=options)
    note = ''
    if post_process is not None and max_side is not None:
        raise ConfigError(f'max_side {max_side}: the processor of {name} chooses the size of '
                          'images itself, for the masks that the model predicts: leave max_side '
                          'out, or change size in its preprocessor_config.json')
    if post_process is None and (max_side is not None or (keep_ratio and squeezes)):
        short = min(height, width) if keep_ratio else None
        step |= dict(short_side=short, max_side=max_side, multiple=_MULTIPLE,
                     options=options | dict(do_resize=True, do_center_crop=False))
        note = 'images keep their ratio' + (
            f', with {short} pixels on the shorter side' if short else '') + (
            f', {"and " if short else ""}at most {max_side} on the longer one' if max_side else '')
    elif post_process is None and squeezes:
        note = (f'its processor makes all images {width}x{height}, whatever their shape: '
                '--keep-ratio (keep_ratio) keeps it')
    network.float()
    if given is None and config.model_type == 'segformer' and config.reshape_last_stage:
        network.decode_head = FusedSegformerHead.fold(network.decode_head)
    model = Foreign(network, direct=True, post_process=post_process, note=note,
                    task=probe.get('task_inputs'),
                    tile=(height, width) if len(tiles) > 1 else None)
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    return model, step, names, dict(type=type(network).__name__, config=config.to_json_string())


def _read_type(transformers: Any, name: str) -> Any:
    """Return the class of the configuration of a model whose code transformers has."""
    settings = _read_config(name)
    if settings['model_type'] not in transformers.CONFIG_MAPPING:
        own = 'asks for code of its own, which is never run' if 'auto_map' in settings else (
            f'is a {settings["model_type"]}, which transformers {transformers.__version__} does '
            'not know')
        raise CheckpointError(f'{name} {own}: give a model that transformers itself has')
    return transformers.CONFIG_MAPPING[settings['model_type']]


def _check_processor(name: str, processor: Any, network: nn.Module, classes: int) -> None:
    """Have a processor post-process an output such as the network's, which another kind cannot."""
    output = SimpleNamespace(patch_offsets=None)
    if hasattr(network, 'segmentation_head') or 'ForSemantic' in type(network).__name__:
        output.logits = torch.zeros(1, classes, 2, 2)
    else:
        output.class_queries_logits = output.logits = torch.zeros(1, 2, classes + 1)
        output.masks_queries_logits = output.pred_masks = torch.zeros(1, 2, 2, 2)
    try:
        processor.post_process_semantic_segmentation(output, target_sizes=[(2, 2)])
    except Exception as error:  # of a class that does not expect this
        raise CheckpointError(f'the processor of {name}, a {type(processor).__name__}, cannot make '
                              f'label maps of a {type(network).__name__} ({first_line(error)}): '
                              'give the preprocessor_config.json that the model was trained with'
                              ) from error


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Silence the report of weights, which is checked here."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _load_plain(given: Any, source: str | None, package: str, classes: Sequence[str] | None,
                mean: Sequence[float] | None, std: Sequence[float] | None, max_side: int | None
                ) -> tuple[Foreign, dict[str, Any], Sequence[str], dict[str, Any]]:
    """Load a model of segmentation-models-pytorch, or take a module that gives logits."""
    name, note, divisor, threshold = source or type(given).__name__, '', 1, 0.
    settings: dict[str, Any] = {}
    norm: dict[str, Any] = dict(mean=mean, std=std)
    if package == 'segmentation_models_pytorch':
        smp = importlib.import_module(package)
        if given is None:
            given = smp.from_pretrained(source, encoder_weights=None)
        settings = {key: value for key, value in given.config.items() if key != 'encoder_weights'}
        if given.requires_divisible_input_shape:
            divisor = given.encoder.output_stride
        threshold = 0.5 if settings.get('activation') else 0.
        if mean is None:
            try:
                norm = smp.encoders.get_preprocessing_params(settings['encoder_name'])
            except (OSError, ValueError):
                norm = _IMAGENET
                note = ("images are normalised as ImageNet's, because the settings of the encoder "
                        f'{settings["encoder_name"]} cannot be read')
    elif classes is None:
        raise ConfigError(f'{name} does not say its classes: give classes=, mean= and std=, or the '
                          'name or folder that transformers loads it from')
    if norm['mean'] is None or norm['std'] is None:
        raise ConfigError(f'{name} does not say how images are normalised: give mean= and std= of '
                          'red, green and blue, for values from 0 to 1')
    model = Foreign(given.eval(), divisor=divisor, threshold=threshold, note=note)
    normalise = Normalisation(**norm)
    with torch.no_grad():
        channels = model(torch.zeros(1, 3, 64, 64, device=next(given.parameters()).device)).shape[1]
    names = classes or (['background', 'foreground'] if channels == 2 else
                        [f'class {index}' for index in range(channels)])
    if len(names) != channels:
        raise ConfigError(f'{name} predicts {channels} classes, and classes= names {len(names)}')
    step = dict(type=Preprocess, processor=normalise, max_side=max_side)
    return model, step, names, dict(settings, type=type(given).__name__)


def _are_same(known: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether these are the classes of a data set, though some may be spelt otherwise."""
    def plain(name: str) -> str:
        return name.partition(',')[0].strip().lower()
    return len(known) == len(names) and 2 * sum(
        plain(one) == plain(other) for one, other in zip(known, names)) > len(known)
