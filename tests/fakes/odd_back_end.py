"""A vhost-user back end of the tests' own, in a thread: it answers as it is told, and does no request."""

import contextlib
import os
import socket
import struct
import threading

from fakes.vhost_front_end import (
    GET_CONFIG,
    GET_FEATURES,
    GET_PROTOCOL_FEATURES,
    GET_VRING_BASE,
    POSTCOPY_ADVISE,
    POSTCOPY_END,
    PROTOCOL_FEATURES,
    SET_LOG_BASE,
    SET_MEM_TABLE,
    VERSION_1,
)
from machine.drives import DISK_BYTES

LOG_ALL, BLOCK = 1 << 26, 1 << 2 | 1 << 6 | 1 << 9
PROTOCOL = 1 << 1 | 1 << 3 | 1 << 8 | 1 << 9
CLOSE, SILENT = object(), object()
"""In place of an answer: the end of the connection, or none."""


def number(value):
    return struct.pack("=Q", value)


def config(sectors=DISK_BYTES // 512, size=57, offset=0):
    return struct.pack("=III", offset, size, 0) + struct.pack("<Q", sectors).ljust(size, b"\0")


class Answer:
    """An answer that is not what it must be.

    :param payload: its bytes; None: the right ones.
    :param size: what the header says.
    """

    def __init__(self, payload=None, *, request=None, flags=5, size=None, fds=0, end=False):
        self.payload, self.request, self.flags, self.size = payload, request, flags, size
        self.fds, self.end = fds, end


class OddBackEnd:
    """At a socket, until the end of the context.

    :param answers: by the number of a message; an :class:`Answer`, the bytes of its payload, ``CLOSE`` or
        ``SILENT``.  Each is used once: the next connection finds a back end that behaves.
    """

    def __init__(self, path, answers=()):
        self.path = path
        self.answers = dict(answers)
        self.once = True
        self.heard = []
        self.payloads = {}
        self.gate = threading.Event()
        """What the first answer of a connection waits for."""
        self.gate.set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._connected = None
        self.connected = False
        """Whether there is a front end."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gate.set()
        for each in (self._listener, self._connected):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def disconnect(self):
        self._connected.shutdown(socket.SHUT_RDWR)

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                self._connected, _ = self._listener.accept()
                self.connected = True
                with self._connected as connected, contextlib.suppress(ConnectionError, EOFError):
                    self._serve(connected)
                self.connected = False

    def _serve(self, connected):
        self._postcopy = False
        while True:
            header, fds, _, _ = socket.recv_fds(connected, 12, 8)
            if len(header) < 12:
                return
            request, flags, size = struct.unpack("=III", header)
            payload = connected.recv(size, socket.MSG_WAITALL) if size else b""
            for fd in fds:
                os.close(fd)
            self.heard.append(request)
            self.payloads[request] = payload
            if request == GET_FEATURES:
                self.gate.wait()
            if request == SET_MEM_TABLE and size == 8:
                continue  # the acknowledgement of our answer
            odd = self.answers.pop(request, None) if self.once else self.answers.get(request)
            right = self._right(request, payload, flags)
            if odd is CLOSE:
                return
            if odd is SILENT:
                connected.recv(1)
                return
            if odd is None and right is None:
                continue
            odd = odd if isinstance(odd, Answer) else Answer(odd)
            self._send(connected, request, odd, right)
            if odd.end:
                return

    def _right(self, request, payload, flags):
        """The payload of the right answer; None: there is none."""
        if request == POSTCOPY_ADVISE:
            self._postcopy = True
            return b""
        if request == SET_MEM_TABLE and self._postcopy:
            return payload
        answers = {
            GET_FEATURES: number(VERSION_1 | PROTOCOL_FEATURES | LOG_ALL | BLOCK),
            GET_PROTOCOL_FEATURES: number(PROTOCOL),
            GET_CONFIG: config(size=max(0, len(payload) - 12)),
            GET_VRING_BASE: struct.pack("=II", 0, 0),
            SET_LOG_BASE: payload[:8],
            POSTCOPY_END: number(0),
        }
        return answers.get(request, number(0) if flags & 8 else None)

    def _send(self, connected, request, odd, right):
        payload = odd.payload if odd.payload is not None else right or b""
        size = odd.size if odd.size is not None else len(payload)
        header = struct.pack("=III", odd.request or request, odd.flags, size)
        count = odd.fds or (1 if request == POSTCOPY_ADVISE and odd.payload is None else 0)
        fds = [os.eventfd(0) for _ in range(count)]
        socket.send_fds(connected, [header + payload], fds)
        for fd in fds:
            os.close(fd)
