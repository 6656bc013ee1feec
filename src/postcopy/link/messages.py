"""Messages between two processes, with file descriptors, over a Unix stream socket.

A message is a u32 length and that many bytes of JSON.  Its descriptors travel with its first byte by
``SCM_RIGHTS`` (unix(7)), and the message says how many there are: a process that is out of descriptors
loses some, and must never take another file of its own for one of them.
"""

import array
import errno
import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from postcopy.errors import EngineDied, KernelError
from postcopy.kernel.calls import close_all
from postcopy.kernel.patience import PASSES, Patience

MOST_DESCRIPTORS: Final = 128
"""A message takes no more along."""

_T = TypeVar("_T")

_LENGTH = struct.Struct("<I")
_LONGEST_BYTES = 64 << 20
_READ_BYTES = 1 << 16

_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN})
_PASSING = PASSES | {errno.ETOOMANYREFS}
"""Descriptors that are on their way count as well: the others are taken in a moment."""


@dataclass(frozen=True, slots=True)
class Received:
    """One message.

    :ivar fds: its descriptors, owned by the receiver; none if any of them is lost.
    :ivar arrived: how many of them have come; the body's ``fds`` says how many were sent.
    """

    body: Mapping[str, Any]
    fds: list[int]
    arrived: int

    @property
    def is_whole(self) -> bool:
        """Whether all of them have come."""
        return bool(self.arrived == self.body["fds"])


class Messages:
    """One end; any thread may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        # Held while the socket is shut or closed: its number may be another's after that.
        self._closing = threading.Lock()
        # The receiver's: the descriptors of messages that have begun to come, in order.
        self._begun: deque[list[int]] = deque()

    def send(self, body: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one message; the descriptors stay the caller's.

        :raises EngineDied: the other end is gone.
        :raises KernelError: nothing of it has been sent, and others may be.
        """
        text = json.dumps({**body, "fds": len(fds)}).encode()
        data = _LENGTH.pack(len(text)) + text
        with self._sending:
            sent = self._send_begin(data, fds)
            try:
                self._send_rest(memoryview(data)[sent:])
            except OSError as error:
                self.shut()  # no message can follow half of one
                raise EngineDied("the other process is gone") from error

    def _send_rest(self, left: memoryview) -> None:
        while left:
            left = left[_outlast(partial(self._socket.send, left)) :]

    def _send_begin(self, data: bytes, fds: Sequence[int]) -> int:
        try:
            return _outlast(lambda: socket.send_fds(self._socket, [data], fds))
        except OSError as error:
            if error.errno in _GONE or self._socket.fileno() < 0:
                raise EngineDied("the other process is gone") from error
            detail = f"a message with {len(fds)} descriptors to another process"
            raise KernelError("sendmsg", error.errno or 0, detail) from error

    def receive(self) -> Iterator[Received]:
        """Each message that comes, until the other end is gone.

        :raises OSError: the other end is gone, or what has come is no message.
        """
        buffer = bytearray()
        while data := _outlast(self._read):
            buffer += data
            while (body := _take(buffer)) is not None:
                yield self._with_descriptors(body)

    def _read(self) -> bytes:
        space = socket.CMSG_LEN(4 * MOST_DESCRIPTORS)
        # Not socket.recv_fds: it drops the flags, and a descriptor would be inherited.
        data, ancillary, flags, _ = self._socket.recvmsg(
            _READ_BYTES, space, socket.MSG_CMSG_CLOEXEC
        )
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) // fds.itemsize * fds.itemsize])
        if fds or flags & socket.MSG_CTRUNC:
            # One call returns the descriptors of one message at most.
            self._begun.append(fds.tolist())
        return data

    def _with_descriptors(self, body: Mapping[str, Any]) -> Received:
        expected = body["fds"]
        fds = self._begun.popleft() if expected and self._begun else []
        if len(fds) == expected:
            return Received(body, fds, len(fds))
        close_all(fds)
        return Received(body, [], len(fds))

    def shut(self) -> None:
        """End both directions; a thread that sends or receives returns."""
        with self._closing, suppress(OSError):  # the other end was quicker
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the socket, and of descriptors that no message has claimed; called by the receiver."""
        self.shut()  # or a thread that sends could hold the lock for ever
        with self._sending, self._closing:
            self._socket.close()
        while self._begun:
            close_all(self._begun.popleft())


def _take(buffer: bytearray) -> Mapping[str, Any] | None:
    if len(buffer) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(buffer)
    if length > _LONGEST_BYTES:
        raise OSError(f"a message of {length} bytes")
    end = _LENGTH.size + length
    if len(buffer) < end:
        return None
    message: dict[str, Any] = json.loads(bytes(buffer[_LENGTH.size : end]))
    del buffer[:end]
    return message


def _outlast(call: Callable[[], _T]) -> _T:
    """Call again while it fails for something that passes."""
    waits = Patience(_PASSING)
    while True:
        try:
            return call()
        except OSError as error:
            if not waits.outlives(error.errno or 0):
                raise
