"""Takes orders over the link; each kind of job is a module of its own, read when it is first needed.

An engine has one job, and what the others need would keep a guest waiting that is to wake at once.  One
that waits for a job of any kind reads them all beforehand: see :meth:`EngineService.preload`.
"""

import importlib
import os
import socket
import threading
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from postcopy.engine.context import EngineContext
from postcopy.kernel import threads
from postcopy.link.protocol import BEAT_S
from postcopy.link.rpc import Handler, Link
from postcopy.status import ENDED

_LAST_WORDS_S = 2.0
"""How long a destination that has ended stays for its source to read so: a process that ends with
unread bytes in a socket resets the connection, and takes its own last word with it.  A command carries
that word, too."""

COMMANDS: Final = {
    "Outgoing": (
        "start_source",
        "resume_source",
        "go_on",
        "adopt_source",
        "start_postcopy",
        "proceed",
        "cancel",
    ),
    "Incoming": (
        "prepare_destination",
        "listen",
        "accept",
        "recover_destination",
        "adopt_destination",
    ),
    "Restoring": ("look_at_image", "start_restore", "restore", "adopt_restore", "hurry"),
    "Resets": ("reset_to_image", "reset_to_now", "keep_rest", "adopt_reset", "put_back"),
}
"""Classes, each in the module of its name, and the orders that are methods of theirs."""


class EngineService:
    """One engine, for one guest and one job."""

    def __init__(self, connection: socket.socket) -> None:
        self._ended = threading.Event()
        handlers: dict[str, Handler] = {
            order: partial(self._dispatch, kind, order)
            for kind, orders in COMMANDS.items()
            for order in orders
        }
        self._link = Link(connection, handlers, on_end=self._ended.set, name="guest-link")
        self._context = context = EngineContext(self._link)
        self._link.serve(
            {
                "set_capabilities": context.set_capabilities,
                "set_parameters": context.set_parameters,
                "pause": context.pause,
                "info": context.info,
                "say_alive": self._say_alive,
            }
        )
        self._loading = threading.Lock()
        # Under the lock.
        self._commands: dict[str, Any] = {}

    def preload(self, commands: Iterable[str]) -> None:
        """Be ready for orders of these kinds."""
        for kind in commands:
            self._command(kind)

    def tell_fault(self, fault: BaseException) -> None:
        """See :meth:`postcopy.engine.context.EngineContext.tell_fault`."""
        self._context.tell_fault(fault)

    def _say_alive(self) -> None:
        """Tell the guest's process again and again that this one does not hang."""
        thread = threading.Thread(target=self._beat, name="alive", daemon=True)
        if not threads.start_if_possible(thread):
            self._link.close()  # it would be taken for one that hangs

    def _beat(self) -> None:
        while not self._ended.is_set():
            self._link.note("alive")
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

    def _dispatch(self, kind: str, order: str, **arguments: Any) -> Any:
        return getattr(self._command(kind), order)(**arguments)

    def _command(self, name: str) -> Any:
        with self._loading:
            if name not in self._commands:
                module = importlib.import_module(f"postcopy.engine.{name.lower()}")
                self._commands[name] = getattr(module, name)(self._context)
            return self._commands[name]
