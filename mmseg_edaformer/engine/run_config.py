"""The config of a run, from its file and what a command line or a caller changes in it."""
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.utils import import_modules_from_strings

from ..command_line import find_config
from ..errors import ConfigError

_RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')


def load_config(path: str | Path, *, cfg_options: Mapping[str, Any] | Sequence[str] | None = None,
                work_dir: str | Path | None = None, launcher: str = 'none',
                compile: bool = False, verbose: bool = False) -> Config:
    """Read a config, with what every run of this package adds to it.

    Args:
        path: The file, or the name of a config that comes with this package.
        cfg_options: Settings to override, by dotted name; strings ``KEY=VALUE`` are parsed as
            mmengine does.
        work_dir: Folder for logs and results; by default the config's, or ``work_dirs/`` and the
            name of the config.
        launcher: What started the processes: ``none``, ``pytorch``, ``slurm`` or ``mpi``.
        compile: Whether to compile the network, unless the config says how.
        verbose: Whether the terminal shows the whole log; otherwise the runner is a `QuietRunner`,
            unless the config names one.

    Raises:
        ConfigError: The file does not exist or cannot be read, or an option does not fit it.
    """
    os.environ.setdefault('LOCAL_RANK', '0')
    if int(os.environ.get(_RANKS.get(launcher, ''), 0)):  # the first process warns for all
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        warnings.simplefilter('ignore')
    path = find_config(path)
    try:
        cfg = Config.fromfile(path)
    except (SyntaxError, NameError, TypeError, KeyError, ImportError, OSError) as error:
        raise ConfigError(f'cannot read {path}: {error}') from error
    try:
        cfg.merge_from_dict(parse_options(cfg_options))
    except (KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f'--cfg-options does not fit {path}: {error}') from error
    if cfg.get('visualizer'):  # the command line can give names, but no dicts
        backends = cfg.visualizer.get('vis_backends') or []
        cfg.visualizer.vis_backends = [
            dict(type=backend) if isinstance(backend, str) else backend
            for backend in ([backends] if isinstance(backends, str) else backends)]
    cfg.launcher = launcher
    if not verbose and 'runner_type' not in cfg:
        cfg.runner_type = 'QuietRunner'
        add_hook(cfg, dict(type='ProgressHook'), replace=False)
    if compile:
        cfg.compile = cfg.get('compile') or True
    cfg.work_dir = str(work_dir or cfg.get('work_dir') or os.path.join('work_dirs', path.stem))
    # First: the plugin is what lets mmseg be imported with mmcv-lite.
    ours = ['mmseg_edaformer', 'mmseg_edaformer.safe_defaults']
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    cfg.custom_imports = dict(imports=[*ours, *(name for name in imports if name not in ours)])
    import_modules_from_strings(**cfg.custom_imports)
    add_hook(cfg, dict(type='CheckWeightsHook'))
    return cfg


def parse_options(options: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Return settings by dotted name from what ``--cfg-options`` was given."""
    if isinstance(options, Mapping):
        return dict(options)
    parsed = {}
    for option in options or ():
        key, sign, value = option.partition('=')
        if not sign:
            raise ConfigError(f"--cfg-options: '{option}' is not KEY=VALUE")
        parsed[key] = DictAction._parse_iterable(value)
    return parsed


def add_hook(cfg: Config, hook: dict[str, Any], *, replace: bool = True) -> None:
    """Give a config a custom hook in place of those of the same type, or unless it has one."""
    hooks = cfg.get('custom_hooks') or []
    others = [other for other in hooks if other['type'] != hook['type']]
    if replace or len(others) == len(hooks):
        cfg.custom_hooks = [*others, hook]
