"""Weights of a pretrained encoder for the backbone of a segmentor."""
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models import EFT
from .checkpoint_loading import load_from_file
from .convert import infer_sizes, rename_key


def select_encoder(state: Mapping[str, Tensor], backbone: nn.Module
                   ) -> tuple[dict[str, Tensor], list[str]]:
    """Select the weights in a checkpoint that belong to an encoder, under the encoder's names.

    The checkpoint may hold the encoder alone, as the authors release it, or as the ``backbone`` of
    a classifier or a segmentor of OpenMMLab.

    Returns:
        The weights, and the names of the others, which are a classifier's or a decoder's.
    """
    state = {name.removeprefix('module.'): tensor for name, tensor in state.items()}
    part = 'backbone.' if any(name.startswith('backbone.') for name in state) else ''
    weights: dict[str, Tensor] = {}
    left_out = []
    for name, tensor in state.items():
        inner = name.removeprefix(part)
        if not name.startswith(part) or inner.startswith('head.'):
            left_out.append(name)
        else:
            weights[rename_key(inner) if isinstance(backbone, EFT) else inner] = tensor
    return weights, left_out


def load_backbone(backbone: nn.Module, filename: str | Path) -> str:
    """Copy the weights of a pretrained encoder into a backbone; every one must fit.

    Returns:
        A line for the log: which weights were used and which were left out.

    Raises:
        CheckpointError: The file cannot be read, or holds an encoder of another kind or size.
    """
    weights, left_out = select_encoder(load_from_file(filename, 'cpu')['state_dict'], backbone)
    wanted = {name: tensor.shape for name, tensor in backbone.state_dict().items()
              if not name.endswith('num_batches_tracked')}
    problems = [f'{name} is {"x".join(map(str, weights[name].shape))} in it and '
                f'{"x".join(map(str, shape))} in the config' for name, shape in wanted.items()
                if name in weights and weights[name].shape != shape]
    problems += [f'{name} is not in it' for name in wanted if name not in weights]
    problems += [f'{name} is not in the config' for name in weights
                 if name not in wanted and not name.endswith('num_batches_tracked')]
    if problems:
        more = f' and {len(problems) - 4} more' if len(problems) > 4 else ''
        raise CheckpointError(f'{filename} does not fit the backbone {type(backbone).__name__} of '
                              f'the config: {"; ".join(problems[:4])}{more}'
                              f'{_advice(backbone, weights)}')
    backbone.load_state_dict(weights, strict=False)
    parts = Counter('.'.join(name.split('.')[:2]) for name in weights)
    return (f'Backbone from {filename}: {len(weights)} weights used (' +
            ', '.join(f'{part} {count}' for part, count in parts.items()) + f'), {len(left_out)} '
            'left out' + (f' ({", ".join(left_out[:4])}{", ..." if len(left_out) > 4 else ""})'
                          if left_out else ''))


def check_backbone(cfg: Config, filename: str | Path) -> None:
    """Check that a pretrained encoder fits the config, and log which weights are used.

    Raises:
        CheckpointError: The file cannot be read, or holds an encoder of another kind or size.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    print_log(load_backbone(MODELS.build(cfg.model.backbone), filename), logger='current')


@HOOKS.register_module()
class BackboneWeightsHook(Hook):
    """Starts the backbone from a pretrained encoder; a resumed run has its weights already.

    Args:
        checkpoint: A .pth or .safetensors of the authors, of this project or of mmpretrain.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def before_train(self, runner: Runner) -> None:
        """Copy the weights after the model is initialised."""
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
    letter = {'tiny': 't', 'base': 'b'}.get(arch)
    return f'. It is EFT {arch}' + (f': train configs/edaformer_{letter}_*.py with it' if letter
                                    else f': set model.backbone.arch={arch}')
