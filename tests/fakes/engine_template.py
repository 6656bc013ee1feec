"""Engines of machines in this process, forked from one that has imported everything already.

To start an interpreter and to import all that an engine needs takes a quarter of a second of a CPU, two or
three times in most tests: that was half of the time of the suite.  A process forked from a template of one
thread comes to the same ``serve`` at once, as a command's first engine does (``postcopy.cli.prefork``).

Where a new interpreter would differ, one is started: see :meth:`EngineTemplate.start`.  Engines of
commands, and those of the tests of ``engine/``, always are new interpreters.
"""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from postcopy.link.guest.engine_process import EngineProcess

COMMAND = "fakes.engine_template"
_TESTS = Path(__file__).resolve().parent.parent
_AT_START = ("PYTHON", "LD_", "LC_", "LANG", "OPENBLAS", "MALLOC_", "GLIBC_")
"""What variables are called that an interpreter, or a library of it, reads once."""
_MESSAGE_BYTES = 1 << 17
_LINK = 3
_CLEAR_OF_ALL = 20
"""Descriptors from here on are none of an engine's: 0 to 3 are."""


class EngineTemplate:
    """Starts engines in place of :meth:`EngineProcess.start`; any number of threads may at once."""

    def __init__(self, start: Callable[[], EngineProcess] = EngineProcess.start) -> None:
        self._new_interpreter = start
        self._lock = threading.Lock()
        # Under the lock: the template, once there has been an engine to start.
        self._orders: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._like: object = None

    def start(self) -> EngineProcess:
        """An engine; a new interpreter if that would begin in other surroundings than the template did."""
        with (
            self._lock,
            contextlib.suppress(OSError),
        ):  # a host without room for one says that below
            if self._orders is None:
                self._orders = self._begin()
            if self._like == _surroundings():
                return self._fork(self._orders)
        return self._new_interpreter()

    def close(self) -> None:
        with self._lock:
            orders, process = self._orders, self._process
            self._orders = self._process = None
        if orders is not None:
            orders.close()
        if process is not None:
            process.wait(20)

    def _begin(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = [str(_TESTS), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-X", "utf8", "-m", COMMAND, str(number), "postcopy.engine"],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                env=os.environ
                | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
                process_group=0,
            )
        self._like = _surroundings()
        return ours

    def _fork(self, orders: socket.socket) -> EngineProcess:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                where = json.dumps([str(Path.cwd()), dict(os.environ)]).encode()
                socket.send_fds(orders, [where], [theirs.fileno(), 1, 2])
            told, (pidfd,), _, _ = socket.recv_fds(orders, 64, 1)
        except BaseException:
            ours.close()
            raise
        return EngineProcess(_Forked(int(told), pidfd), ours)


class _Forked:
    """A child of the template; how it has ended is not known here, and 0."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._lock = threading.Lock()
        self._ended = select.poll()
        self._ended.register(pidfd, select.POLLIN)
        self._close = weakref.finalize(self, os.close, pidfd)

    def wait(self) -> int:
        with self._lock:
            return self._poll(None) or 0

    def poll(self) -> int | None:
        if not self._lock.acquire(blocking=False):
            return None  # another thread waits for the end
        try:
            return self._poll(0)
        finally:
            self._lock.release()

    def _poll(self, timeout_ms: int | None) -> int | None:
        if self._close.alive:
            if not self._ended.poll(timeout_ms):
                return None
            self._close()
        return 0


def _surroundings() -> object:
    """What an interpreter reads once, when it starts; the template is told of all else."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_AT_START) and name != "PYTHONPATH"
    }
    kinds = [each for each in dir(resource) if each.startswith("RLIMIT_")]
    return variables, {each: resource.getrlimit(getattr(resource, each)) for each in kinds}


def main() -> None:
    """The template: forks an engine for each message, until there can be no more."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    for kind in ("outgoing", "incoming", "restoring"):
        __import__(f"postcopy.engine.{kind}")
    import postcopy.engine.__main__ as program

    # An engine's path of modules is its own; the first is the working directory.
    own = os.environ["PYTHONPATH"].split(os.pathsep)
    installed = [path for path in sys.path[1:] if path not in own]
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        where, fds, _, _ = socket.recv_fds(orders, _MESSAGE_BYTES, 3)
        if not where:
            return
        with _no_signals():  # an engine's number is its own until it is reaped
            pid = os.fork()
            if not pid:
                orders.close()
                _become_engine(program.serve, program.COMMANDS, fds, installed, *json.loads(where))
            pidfd = os.pidfd_open(pid)
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(orders, [str(pid).encode()], [pidfd])
        for fd in (pidfd, *fds):
            os.close(fd)


def _reap(_number: int, _frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@contextlib.contextmanager
def _no_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _become_engine(serve, commands, fds, installed, folder, environment) -> NoReturn:
    """What ``exec`` of a new interpreter would do."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.setpgid(0, 0)
        taken = [os.dup2(fd, _CLEAR_OF_ALL + number) for number, fd in enumerate(fds)]
        for fd, wanted in zip(taken, (_LINK, 1, 2), strict=True):
            os.dup2(fd, wanted)
        os.closerange(_LINK + 1, os.sysconf("SC_OPEN_MAX"))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment | {"OPENBLAS_NUM_THREADS": "1"})
        paths = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        sys.path[:] = [folder, *paths, *installed]
        serve(_LINK, commands)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    main()
