"""Reading weights from files that may be damaged, foreign or hostile."""
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, CheckpointLoader, Runner
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError


CHECKPOINT_FORMAT = 1


def load_from_file(filename: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint, .safetensors or torch's own, without running any code that it holds.

    It stands in for mmengine's reader of local files, so that runs, too, load with
    ``weights_only``, whatever the version of torch, and know safetensors.

    Returns:
        mmengine's form: a dict with ``state_dict``, and ``meta`` and more where the file has them.

    Raises:
        CheckpointError: The file is missing, damaged, or asks for code to be run.
    """
    path = Path(filename)
    if not path.is_file():
        raise CheckpointError(f'checkpoint not found: {path}')
    try:
        if path.suffix == '.safetensors':
            device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
            return {'state_dict': load_file(path, device=str(device)), 'meta': {}}
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        cause = re.search(r'GLOBAL ([\w.]+)|(the file asks for .*)', str(error))
        if cause is None:
            raise CheckpointError(f'{path} is not a checkpoint, or it is damaged') from error
        raise CheckpointError(
            f'{path} is refused: it asks for {cause[1] or cause[2]}, and weights need no code. '
            'If you trust where it comes from, open it there and save its state_dict '
            'alone, best as .safetensors') from error
    except (SafetensorError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f'{path} is damaged or cut short ({reason}): '
                              'copy it again') from error
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a checkpoint')
    return content if 'state_dict' in content else {'state_dict': _weights(content, path),
                                                    'meta': {}}


def _weights(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights of a file that is a bare state dict, or has one under 'model'."""
    state = content.get('model', content)
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f'{path} holds no weights: its entries are '
                              f'{", ".join(map(str, list(state)[:5]))}')
    return weights


CheckpointLoader.register_scheme('', load_from_file, force=True)


@HOOKS.register_module()
class CheckWeightsHook(Hook):
    """See that a loaded checkpoint fits the model, where mmengine only logs that it does not.

    For test and resume every weight must be there. For a fine-tuning (``load_from``) weights of
    another shape, such as the classifier of other classes, are left as initialised, and said so.

    Raises:
        CheckpointError: The checkpoint does not fit; the message names the weights.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare names and shapes before the runner copies the weights."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        wanted = {name.removeprefix('module.'): tensor
                  for name, tensor in model.state_dict().items()
                  if not name.endswith('num_batches_tracked')}
        state = checkpoint['state_dict']
        found = {name.removeprefix('module.'): tensor for name, tensor in state.items()}
        missing = [name for name in wanted if name not in found]
        other = [name for name in wanted
                 if name in found and found[name].shape != wanted[name].shape]
        if len(missing) == len(wanted):
            hint = (': it is of the authors\' release, run tools/convert_checkpoint.py on it first'
                    if any('.attn.sr.' in name for name in found) else '')
            raise CheckpointError('the checkpoint has not one weight of this model' + hint)
        if not missing and not other:
            return
        shapes = [f'{name} is {_shape(found[name])} in the checkpoint and {_shape(wanted[name])} '
                  'in the model' for name in other]
        if isinstance(runner._train_loop, BaseLoop) and not runner._resume:  # fine-tuning
            for name in other:
                state.pop(name, state.pop(f'module.{name}', None))
            runner.logger.warning('Left as initialised, since the checkpoint has other weights: ' +
                                  '; '.join([*shapes, *(f'{name} is not in it'
                                                        for name in missing)]))
            return
        advice = ('' if not other else '. A classifier of another size means another class count: '
                  'take the config that the checkpoint was trained with, or fine-tune it with '
                  'tools/train.py CONFIG --load-from CHECKPOINT')
        raise CheckpointError('the checkpoint does not fit the model: ' + '; '.join(
            [*shapes[:6], *(f'{name} is not in it' for name in missing[:6])]) + advice)


def _shape(tensor: Tensor) -> str:
    return 'x'.join(map(str, tensor.shape)) or 'a number'
