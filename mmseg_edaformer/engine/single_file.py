"""Single files: a .safetensors with all that a prediction needs.

Its metadata describes the model as JSON, which names classes from a short list: no code, no files,
no addresses.
"""
import json
import warnings
from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import __version__
from ..data.audit import inner_datasets
from ..data.classification import is_classifier
from ..data.transforms import without_checks
from ..errors import CheckpointError, ConfigError
from .checkpoint_loading import check_weights, load_from_file
from .convert import convert_state_dict, stored_classes, write_weights

DESCRIPTION_FORMAT = 1  # of what is written here; a larger one comes from a newer package

_KEY = 'mmseg_edaformer'
_DESCRIBED = {
    'EncoderDecoder', 'StreamedEncoderDecoder', 'SegDataPreProcessor', 'BatchPreProcessor', 'EFT',
    'EDAFormerHead', 'MixVisionTransformer', 'SegformerHead', 'FusedSegformerHead', 'LVT',
    'FeedFormerHead', 'BN', 'SyncBN', 'LN', 'ReLU', 'GELU', 'LoadImageFromFile', 'Resize',
    'ResizeToMultiple', 'PackSegInputs'}
"""Classes that a file may name; mmengine imports and calls anything that a ``type`` names."""
_TRAINING = ('init_cfg', 'pretrained', 'train_cfg', 'loss_decode', 'auxiliary_head')
"""Arguments for training alone; most can name files, some of which would be unpickled."""
# Arguments that a described LoadImageFromFile may have, and what may follow it: the last one ends.
_READING = ('type', 'to_float32', 'color_type', 'imdecode_backend')
_STEPS = ('Resize', 'ResizeToMultiple', 'PackSegInputs')
_RULES: dict[str, tuple[Any, ...] | range] = {
    **dict.fromkeys(('align_corners', 'keep_ratio', 'to_float32', 'bgr_to_rgb', 'rgb_to_bgr',
                     'qkv_bias', 'seg_logits'), (False, True)),
    'imdecode_backend': ('cv2', 'pillow'),  # others come without a limit on pixels
    'color_type': tuple(colour + how for colour in ('color', 'grayscale')
                        for how in ('', '_ignore_orientation')),
    'mode': ('whole', 'slide'),
    **dict.fromkeys(('scale', 'size', 'size_divisor', 'crop_size', 'stride', 'in_channels',
                     'channels', 'num_classes', 'embed_dims'), range(1, 2 ** 14 + 1)),
    **dict.fromkeys(('depths', 'num_layers', 'num_heads', 'pool_ratios', 'sr_ratios',
                     'patch_sizes', 'strides'), range(1, 257)),
    **dict.fromkeys(('in_index', 'out_indices'), range(4))}
"""Allowed values by argument name; unless they are words, also None and lists of them."""
_LIMITS = dict(std=(1e-6, 1e6), scale_factor=(1e-3, 4), ffn_ratios=(.1, 64), mlp_ratio=(.1, 64))
"""Lowest and highest number by argument name; for all others -1e6 and 1e6."""


@dataclass(frozen=True)
class Description:
    """What a prediction needs besides weights: a config without its settings for training."""
    model: dict[str, Any]
    pipeline: list[dict[str, Any]]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


def pack_file(source: str | Path, target: str | Path, cfg: Config) -> Description:
    """Write weights, config, classes and palette to one .safetensors, whole or not at all.

    The source is a checkpoint of a training with ``cfg``, or one that the authors released.
    """
    content = load_from_file(source, map_location='cpu')
    if any('.linear_pred.' in name for name in content['state_dict']):
        content['state_dict'] = convert_state_dict(content['state_dict']).state_dict
    return pack(target, describe(cfg, content['meta']), content, cfg.filename)


def pack(target: str | Path, whole: Description, content: Mapping[str, Any],
         name: str) -> Description:
    """Write a described model with its weights to one .safetensors; ``name`` is for messages."""
    target = Path(target)
    if target.suffix != '.safetensors':
        raise CheckpointError(f'{target}: write to a .safetensors file, which can hold the whole '
                              'model')
    first, *steps = whole.pipeline
    first = {name: value for name, value in first.items() if name in _READING}
    data = dict(vars(whole), pipeline=[first, *steps], format=DESCRIPTION_FORMAT,
                version=__version__)
    try:
        description = _parse(json.loads(json.dumps(data)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{name} cannot be written as data ({error}): keep the '
                          'checkpoint and its config together instead') from error
    model = load_model(description, content)
    write_weights(target, model.state_dict(), {_KEY: json.dumps(data), 'format': 'pt'})
    return description


def read_description(path: str | Path) -> Description:
    """Read what `pack_file` wrote besides the weights; nothing in it is executed."""
    try:
        with safe_open(path, 'pt') as file:
            text = (file.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error
    if text is None:
        raise CheckpointError(f'{path} holds weights alone: give the config and this file as its '
                              'checkpoint, or write a single file with '
                              'tools/convert_checkpoint.py --config CONFIG')
    try:
        return _parse(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{path} is refused: tools/convert_checkpoint.py does not write '
                              f'such a description of a model ({error})') from error


def describe(cfg: Config, meta: Mapping[str, Any]) -> Description:
    """Return what a prediction needs of a config, and of the ``meta`` of its checkpoint.

    The class names are the checkpoint's, or else those of the config's test set.
    """
    # Test-time augmentation wraps the model, also in the config that it writes to a work dir.
    model = (cfg.get('model') or {}).get('module') or cfg.get('model') or {}
    head = model.get('decode_head')
    head = head[-1] if isinstance(head, (list, tuple)) else head
    if is_classifier(cfg) or not head or not head.get('num_classes'):
        raise ConfigError(f'{cfg.filename} has no model that predicts a class per pixel: give the '
                          'config of a segmentor')
    datasets = cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}
    parts = [part for _, part in inner_datasets(datasets.get('dataset') or {})]
    dataset: dict[str, Any] = parts[0] if parts else {}
    pipeline = dataset.get('pipeline')
    if not pipeline or any(step['type'] == 'TestTimeAug' for step in pipeline):
        pipeline = cfg.get('test_pipeline')
    steps = [_plain(without_checks(step)) for step in pipeline or ()]
    steps = [step for step in steps if step['type'] != 'LoadAnnotations']
    if not steps or steps[0]['type'] != 'LoadImageFromFile':
        begin = steps[0]['type'] if steps else 'nothing'
        raise ConfigError(f'{cfg.filename} has a test pipeline that begins with {begin}, so it '
                          'does not say how to read an image: begin it with LoadImageFromFile')
    init_default_scope('mmseg')
    names = stored_classes(meta)
    if dataset.get('type') and not _fit(names[0], head['num_classes']):
        own = DATASETS.build({**dataset, 'lazy_init': True}).metainfo
        names = own.get('classes'), own.get('palette')
    for name in ('skip_list', 'blank', 'ignore_empty'):  # a bad image must not become a blank one
        steps[0].pop(name, None)
    return Description(_plain(model), steps, *name_classes(*names, head['num_classes']))


def load_model(description: Description, content: Mapping[str, Any]) -> nn.Module:
    """Build the described segmentor with the weights of a checkpoint, in eval mode on the CPU."""
    init_default_scope('mmseg')
    config = dict(description.model)
    if config['type'] == 'EncoderDecoder':  # the same labels, in less time and memory
        config['type'] = 'StreamedEncoderDecoder'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # mmseg warns of its own defaults
        model: nn.Module = MODELS.build(config)
    check_weights(model, dict(content))
    own = model.state_dict()
    state = {name.removeprefix('module.'): value for name, value in content['state_dict'].items()}
    model.load_state_dict({name: value for name, value in state.items() if name in own},
                          strict=False)
    return model.eval()


def _parse(data: Any) -> Description:
    """Return a description from JSON."""
    if not isinstance(data, dict) or not isinstance(data.get('format'), int):
        raise ValueError('it does not say its format')
    if data['format'] > DESCRIPTION_FORMAT:
        raise ValueError('it comes from a newer version: upgrade mmseg_edaformer')
    model, pipeline = _checked(data.get('model')), _checked(data.get('pipeline'))
    if not isinstance(model, dict) or not isinstance(model.get('decode_head'), dict):
        raise ValueError('it has no model')
    if not isinstance(pipeline, tuple) or not pipeline or not all(
            isinstance(step, dict) and 'type' in step for step in pipeline):
        raise ValueError('it has no pipeline')
    first = pipeline[0]
    if first['type'] != 'LoadImageFromFile' or not first.keys() <= set(_READING):
        raise ValueError('its pipeline does not begin with a plain LoadImageFromFile')
    if pipeline[-1]['type'] != _STEPS[-1] or any(s['type'] not in _STEPS for s in pipeline[1:]):
        raise ValueError(f'its pipeline has other steps than {", ".join(_STEPS)}, or does not end '
                         f'with {_STEPS[-1]}')
    classes, palette = data.get('classes') or (), data.get('palette')
    if not _fit(classes, model['decode_head'].get('num_classes')):
        raise ValueError('it does not name each class of the model')
    return Description(model, list(pipeline), *name_classes(classes, palette, len(classes)))


def _checked(value: Any, name: str = '') -> Any:
    """Return JSON with tuples for lists, as mmseg needs them; ``name`` is the argument's name."""
    allowed, (low, high) = _RULES.get(name), _LIMITS.get(name, (-1e6, 1e6))
    word = allowed is not None and isinstance(allowed[0], str)
    if isinstance(value, list) and not word:
        return tuple(_checked(item, name) for item in value)
    if allowed and value not in allowed and (value is not None or word):
        raise ValueError(f'{name}={value!r:.60}: it must be ' + (
            f'{allowed[0]} to {allowed[-1]}' if isinstance(allowed, range) else
            ' or '.join(map(repr, allowed))))
    if isinstance(value, (int, float)) and not low <= value <= high:  # nan lies nowhere
        raise ValueError(f'{name}={value!r:.60}: it must be {low:g} to {high:g}')
    if isinstance(value, dict):
        for name in value:
            if name in _TRAINING or name.startswith('_') or name in ('skip_list', 'backend_args'):
                raise ValueError(f'it must not have {name[:60]!r}')
        if 'type' in value and str(value['type']) not in _DESCRIBED:
            raise ValueError(f'it must not name {str(value["type"])[:60]!r}')
        return {name: _checked(item, name) for name, item in value.items()}
    return value


def _plain(value: Any) -> Any:
    """Return a copy of a part of a config in plain dicts, without arguments for training."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if name not in _TRAINING}
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _fit(names: Any, count: Any) -> bool:
    return (isinstance(names, Sequence) and not isinstance(names, str) and len(names) == count and
            all(isinstance(name, str) for name in names))


def name_classes(names: Any, palette: Any, count: int
                 ) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Return a printable name and a colour for each class, made up if there is none."""
    if not _fit(names, count):
        names = [f'class {index}' for index in range(count)]
    try:
        colours: np.ndarray = np.array(palette).reshape(count, 3)
    except ValueError:
        colours = np.zeros(3)
    if colours.dtype.kind not in 'iu' or not ((colours >= 0) & (colours < 256)).all():
        # Hues in steps of the golden ratio never come close to the last few ones.
        colours = np.array([[round(255 * part) for part in hsv_to_rgb(
            i * 0.618034 % 1, (0.9, 0.5, 0.7)[i % 3], (0.95, 0.75, 0.55)[i // 3 % 3])]
            for i in range(count)])
    return (tuple(''.join(ch if ch.isprintable() else '?' for ch in name[:60]) for name in names),
            tuple((int(r), int(g), int(b)) for r, g, b in colours))
