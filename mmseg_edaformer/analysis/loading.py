"""Models to be measured: how they are loaded, given a ratio, and counted."""
import warnings
from collections.abc import Callable
from typing import Any

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmseg.registry import MODELS
from torch import nn

from ..command_line import check_checkpoint
from ..cost import count_macs, windows
from ..data.classification import is_classifier
from ..engine.checkpoint_loading import check_weights
from ..errors import RatioError
from ..isr import ISRRatio, apply_isr

NONE = ISRRatio.parse('none')


def load_model(cfg: Config, checkpoint: str | None = None) -> Any:
    """Build the model of a config in eval mode on the CPU, with random weights or a checkpoint's.

    Raises:
        CheckpointError: The checkpoint is missing or damaged, or does not fit.
    """
    check_checkpoint(checkpoint)
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    # What mixes batches is for training, and mmpretrain logs what it implies.
    settings = {**cfg.model, 'train_cfg': None} if is_classifier(cfg) else cfg.model
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # mmseg's, of its own defaults
        model = revert_sync_batchnorm(MODELS.build(settings))
    if checkpoint:
        check_weights(model, load_checkpoint(model, checkpoint, map_location='cpu',
                                             logger='silent'))
    return model.eval()


def can_reduce(model: nn.Module) -> bool:
    """Return whether ISR can act on a model."""
    if hasattr(model, 'set_isr'):
        return True
    try:
        apply_isr(model, NONE)
    except RatioError:
        return False
    return True


def set_ratio(model: Any, ratio: ISRRatio) -> None:
    """Apply a ratio: by the model's own ``set_isr(ratio)`` if it has one, else by `apply_isr`.

    Raises:
        RatioError: It does not fit the model.
    """
    if hasattr(model, 'set_isr'):
        model.set_isr(ratio)
    elif ratio != NONE or can_reduce(model):
        apply_isr(model, ratio)


def count_windows(model: nn.Module, size: tuple[int, int],
                  count: Callable[[nn.Module, tuple[int, int]], int] = count_macs) -> int:
    """Count what one image costs at the ratio in effect, all windows of the config included."""
    views = windows(model, size)
    return len(views) * count(model, views[0])
