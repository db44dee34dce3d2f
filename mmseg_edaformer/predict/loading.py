"""Loading the model of a prediction, of this package or another library, onto a device."""
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.config.utils import _get_cfg_metainfo
from mmengine.runner import CheckpointLoader

from ..command_line import check_model, find_in_zoo, is_foreign
from ..engine import load_from_file
from ..engine.allocator import keep_freed_memory
from ..engine.run_config import load_config
from ..engine.single_file import Description, describe, load_model, read_description
from ..errors import CheckpointError, ConfigError, UserError, first_line
from .foreign import load_foreign


def load_segmentor(model: str | Path | torch.nn.Module, checkpoint: str | Path | None,
                   **settings: Any) -> tuple[Description, torch.nn.Module, str]:
    """Return the description of a model, the model, and the file of its weights.

    ``settings`` are those of `load_foreign`, which mmseg's models do not have.
    """
    if isinstance(model, torch.nn.Module) or is_foreign(model):
        if checkpoint is not None:
            raise ConfigError(f'{model} has its own weights: leave {checkpoint} out')
        return load_foreign(model if isinstance(model, torch.nn.Module) else str(model), **settings)
    check_model(model, checkpoint)
    for name, value in settings.items():
        if value and name != 'max_side':
            raise ConfigError(f'{name} is not for {model}, whose config says it: leave it out')
    return _load_own(Path(model), checkpoint)


def _load_own(model: Path, checkpoint: str | Path | None
              ) -> tuple[Description, torch.nn.Module, str]:
    if model.suffix == '.safetensors':
        if checkpoint is not None:
            raise ConfigError(f'{model} holds its own weights: leave {checkpoint} out, or give a '
                              'config with it')
        content = load_from_file(model, 'cpu')
        description = read_description(model)
        try:
            return description, load_model(description, content), str(model)
        except Exception as error:  # sizes that make no sense raise anything
            raise CheckpointError(f'{model} is refused: its model cannot be built '
                                  f'({first_line(error)})') from error
    if model.is_dir():
        model, checkpoint = _find_in_work_dir(model, checkpoint)
    if model.suffix == '.pth':
        raise ConfigError(f'{model} is a checkpoint and does not say what model it is of: give its '
                          'work dir, or its config and then the checkpoint')
    if known := find_in_zoo(str(model)):
        model, path = known, f'{known.parent.name}/{known.name}'
        with suppress(ValueError):  # no metafile names it
            checkpoint = checkpoint or _get_cfg_metainfo(str(known.parents[3]), path).get('Weights')
    if checkpoint is None:
        raise ConfigError(f'{model}: a config needs a checkpoint')
    cfg = load_config(model)
    content = CheckpointLoader.load_checkpoint(str(checkpoint), 'cpu', 'silent')
    try:
        description = describe(cfg, content['meta'])
    except UserError:
        raise
    except Exception as error:  # of any data set
        raise ConfigError(f'{checkpoint} does not hold the names of the classes, and the test set '
                          f'of {model} cannot be built ({first_line(error)}): correct it there'
                          ) from error
    try:
        return description, load_model(description, content), str(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from error


def _find_in_work_dir(folder: Path, checkpoint: str | Path | None) -> tuple[Path, str | Path]:
    configs = sorted(folder.glob('*.py'))
    if not configs:
        raise ConfigError(f'{folder} is not the work dir of a training: it holds no config, nor '
                          'the config.json that save_pretrained of transformers or '
                          'segmentation-models-pytorch writes')
    if len(configs) > 1:
        raise ConfigError(f'{folder} holds several configs, '
                          f'{", ".join(path.name for path in configs[:4])}: give one of them and '
                          'its checkpoint')
    if checkpoint is None:
        candidates = sorted(folder.glob('best_*.pth'), key=os.path.getmtime)
        pointer = folder / 'last_checkpoint'
        if not candidates and pointer.is_file():
            # Relative to the work dir; mmengine's own is absolute, and the folder may have moved.
            last = folder / pointer.read_text(errors='replace').strip()
            candidates = [path for path in (last, folder / last.name) if path.is_file()][:1]
        if not candidates:
            raise CheckpointError(f'{folder} holds no checkpoint of a training: give one')
        checkpoint = candidates[-1]
    return configs[0], checkpoint


def find_device(name: str | None) -> torch.device:
    """Return a device that works, by default the first GPU if there is one."""
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f'device {name} cannot be used: {first_line(error)}') from error
    if device.type == 'cpu':
        keep_freed_memory()
    return device
