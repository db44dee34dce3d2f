"""Training and testing: from a config and the flags of the tools to a runner and its result."""
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_rank, is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from mmseg.registry import RUNNERS

from .. import __version__, compat
from ..command_line import check_checkpoint
from ..cost import unwrap
from ..data.bad_files import skip_bad_files as skip_files
from ..data.classification import is_classifier
from ..errors import ConfigError
from ..files import write_file
from ..isr import ISRRatio
from ..isr.pooling import check_method
from . import checks
from .allocator import keep_freed_memory
from .checkpoint_hook import find_checkpoint
from .compile import compile_model
from .convert import check_backbone
from .nonfinite import skip_nonfinite_steps
from .preemption import EXIT_PREEMPTED, Preempted, Watchdog, is_lost_peer
from .run_config import add_hook


def add_report(cfg: Config) -> None:
    """Have a run leave report.html in its work dir, unless the config says ``report = False``."""
    if cfg.get('report', True):
        imports = cfg.get('custom_imports') or dict(imports=[])
        cfg.custom_imports = dict(imports, imports=[*dict.fromkeys((
            *imports['imports'], 'mmseg_edaformer.analysis.evaluation'))])
        add_hook(cfg, dict(type='EvaluationHook', compiled=bool(cfg.get('compile'))),
                 replace=False)


def build_runner(cfg: Config) -> Runner:
    """Start the process group where there is one, and build the runner that the config names."""
    if cfg.get('custom_imports'):  # some were added after the config was read
        import_modules_from_strings(**cfg.custom_imports)
    if cfg.launcher == 'pytorch':
        compat.init_distributed(cfg)
    if not torch.cuda.is_available():
        keep_freed_memory()
    compiling = cfg.pop('compile', None)  # its own compiles parts that fail
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if compiling:
        compile_model(runner.model, **({} if compiling is True else compiling))
    return runner


def prepare_train(cfg: Config, *, resume: bool = False, load_from: str | None = None,
                  amp: bool = False, auto_scale_lr: bool = False,
                  skip_nonfinite: int | None = None, skip_bad_files: bool = False,
                  backbone_weights: str | None = None) -> None:
    """Apply the flags of a training to its config, and fail early if it cannot run.

    A training that torchrun restarts after a failed process resumes.
    """
    if load_from is not None:
        cfg.load_from = load_from
    if backbone_weights is not None:
        if cfg.get('load_from'):
            raise ConfigError('--backbone-weights initialises the encoder and load_from the whole '
                              'model: give only one of them')
        check_backbone(cfg, backbone_weights)
        add_hook(cfg, dict(type='BackboneWeightsHook', checkpoint=backbone_weights))
    restart = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
    # A new run in the folder of an earlier one must not resume from that one's checkpoints.
    started = Path(cfg.work_dir) / '.started'
    cfg.resume = False
    if resume or restart:
        since = started.stat().st_mtime if restart and started.is_file() else 0.
        newest = find_checkpoint(cfg.work_dir, since)
        again = f' (start {restart + 1} of this run)' if restart else ''
        if newest is None:
            print_log(f'Nothing to resume in {cfg.work_dir}: training starts from the beginning'
                      f'{again}', logger='current', level=logging.WARNING)
        else:
            print_log(f'Resuming from {newest}{again}', logger='current')
            cfg.resume, cfg.load_from = True, newest
    add_hook(cfg, dict(type='PreemptionHook'), replace=False)
    add_report(cfg)
    add_hook(cfg, dict(type='FiniteLossHook', skip=skip_nonfinite or 0),
             replace=skip_nonfinite is not None)
    if amp:
        # bfloat16 has the range of float32 and needs no loss scale; older cards lack it.
        half = dict(loss_scale='dynamic') if torch.cuda.is_available() and (
            torch.cuda.get_device_capability() < (8, 0)) else dict(dtype='bfloat16', loss_scale=1.)
        cfg.optim_wrapper.update(type='AmpOptimWrapper', **half)
    skip_nonfinite_steps(cfg)
    if auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ConfigError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    if is_classifier(cfg):
        checks.check_classifier_flags({'--skip-bad-files': skip_bad_files})
    if skip_bad_files:
        skip_files(cfg, cfg.work_dir)
    checks.check_amp(cfg)
    checks.check_programs(cfg)
    checks.check_start(cfg)
    checks.check_data(cfg, 'train', 'val')
    checks.check_work_dir(cfg.work_dir)
    if not restart and os.environ.get('RANK', '0') == '0':
        if cfg.resume:
            started.unlink(missing_ok=True)
        else:
            write_file(started, '')


def train(cfg: Config) -> int:
    """Train, and warn first if the images per step differ from those of the recipe.

    Returns:
        The exit code: 0, or `EXIT_PREEMPTED` if a signal stopped the run, which can be resumed.
    """
    watchdog = Watchdog() if cfg.launcher == 'pytorch' else None
    if watchdog is not None:
        watchdog.start()  # before the processes meet, for which all of them are needed
    try:
        runner = build_runner(cfg)
        if cfg.launcher in ('slurm', 'mpi'):
            watchdog = Watchdog()  # mmengine has found out the ranks by now
            watchdog.start()
        checks.check_batch_size(cfg, runner.world_size)
        loop: Any = runner.train_loop
        if getattr(loop, 'samples_per_step', 0):  # counts iterations of batches of one size
            checks.check_epochs(loop.max_iters, loop.samples_per_step, len(loop.dataloader.dataset))
        runner.train()
    except Preempted as stop:
        runner.logger.warning(str(stop))
        return EXIT_PREEMPTED
    except Exception as error:
        if not is_lost_peer(error):
            raise
        sys.exit(f'error: rank {get_rank()} ends because another process of this run ended '
                 f'({error}): the last lines of that one say why. Continue with --resume')
    finally:
        if watchdog is not None:
            watchdog.stopped.set()  # the others may leave now, and wait while the first one writes
    runner.call_hook('after_success')
    return 0


def prepare_test(cfg: Config, checkpoint: str, *, isr_ratio: str | None = None,
                 isr_method: str = 'average', tta: bool = False, out: str | None = None,
                 show: bool = False, show_dir: str | None = None, wait_time: float = 2.,
                 bf16: bool = False, skip_bad_files: bool = False) -> None:
    """Apply the flags of a test to its config, and fail early if it cannot run."""
    check_checkpoint(checkpoint)
    cfg.load_from = checkpoint
    if is_classifier(cfg):
        checks.check_classifier_flags({'--tta': tta, '--out': out, '--show': show, '--bf16': bf16,
                                       '--show-dir': show_dir, '--skip-bad-files': skip_bad_files})
    if isr_ratio is not None:
        read = ISRRatio.parse_encoder if is_classifier(cfg) else ISRRatio.parse
        # A segmentor's preprocessor knows the size of its crops.
        size = dict(crop_size=cfg.get('crop_size')) if is_classifier(cfg) else {}
        add_hook(cfg, dict(type='ISRHook', isr_ratio=str(read(isr_ratio)),
                           method=check_method(isr_method), **size))
    if show or show_dir:
        if 'visualization' not in cfg.default_hooks:
            raise ConfigError('--show and --show-dir need default_hooks.visualization='
                              "dict(type='SegVisualizationHook') in the config")
        cfg.default_hooks.visualization.update(draw=True, show=show, wait_time=wait_time)
        if show_dir:
            cfg.visualizer.save_dir = show_dir
    if bf16 and cfg.model.type != 'StreamedEncoderDecoder':
        raise ConfigError('--bf16 needs model.type=StreamedEncoderDecoder, which casts images and '
                          f'logits, not {cfg.model.type}')
    if tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            raise ConfigError('--tta needs tta_model and tta_pipeline in the config')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(cfg.tta_model, module=cfg.model)
    if out is not None:
        cfg.test_evaluator.update(output_dir=out, keep_results=True)
    if skip_bad_files:
        skip_files(cfg, cfg.work_dir, 'test')
    checks.check_programs(cfg)
    if cfg.get('compile') is True:
        cfg.compile = dict(frozen=True)
    add_report(cfg)
    checks.check_data(cfg, 'test')


def evaluate(cfg: Config, json_file: str | None = None, *, bf16: bool = False) -> dict[str, float]:
    """Test a config that `prepare_test` has seen, and return the metrics.

    Args:
        cfg: The config.
        json_file: File for the metrics, the ISR ratio, the time and the machine.
        bf16: Whether to compute in bfloat16, except for the normalisation of images.
    """
    runner = build_runner(cfg)
    if bf16:
        model: Any = unwrap(runner.model)
        for name, part in model.named_children():
            if name != 'data_preprocessor':
                part.bfloat16()
    start = time.perf_counter()
    metrics = runner.test()
    seconds = time.perf_counter() - start
    if json_file is not None and is_main_process():
        hook: dict[str, Any] = next(
            (hook for hook in cfg.custom_hooks if hook['type'] == 'ISRHook'), {})
        figures = dict(
            config=str(cfg.filename), checkpoint=cfg.load_from,
            isr_ratio=hook.get('isr_ratio', 'none'), isr_method=hook.get('method', 'average'),
            metrics={name: float(value) for name, value in metrics.items()},
            images=len(runner.test_dataloader.dataset), seconds=round(seconds, 3),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu',
            threads=torch.get_num_threads(), processes=runner.world_size,
            versions=dict(mmseg_edaformer=__version__, torch=torch.__version__))
        write_file(json_file, json.dumps(figures, indent=2) + '\n')
    runner.call_hook('after_success')
    return metrics
