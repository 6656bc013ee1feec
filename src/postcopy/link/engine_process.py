"""Start engine processes, and keep one ready.

Starting an interpreter and importing numpy takes a tenth of a second or two.  So one engine is always
started ahead: it waits, idle, for a job.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping

from postcopy.link.guest_service import MAY_WAIT_FOR_PAGES
from postcopy.link.rpc import Handler, Link


class EngineProcess:
    """One engine: a process of its own, and our end of the link to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "postcopy.engine", "--link", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # numpy's linear algebra, which nobody uses here, starts threads that spin.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                # A Ctrl-C is for the monitor; the engine ends with its link.
                start_new_session=True,
            )
        self._socket = ours
        self.link: Link | None = None

    @property
    def process_id(self) -> int:
        """The engine's process."""
        return self._process.pid

    def connect(self, handlers: Mapping[str, Handler], on_end: Callable[[], None]) -> Link:
        """Begin to talk to it."""
        # A pause that comes after the guest has been let go on would stop it for good.
        completed = frozenset(handlers) - MAY_WAIT_FOR_PAGES
        self.link = Link(
            self._socket, handlers, on_end=on_end, completed=completed, name="engine-link"
        )
        self.link.start()
        return self.link

    @property
    def is_dead(self) -> bool:
        """Whether its process has ended."""
        return self._process.poll() is not None

    def end(self) -> None:
        """Let it go: it ends by itself when the link does."""
        if self.link is None:
            self._socket.close()
        else:
            self.link.close()
        threading.Thread(target=self._process.wait, name="engine-reaper", daemon=True).start()

    def kill(self) -> None:
        """End it at once, whatever it does."""
        with contextlib.suppress(ProcessLookupError):  # it was dead before
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()


class EnginePool:
    """Hands out engines, and starts the next one ahead."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Under the lock: the one that waits, and who is going to start it.
        self._spare: EngineProcess | None = None
        self._timer: threading.Timer | None = None
        self._closed = False

    def prepare(self, delay_s: float = 0.0) -> None:
        """Have one ready, unless the pool is closed.

        :param delay_s: when to begin: a guest that has just arrived needs the CPU for itself.
        """
        with self._lock:
            self._cancel_timer()
            if self._spare is not None or self._closed:
                return
            if not delay_s:
                self._spare = EngineProcess()
                return
            self._timer = threading.Timer(delay_s, self.prepare)
            self._timer.daemon = True
            self._timer.start()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def take(self) -> EngineProcess:
        """Return a fresh engine."""
        with self._lock:
            engine, self._spare = self._spare, None
        if engine is not None and engine.is_dead:
            engine.end()
            engine = None
        return engine or EngineProcess()

    def close(self) -> None:
        """Let the one that waits go."""
        with self._lock:
            self._closed = True
            self._cancel_timer()
            if self._spare is not None:
                self._spare.end()
                self._spare = None
