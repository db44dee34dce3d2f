"""The runner of this package's tools: mmengine's, with a quiet terminal."""
import logging
import re
from pathlib import Path
from typing import Any

from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

_PACKAGE = str(Path(__file__).resolve().parents[1])
# What mmengine warns of in every run of mmseg, though nobody can do anything about it.
_OF_NO_USE = re.compile('prefix is not set in metric|"FileClient" will be|"HardDiskBackend" is')


@RUNNERS.register_module()
class QuietRunner(Runner):
    """mmengine's Runner that writes its whole log to the file in the work dir alone.

    The terminal shows warnings and what this package itself has to say, such as the figures of a
    validation and where the report lies.
    """

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build mmengine's logger and filter what it prints."""
        logger: MMLogger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.addFilter(_matters)
        return logger


def _matters(record: logging.LogRecord) -> bool:
    if record.pathname.startswith(_PACKAGE):
        return True
    return record.levelno >= logging.WARNING and not _OF_NO_USE.search(record.getMessage())
