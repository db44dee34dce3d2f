"""Loading the model of a prediction: from a work dir, a config or one file, onto a device."""
import os
from pathlib import Path

import torch
from mmengine.runner import CheckpointLoader

from ..command_line import check_model
from ..engine import load_from_file
from ..engine.allocator import keep_freed_memory
from ..engine.run_config import load_config
from ..engine.single_file import Description, describe, load_model, read_description
from ..errors import CheckpointError, ConfigError, UserError


def load_segmentor(model: Path, checkpoint: str | Path | None
                   ) -> tuple[Description, torch.nn.Module, str]:
    """Return the description of a model, the model on the CPU, and the file of its weights.

    Raises:
        UserError: One of them is not there, or they do not fit.
    """
    check_model(model, checkpoint)
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


def first_line(error: Exception) -> str:
    """Return the beginning of an error's message, for one line of another one."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _find_in_work_dir(folder: Path, checkpoint: str | Path | None) -> tuple[Path, str | Path]:
    configs = sorted(folder.glob('*.py'))
    if not configs:
        raise ConfigError(f'{folder} is not the work dir of a training: it holds no config')
    if len(configs) > 1:
        raise ConfigError(f'{folder} holds several configs, '
                          f'{", ".join(path.name for path in configs[:4])}: give one of them and '
                          'its checkpoint')
    if checkpoint is None:
        found = sorted(folder.glob('best_*.pth'), key=os.path.getmtime)
        pointer = folder / 'last_checkpoint'
        if not found and pointer.is_file():
            # Relative to the work dir; mmengine's own is absolute, and the folder may have moved.
            last = folder / pointer.read_text(errors='replace').strip()
            found = [path for path in (last, folder / last.name) if path.is_file()][:1]
        if not found:
            raise CheckpointError(f'{folder} holds no checkpoint of a training: give one')
        checkpoint = found[-1]
    return configs[0], checkpoint


def find_device(name: str | None) -> torch.device:
    """Return a device that works, by default the first GPU if there is one.

    Raises:
        ConfigError: It cannot be used.
    """
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
