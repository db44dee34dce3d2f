"""What `doctor` tries in a child process, where a library may crash or hang."""
import faulthandler
import functools
import importlib
import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from . import compat
from .doctor import OPTIONAL, REQUIRED, Report, check_torchvision

SERIOUS = r'CUDA init|NVML|not compatible|cpu_kernels\.cpp'
"""Warnings that are findings."""


def try_all(notes: str, timeout: str, config: str | None = None) -> None:
    """Import what is needed, predict with EDAFormer-T, check the config; note each step in a file.

    A step that takes more than ``timeout`` seconds ends the process, even within C code.
    """
    report = Report(notes=notes)
    tried = functools.partial(attempt, report, float(timeout))
    for name in REQUIRED:
        if tried(f'import {name}', 'error', try_import, report, name) is None:
            return
        if name == 'torch':
            tried('torch devices', 'error', check_torch, report)
    compat.prepare_imports()  # as the package itself does
    from mmengine.utils.dl_utils import collect_env
    for name, value in (tried('collect_env', 'warning', collect_env) or {}).items():
        report.add_fact('Environment', name, ' '.join(str(value).split()))
    for name in OPTIONAL:
        if importlib.util.find_spec(name) is not None:
            tried(f'import {name}', 'warning', try_import, report, name)
    if tried('import mmseg_edaformer', 'error', try_import, report, 'mmseg_edaformer'):
        for device in ('cpu', 'cuda') if sys.modules['torch'].cuda.is_available() else ('cpu',):
            tried(f'EDAFormer-T on {device}', 'error', predict, device)
        if config is not None:
            check_config(tried, report, config)


def attempt(report: Report, timeout: float, step: str, level: str, call: Callable[..., Any],
            *args: Any) -> Any:
    """Take a step and add how it went; returns its result, or None if it failed."""
    report.add_fact('Tried', step, 'fails')  # until it ends
    faulthandler.dump_traceback_later(timeout, exit=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            result = call(*args)
        report.add_fact('Tried', step, result if isinstance(result, str) else 'works')
        for warning in caught:
            if re.search(SERIOUS, text := ' '.join(str(warning.message).split())):
                report.add('warning', text)
        return result
    except (Exception, SystemExit) as error:
        text = ' '.join(str(error).split()).removeprefix('error: ')  # SystemExit of clear_errors
        report.add_failure(level, step, 'fails: ' + (
            text if isinstance(error, SystemExit) else f'{type(error).__name__}: {text[:500]}'))
    finally:
        faulthandler.cancel_dump_traceback_later()


def try_import(report: Report, name: str) -> str:
    """Import a module, and return its version and folder."""
    module = importlib.import_module(name)
    if name in ('mmpretrain', 'mmseg_edaformer'):  # the rest does not say whether it works
        importlib.import_module(f'{name}.models')
    version = getattr(module, '__version__', '')
    if name == 'torchvision':  # whose metadata may not tell its build
        check_torchvision(report, sys.modules['torch'].__version__, version)
    return f'{version} {module.__file__}'.strip()


def check_torch(report: Report) -> str:
    """Check that torch sees the GPUs."""
    import torch
    from torch.utils.collect_env import get_gpu_info, run
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and (cards := get_gpu_info(run)):
        build = torch.version.cuda or torch.version.hip
        report.add('warning', f'torch does not see the GPU ({cards}): ' + (
            f'CUDA_VISIBLE_DEVICES hides it, the driver is too old for CUDA {build}, or this user '
            'may not open /dev/nvidia*' if build else 'it was built for CPUs. Install the build '
            'that https://pytorch.org/get-started/locally names'))
    return f'GPUs: {count}'


def predict(device: str) -> str:
    """Predict a 64 x 64 image with EDAFormer-T and random weights, without ISR and with it."""
    import torch
    from mmseg.apis import init_model

    from mmseg_edaformer.engine.run_config import load_config
    from mmseg_edaformer.isr import isr
    model = init_model(load_config('edaformer_t_ade'), device=device)
    for ratio in ('none', 'optimal'):
        with isr(model, ratio), torch.no_grad():
            model.predict_labels(torch.zeros(1, 3, 64, 64, device=device))
    return 'predicts a 64 x 64 image, without ISR and with it'


def check_config(tried: Callable[..., Any], report: Report, path: str) -> None:
    """Check a config as tools/train.py and tools/test.py do, but go on after an error."""
    import torch
    from mmengine.logging import MMLogger

    from mmseg_edaformer.engine import checks
    from mmseg_edaformer.engine.run_config import load_config
    from mmseg_edaformer.errors import clear_errors
    handler, logger = logging.Handler(logging.WARNING), MMLogger.get_current_instance()
    handler.emit = lambda record: report.add('warning', record.getMessage())  # type: ignore
    logger.addHandler(handler)
    cfg = tried('config', 'error', clear_errors()(load_config), path)
    steps: list[tuple[str, Callable[..., None], Any]] = [] if cfg is None else [
        ('precision', checks.check_amp, cfg), ('programs', checks.check_programs, cfg),
        ('start', checks.check_start, cfg), ('work dir', checks.check_work_dir, cfg.work_dir),
        *((f'{split} set', functools.partial(checks.check_data, cfg), split)
          for split in ('train', 'val', 'test')),
        ('batch size', functools.partial(checks.check_batch_size, cfg),
         max(1, torch.cuda.device_count()))]
    for name, call, subject in steps:
        tried(f'config, {name}', 'error', clear_errors()(call), subject)
    logger.removeHandler(handler)
