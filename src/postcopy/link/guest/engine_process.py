"""An engine's process, from its start to its end, and this end of the link to it.

It is in the session of the guest's process, whose vCPUs wait for it: the kernel may share CPUs out among
sessions (``sched_autogroup_enabled``), and an engine that is mostly at work on one CPU gets next to nothing
of another then (``docs/decisions``, 0039).  A process group of its own keeps the terminal's signals away.
"""

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Concatenate, Final, NoReturn, ParamSpec, Protocol, Self, TypeVar

from postcopy.errors import EngineDied, HostCannot
from postcopy.kernel import threads
from postcopy.kernel.patience import persist
from postcopy.link.rpc import Answer, Handler, Link

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Names of files are in UTF-8, whatever the locale.
_PYTHON: Final = (sys.executable, "-X", "utf8")

# numpy's linear algebra, which is not used here, starts threads that spin.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}

_DEATH_S = 5.0
"""How long the end of a killed process is waited for: one that hangs in a kernel call may take longer."""

_LEAVE_S = 10.0
"""How long an engine that is not needed any more has for its last words."""

_SHORTEST_LOOK_S = 0.001
_LONGEST_LOOK_S = 0.05

_CURES = {
    errno.EMFILE: "raise this process's limit of open files ('prlimit --nofile=1024 --pid PID')",
    errno.ENFILE: "raise the host's limit of open files ('sysctl fs.file-max')",
    errno.EAGAIN: "raise the limit of processes ('ulimit -u', 'pids.max')",
    errno.ENOMEM: "free some of the host's memory",
}


class _Process(Protocol):
    """What there is to know of a child process."""

    @property
    def pid(self) -> int:
        """Its number."""

    def wait(self) -> int:
        """Wait for its end, any number of times."""

    def poll(self) -> int | None:
        """How it has ended, if it has."""


class EngineProcess:
    """One engine: a process of its own, and our end of the link to it."""

    def __init__(self, process: _Process, connection: socket.socket) -> None:
        self._process = process
        self._socket = connection
        self._lock = threading.Lock()
        # Under the lock.
        self._on_end: Callable[[], None] = lambda: None
        self._is_gone = False
        self.link: Link | None = None
        """Our end of the link, once there has been anything to say."""
        self.fate = "died"
        """What has become of it, should its link have ended unasked."""

    @classmethod
    def start(cls) -> Self:
        """A new interpreter, ready for any job when it has imported all.

        :raises HostCannot: there are no descriptors, processes or memory for one.
        """
        import subprocess  # seldom the way of the first engine: see `fork`

        with _lacking(), contextlib.ExitStack() as undo:
            ours, theirs = persist(socket.socketpair, socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(ours.close)
            with theirs:
                link = theirs.fileno()
                process = persist(
                    lambda: subprocess.Popen(
                        [*_PYTHON, "-m", "postcopy.engine", "--link", str(link)],
                        pass_fds=[link],
                        stdin=subprocess.DEVNULL,
                        env=os.environ | _ENVIRONMENT,
                        # A Ctrl-C is for the monitor; the engine ends with its link.
                        process_group=0,
                    )
                )
            undo.pop_all()
        return cls(process, ours)

    @classmethod
    def fork(cls, serve: Callable[[int], None]) -> Self:
        """Branch off from this process, which has one thread and holds nothing that must not be shared.

        :param serve: what the engine does with the descriptor of its end of the link.
        :raises HostCannot: there are no descriptors, processes or memory for one.
        """
        with _lacking():
            ours, theirs = persist(socket.socketpair, socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                pid = persist(os.fork)
            except OSError:
                ours.close()
                theirs.close()
                raise
        if not pid:
            _be_engine(theirs.fileno(), serve)
        theirs.close()
        return cls(_Forked(pid), ours)

    @property
    def process_id(self) -> int:
        """The engine's process."""
        return self._process.pid

    def ask(
        self, order: Callable[Concatenate[Any, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> Answer[_R]:
        """Have it do something for which it needs no guest.

        :raises EngineDied: it is gone.
        :raises HostCannot: there can be no more threads.
        """
        return self._begun().ask(order, *args, **kwargs)

    def connect(self, handlers: Mapping[str, Handler], on_end: Callable[[], None]) -> Link:
        """Begin to talk to it about a guest.

        :param on_end: called once, from the link's reader thread, when the link ends after this.
        :raises EngineDied: it has ended already; ``on_end`` is never called.
        :raises HostCannot: there can be no more threads.
        """
        from postcopy.link.guest.keeper import (
            MAY_WAIT_FOR_PAGES,  # an engine needs no more of it
        )

        link = self._begun()
        # A pause that comes after the guest has been let go on would stop it for good.
        link.serve(handlers, completed=frozenset(handlers) - MAY_WAIT_FOR_PAGES)
        with self._lock:
            if self._is_gone:
                raise EngineDied("the engine process ended before it got anything to do")
            self._on_end = on_end
        return link

    def watch(self, hang_looks: int) -> None:
        """End it when it hangs: see :mod:`postcopy.link.guest.watchdog`."""
        from postcopy.link.guest.watchdog import Watchdog

        Watchdog(self._begun(), hang_looks, self._hangs).start()

    def _hangs(self, silent_s: float) -> None:
        self.fate = f"hung for {silent_s:g} s, and was killed"
        self._signal_end()
        # A thread that the kernel holds back dies later; but the process does nothing any more.
        self._let_go()

    def _begun(self) -> Link:
        with self._lock:
            if self.link is None:
                link = Link(self._socket, {}, on_end=self._gone, name="engine-link")
                link.start()
                self.link = link
            return self.link

    @property
    def is_dead(self) -> bool:
        """Whether its process has ended."""
        return self._process.poll() is not None

    def _gone(self) -> None:
        with self._lock:
            self._is_gone = True
            on_end = self._on_end
        on_end()

    def end(self) -> None:
        """Let it go: it ends by itself when the link does."""
        self._let_go()
        thread = threading.Thread(target=self._reap, name="engine-reaper", daemon=True)
        threads.start_if_possible(thread)  # else one that hangs is ended when this process leaves

    def _let_go(self) -> None:
        with self._lock:
            link = self.link
            if link is None:
                self._is_gone = True
                self._socket.close()
        if link is not None:
            link.close()

    def _reap(self) -> None:
        """One that hangs does not see that it may go."""
        self.kill_unless_dead_within(_LEAVE_S)
        self._process.wait()

    def kill_unless_dead_within(self, timeout_s: float) -> None:
        """Give it time to end by itself."""
        if not self._is_dead_within(timeout_s):
            self._signal_end()

    def fails(self, reason: str) -> None:
        """Note what it says that it is about to end of."""
        self.fate = f"died ({reason})"

    def kill(self) -> None:
        """End it at once, whatever it does, unless its kernel holds it back."""
        self._signal_end()
        self._is_dead_within(_DEATH_S)

    def _is_dead_within(self, timeout_s: float) -> bool:
        until_s, pause_s = time.monotonic() + timeout_s, _SHORTEST_LOOK_S
        while not self.is_dead:
            if time.monotonic() > until_s:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_LOOK_S)
        return True

    def _signal_end(self) -> None:
        if not self.is_dead:
            with contextlib.suppress(ProcessLookupError):  # it was dead before
                os.kill(self._process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _lacking() -> Iterator[None]:
    """What is done in this context fails for want of something that the host lacks.

    :raises HostCannot: in place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        what = f"no engine process can be started: {error.strerror}"
        raise HostCannot(what, _CURES.get(error.errno or 0, "try again")) from error


class _Forked:
    """A child that is no program of its own."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._lock = threading.Lock()
        self._code: int | None = None

    def wait(self) -> int:
        """See :class:`_Process`."""
        with self._lock:
            if self._code is None:
                _, status = os.waitpid(self.pid, 0)
                self._code = os.waitstatus_to_exitcode(status)
            return self._code

    def poll(self) -> int | None:
        """See :class:`_Process`."""
        if not self._lock.acquire(blocking=False):
            return None  # another thread waits for the end
        try:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            return self._code
        finally:
            self._lock.release()


def _be_engine(link: int, serve: Callable[[int], None]) -> NoReturn:
    """What :meth:`EngineProcess.start` has done to a new interpreter, in a process that goes on."""
    try:
        os.setpgid(0, 0)
        kept = os.dup2(link, 3)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        os.environ.update(_ENVIRONMENT)
        serve(kept)
    except BaseException:
        traceback.print_exc()
    os._exit(1)
