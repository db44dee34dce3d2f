"""Errors that a user can fix, and how the command lines show them."""
import difflib
import errno
import inspect
import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An error that the user can fix: the message says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker's error arrives as "Caught X in DataLoader worker ... X: message",
        # built by calling the class with that text: keep the message alone.
        text = message.rpartition(f'{type(self).__name__}: ')[2].strip()
        super().__init__('\n'.join(map(shown, text.split('\n'))))


class ConfigError(UserError):
    """A config or a command line that cannot work."""


class DataError(UserError):
    """A data set, an image or a mask that is missing or damaged."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or made for another model."""


class RatioError(UserError):
    """An ISR ratio that makes no sense, or not for this model."""


class ExampleError(RatioError):
    """A model that does not run on the example with which ISR would look at it."""


def first_line(error: Exception) -> str:
    """Return the beginning of an error's message, for one line of another one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def shown(name: object) -> str:
    """Return a file name for people and JSON: control characters and non-UTF-8 as ``\\xe9``."""
    return re.sub('[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]',
                  lambda match: f'\\x{ord(match[0]) & 0xff:02x}', str(name))


@contextmanager
def clear_errors() -> Iterator[None]:
    """End a command line with one clear message and exit code 1 on errors that the user can fix.

    Other errors keep their traceback, which the report of a defect needs. Characters that the
    terminal's encoding lacks are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    try:
        yield
    except KeyboardInterrupt:
        sys.exit('interrupted')
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        _end_torchrun()
        sys.exit(f'error: {message}')


def _message(error: Exception) -> str | None:
    """Return the message of an error that the user can fix, or None for a defect."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f'{error}: free some space, or write elsewhere'
        if error.errno == errno.ELOOP:
            return f'{error}: remove this link, which leads back to itself'
        return str(error) if error.errno in (errno.ENOENT, errno.EACCES, errno.EROFS) else None
    if isinstance(error, UnicodeEncodeError) and error.encoding == 'ascii':
        return (f'{error.object[:200]!r} cannot be used, because the locale here knows ASCII '
                'alone: export PYTHONUTF8=1, or LC_ALL=C.UTF-8')
    if isinstance(error, TypeError) and 'unexpected keyword argument' in str(error):
        return _explain_misspelling(error)
    if isinstance(error, KeyError) and 'is not in the' in str(error):  # of mmengine's registries
        return f'the config names a class that does not exist: {error.args[0]}'
    return None


def _end_torchrun() -> None:
    """Stop torchrun, which would restart a run whose error would come again.

    The ranks do it one after the other, so that an error of all is shown once.
    """
    if int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)) < 1:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.5 * int(os.environ.get('LOCAL_RANK', 0)))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(os.getppid(), signal.SIGTERM)


def _explain_misspelling(error: TypeError) -> str:
    """Name the class in the config that lacks the argument, and its nearest one."""
    argument = str(error).rpartition('argument ')[2].split("'")[1]
    frame, built = error.__traceback__, None
    while frame is not None:  # mmengine's registry holds the class in a local name
        built = frame.tb_frame.f_locals.get('obj_cls', built)
        frame = frame.tb_next
    if not inspect.isclass(built):
        return str(error)
    known = {name for cls in built.__mro__ if '__init__' in vars(cls)
             for name, parameter in inspect.signature(vars(cls)['__init__']).parameters.items()
             if name != 'self' and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD,
                                                      parameter.KEYWORD_ONLY)}
    near = difflib.get_close_matches(argument, known, 1)
    hint = f"did you mean '{near[0]}'?" if near else f'it takes {", ".join(sorted(known))}'
    return (f"the config gives {built.__name__} an argument '{argument}' that it does not have: "
            f'{hint}')
