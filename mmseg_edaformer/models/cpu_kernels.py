"""Operators compiled for the CPU at hand, from cpu_kernels.cpp, if there is a C++ compiler.

They are built once, in a few seconds, when a network first predicts on a CPU, and kept in the
user's cache. Without a compiler, or with ``EDAFORMER_NATIVE=0`` in the environment, the functions
here return None and the caller uses PyTorch's operators. The variable also turns off the Triton
kernels of GPUs.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_file

SOURCE = Path(__file__).with_suffix('.cpp')
TYPES = {torch.float32: 'float', torch.bfloat16: 'bfloat16'}
_allowed = True


def kernels_allowed() -> bool:
    """Whether this project's own kernels, here and on GPUs, may replace PyTorch's."""
    return _allowed and os.environ.get('EDAFORMER_NATIVE') != '0'


def allow_kernels(allowed: bool) -> None:
    """Allow or forbid this project's own kernels from now on, for comparisons."""
    global _allowed
    _allowed = allowed


def attend(x: Tensor, kv: Tensor, num_heads: int) -> Tensor | None:
    """`attention.attend_by_rows`, or None if it cannot be computed here."""
    dim = x.shape[1] // num_heads
    if x.dtype != kv.dtype or dim % 4:
        return None
    x, kv = (t.contiguous(memory_format=torch.channels_last) for t in (x, kv))
    out = torch.empty_like(x)
    return out if _call('attend', [x, kv, out], len(x), x.shape[2] * x.shape[3],
                        kv.shape[2] * kv.shape[3], num_heads, dim) else None


def gelu_(x: Tensor) -> Tensor | None:
    """``F.gelu`` in place, for x without gaps in memory; None if it cannot be computed here."""
    return x if _call('gelu', [x], x.numel()) else None


def _call(name: str, tensors: list[Tensor], *sizes: int) -> bool:
    """Call the library's function for the type of the tensors; False if there is none."""
    library = _library() if tensors[0].dtype in TYPES and kernels_allowed() else None
    if library is None:
        return False
    getattr(library, f'{name}_{TYPES[tensors[0].dtype]}')(
        *(ctypes.c_void_p(t.data_ptr()) for t in tensors), *map(ctypes.c_int64, sizes))
    return True


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get('CXX', 'g++'))
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, 'stderr', None) or str(error)).strip().splitlines()[-1:]
        warnings.warn(f'{SOURCE.name} could not be compiled or loaded, so prediction is slower '
                      f"({' '.join(detail)}): set EDAFORMER_NATIVE=0 to silence this", stacklevel=2)
        return None


def _build(compiler: str) -> Path:
    """Compile for this machine, unless the cache has the library; returns its path."""
    root = Path(torch.__file__).parent
    cpuinfo = Path('/proc/cpuinfo')
    flags = [line for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
             if line.startswith(('flags', 'Features'))][:1]
    key = hashlib.sha256('\n'.join([SOURCE.read_text(), torch.__version__, compiler,
                                    platform.machine(), *flags]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmseg_edaformer'
    for library in cache.glob(f'native-{key}-*.so'):
        if library == _place(cache, key, library.read_bytes()):  # a damaged one kills Python
            return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        unit, linked = Path(folder) / 'kernels.o', Path(folder) / 'kernels.so'
        subprocess.run([compiler, '-O3', '-march=native', '-ffp-contract=fast', '-std=c++20',
                        '-fPIC', '-fopenmp', '-DAT_PARALLEL_OPENMP=1', f'-I{root}/include',
                        '-c', SOURCE, '-o', unit], check=True, capture_output=True, text=True)
        # Link the OpenMP that torch ships, if any: a second one would start its own threads.
        openmp = [str(path) for folder in (root / 'lib', root.parent / 'torch.libs')
                  for path in folder.glob('libgomp*')][:1]
        subprocess.run([compiler, '-shared', unit, '-o', linked, f'-L{root}/lib',
                        '-ltorch_cpu', '-lc10', *(openmp or ['-fopenmp'])],
                       check=True, capture_output=True, text=True)
        content = linked.read_bytes()
    library = _place(cache, key, content)
    write_file(library, content)
    return library


def _place(cache: Path, key: str, content: bytes) -> Path:
    return cache / f'native-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so'
