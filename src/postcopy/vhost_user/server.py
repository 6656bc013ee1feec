"""Back ends at a Unix socket: a process for each front end, one front end at a time.

The process that listens never touches guest memory, so it ends at once when it is told to; and it ends
the other one when its front end is gone: a thread that waits for a page which will never come cannot end
itself.  What a front end does to its own process (memory that it cuts off ends it by ``SIGBUS``) does not
reach the next front end.
"""

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from postcopy.channel.address import SocketPath, remove_stale
from postcopy.errors import CannotListen, PostcopyError
from postcopy.kernel import calls, processes
from postcopy.vhost_user.device import Device
from postcopy.vhost_user.session import Session

Say = Callable[[str], None]

_CLEAN_UP_S: Final = 1.0
"""A process must have ended within this time after its front end has gone."""

_ENDING: Final = (signal.SIGTERM, signal.SIGINT)
_RELOAD: Final = signal.SIGUSR1


def serve(path: str | os.PathLike[str], device: Device, say: Say = lambda _: None) -> None:
    """Serve one front end after another at a Unix socket, until ``SIGTERM`` or ``SIGINT``.

    To be called in the main thread of a process that has no other: each front end gets a fork of it.
    ``SIGUSR1`` calls :meth:`Device.reload`.

    :param say: is told in one line of what front ends and drivers did wrong.
    :raises CannotListen: the path is taken, or cannot be made.
    """
    with (
        contextlib.suppress(_ToldToEnd),
        _signals() as signals,
        _listening(Path(path)) as listener,
    ):
        _Server(listener, signals, device, say).run()


class _ToldToEnd(Exception):
    """A signal has come that ends the server."""


class _Server:
    """The process that listens.

    :param signals: readable when a signal has come; each byte is the number of one.
    """

    def __init__(
        self, listener: socket.socket, signals: socket.socket, device: Device, say: Say
    ) -> None:
        self._listener = listener
        self._signals = signals
        self._device = device
        self._say = say
        self._child: processes.Child | None = None

    def run(self) -> NoReturn:
        """Serve until :class:`_ToldToEnd`."""
        while True:
            self._wait((self._listener, select.POLLIN))
            with contextlib.suppress(
                BlockingIOError, ConnectionAbortedError
            ):  # it has gone already
                connected, _ = self._listener.accept()
                with connected:
                    self._serve(connected)

    def _serve(self, connected: socket.socket) -> None:
        with processes.Child(partial(self._serve_in_child, connected)) as child:
            self._child = child
            try:
                self._wait((child, select.POLLIN), (connected, select.POLLRDHUP))
                if self._wait((child, select.POLLIN), timeout_s=_CLEAN_UP_S):
                    self._tell_of_end(child.wait())
                else:
                    what = "its process waits for a page or for the disk: it is killed"
                    self._say(f"a front end is gone, and {what}")
            finally:
                self._child = None

    def _serve_in_child(self, connected: socket.socket) -> None:
        """The life of a process that serves a front end."""
        with Session(connected, self._device, self._say) as session:
            signal.set_wakeup_fd(-1)
            for number in _ENDING:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(_RELOAD, lambda *_: session.reload())
            self._listener.close()
            try:
                session.run()
            except PostcopyError as error:
                self._say(f"{error}; the connection is closed, and another front end can come")

    def _tell_of_end(self, code: int) -> None:
        if code < 0:
            self._say(
                f"the process that served a front end was ended by {signal.Signals(-code).name} (SIGBUS: "
                "its memory was cut, or a page of it is lost); another front end can come"
            )

    def _wait(
        self, *events: tuple[socket.socket | processes.Child, int], timeout_s: float | None = None
    ) -> bool:
        """Wait for one of these; return whether it has come.

        :raises _ToldToEnd: this process is to end.
        """
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        for awaited, event in events:
            poll.register(awaited, event)
        timeout_ms = None if timeout_s is None else timeout_s * 1000
        while True:
            ready = {fd for fd, _ in calls.of_python("poll", "", poll.poll, timeout_ms)}
            if self._signals.fileno() not in ready:
                return bool(ready)
            self._obey(set(self._signals.recv(64)))

    def _obey(self, come: set[int]) -> None:
        if come.intersection(_ENDING):
            raise _ToldToEnd
        self._device.reload()
        if self._child is not None:
            self._child.send_signal(_RELOAD)


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener:
        try:
            remove_stale(path)
            listener.bind(os.fspath(path))
            listener.listen()
            listener.settimeout(0)
            bound = SocketPath(path)
        except OSError as error:
            why, cure = error.strerror or error, "give another path, or end what listens there"
            raise CannotListen(f"cannot listen at {path}: {why}; {cure}") from error
        try:
            yield listener
        finally:
            bound.remove()


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket from which the numbers of signals can be read that come to this process."""
    woken, waker = socket.socketpair()
    with woken, waker:
        waker.settimeout(0)
        taken = (*_ENDING, _RELOAD)
        before = {number: signal.signal(number, lambda *_: None) for number in taken}
        wakeup = signal.set_wakeup_fd(waker.fileno())
        try:
            yield woken
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
