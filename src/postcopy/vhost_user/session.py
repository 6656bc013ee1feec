"""One front end served: its messages taken and its rings' requests done, in one thread.

The thread may wait for a missing page at any touch of guest memory, and holds the interpreter lock then:
no other Python thread of its process runs.  :mod:`postcopy.vhost_user.server` gives it its own process.
"""

import contextlib
import select
import socket
from collections.abc import Callable
from typing import Self

from postcopy.vhost_user.backend import Answer, BackEnd
from postcopy.vhost_user.connection import Connection, Message
from postcopy.vhost_user.device import Device
from postcopy.vhost_user.messages import FRONT_END
from postcopy.vhost_user.payloads import Number
from postcopy.vhost_user.vring import Vring


class Session:
    """Serves one front end until it is gone.

    :param connected: a Unix stream socket; this object's from now on.
    :param say: is told in one line of what the driver did wrong.
    """

    def __init__(
        self, connected: socket.socket, device: Device, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._connection = Connection(connected, FRONT_END)
        self._device = device
        self._back_end = BackEnd(device, say)
        self._poll = select.poll()
        self._kicks: dict[int, Vring] = {}
        self._poll.register(self._connection, select.POLLIN)

    def run(self) -> None:
        """Serve until the front end closes.

        :raises VhostUserError: it sent what cannot be.
        """
        waiting: set[Vring] = set()
        while True:
            for fd, _ in self._poll.poll(0 if waiting else None):
                if fd != self._connection.fileno():
                    vring = self._kicks[fd]
                    vring.take_kick()
                    waiting.add(vring)
                    continue
                if not self.step():
                    return
                # A ring that begins to be served may hold requests that were kicked for long ago.
                waiting = set(self._watch())
                break
            waiting = {vring for vring in waiting if vring.serve()}
            if any(not vring.is_served for vring in self._kicks.values()):
                self._watch()

    def step(self) -> bool:
        """Take one message; return False when the front end has closed.

        :raises VhostUserError: it cannot be.
        """
        message = self._connection.receive()
        if message is None:
            return False
        with message:
            self._answer(message)
        return True

    def reload(self) -> None:
        """Have the device look at what it is made of; a new configuration is told to the front end."""
        if self._device.reload():
            self._back_end.tell_configuration_changed()

    def close(self) -> None:
        """Let go of everything."""
        self._connection.close()
        self._back_end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, message: Message) -> None:
        result = self._back_end.handle(message)
        with contextlib.suppress(ConnectionError):  # that it is gone is read next
            if isinstance(result, Answer):
                self._connection.answer(message, result.payload, result.fds)
            elif result is not None and message.needs_reply and self._back_end.acknowledges:
                self._connection.answer(message, Number(result))

    def _watch(self) -> list[Vring]:
        """Have the kicks of the rings that are served polled, and no others."""
        served = self._back_end.served
        kicks = {vring.kick: vring for vring in served}
        for fd in self._kicks.keys() - kicks.keys():
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)
        for fd in kicks:
            self._poll.register(fd, select.POLLIN)
        self._kicks = kicks
        return served
