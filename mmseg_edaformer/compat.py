"""All that exists only because of a dependency's version.

Each piece names the upstream problem and when it can go.
"""
import atexit
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

STACKS: dict[str, dict[str, tuple[str, str | None]]] = {
    'openmmlab': {'mmengine': ('0.10.3', None), 'mmsegmentation': ('1.2.2', None),
                  'mmcv-lite': ('2.0.1', '2.2.0')},
    'fork': {'onedl-mmengine': ('0.10.8', None), 'onedl-mmsegmentation': ('1.4.0', None),
             'onedl-mmcv': ('2.3.0', None)},
}
"""Minimum and first unsupported versions of the two sets of packages; a full mmcv serves as well
as mmcv-lite."""

_torchvision: Any = None  # keeps the declarations alive


def check_environment() -> None:
    """See that what this package stands on is there and new enough.

    Raises:
        ImportError: What is missing or of a wrong version, and the command that mends it.
    """
    fork = _version('onedl-mmengine') is not None and _version('mmengine') is None
    stack = 'fork' if fork else 'openmmlab'
    wanted: dict[str, tuple[str, str | None]] = {'torch': ('2.4', None), **STACKS[stack]}
    if not fork and _version('mmcv') is not None:
        wanted['mmcv'] = wanted.pop('mmcv-lite')
    wrong = []
    for name, (minimum, below) in wanted.items():
        found = _version(name)
        if found is None:
            wrong.append(f'{name} is missing')
        elif _digits(found) < _digits(minimum) or (below and _digits(found) >= _digits(below)):
            wrong.append(f'{name} {found} does not fit: it must be {minimum} or newer' +
                         (f' and older than {below}' if below else ''))
    if wrong:
        fix = ' '.join(f'"{name}>={minimum}{f",<{below}" if below else ""}"'
                       for name, (minimum, below) in wanted.items())
        raise ImportError(f'mmseg_edaformer cannot start: {"; ".join(wrong)}. '
                          f'Run: {sys.executable} -m pip install {fix} ftfy regex')


def declare_torchvision_ops() -> None:
    """Let torchvision be imported where its build does not match torch's, as timm does.

    torchvision's CUDA build does not load its operators on a CPU torch, and then fails at import
    because they are not declared; there is no CPU build for every torch on every package index.
    timm and mmpretrain call none of them. Can go when both builds can be installed alike.
    """
    global _torchvision
    import torch
    found = _version('torchvision')
    if (found is None or 'torchvision' in sys.modules or not torch.__version__.endswith('+cpu') or
            found.endswith('+cpu')):
        return
    _torchvision = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
        _torchvision.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _digits(version: str) -> tuple[int, ...]:
    """The release of a version: '2.13.0+cpu' -> (2, 13, 0)."""
    digits = []
    for part in version.split('+')[0].split('.'):
        number = ''.join(ch for ch in part if ch.isdigit())
        if not number or not part.isdigit():
            break
        digits.append(int(number))
    return tuple(digits)


def stub_mmcv_ops() -> None:
    """Let ``mmseg.models`` be imported with mmcv-lite.

    mmseg 1.2.2 imports mmcv.ops for Mask2Former's sake, and mmcv.ops needs the compiled
    ``mmcv._ext``, which mmcv-lite lacks. The stub's operators raise when they are called. Can go
    when mmsegmentation imports mmcv.ops lazily; the fork needs no stub.
    """
    if _version('onedl-mmcv') is not None or importlib.util.find_spec('mmcv._ext') is not None:
        return

    class MissingOps(types.ModuleType):

        def __getattr__(self, name: str) -> Any:
            if name.startswith('__'):
                raise AttributeError(name)

            def missing(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError(f'the operator {name} needs the compiled mmcv in place of '
                                   'mmcv-lite')
            return missing

    module = MissingOps('mmcv._ext')
    # The Runner's report of the environment asks for the spec.
    module.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)
    sys.modules['mmcv._ext'] = module


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep what mmcv and mmseg say of themselves at every import off the terminal.

    mmcv-lite warns of operators that nothing here uses, mmseg of a default of its loss. Can go
    when they warn at use instead.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Fail to import|Default ``avg_non_ignore``')
        warnings.filterwarnings('ignore', category=DeprecationWarning)
        yield


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read the checkpoints that mmengine writes.

    mmengine stores its HistoryBuffer, which pickles numpy arrays and four of its own methods by
    ``getattr``. The raw ``getattr`` would let a file reach anything, so a stand-in takes its
    place that knows those methods only. Can go when mmengine stores plain numbers.
    """
    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer
    try:
        from numpy._core.multiarray import _reconstruct, scalar
    except ImportError:  # numpy < 2
        from numpy.core.multiarray import _reconstruct, scalar  # type: ignore[no-redef]

    def history_buffer_method(owner: type, name: str) -> Any:
        if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
            return getattr(owner, name)
        raise RuntimeError(f'the file asks for {name} of {owner}, which no checkpoint needs')

    history_buffer_method.__module__ = 'builtins'
    history_buffer_method.__qualname__ = history_buffer_method.__name__ = 'getattr'
    torch.serialization.add_safe_globals([
        HistoryBuffer, history_buffer_method, _reconstruct, scalar, np.ndarray, np.dtype,
        *{type(np.dtype(code)) for code in ('f8', 'f4', 'i8', 'i4')},
    ])
    if torch.__version__ >= torch.torch_version.TorchVersion('2.6'):
        for core in ('numpy.core', 'numpy._core'):
            torch.serialization.add_safe_globals([
                (_reconstruct, f'{core}.multiarray._reconstruct'),
                (scalar, f'{core}.multiarray.scalar')])


def init_cpu_distributed(cfg: Any) -> None:
    """Let a torchrun launch work where there is no GPU.

    mmengine's init_dist selects a CUDA device, its Runner hands device ids to DDP, and torch's
    SyncBatchNorm refuses CPU tensors. So the process group is made first, with gloo, and the
    config names a wrapper without device ids and no SyncBN. Can go when mmengine's init_dist asks
    which device there is.

    Args:
        cfg: The config of the run, changed in place.
    """
    import torch
    import torch.distributed
    if torch.cuda.is_available() or torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group('gloo')
    cfg.sync_bn = None
    cfg.model_wrapper_cfg = dict(type='CPUDistributedDataParallel')


def find_newest_checkpoints() -> None:
    """Let any resume take the newest checkpoint that loads, wherever the work dir lies now.

    mmengine follows ``last_checkpoint`` as a path from the current folder, and fails where that
    file does not load. Can go when mmengine looks for checkpoints itself.
    """
    from mmengine.runner import runner

    from .engine.saving import find_checkpoint
    runner.find_latest_checkpoint = find_checkpoint


def leave_distributed(code: int = 0) -> None:
    """End a process of a distributed run that is done: the last thing that a command line does.

    mmengine never ends the process group, and gloo now and then aborts a process whose peer goes
    away while it is still busy, or one that takes its threads down. So all meet, over the store and
    not over gloo, before the first one leaves, rank 0 leaves last, and none takes gloo down: the
    process ends here. Can go when mmengine destroys its process group and gloo survives that.

    Args:
        code: Exit code of the process.
    """
    import torch.distributed as dist
    if not dist.is_initialized():
        return
    if dist.get_backend() == 'gloo':
        rank, others = dist.get_rank(), range(1, dist.get_world_size())
        store = dist.distributed_c10d._get_default_store()
        dist.barrier()
        store.set(f'done{rank}', '')
        store.wait([f'done{other}' for other in (0, *others)])
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        if rank:
            store.set(f'left{rank}', '')
        elif others:
            store.wait([f'left{other}' for other in others])
        os._exit(code)
    dist.destroy_process_group()


def register_cpu_wrapper() -> None:
    """Register the DDP wrapper that `init_cpu_distributed` names."""
    from mmengine.model import MMDistributedDataParallel
    from mmengine.registry import MODEL_WRAPPERS

    class CPUDistributedDataParallel(MMDistributedDataParallel):

        def __init__(self, module: Any, device_ids: Any = None, **kwargs: Any) -> None:
            super().__init__(module, device_ids=None, **kwargs)

    MODEL_WRAPPERS.register_module(module=CPUDistributedDataParallel)


def compiled_resize(x: 'Tensor', size: tuple[int, int], align_corners: bool) -> 'Tensor':
    """Bilinear resize as two matrix products, for training in compiled code.

    Upstream: with torch 2.13 on CPUs, inductor's own gradient of ``F.interpolate`` came out zero
    for maps computed in the same graph (seen on EDAFormerHead; tests/engine/test_compile.py fails
    without this). Can go once that test passes with ``F.interpolate``.

    Args:
        x: Map, N x C x h x w.
        size: H and W.
        align_corners: As in ``F.interpolate``.

    Returns:
        Map, N x C x H x W, channels-last.
    """
    import torch
    n, c, height, width = x.shape

    def weights(low: int, full: int) -> 'Tensor':
        place = torch.arange(full, dtype=torch.float32, device=x.device)
        place = place * ((low - 1) / max(full - 1, 1)) if align_corners else (
            (place + 0.5) * (low / full) - 0.5).clamp(0, low - 1)
        distance = (place[:, None] - torch.arange(low, device=x.device)).abs()
        return (1 - distance).clamp(min=0).to(x.dtype)

    rows = weights(height, size[0]) @ x.permute(0, 2, 3, 1).reshape(n, height, width * c)
    return (weights(width, size[1]) @ rows.view(n, size[0], width, c)).permute(0, 3, 1, 2)
