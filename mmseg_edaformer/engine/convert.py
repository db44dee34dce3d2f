"""The authors' weights under this package's names, and encoders of any origin in a backbone."""
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import replacing
from ..models import EFT, EDAFormerHead
from ..models.eft import ARCHITECTURES
from .checkpoint_loading import compare_weights, join_problems, load_from_file

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
_LETTERS = {'tiny': 't', 'base': 'b'}  # in the names of configs


@dataclass(frozen=True)
class Conversion:
    """Converted weights, and what happened to every key of the source.

    ``renamed`` maps each used key to its new name, ``dropped`` each other key to the reason.
    """
    state_dict: dict[str, Tensor]
    renamed: dict[str, str]
    dropped: dict[str, str]
    sizes: dict[str, Any]

    @property
    def advice(self) -> str:
        """The model's sizes and the config to use."""
        arch = self.sizes['arch']
        letter = _LETTERS.get(arch)
        if 'head' not in self.sizes:
            return (f'EFT {arch}, an encoder: train edaformer_{letter or "t"}_*.py with '
                    '--backbone-weights FILE')
        classes = self.sizes['num_classes']
        data = {150: 'ade', 19: 'cityscapes', 171: 'cocostuff'}.get(classes)
        config = (f'configs/edaformer_{letter}_{data}.py' if letter and data else f'a config with '
                  f'model.backbone.arch={arch} and model.decode_head.num_classes={classes}')
        return f'EDAFormer {arch}, {classes} classes: use {config}'


def convert_state_dict(source: Mapping[str, Tensor]) -> Conversion:
    """Rename the weights of a released segmentor or encoder, and check each against the model."""
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
    wanted = {f'{prefix}{name}': tensor for name, tensor in _on_meta(EFT, sizes['eft'])}
    if segmentor:
        wanted.update({f'decode_head.{name}': tensor
                       for name, tensor in _on_meta(EDAFormerHead, sizes['head'])})
    problems = compare_weights(weights, wanted)
    if problems:
        raise CheckpointError(f'the weights are not those of an EDAFormer: '
                              f'{join_problems(problems)}')
    return Conversion(weights, renamed, dropped, sizes)


def rename_key(name: str) -> str:
    """Return this package's name of a released weight, or a name of this package unchanged."""
    prefix = 'backbone.' if name.startswith('backbone.') else ''
    name = name.removeprefix('backbone.')
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return prefix + name


def infer_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return arguments for EFT and EDAFormerHead that fit converted weights.

    Weights do not show the numbers of heads and the pool ratios. They are assumed to double from
    stage to stage, as in every released model.
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
        arch = next((name for name, known in ARCHITECTURES.items()
                     if (list(known['embed_dims']), list(known['depths'])) == (dims, depths)),
                    f'dict(embed_dims={dims}, depths={depths})')
        sizes: dict[str, Any] = dict(arch=arch, eft=eft)
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

    It writes the target whole or not at all, with the class names and the palette of the source.
    """
    target = Path(target)
    if target.suffix not in ('.pth', '.safetensors'):
        raise CheckpointError(f'{target}: write to a .pth or a .safetensors file')
    content = load_from_file(source, map_location='cpu')
    conversion = convert_state_dict(content['state_dict'])
    classes, palette = stored_classes(content['meta'])
    meta = dict(dataset_meta=dict(classes=classes, palette=palette)) if classes else {}
    write_weights(target, conversion.state_dict, meta)
    return conversion


def write_weights(target: Path, weights: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a checkpoint whole; a .safetensors takes only the texts in ``meta``."""
    try:
        with replacing(target) as partial:
            if target.suffix == '.safetensors':
                texts = {name: value for name, value in meta.items() if isinstance(value, str)}
                save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial,
                          texts or None)
            else:
                torch.save(dict(state_dict=weights, meta=meta), partial)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f'{target} cannot be written ({str(error).splitlines()[0]}): make '
                              'room, or write elsewhere') from error


def stored_classes(meta: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the names and colours of classes as a checkpoint stores them."""
    stored = meta.get('dataset_meta') or {}
    return (meta.get('CLASSES') or stored.get('classes'),
            meta.get('PALETTE') or stored.get('palette'))


def _ffn_ratio(dim: int, hidden: int) -> float:
    # One decimal that gives the width, such as 3.8 for int(32 * 3.8) = 121.
    return next((tenths / 10 for tenths in range(1, 200) if int(dim * tenths / 10) == hidden),
                hidden / dim)


def _on_meta(build: type, arguments: dict[str, Any]) -> list[tuple[str, Tensor]]:
    with torch.device('meta'):
        return [*build(**arguments).state_dict().items()]


def load_backbone(backbone: nn.Module, filename: str | Path) -> str:
    """Copy the weights of a pretrained encoder into a backbone; every one must fit.

    The file may hold the encoder alone, as the authors release it, or as the ``backbone`` of a
    classifier or a segmentor of OpenMMLab.

    Returns:
        A line for the log: which weights were used and which were left out.
    """
    state = {name.removeprefix('module.'): tensor
             for name, tensor in load_from_file(filename, 'cpu')['state_dict'].items()}
    part = 'backbone.' if any(name.startswith('backbone.') for name in state) else ''
    weights: dict[str, Tensor] = {}
    left_out = []
    for name, tensor in state.items():
        inner = name.removeprefix(part)
        if not name.startswith(part) or inner.startswith('head.'):
            left_out.append(name)
        else:
            weights[rename_key(inner) if isinstance(backbone, EFT) else inner] = tensor
    problems = compare_weights(weights, backbone.state_dict())
    if problems:
        raise CheckpointError(f'{filename} does not fit the backbone {type(backbone).__name__} of '
                              f'the config: {join_problems(problems)}{_advice(backbone, weights)}')
    backbone.load_state_dict(weights, strict=False)
    parts = Counter('.'.join(name.split('.')[:2]) for name in weights)
    return (f'Backbone from {filename}: {len(weights)} weights used (' +
            ', '.join(f'{part} {count}' for part, count in parts.items()) + f'), {len(left_out)} '
            'left out' + (f' ({", ".join(left_out[:4])}{", ..." if len(left_out) > 4 else ""})'
                          if left_out else ''))


def check_backbone(cfg: Config, filename: str | Path) -> None:
    """Check that a pretrained encoder fits the config, and log which weights are used."""
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    print_log(load_backbone(MODELS.build(cfg.model.backbone), filename), logger='current')


@HOOKS.register_module()
class BackboneWeightsHook(Hook):
    """Starts the backbone from a pretrained encoder; a resumed run has its weights already."""

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def before_train(self, runner: Runner) -> None:
        if not runner._resume:
            model: Any = runner.model.module if is_model_wrapper(runner.model) else runner.model
            load_backbone(model.backbone, self.checkpoint)


def _advice(backbone: nn.Module, weights: Mapping[str, Tensor]) -> str:
    if not isinstance(backbone, EFT):
        return ''
    try:
        arch = infer_sizes(weights)['arch']
    except CheckpointError:
        return '. It is not an EFT: give an encoder of the kind that the config names'
    letter = _LETTERS.get(arch)
    return f'. It is EFT {arch}' + (f': train configs/edaformer_{letter}_*.py with it' if letter
                                    else f': set model.backbone.arch={arch}')
