"""The thread of a device: it does the guest's requests, one by one, while the guest runs."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from postcopy.kernel import calls, threads

_CLOSE_S: Final = 2.0


class RequestThread:
    """Serves requests whenever it is wanted and has been kicked.

    Invariant, kept under :attr:`turn`: ``_busy`` from before a request is taken until it has been given
    back, and only then does the thread touch guest memory or the ring.  It holds no lock meanwhile: it may
    have to wait for a missing page.  All methods may be called from any other thread.

    :ivar turn: the lock of all that the requests depend on.
    :ivar kick_fd: an eventfd: a write to it is :meth:`kick`.
    :ivar name: of the device, for a user.
    :param awaited: says what a request under way waits for, and the cure.
    :param serve: does the next request, and returns whether there was one; it must not raise.
    :raises HostCannot: there can be no more threads.
    """

    def __init__(self, name: str, serve: Callable[[], bool], awaited: Callable[[], str]) -> None:
        self.name = name
        self._serve = serve
        self._awaited = awaited
        self.turn = threading.Condition()
        self._wanted = self._busy = self._closing = False
        self._waiting = 0  # for a moment between two requests
        self.kick_fd = calls.of_python("eventfd", "", os.eventfd, 0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            threads.start(self._thread)
        except BaseException:
            os.close(self.kick_fd)
            raise

    def _run(self) -> None:
        while not self._closing:
            os.eventfd_read(self.kick_fd)
            while self._begin() and self._serve_one():
                pass

    def _begin(self) -> bool:
        with self.turn:
            self.turn.wait_for(lambda: not self._waiting)  # else they might wait for ever
            self._busy = self._wanted and not self._closing
            return self._busy

    def _serve_one(self) -> bool:
        try:
            return self._serve()
        finally:
            with self.turn:
                self._busy = False
                self.turn.notify_all()

    @property
    def awaits(self) -> str:
        """See :class:`postcopy.machine.vcpu.Runner`."""
        return self._awaited()

    def kick(self) -> None:
        """There may be a request.  Harmless when closed."""
        with self.turn:
            if not self._closing:
                os.eventfd_write(self.kick_fd, 1)

    def want(self) -> None:
        """The guest runs: do what stands in the ring, and what comes."""
        with self.turn:
            self._wanted = True
        self.kick()

    def unwant(self) -> None:
        """Take no further request; see :meth:`wait_parked`."""
        with self.turn:
            self._wanted = False

    def wait_parked(self, timeout_s: float | None = None) -> bool:
        """Wait until the request under way has ended; return whether it has."""
        with self.turn:
            return self.turn.wait_for(lambda: not self._busy, timeout_s)

    @contextmanager
    def between_requests(self) -> Iterator[None]:
        """Have :attr:`turn` when no request is under way; none begins meanwhile."""
        with self.turn:
            self._waiting += 1
            try:
                self.turn.wait_for(lambda: not self._busy)
                yield
            finally:
                self._waiting -= 1
                self.turn.notify_all()

    def close(self) -> bool:
        """End the thread.

        :return: whether it has ended: one that waits for a page that does not come is left behind, and
            the guest's memory must stay mapped.
        """
        with self.turn:
            self._wanted, self._closing = False, True
            os.eventfd_write(self.kick_fd, 1)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            return False
        os.close(self.kick_fd)
        return True
