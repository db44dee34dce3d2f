"""Processes of their own for what is to be killed or ends: forks, which start at once."""
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path

from mmengine.utils import ManagerMixin

from mmseg_edaformer.errors import clear_errors

ROOT = Path(__file__).parents[1]


def in_child(function, *arguments, log=os.devnull, **keywords):
    """Run a function in a fork of this process; returns its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, name in (1, 'stdout'), (2, 'stderr'):  # pytest has put its own in their place
            os.dup2(output, number)
            setattr(sys, name, os.fdopen(number, 'w', buffering=1, closefd=False))
        forget(ManagerMixin)
        with clear_errors():
            function(*arguments, **keywords)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def forget(managed):
    """Have mmengine make loggers, visualizers and the like anew: the parent's write elsewhere."""
    managed._instance_dict.clear()
    for each in managed.__subclasses__():
        forget(each)


def finish(pid, seconds=300):
    """Wait for a child; returns its exit code, negative for a signal. One that hangs is killed."""
    alarm = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    alarm.daemon = True
    alarm.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        alarm.cancel()


def run_tool(*command):
    """Run a command line of the project in a child, without the seconds that its imports take.

    Returns:
        The exit code, and all that it wrote.
    """
    def main():
        os.chdir(ROOT)
        sys.argv = [str(word) for word in command]
        runpy.run_path(sys.argv[0], run_name='__main__')

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / 'log'
        return finish(in_child(main, log=log)), log.read_text()


def done(*command):
    """Run a command line to a good end as `run_tool` does; returns what it wrote."""
    code, output = run_tool(*command)
    assert code == 0, output[-4000:]
    return output


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]
