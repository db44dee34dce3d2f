"""What `doctor` tries in a child process, where a library may crash or hang."""
import faulthandler
import importlib.util
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import compat
from .doctor import (
    IMPORTS,
    INSTALL,
    OPTIONAL,
    PIP,
    Report,
    check_folder,
    check_torchvision,
    find_fix,
)

ROOT = Path(__file__).resolve().parents[1]


def try_all(notes: str, timeout: str, config: str | None = None) -> None:
    """Import what is needed, predict with EDAFormer-T, check the config; note each step in a file.

    A step that takes more than ``timeout`` seconds ends the process, even within C code.
    """
    report = Report(notes=notes)

    def attempt(step: str, level: str, call: Callable[..., str], *args: Any) -> bool:
        report.add_fact('Tried', step, 'fails')  # until it ends
        faulthandler.dump_traceback_later(float(timeout), exit=True)
        try:
            report.add_fact('Tried', step, call(report, *args))
            return True
        except (Exception, SystemExit) as error:
            report.add_failure(level, step, f'fails: {_describe(error)}')
            return False

    for name in IMPORTS:
        if not attempt(f'import {name}', 'error', try_import, name):
            return
        if name == 'torch':
            attempt("torch's collect_env", 'warning', collect_environment)
            attempt('torch devices', 'error', check_torch)
    compat.prepare_imports()  # as the package itself does
    for name in OPTIONAL:
        if importlib.util.find_spec(name) is not None:
            attempt(f'import {name}', 'warning', try_import, name)
    if attempt('import mmseg_edaformer', 'error', try_import, 'mmseg_edaformer'):
        for device in ('cpu', 'cuda') if sys.modules['torch'].cuda.is_available() else ('cpu',):
            attempt(f'EDAFormer-T on {device}', 'error', predict, device)
        if config is not None:
            attempt('config', 'error', check_config, config)


def try_import(report: Report, name: str) -> str:
    """Import a module, and return its version and folder."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        module = importlib.import_module(name)
        if name in ('mmpretrain', 'mmseg_edaformer'):  # the rest does not say whether it works
            importlib.import_module(f'{name}.models')
    version, folder = getattr(module, '__version__', ''), Path(str(module.__file__)).parent
    if name == 'mmseg_edaformer' and folder.resolve() != Path(__file__).resolve().parent:
        report.add('warning', f'Python imports another copy, {folder}, than the one in {ROOT}',
                   INSTALL)
    if name == 'torchvision':  # whose metadata may not tell its build
        check_torchvision(report, sys.modules['torch'].__version__, version)
    return f'{version} {folder}'.strip()


def collect_environment(report: Report) -> str:
    """Add what torch collects of the machine for bug reports."""
    from torch.utils.collect_env import get_env_info
    for name, value in get_env_info()._asdict().items():
        if value and name not in ('torch_version', 'pip_packages', 'conda_packages', 'cpu_info'):
            report.add_fact('Environment', name, ', '.join(str(value).splitlines()))
    return 'see Environment'


def check_torch(report: Report) -> str:
    """Check the threads that torch starts and the GPUs that it can use."""
    import torch
    cores, threads = usable_cores(), torch.get_num_threads()
    if threads > cores:
        report.add('warning', f'torch starts {threads} threads on {cores} '
                   f'core{"s" if cores > 1 else ""}, which makes it many times slower',
                   f'export OMP_NUM_THREADS={cores}')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for warning in caught:
        report.add('warning', f'torch warns: {" ".join(str(warning.message).split())}')
    if count and compat._version('triton') is None:
        report.add('warning', 'Triton is missing; --compile needs it on a GPU',
                   f'{PIP} install triton')
    cards = report.facts.get('Environment', {}).get('nvidia_gpu_models')
    if cards and not count and not caught:
        _explain_no_gpu(report, f'torch does not see the GPU ({cards})',
                        torch.version.cuda or torch.version.hip)
    return f'{count or "no"} GPU{"" if count == 1 else "s"}'


def _explain_no_gpu(report: Report, problem: str, build: str | None) -> None:
    if build is None:
        report.add('warning', f'{problem}: it was built for CPUs. Install the build that '
                   'https://pytorch.org/get-started/locally names, such as',
                   f'{PIP} install --force-reinstall --index-url https://pypi.org/simple '
                   f'"torch=={(compat._version("torch") or "").partition("+")[0]}"')
    elif os.environ.get('CUDA_VISIBLE_DEVICES', '0').strip() in ('', '-1'):
        report.add('warning', f'{problem}: CUDA_VISIBLE_DEVICES hides it',
                   'unset CUDA_VISIBLE_DEVICES')
    else:
        report.add('warning', f'{problem}: the driver is too old for CUDA {build}, or this user '
                   'may not open the device files', 'ls -l /dev/nvidia*')


def predict(report: Report, device: str) -> str:
    """Predict a 64 x 64 image with EDAFormer-T and random weights, without ISR and with it."""
    import torch
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    from mmseg_edaformer.isr import isr
    init_default_scope('mmseg')
    sizes = dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = MODELS.build(Config.fromfile(
            ROOT / 'configs' / 'edaformer_t_ade.py').model).eval().to(device)
        for ratio in ('none', 'optimal'):
            with isr(model, ratio), torch.no_grad():
                model.test_step(dict(inputs=[torch.zeros(3, 64, 64, dtype=torch.uint8)],
                                     data_samples=[SegDataSample(metainfo=sizes)]))
    for warning in caught:
        if str(warning.message).startswith('cpu_kernels.cpp'):
            report.add('warning', str(warning.message))
    return 'predicts a 64 x 64 image, without ISR and with it'


def check_config(report: Report, path: str) -> str:
    """Check a config as tools/train.py and tools/test.py do, but go on after an error."""
    import torch
    from mmengine.logging import MMLogger

    from mmseg_edaformer.engine import checks
    from mmseg_edaformer.engine.run_config import load_config
    from mmseg_edaformer.errors import clear_errors

    def check(call: Callable[..., Any], *args: Any) -> Any:
        try:
            with clear_errors():
                return call(*args)
        except (Exception, SystemExit) as error:  # the other checks have more to say
            problem = _describe(error)
            report.add('error', problem, find_fix(problem))

    handler, logger = logging.Handler(logging.WARNING), MMLogger.get_current_instance()
    handler.emit = lambda record: report.add('warning', record.getMessage())  # type: ignore
    logger.addHandler(handler)
    try:
        cfg = check(load_config, path)
        if cfg is None:
            return path
        for call in (checks.check_amp, checks.check_programs, checks.check_start):
            check(call, cfg)
        check(checks.check_batch_size, cfg,
              torch.cuda.device_count() if torch.cuda.is_available() else 1)
        for split in ('train', 'val', 'test'):
            check(checks.check_data, cfg, split)
        check_folder(report, Path(cfg.work_dir), 'error')
    finally:
        logger.removeHandler(handler)
    return path


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):  # of clear_errors
        return str(error).removeprefix('error: ')
    return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'


def usable_cores() -> int:
    """Return how many cores this process may keep busy, with the limit of its container."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
             else os.cpu_count() or 1)
    limit = Path('/sys/fs/cgroup/cpu.max')
    quota, period = limit.read_text().split() if limit.is_file() else ('max', '')
    return cores if quota == 'max' else min(cores, math.ceil(int(quota) / int(period)))
