"""Takes orders over the link; each kind of job is a module of its own, read when it is first needed.

An engine has one job, and what the others need would keep a guest waiting that is to wake at once.  One
that waits for a job of any kind reads them all beforehand: see :meth:`EngineService.preload`.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

from postcopy.engine.context import EngineContext
from postcopy.errors import PostcopyError
from postcopy.kernel import threads
from postcopy.link.protocol import (
    BEAT_S,
    Beats,
    EngineReports,
    IncomingCommands,
    JobCommands,
    OutgoingCommands,
    ResetCommands,
    RestoreCommands,
    WatchCommands,
    messages,
)
from postcopy.link.rpc import Link, handlers
from postcopy.status import ENDED

_LAST_WORDS_S = 2.0
"""How long a destination that has ended stays for its source to read so: a process that ends with
unread bytes in a socket resets the connection, and takes its own last word with it.  A command carries
that word, too."""


def _outgoing(context: EngineContext) -> OutgoingCommands:
    from postcopy.engine.outgoing import Outgoing

    return Outgoing(context)


def _incoming(context: EngineContext) -> IncomingCommands:
    from postcopy.engine.incoming import Incoming

    return Incoming(context)


def _restoring(context: EngineContext) -> RestoreCommands:
    from postcopy.engine.restoring import Restoring

    return Restoring(context)


def _resets(context: EngineContext) -> ResetCommands:
    from postcopy.engine.restoring import Resets

    return Resets(context)


COMMANDS: Final[dict[type[Any], Callable[[EngineContext], Any]]] = {
    OutgoingCommands: _outgoing,
    IncomingCommands: _incoming,
    RestoreCommands: _restoring,
    ResetCommands: _resets,
}
"""The kinds of orders, and what makes their implementation."""


class EngineService(WatchCommands):
    """One engine, for one guest and one job."""

    def __init__(self, connection: socket.socket) -> None:
        self._ended = threading.Event()
        orders = {
            order: partial(self._dispatch, kind, order)
            for kind in COMMANDS
            for order in messages(kind)
        }
        self._link = Link(connection, orders, on_end=self._ended.set, name="guest-link")
        self._context = context = EngineContext(self._link)
        self._link.serve(handlers(JobCommands, context) | handlers(WatchCommands, self))
        self._loading = threading.Lock()
        # Under the lock.
        self._commands: dict[type[Any], Any] = {}

    def preload(self, kinds: Iterable[type[Any]]) -> None:
        """Be ready for orders of these kinds."""
        for kind in kinds:
            self._implementation(kind)

    def tell_fault(self, fault: BaseException) -> None:
        """Say what this process is about to end of, where a user can do something about it."""
        if isinstance(fault, PostcopyError | OSError):
            self._link.note(EngineReports.fault, str(fault))

    def say_alive(self) -> None:
        thread = threading.Thread(target=self._beat, name="alive", daemon=True)
        if not threads.start_if_possible(thread):
            self._link.close()  # it would be taken for one that hangs

    def _beat(self) -> None:
        while not self._ended.is_set():
            self._link.note(Beats.alive)
            self._ended.wait(BEAT_S)

    def run(self) -> None:
        """Serve until the guest's process closes the link; then this process ends."""
        self._link.start()
        self._ended.wait()
        self._context.on_exit()
        if self._context.progress.status in ENDED:
            self._context.join(_LAST_WORDS_S)
        self._context.end_commands()
        # Threads may wait in calls that nothing will end; all that matters outlives us elsewhere.
        os._exit(0)

    def _dispatch(self, kind: type[Any], order: str, *arguments: Any, **named: Any) -> Any:
        return getattr(self._implementation(kind), order)(*arguments, **named)

    def _implementation(self, kind: type[Any]) -> Any:
        with self._loading:
            if kind not in self._commands:
                self._commands[kind] = COMMANDS[kind](self._context)
            return self._commands[kind]
