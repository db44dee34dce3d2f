"""What this room knows of mmpretrain's configs, whose data sets are folders of classes."""
import importlib
import os
from pathlib import Path

from mmengine.config import Config

from .. import compat
from ..errors import ConfigError


def is_classifier(cfg: Config) -> bool:
    """Return whether a config is one of mmpretrain's rather than of mmseg's."""
    return cfg.get('default_scope') == 'mmpretrain'


def check_library() -> None:
    """Check that mmpretrain can be imported.

    Raises:
        ConfigError: It cannot; the message says why, and what installs it.
    """
    try:
        importlib.import_module('mmpretrain.models')
    except Exception as error:  # its undeclared dependencies fail in many ways
        extra = 'pretrain-fork' if compat.installed_stack() == 'fork' else 'pretrain'
        raise ConfigError(
            f'this config needs mmpretrain, which cannot be imported here ({error}): '
            f'{compat.install_command(extra)}, or run tools/doctor.py for details') from error


def class_folders(root: str | Path) -> list[str]:
    """Return the folders of a split in the order that numbers the classes."""
    if not os.path.isdir(root):
        return []
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
