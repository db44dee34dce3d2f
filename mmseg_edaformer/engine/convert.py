"""Checkpoints in other forms: the authors' under the names of this package, and single files.

A single file is a .safetensors with all that a prediction needs. What it says besides the weights
is JSON that names classes from a short list: no code, no files, no addresses.
"""
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..data.audit import inner_datasets
from ..data.classification import is_classifier
from ..data.transforms import without_checks
from ..errors import CheckpointError, ConfigError
from ..files import replacing
from ..models import EFT, EDAFormerHead
from ..models.eft import ARCHITECTURES
from .checkpoint_loading import check_weights, load_from_file

DESCRIPTION_FORMAT = 1
"""The form of the descriptions that are written here; larger ones are of a future version."""

_KEY = 'mmseg_edaformer'
_DESCRIBED = {
    'EncoderDecoder', 'StreamedEncoderDecoder', 'SegDataPreProcessor', 'BatchPreProcessor', 'EFT',
    'EDAFormerHead', 'MixVisionTransformer', 'SegformerHead', 'LVT', 'FeedFormerHead', 'BN',
    'SyncBN', 'LN', 'ReLU', 'GELU', 'LoadImageFromFile', 'Resize', 'ResizeToMultiple',
    'PackSegInputs'}
"""What a file may name. mmengine imports and calls anything else that a ``type`` names."""
_TRAINING = ('init_cfg', 'pretrained', 'train_cfg', 'loss_decode', 'auxiliary_head')
"""What only training needs; most can name files, some of which would be unpickled."""
_READING = ('type', 'to_float32', 'color_type', 'imdecode_backend')
"""What a described LoadImageFromFile may be told."""
_STEPS = ('Resize', 'ResizeToMultiple', 'PackSegInputs')
"""What may follow it, the last one at the end."""
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
"""Values of arguments by their names; where it is no word also None, or a list of them.

2^14 in height and width are as many pixels as an image may have.
"""
_LIMITS = dict(std=(1e-6, 1e6), scale_factor=(1e-3, 4), ffn_ratios=(.1, 64), mlp_ratio=(.1, 64))
"""Least and largest of numbers that need not be whole; all others lie within a million of 0."""

_RENAMED: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r'^patch_embed(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.patch_embed.'),
    (r'^block(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.blocks.'),
    (r'^norm(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.norm.'),
    (r'^decode_head\.attn((\d)\2*)\.',
     lambda m: f'decode_head.levels.{int(m[2]) - 2}.{len(m[1]) - 1}.'),
    (r'\.attn\.sr\.', '.attn.kv.'),
    (r'\.attn\.norm\.', '.attn.kv_norm.'),
    (r'\.mlp\.dwconv\.dwconv\.', '.ffn.dwconv.'),
    (r'\.mlp\.', '.ffn.'),
    (r'^decode_head\.linear_fuse\.conv\.', 'decode_head.fuse.'),
    (r'^decode_head\.linear_fuse\.bn\.', 'decode_head.fuse_norm.'),
    (r'^decode_head\.linear_pred\.', 'decode_head.conv_seg.'),
]


@dataclass(frozen=True)
class Conversion:
    """Converted weights and what became of every key of the source.

    ``renamed`` maps each used key to its new name; ``dropped`` gives the reason for the others.
    ``backbone_only`` tells an ImageNet encoder from a segmentor.
    """
    state_dict: dict[str, Tensor]
    renamed: dict[str, str]
    dropped: dict[str, str]
    backbone_only: bool
    sizes: dict[str, Any]

    @property
    def advice(self) -> str:
        """The model's sizes and the config to use."""
        sizes = self.sizes
        letter = {'tiny': 't', 'base': 'b'}.get(sizes['arch'])
        if self.backbone_only:
            use = '--backbone-weights FILE'
            return (f'EFT {sizes["arch"]}, an encoder: train edaformer_{letter or "t"}_*.py '
                    f'with {use}')
        data = {150: 'ade', 19: 'cityscapes', 171: 'cocostuff'}.get(sizes['num_classes'])
        known = letter and data
        config = (f'configs/edaformer_{letter}_{data}.py' if known else
                  f'a config with model.backbone.arch={sizes["arch"]} and '
                  f'model.decode_head.num_classes={sizes["num_classes"]}')
        return f'EDAFormer {sizes["arch"]}, {sizes["num_classes"]} classes: use {config}'


@dataclass(frozen=True)
class Description:
    """What a prediction needs besides weights.

    ``model`` is the config of the segmentor without what only training needs; ``pipeline`` that of
    its test images without labels; ``classes`` are names, ``palette`` their colours, RGB.
    """
    model: dict[str, Any]
    pipeline: list[dict[str, Any]]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


def convert_state_dict(source: Mapping[str, Tensor]) -> Conversion:
    """Rename the weights of a released segmentor or encoder, and check each against the model.

    Raises:
        CheckpointError: A key is unknown, missing or of a shape that no model of its sizes has.
    """
    source = {name.removeprefix('module.'): tensor for name, tensor in source.items()}
    segmentor = any(name.startswith('decode_head.') for name in source)
    weights: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for name, tensor in source.items():
        if name.startswith('decode_head.conv_seg.'):
            dropped[name] = 'unused in the release: its classifier is linear_pred'
        elif name.startswith(('head.', 'backbone.head.')):
            dropped[name] = 'the ImageNet classifier'
        else:
            renamed[name] = new = rename_key(name)
            weights[new] = tensor
    sizes = infer_sizes(weights)
    prefix = 'backbone.' if segmentor else ''
    wanted = {f'{prefix}{name}': tensor.shape for name, tensor in _on_meta(EFT, sizes['eft'])}
    if segmentor:
        wanted.update({f'decode_head.{name}': tensor.shape
                       for name, tensor in _on_meta(EDAFormerHead, sizes['head'])})
    problems = [f'{name} is missing' for name in wanted if name not in weights]
    problems += [f'{old} is not known' for old, new in renamed.items()
                 if new not in wanted and not new.endswith('num_batches_tracked')]
    problems += [f'{name} is {tuple(weights[name].shape)}, not {tuple(shape)}'
                 for name, shape in wanted.items()
                 if name in weights and weights[name].shape != shape]
    if problems:
        raise CheckpointError('the weights are not those of an EDAFormer: ' +
                              '; '.join(problems[:8]) +
                              (f' and {len(problems) - 8} more' if len(problems) > 8 else ''))
    return Conversion(weights, renamed, dropped, not segmentor, sizes)


def rename_key(name: str) -> str:
    """The name here of a released weight; a name of ours stays what it is."""
    prefix = 'backbone.' if name.startswith('backbone.') else ''
    name = name.removeprefix('backbone.')
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return prefix + name


def infer_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments for EFT and EDAFormerHead, read off converted weights.

    Heads and pools leave no trace in weights; they are taken as doubling from stage to stage, as
    in every released model.

    Raises:
        CheckpointError: There is no patch embedding to start from.
    """
    encoder = {name.removeprefix('backbone.'): tensor for name, tensor in weights.items()
               if not name.startswith('decode_head.')}
    try:
        dims: list[int] = []
        depths: list[int] = []
        ffn_ratios: list[float] = []
        while f'stages.{len(dims)}.patch_embed.proj.weight' in encoder:
            stage = f'stages.{len(dims)}.'
            dim = encoder[f'{stage}patch_embed.proj.weight'].shape[0]
            hidden = encoder[f'{stage}blocks.0.ffn.fc1.weight'].shape[0]
            dims.append(dim)
            depths.append(len({name.split('.')[3] for name in encoder
                               if name.startswith(f'{stage}blocks.')}))
            ffn_ratios.append(_ffn_ratio(dim, hidden))
        if not dims:
            raise KeyError('patch_embed1.proj.weight')
        eft = dict(arch=dict(embed_dims=dims, depths=depths, ffn_ratios=ffn_ratios,
                             num_heads=[2 ** i for i in range(len(dims))],
                             pool_ratios=[2 ** i for i in range(len(dims) - 1, -1, -1)]))
        sizes: dict[str, Any] = dict(arch=_name_arch(dims, depths), eft=eft)
        if 'decode_head.fuse.weight' in weights:
            levels = sorted({int(name.split('.')[2]) for name in weights
                             if name.startswith('decode_head.levels.')})
            head = [f'decode_head.levels.{level}.' for level in levels]
            sizes['num_classes'] = weights['decode_head.conv_seg.weight'].shape[0]
            in_channels = [weights[f'{level}0.attn.kv.weight'].shape[0] for level in head]
            sizes['head'] = dict(
                in_channels=in_channels, in_index=[level + 1 for level in levels],
                channels=weights['decode_head.fuse.weight'].shape[0],
                num_classes=sizes['num_classes'],
                depths=[len({name.split('.')[3] for name in weights if name.startswith(level)})
                        for level in head],
                num_heads=[2 ** (level + 1) for level in levels],
                pool_ratios=[2 ** (levels[-1] - level) for level in levels],
                ffn_ratios=[_ffn_ratio(dim, weights[f'{level}0.ffn.fc1.weight'].shape[0])
                            for level, dim in zip(head, in_channels)])
    except KeyError as error:
        raise CheckpointError(f'the weights are not those of an EDAFormer: {error.args[0]} '
                              'is missing') from error
    return sizes


def convert_file(source: str | Path, target: str | Path) -> Conversion:
    """Convert a released checkpoint, .pth or .safetensors, to a file of either kind.

    The target appears only when all went well. Class names and palette of the source go along.

    Raises:
        CheckpointError: The source is not a whole checkpoint of EDAFormer or EFT, or the target
            has another suffix.
    """
    target = Path(target)
    if target.suffix not in ('.pth', '.safetensors'):
        raise CheckpointError(f'{target}: write to a .pth or a .safetensors file')
    content = load_from_file(source, map_location='cpu')
    conversion = convert_state_dict(content['state_dict'])
    classes, palette = _stored_classes(content['meta'])
    meta = dict(dataset_meta=dict(classes=classes, palette=palette)) if classes else {}
    _write(target, conversion.state_dict, meta)
    return conversion


def pack_file(source: str | Path, target: str | Path, cfg: Config) -> Description:
    """Write weights, config, classes and palette to one file, from which `Segmenter` predicts.

    Args:
        source: A checkpoint of a training, or one that the authors released.
        target: A .safetensors file; it appears only when all went well.
        cfg: The config that the checkpoint was trained with.

    Raises:
        CheckpointError: The source is not a whole checkpoint of that config, or the target has
            another suffix.
        ConfigError: The config is not a segmentor's, or names more than can be told as data.
    """
    target = Path(target)
    if target.suffix != '.safetensors':
        raise CheckpointError(f'{target}: with a config, write to a .safetensors file')
    content = load_from_file(source, map_location='cpu')
    if any('.linear_pred.' in name for name in content['state_dict']):
        content['state_dict'] = convert_state_dict(content['state_dict']).state_dict
    found = describe(cfg, content['meta'])
    told = dict(format=DESCRIPTION_FORMAT, version=__version__, model=found.model,
                pipeline=[{name: value for name, value in step.items() if name in _READING}
                          if step['type'] == 'LoadImageFromFile' else step
                          for step in found.pipeline],
                classes=found.classes, palette=found.palette)
    try:
        description = _parse(json.loads(json.dumps(told)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{cfg.filename} cannot be told as data ({error}): keep the checkpoint '
                          'and its config together instead') from error
    model = load_model(description, content)
    _write(target, model.state_dict(), {_KEY: json.dumps(told), 'format': 'pt'})
    return description


def read_description(path: str | Path) -> Description:
    """Read what `pack_file` wrote beside the weights; nothing in it is executed.

    Raises:
        CheckpointError: The file says nothing, or more than is read as data.
    """
    try:
        with safe_open(path, 'pt') as file:
            text = (file.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error
    if text is None:
        raise CheckpointError(f'{path} holds weights alone: give the config and this file as its '
                              'checkpoint, or have tools/convert_checkpoint.py --config CONFIG '
                              'write one that says all')
    try:
        return _parse(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{path} is refused: what it says of its model is not what '
                              f'tools/convert_checkpoint.py writes ({error})') from error


def describe(cfg: Config, meta: Mapping[str, Any]) -> Description:
    """What a prediction needs of a config, and of the ``meta`` of its checkpoint.

    The names of the classes are the checkpoint's, or else those of the config's test set.

    Raises:
        ConfigError: The config is not a segmentor's, or has no test pipeline.
    """
    # Test-time augmentation wraps the model, also in the config that it leaves in a work dir.
    model = (cfg.get('model') or {}).get('module') or cfg.get('model') or {}
    head = model.get('decode_head')
    head = head[-1] if isinstance(head, (list, tuple)) else head
    if is_classifier(cfg) or not head or not head.get('num_classes'):
        raise ConfigError(f'{cfg.filename} has no model that predicts a class for each pixel: give '
                          'the config of a segmentor')
    datasets = cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}
    parts = [part for _, part in inner_datasets(datasets.get('dataset') or {})]
    dataset: dict[str, Any] = parts[0] if parts else {}
    pipeline = dataset.get('pipeline')
    if not pipeline or any(step['type'] == 'TestTimeAug' for step in pipeline):
        pipeline = cfg.get('test_pipeline')
    pipeline = [without_checks(step) for step in pipeline or ()]
    if not pipeline or pipeline[0]['type'] != 'LoadImageFromFile':
        begin = pipeline[0]['type'] if pipeline else 'nothing'
        raise ConfigError(f'{cfg.filename} has a test pipeline that begins with {begin} and not '
                          'with LoadImageFromFile: it cannot be told how images are made ready')
    init_default_scope('mmseg')
    names = _stored_classes(meta)
    if dataset.get('type') and not _fit(names[0], head['num_classes']):
        own = DATASETS.build({**dataset, 'lazy_init': True}).metainfo
        names = own.get('classes'), own.get('palette')
    steps = [_plain(step) for step in pipeline if not step['type'].startswith('LoadAnnotations')]
    for name in ('skip_list', 'blank', 'ignore_empty'):  # a bad image is never to be a blank one
        steps[0].pop(name, None)
    return Description(_plain(model), steps,
                       *_name_classes(*names, head['num_classes']))


def load_model(description: Description, content: Mapping[str, Any]) -> nn.Module:
    """The described segmentor with the weights of a checkpoint, in eval mode on the CPU.

    Raises:
        CheckpointError: The weights are not those of this model.
    """
    init_default_scope('mmseg')
    config = dict(description.model)
    if config['type'] == 'EncoderDecoder':  # the same labels, in less time and memory
        config['type'] = 'StreamedEncoderDecoder'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # mmseg's, of its own defaults
        model: nn.Module = MODELS.build(config)
    check_weights(model, dict(content))
    own = model.state_dict()
    state = {name.removeprefix('module.'): value for name, value in content['state_dict'].items()}
    model.load_state_dict({name: value for name, value in state.items() if name in own},
                          strict=False)
    return model.eval()


def _write(target: Path, weights: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a checkpoint whole; of a .safetensors ``meta`` is the metadata where it is text."""
    try:
        with replacing(target) as partial:
            if target.suffix == '.safetensors':
                texts = {name: value for name, value in meta.items() if isinstance(value, str)}
                save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial,
                          texts or None)
            else:
                torch.save(dict(state_dict=weights, meta=meta), partial)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f'{target} cannot be written, nothing is left of it '
                              f'({str(error).splitlines()[0]}): is the disk full?') from error


def _parse(told: Any) -> Description:
    """A description from JSON.

    Raises:
        ValueError: It is none, or it asks for more than `_DESCRIBED`.
    """
    if not isinstance(told, dict) or not isinstance(told.get('format'), int):
        raise ValueError('it does not say in which form it is')
    if told['format'] > DESCRIPTION_FORMAT:
        raise ValueError('it is of a newer version: upgrade mmseg_edaformer')
    model, pipeline = _checked(told.get('model')), _checked(told.get('pipeline'))
    if not isinstance(model, dict) or not isinstance(model.get('decode_head'), dict):
        raise ValueError('it has no model')
    if not isinstance(pipeline, tuple) or not pipeline or not all(
            isinstance(step, dict) and 'type' in step for step in pipeline):
        raise ValueError('it has no pipeline')
    first = pipeline[0]
    if first['type'] != 'LoadImageFromFile' or not first.keys() <= set(_READING):
        raise ValueError('its pipeline does not begin with a plain LoadImageFromFile')
    if pipeline[-1]['type'] != _STEPS[-1] or any(s['type'] not in _STEPS for s in pipeline[1:]):
        raise ValueError(f'its pipeline does not go on with {" or ".join(_STEPS[:-1])}, if at all, '
                         f'and end with {_STEPS[-1]}')
    classes, palette = told.get('classes') or (), told.get('palette')
    if not _fit(classes, model['decode_head'].get('num_classes')):
        raise ValueError('it does not name each class of the model')
    return Description(model, list(pipeline), *_name_classes(classes, palette, len(classes)))


def _checked(value: Any, name: str = '') -> Any:
    """JSON with tuples for its lists, as mmseg wants them; ``name`` is that of the argument.

    Raises:
        ValueError: It names a class outside of `_DESCRIBED`, has what only training needs, or a
            value that breaks `_RULES` or `_LIMITS`.
    """
    allowed, (low, high) = _RULES.get(name), _LIMITS.get(name, (-1e6, 1e6))
    word = allowed is not None and isinstance(allowed[0], str)
    if isinstance(value, list) and not word:
        return tuple(_checked(each, name) for each in value)
    if allowed and value not in allowed and (value is not None or word):
        raise ValueError(f'{name}={value!r:.60}: it must be ' + (
            f'{allowed[0]} to {allowed[-1]}' if isinstance(allowed, range) else
            ' or '.join(map(repr, allowed))))
    if isinstance(value, (int, float)) and not low <= value <= high:  # nan lies nowhere
        raise ValueError(f'{name}={value!r:.60}: it must be {low:g} to {high:g}')
    if isinstance(value, dict):
        for name in value:
            if name in _TRAINING or name.startswith('_') or name in ('skip_list', 'backend_args'):
                raise ValueError(f'{name[:60]!r} is not to be in it')
        if 'type' in value and str(value['type']) not in _DESCRIBED:
            raise ValueError(f'{str(value["type"])[:60]!r} is not among what it may name')
        return {name: _checked(each, name) for name, each in value.items()}
    return value


def _plain(value: Any) -> Any:
    """A part of a config in dicts of Python, a copy without what only training needs."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if name not in _TRAINING}
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _stored_classes(meta: Mapping[str, Any]) -> tuple[Any, Any]:
    """Names and colours of the classes that a checkpoint knows, as it has them."""
    stored = meta.get('dataset_meta') or {}
    return (meta.get('CLASSES') or stored.get('classes'),
            meta.get('PALETTE') or stored.get('palette'))


def _fit(names: Any, count: Any) -> bool:
    return (isinstance(names, Sequence) and not isinstance(names, str) and len(names) == count and
            all(isinstance(name, str) for name in names))


def _name_classes(names: Any, palette: Any, count: int
                  ) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """A printable name and a colour for each class, made up where there is none."""
    if not _fit(names, count):
        names = [f'class {index}' for index in range(count)]
    try:
        colours: np.ndarray = np.array(palette).reshape(count, 3)
    except ValueError:
        colours = np.zeros(3)
    if colours.dtype.kind not in 'iu' or not ((colours >= 0) & (colours < 256)).all():
        colours = np.random.default_rng(0).integers(0, 256, (count, 3))
    return (tuple(''.join(ch if ch.isprintable() else '?' for ch in name[:60]) for name in names),
            tuple((int(r), int(g), int(b)) for r, g, b in colours))


def _ffn_ratio(dim: int, hidden: int) -> float:
    """The ratio of one decimal that gives a width, such as 3.8 for int(32 * 3.8) = 121."""
    return next((tenths / 10 for tenths in range(1, 200) if int(dim * tenths / 10) == hidden),
                hidden / dim)


def _name_arch(dims: list[int], depths: list[int]) -> str:
    return next((name for name, sizes in ARCHITECTURES.items()
                 if (list(sizes['embed_dims']), list(sizes['depths'])) == (dims, depths)),
                f'dict(embed_dims={dims}, depths={depths})')


def _on_meta(build: type, arguments: dict[str, Any]) -> list[tuple[str, Tensor]]:
    with torch.device('meta'):
        return [(name, tensor) for name, tensor in build(**arguments).state_dict().items()
                if not name.endswith('num_batches_tracked')]
