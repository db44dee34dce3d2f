"""Workarounds for versions of dependencies. Each names its upstream cause and when it can go."""
import atexit
import functools
import getpass
import os
import re
import shlex
import sys
import tempfile
import warnings
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

STACKS: dict[str, dict[str, tuple[str, str | None]]] = {
    'openmmlab': {'mmengine': ('0.10.3', None), 'mmsegmentation': ('1.2.2', None),
                  'mmcv-lite': ('2.0.1', '2.2.0'),
                  'ftfy': ('6', None), 'regex': ('2020', None)},  # mmseg does not declare them
    'fork': {'onedl-mmengine': ('0.10.8', None), 'onedl-mmsegmentation': ('1.4.0', None),
             'onedl-mmcv': ('2.3.0', None)},
}
"""Minimum and first unsupported versions of the two sets of packages; a full mmcv serves as well
as mmcv-lite."""
PIP = f'{shlex.quote(sys.executable)} -m pip'


def check_environment() -> None:
    """Check that the required packages are installed in versions that fit.

    Raises:
        ImportError: A package is missing or does not fit; the message has the command to run.
    """
    if misfits := find_misfits():
        raise ImportError('mmseg_edaformer cannot start: {}. Run: {}'.format(*misfits))


def find_misfits() -> tuple[str, str] | None:
    """Return what is wrong with the required packages and the command that fixes it, or None."""
    problems: list[str] = []
    needed: list[str] = []
    uninstall = ''
    for name, (minimum, below) in {'torch': ('2.4', None), **STACKS[installed_stack()]}.items():
        package = 'mmcv' if name == 'mmcv-lite' and version_of('mmcv') else name
        found = version_of(package)
        if found is None:
            problems.append(f'{package} is missing')
        elif release(found) < release(minimum) or (below and release(found) >= release(below)):
            problems.append(f'{package} {found} does not fit: it must be {minimum} or newer' +
                            (f' and older than {below}' if below else ''))
            if package == 'mmcv':  # which has no wheels for a new torch
                uninstall = f'{PIP} uninstall -y mmcv && '
        else:
            continue
        needed.append(f'"{name}>={minimum}{f",<{below}" if below else ""}"')
    return ('; '.join(problems), f'{uninstall}{PIP} install {" ".join(needed)}') if needed else None


def installed_stack() -> str:
    """Return which of `STACKS` is installed, which is also the name of its extra."""
    fork = version_of('onedl-mmengine') is not None and version_of('mmengine') is None
    return 'fork' if fork else 'openmmlab'


def install_command(extra: str) -> str:
    """Return the command that installs an extra: no package index has this package."""
    root = Path(__file__).resolve().parents[1]
    source = (f'-e {shlex.quote(f"{root}[{extra}]")}' if (root / 'setup.py').is_file() else
              f'"mmseg_edaformer[{extra}] @ git+ADDRESS_OF_THE_REPOSITORY"')
    return f'{PIP} install {source}'


def provide_home() -> None:
    """Give a user who is a bare number, as in containers, a home folder and a name.

    Without HOME, yapf, which mmengine imports, raises at import; without a name, an older torch's
    compiler does. The folder lies among the temporary files and belongs to this user
    alone, because libraries are loaded from the cache in it. Can go when both ask for neither.
    """
    if os.name == 'nt':
        return
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ['USER'] = f'uid_{os.getuid()}'
    if os.path.expanduser('~') == '~':
        home = os.path.join(tempfile.gettempdir(), f'home_of_{os.getuid()}')
        with suppress(FileExistsError):
            os.mkdir(home, 0o700)
        os.environ['HOME'] = (home if os.lstat(home).st_uid == os.getuid() else
                              tempfile.mkdtemp(prefix='home_of_'))


def log_in_utf8() -> None:
    """Have runners write their log files as UTF-8, whatever the locale.

    mmengine opens them in the locale's encoding, and under LC_ALL=POSIX without Python's UTF-8 mode
    a class name such as 'Straße' becomes a traceback in the output and is missing in the file.
    Can go when mmengine names the encoding.
    """
    from mmengine.runner import Runner

    def build_logger(self: Any, *args: Any, _build: Any = Runner.build_logger,
                     **kwargs: Any) -> Any:
        # The plain FileHandler has no name in mmengine; this one rotates only if it is told to.
        kwargs.setdefault('file_handler_cfg', dict(
            type='RotatingFileHandler', encoding='utf-8', errors='backslashreplace'))
        return _build(self, *args, **kwargs)

    Runner.build_logger = build_logger


def version_of(package: str) -> str | None:
    """Return the version of an installed package by its metadata, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: '2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(map(int, re.findall(r'\d+', re.split(r'[^\d.]', version)[0])))


@functools.cache
def declare_torchvision_ops() -> Any:
    """Let torchvision be imported where its build does not match torch's, as timm does.

    torchvision's CUDA build does not load its operators on a CPU torch, and then fails at import
    because they are not declared; there is no CPU build for every torch on every package index.
    timm and mmpretrain call none of them. Can go when both builds can be installed alike. The
    declarations last as long as the object that is returned; the cache keeps it.
    """
    import torch
    if not torch.__version__.endswith('+cpu') or (
            version_of('torchvision') or '+cpu').endswith('+cpu'):
        return None
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
        library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    return library


class _MissingOps(Loader):
    """Loads ``mmcv._ext`` where there is none: its operators raise when they are called."""

    def exec_module(self, module: Any) -> None:
        def operator(name: str) -> Any:
            if name.startswith('__'):
                raise AttributeError(name)

            def missing(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError(f'the operator {name} needs the compiled mmcv in place of '
                                   'mmcv-lite')
            return missing
        module.__getattr__ = operator


class _Imports(MetaPathFinder):
    """Helps three packages when they are imported.

    torchvision: see `declare_torchvision_ops`. timm: mmseg imports it, a second of work, for one of
    its backbones, so it is loaded when it is used. ``mmcv._ext``: mmseg 1.2.2 imports mmcv.ops for
    Mask2Former's sake, which needs it, and mmcv-lite lacks it; the fork needs no stub. The last two
    can go when mmseg imports them where they are used.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == 'torchvision':
            declare_torchvision_ops()
        spec = PathFinder.find_spec(name, path) if name in ('timm', 'mmcv._ext') else None
        if name == 'timm' and spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        if name == 'mmcv._ext' and spec is None and version_of('onedl-mmcv') is None:
            spec = ModuleSpec(name, _MissingOps())
        return spec


def prepare_imports() -> None:
    """Let mmcv, mmseg, timm and mmpretrain be imported, and quietly; costs nothing until they are.

    mmcv-lite warns of operators that nothing here uses, mmseg of a default of its loss, of its own
    use of an old function and of a hook that draws nothing: the filter can go when they do not.
    """
    provide_home()
    sys.meta_path.insert(0, _Imports())
    warnings.filterwarnings('ignore', message='Fail to import|Default ``avg_non_ignore``|'
                            '``build_loss`` would be|The draw is False|'
                            'This DataLoader will create')


def swaps_channels(preprocessor: Any) -> bool:
    """Whether a ``SegDataPreProcessor`` turns the channels of pictures, which come as BGR, around.

    mmseg keeps it as ``channel_conversion``, its fork as mmengine does with an underscore. Can go
    when one of the two is no longer served.
    """
    return bool(getattr(preprocessor, 'channel_conversion', False) or
                getattr(preprocessor, '_channel_conversion', False))


def is_exporting() -> bool:
    """Whether torch.export traces: other runtimes read its graph, so it must hold plain operators.

    torch before 2.7 cannot tell, and this says no. ``torch.compiler.is_exporting`` can take its
    place when torch 2.6 is no longer served.
    """
    import torch
    return torch.compiler.is_compiling() and getattr(torch.compiler, 'is_exporting', bool)()


@functools.cache
def allow_mmengine_checkpoints() -> list[Any]:
    """Let ``torch.load(weights_only=True)`` read the checkpoints that mmengine writes.

    mmengine stores its HistoryBuffer, which pickles numpy arrays and four of its own methods by
    ``getattr``. Real ones would let a file reach anything (``getattr``), forge arrays of Python
    objects (``numpy.ndarray``, a dtype's ``__setstate__``), or change what HistoryBuffer does for
    all. So stand-ins take their places that make plain numbers only; they are returned. Can go when
    mmengine stores plain numbers.
    """
    import pickle

    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer
    plain = {code: np.dtype(code) for code in ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4',
                                               'u8', 'f2', 'f4', 'f8')}

    def refuse(what: str) -> Any:
        raise pickle.UnpicklingError(f'the file asks for {what}, which no checkpoint needs')

    def named(stand_in: Any, module: str, name: str) -> Any:
        stand_in.__module__, stand_in.__qualname__, stand_in.__name__ = module, name, name
        return stand_in

    class Filled:
        """A class that a file may name, and whose objects it may fill, but that it cannot call."""

        def __new__(cls, *args: Any) -> Any:
            if not isinstance(cls, type):  # torch calls it with what a file names as the class
                refuse(f'a new {cls.path}')
            return super().__new__(cls)

        def __init__(self, cls: type) -> None:
            self.cls = cls
            self.path = f'{cls.__module__}.{cls.__qualname__}'
            named(self, cls.__module__, cls.__qualname__)

        def __eq__(self, other: object) -> bool:  # torch looks the class of an object up
            return other is self or other is self.cls

        def __hash__(self) -> int:
            return hash(self.cls)

        def __call__(self, *args: Any) -> Any:
            refuse(f'a call of {self.path}')

    def dtype(code: Any, *_: Any) -> Any:
        # numpy's own object, not a copy: filling it with a state does nothing.
        return plain[code] if code in plain else refuse(f'numpy.dtype({code!r})')

    def reconstruct(module: str) -> Any:
        return named(lambda *_: np.empty(0), module, '_reconstruct')

    def scalar(module: str) -> Any:
        def make(kind: Any, content: Any) -> Any:
            if kind not in plain.values() or not isinstance(content, bytes):
                refuse(f'{module}.scalar of {kind!r}')
            return np.frombuffer(content, kind, 1)[0]
        return named(make, module, 'scalar')

    def history_buffer_method(owner: Any, name: str) -> Any:
        if owner is Buffer and name in ('min', 'max', 'mean', 'current'):
            return getattr(HistoryBuffer, name)
        return refuse(f'getattr({owner}, {name!r})')

    class Buffer(HistoryBuffer):

        def __init__(self, *args: Any) -> None:
            refuse('a call of HistoryBuffer')

        def __setstate__(self, state: Any) -> None:
            if not isinstance(state, dict) or not isinstance(state.get('max_length'), int) or any(
                    not isinstance(state.get(name), np.ndarray) or state[name].ndim != 1
                    for name in ('_log_history', '_count_history')):
                refuse('a HistoryBuffer without histories')
            super().__setstate__({name: state[name] for name in (
                'max_length', '_log_history', '_count_history')})
            self.__class__ = HistoryBuffer

    cores = ('numpy.core.multiarray', 'numpy._core.multiarray')  # numpy 1 and 2
    allowed = [
        named(Buffer, HistoryBuffer.__module__, HistoryBuffer.__qualname__),
        named(history_buffer_method, 'builtins', 'getattr'), named(dtype, 'numpy', 'dtype'),
        named(lambda: b'', 'builtins', 'bytes'),  # the content of an empty array
        *map(reconstruct, cores), *map(scalar, cores),
        *[Filled(cls) for cls in [np.ndarray, *map(type, plain.values())]]]
    torch.serialization.add_safe_globals(allowed)
    return allowed


def init_distributed(cfg: Any) -> None:
    """Start the process group of a torchrun launch where mmengine or torch cannot.

    Without a GPU: mmengine's init_dist selects a CUDA device, its Runner hands device ids to DDP,
    and torch's SyncBatchNorm refuses CPU tensors. So the process group is made first, with gloo,
    and the config names no device ids and no SyncBN. Can go when mmengine's
    init_dist asks which device there is.

    After a restart: torch 2.13's static rendezvous keeps its store, and with it the addresses of
    processes that are gone, at which the new ones wait for ever. So each start gets a prefix of its
    own. Can go when torch/distributed/rendezvous.py has one again for stores of the agent.

    ``cfg``, the config of the run, is changed in place.
    """
    import torch
    import torch.distributed as dist
    restart = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
    on_gpu = torch.cuda.is_available()
    if dist.is_initialized() or (on_gpu and not restart):
        return
    settings: dict[str, Any] = dict(backend='gloo')
    if on_gpu:
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        settings = dict(cfg.get('env_cfg', {}).get('dist_cfg') or dict(backend='nccl'))
        if isinstance(settings.get('timeout'), (int, float)):
            settings['timeout'] = timedelta(seconds=settings['timeout'])
    else:
        cfg.sync_bn = None
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    if restart:
        rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']),
                              world_size, is_master=False)
        settings.update(store=dist.PrefixStore(f'start {restart}', store), rank=rank,
                        world_size=world_size)
    dist.init_process_group(**settings)


def leave_distributed(code: int = 0) -> None:
    """End a process of a distributed run that is done: the last thing that a command line does.

    mmengine never ends the process group, and gloo now and then aborts a process whose peer goes
    away while it is still busy, or one that takes its threads down. So all meet, over the store and
    not over gloo, before the first one leaves, rank 0 leaves last, and none takes gloo down: the
    process ends here, with this exit code. Can go when mmengine destroys its process group and gloo
    survives that.
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


def compiled_resize(x: 'Tensor', size: tuple[int, int], align_corners: bool) -> 'Tensor':
    """Bilinear resize as two matrix products, for training in compiled code.

    Upstream: with torch 2.13 on CPUs, inductor's own gradient of ``F.interpolate`` came out zero
    for maps computed in the same graph (seen on EDAFormerHead; tests/engine/test_compile.py fails
    without this). Can go once that test passes with ``F.interpolate``.

    Arguments are those of ``F.interpolate``; the result is channels-last.
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
