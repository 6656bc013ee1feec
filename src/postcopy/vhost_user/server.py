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
from typing import Final

from postcopy.channel.address import SocketPath, remove_stale
from postcopy.errors import CannotListen, PostcopyError
from postcopy.kernel import calls, processes
from postcopy.vhost_user.device import Device
from postcopy.vhost_user.session import Session

Say = Callable[[str], None]

_CLEAN_UP_S: Final = 1.0
"""A process must have ended within this time after its front end has gone."""

_ENDING: Final = (signal.SIGTERM, signal.SIGINT)


def serve(path: str | os.PathLike[str], device: Device, say: Say = lambda _: None) -> None:
    """Serve one front end after another at a Unix socket, until ``SIGTERM`` or ``SIGINT``.

    To be called in the main thread of a process that has no other: each front end gets a fork of it.

    :param say: is told in one line of what front ends and drivers did wrong.
    :raises CannotListen: the path is taken, or cannot be made.
    """
    with _ended_by_signals() as ending, _listening(Path(path)) as door:
        while _readable(door, ending):
            connected, _ = door.accept()
            work = partial(_serve_one, connected, door, device, say)
            with connected, processes.Child(work) as child:
                if not _until_over(child, connected, ending, say):
                    return


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with door:
        try:
            remove_stale(path)
            door.bind(os.fspath(path))
            door.listen()
            bound = SocketPath(path)
        except OSError as error:
            why, cure = error.strerror or error, "give another path, or end what listens there"
            raise CannotListen(f"cannot listen at {path}: {why}; {cure}") from error
        try:
            yield door
        finally:
            bound.remove()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[socket.socket]:
    """A socket that becomes readable when the process is told to end."""
    woken, waker = socket.socketpair()
    with woken, waker:
        waker.settimeout(0)
        before = {number: signal.signal(number, lambda *_: None) for number in _ENDING}
        wakeup = signal.set_wakeup_fd(waker.fileno())
        try:
            yield woken
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)


def _readable(door: socket.socket, ending: socket.socket) -> bool:
    """Wait for a front end; return False when the process is told to end."""
    poll = select.poll()
    poll.register(door, select.POLLIN)
    poll.register(ending, select.POLLIN)
    return all(fd != ending.fileno() for fd, _ in calls.of_python("poll", "", poll.poll))


def _serve_one(connected: socket.socket, door: socket.socket, device: Device, say: Say) -> None:
    """The life of a process that serves a front end."""
    signal.set_wakeup_fd(-1)
    for number in _ENDING:
        signal.signal(number, signal.SIG_DFL)
    door.close()
    try:
        with Session(connected, device, say) as session:
            session.run()
    except PostcopyError as error:
        say(f"{error}; the connection is closed, and another front end can come")


def _until_over(
    child: processes.Child, connected: socket.socket, ending: socket.socket, say: Say
) -> bool:
    """Wait until the front end has been served; return False when this process is told to end."""
    poll = select.poll()
    poll.register(child, select.POLLIN)
    poll.register(connected, select.POLLRDHUP)
    poll.register(ending, select.POLLIN)
    ready = {fd for fd, _ in calls.of_python("poll", "", poll.poll)}
    if ending.fileno() in ready:
        return False
    if child.ended_within(_CLEAN_UP_S):
        code = child.wait()
        if code < 0:
            say(
                f"the process that served a front end was ended by {signal.Signals(-code).name} (SIGBUS: "
                "its memory was cut, or a page of it is lost); another front end can come"
            )
    else:
        say("a front end is gone, and its process waits for a page or for the disk: it is killed")
    return True
