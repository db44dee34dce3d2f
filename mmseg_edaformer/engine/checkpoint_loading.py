"""Reading weights from files that may be damaged, foreign or hostile."""
import os
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import urlparse

import torch
import torch.distributed
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner, checkpoint as zoo
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import compat
from ..errors import CheckpointError

CHECKPOINT_FORMAT = 1
"""Version of the checkpoint files written here; a larger one comes from a newer package."""

_AGAIN = 'copy it again, or resume from an older one'


def load_from_file(filename: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint, .pth or .safetensors, without running any code that it holds.

    The other `LOADERS` end here. It allows nothing but tensors, plain Python values and mmengine's
    logs. torch does not notice damaged tensors, so the checksums of .pth files are verified first;
    .safetensors and old .pth files, which are no zip archives, have none.

    Returns:
        A dict in mmengine's form, with ``state_dict`` and ``meta``, and more if the file has it.

    Raises:
        CheckpointError: The file is missing, damaged, asks for code to be run, claims to hold more
            than it does, or was written by a newer version of this package.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise CheckpointError(f'checkpoint not found: {path}')
    path.open('rb').close()  # raises PermissionError, which is not damage
    try:
        if path.suffix == '.safetensors':
            device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
            content: Any = load_file(path, device=str(device))
        else:
            _check_container(path)
            with _allowing_only_logs():
                content = torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_explain_refusal(path, str(error))) from error
    except Exception as error:  # a damaged file can raise anything
        reason = _shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
        if isinstance(error, MemoryError) or re.search('CUDA|memory', reason):
            raise CheckpointError(f'{path} cannot be loaded here: {reason}') from error
        raise CheckpointError(f'{path} is damaged or cut short ({reason}): {_AGAIN}') from error
    return _normalized(content, path)


def _check_container(path: Path) -> None:
    with path.open('rb') as file:
        zipped = file.read(4) == b'PK\3\4'  # as torch decides
    if not zipped:
        try:
            tarfile.open(path, 'r:').close()
        except tarfile.TarError:
            return
        # torch before 2.6 runs the code in them.
        raise CheckpointError(f'{path} is a tar archive, which torch wrote before 2017 and which '
                              'can hold code: it is refused')
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = {member.filename for member in members}
        if any(PurePosixPath(name).name == 'constants.pkl' for name in names):
            raise CheckpointError(f'{path} is a TorchScript program, not weights: it is refused')
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(f'{path} is compressed, which checkpoints of torch are not: it '
                                  'is refused. If it holds a checkpoint, unzip it')
        size = path.stat().st_size
        # For a folder (16), or a member with two sizes, torch would return uninitialised memory.
        if archive.comment or len(names) < len(members) or any(
                member.external_attr & 16 or member.file_size != member.compress_size
                for member in members) or sum(member.file_size for member in members) > size:
            raise CheckpointError(f'{path} is damaged, its table of contents is inconsistent: '
                                  f'{_AGAIN}')
        if any(member.CRC for member in members):  # set_crc32_options(False) writes zeros
            damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f'{path} is damaged: the checksum of {damaged} in it is '
                                      f'wrong; {_AGAIN}')


@contextmanager
def _allowing_only_logs() -> Iterator[None]:
    """Allow mmengine's logs, and nothing that other libraries have added."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(compat.allow_mmengine_checkpoints())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='Detected pickle protocol')
            yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _explain_refusal(path: Path, error: str) -> str:
    """Name what a pickle asked for and weights do not need."""
    asked = re.search(r'GLOBAL (\S+)|the file asks for (.+), which', error)
    if asked is not None:
        return (f'{path} is refused: it asks for {_shown(asked[1] or asked[2])}, and weights need '
                'no code. If you trust where it comes from, open it there and save its state_dict '
                'alone, best as .safetensors')
    reason = error.partition('WeightsUnpickler error:')[2].strip().splitlines() or ['no pickle']
    return (f'{path} is damaged, or not a checkpoint as torch.save writes it by default '
            f'({_shown(reason[0])}). If you trust where it comes from, save it there without '
            'pickle_protocol, best as .safetensors')


def _normalized(content: Any, path: Path) -> dict[str, Any]:
    """Return content in mmengine's form from a bare state dict, or one under 'model'."""
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a checkpoint')
    bare = 'state_dict' not in content
    state = content.get('model', content) if bare else content['state_dict']
    meta = {} if bare else content.get('meta') or {}
    # Other attributes of an OrderedDict would hide its methods.
    if not isinstance(state, dict) or not isinstance(meta, dict) or not (
            getattr(state, '__dict__', {}).keys() <= {'_metadata'}) or not (
            bare or all(isinstance(name, str) for name in state)):
        raise CheckpointError(f'{path} is not a checkpoint: its state_dict or its meta is not '
                              'written by torch or mmengine')
    weights = {name: value for name, value in state.items()
               if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f'{path} holds no weights: its entries are '
                              f'{_shown(", ".join(map(str, list(state)[:5]))) or "none"}')
    for name, tensor in weights.items():  # a small file can repeat one number any number of times
        if tensor.numel() * tensor.element_size() > max(path.stat().st_size, 2 ** 20):
            raise CheckpointError(f'{path} is refused: {_shown(name)} of shape {_shape(tensor)} '
                                  'would be larger than the file')
    written_by = meta.get('mmseg_edaformer')
    if written_by is not None:
        form = written_by.get('format') if isinstance(written_by, dict) else None
        if not isinstance(form, int):
            raise CheckpointError(f'{path} does not say its format: {_AGAIN}')
        if form > CHECKPOINT_FORMAT:
            raise CheckpointError(
                f'{path} was written by mmseg_edaformer {_shown(written_by.get("version"))}, which '
                'is newer than this one: upgrade mmseg_edaformer to read it')
    _check_removals(content.get('message_hub'), path)
    return {**({} if bare else content), 'state_dict': weights if bare else state, 'meta': meta}


def _check_removals(message_hub: Any, path: Path) -> None:
    """Raise CheckpointError if a resumed run would remove anything but checkpoints."""
    info = message_hub.get('runtime_info') if isinstance(message_hub, dict) else None
    for key, value in info.items() if isinstance(info, dict) else ():
        key = str(key)
        if key.startswith('best_ckpt') and not (isinstance(value, str) and re.fullmatch(
                r'best_.+', re.split(r'[/\\]', value)[-1])) and value is not None:
            raise CheckpointError(f'{path} is refused: the best checkpoint, which a resumed run '
                                  f'would remove, is {_shown(value)}, which is no checkpoint')
        if key == 'keep_ckpt_ids' and not (isinstance(value, list) and all(
                isinstance(step, int) for step in value)):
            raise CheckpointError(f'{path} is refused: the checkpoints that a resumed run would '
                                  f'remove are {_shown(value)}, which are no steps')


def load_from_http(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Download a checkpoint to torch's cache, unless it is there, and read it.

    If its name ends in a hash (``resnet18-5c106cde.pth``), the download must have that hash.
    """
    name = PurePosixPath(urlparse(filename).path).name
    if not name.strip('.') or set(name) & set('\\:'):
        raise CheckpointError(f'{filename} does not end in the name of a file')
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    rank, processes = get_dist_info()
    for turn in ('first', 'others') if processes > 1 else ('first',):
        # The first process downloads for the others, which share its disk.
        if (rank == 0) == (turn == 'first') and not path.exists():
            # Eight digits that begin with 20 are a date.
            ending = re.search(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$', name)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(filename, str(path), ending and ending[1],
                                               progress=os.isatty(2))
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f'{filename} cannot be downloaded: {error}. Download it by '
                                      'other means and give the file') from error
        if processes > 1:
            torch.distributed.barrier()
    return load_from_file(path, map_location)


def load_from_zoo(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read weights that mmengine knows by name, such as ``open-mmlab://resnet50_v1c``."""
    scheme, _, name = filename.partition('://')
    try:
        if scheme in ('torchvision', 'modelzoo'):
            sources = zoo.get_torchvision_models()
        else:
            sources = zoo.get_external_models()
            name = zoo.get_deprecated_model_names().get(name, name)
    except ImportError as error:
        raise CheckpointError(f'{filename} cannot be looked up: {error}') from error
    if name not in sources:
        raise CheckpointError(f'{filename} is not known to mmengine')
    source = sources[name]
    if source.startswith(('http://', 'https://')):
        return load_from_http(source, map_location)
    return load_from_file(Path(zoo._get_mmengine_home(), source), map_location)


def refuse_scheme(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Refuse what needs mmengine's own readers, which may run code."""
    raise CheckpointError(f'{filename} cannot be read: download it and give the file')


LOADERS: dict[str, Callable[..., dict[str, Any]]] = {
    **dict.fromkeys(('http://', 'https://'), load_from_http),
    **dict.fromkeys(('torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://'),
                    load_from_zoo),
    **dict.fromkeys(('mmcls://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://'), refuse_scheme),
    '': load_from_file}
"""What reads a checkpoint, by a pattern for the start of its name; mmengine has the same ones."""


def load_checkpoint(filename: str | Path, map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a checkpoint by the first of `LOADERS` that its name matches."""
    name = str(filename)
    loader = next(loader for scheme, loader in LOADERS.items() if re.match(scheme, name))
    return loader(name, map_location)


def compare_weights(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what of a checkpoint does not fit a model, by name, other shapes first."""
    given, wanted = ({name: tensor for name, tensor in weights.items()
                      if not name.endswith('num_batches_tracked')} for weights in (given, wanted))
    return {
        **{name: f'{name} is {_shape(given[name])} in the checkpoint and {_shape(tensor)} in the '
           'model' for name, tensor in wanted.items()
           if name in given and given[name].shape != tensor.shape},
        **{name: f'{name} is not in it' for name in wanted if name not in given},
        **{name: f'{name} is not in the model' for name in given if name not in wanted}}


def join_problems(problems: Mapping[str, str]) -> str:
    """Return the first problems as a text."""
    more = f' and {len(problems) - 6} more' if len(problems) > 6 else ''
    return '; '.join([*problems.values()][:6]) + more


def check_weights(model: nn.Module, checkpoint: dict[str, Any], *,
                  fine_tune: bool = False) -> list[str]:
    """Check that a loaded checkpoint fits a model; mmengine only logs that it does not.

    With ``fine_tune``, weights that do not fit, such as the classifier of other classes, may stay
    as initialised: they are removed from the checkpoint, and returned with reasons.

    Raises:
        CheckpointError: A weight is nan or infinite, as a diverged training leaves it, or no weight
            fits. Without ``fine_tune``: a weight is missing or has another shape.
    """
    model = cast(Any, model).module if is_model_wrapper(model) else model
    wanted = {name.removeprefix('module.'): tensor for name, tensor in model.state_dict().items()}
    state = checkpoint['state_dict']
    given = {name.removeprefix('module.'): tensor for name, tensor in state.items()
             if name.removeprefix('module.') in wanted}
    parameters = {name for name, _ in model.named_parameters()}
    for name in given:  # a buffer may be a mask of -inf
        wrong = ~given[name].isfinite() if name in parameters else given[name].isnan()
        if wrong.any():
            raise CheckpointError(
                f'{name} has {int(wrong.sum())} of {wrong.numel()} numbers in the checkpoint '
                'that are nan or infinite: the training diverged or the file is damaged. Use an '
                'older checkpoint')
    if not given:
        hint = ('. It is the authors\' release: run tools/convert_checkpoint.py on it first'
                if any('.attn.sr.' in name for name in state) else '')
        raise CheckpointError('the checkpoint has no weight of this model' + hint)
    problems = compare_weights(given, wanted)
    if problems and not fine_tune:
        advice = ('' if given.keys().isdisjoint(problems) else '. A classifier of another size '
                  'means another number of classes: use the config that the checkpoint was trained '
                  'with, or fine-tune it with tools/train.py CONFIG --load-from CHECKPOINT')
        raise CheckpointError(f'the checkpoint does not fit the model: {join_problems(problems)}'
                              f'{advice}')
    for name in given.keys() & problems.keys():
        state.pop(name, state.pop(f'module.{name}', None))
    return [*problems.values()]


@HOOKS.register_module()
class CheckWeightsHook(Hook):
    """Applies `check_weights` to the checkpoint that a runner loads.

    Test and resume need every weight. Fine-tuning (``load_from``) leaves weights of another shape
    as initialised, and logs them.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare names and shapes before the runner copies the weights."""
        fine_tune = isinstance(runner._train_loop, BaseLoop) and not runner._resume
        left = check_weights(runner.model, checkpoint, fine_tune=fine_tune)
        if left:
            runner.logger.warning('Left as initialised, because the checkpoint does not fit: ' +
                                  '; '.join(left))


def _shown(value: Any) -> str:
    """Return text from a file, cut, and without characters that control a terminal."""
    return ''.join(ch if ch.isprintable() else '?' for ch in str(value)[:200])


def _shape(tensor: Tensor) -> str:
    return 'x'.join(map(str, tensor.shape)) or 'a number'
