"""Carries a serial port's output to a file, so that no vCPU ever waits for that file or ends by it."""

import os
import select
import threading
from collections.abc import Callable
from typing import Final

from postcopy.kernel import threads
from postcopy.kernel.patience import persist

BUFFER_BYTES: Final = 256 << 10
CLOSE_TIMEOUT_S: Final = 1.0


class SerialOutput:
    """A bounded buffer, and a thread that writes it to a file descriptor.

    What finds no room in the buffer, and what the file does not take (a full disk, a pipe that nothing
    reads any more), is dropped and counted.  The descriptor's flags stay as they are: a terminal shares
    them with other processes.

    Invariant, kept under one lock: ``_waiting`` is at most ``buffer_bytes`` long, and each byte that was
    given is waiting, being written, written, or counted as dropped.

    :param fd: stays the caller's; it must stay open until :meth:`close` has returned True, or for good.
    :param on_trouble: gets why the file does not take the output, once for each reason; called on the
        thread that writes.
    """

    def __init__(
        self,
        fd: int,
        on_trouble: Callable[[str], None] = lambda _reason: None,
        *,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self._fd = fd
        self._on_trouble = on_trouble
        self._buffer_bytes = buffer_bytes
        self._changed = threading.Condition()
        self._waiting = bytearray()
        self._dropped_bytes = 0
        self._closing = False
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._write_all, name="serial", daemon=True)
        threads.start(self._thread)

    @property
    def dropped_bytes(self) -> int:
        """How many bytes were lost until now."""
        with self._changed:
            return self._dropped_bytes

    def write(self, data: bytes) -> None:
        """Take the guest's output; never waits and never fails."""
        with self._changed:
            taken = data[: self._buffer_bytes - len(self._waiting)]
            self._waiting += taken
            self._dropped_bytes += len(data) - len(taken)
            self._changed.notify()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Write what is waiting, and end the thread; what was not begun within the time is dropped.

        :return: whether the thread has ended; if not, it uses the descriptor still.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            self._dropped_bytes += len(self._waiting)
            self._waiting.clear()
        return not self._thread.is_alive()

    def _write_all(self) -> None:
        while data := self._next():
            try:
                self._write(data)
            except OSError as error:
                self._tell(error.strerror or str(error))

    def _next(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            data = bytes(self._waiting)
            self._waiting.clear()
            return data

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                try:
                    left = left[os.write(self._fd, left) :]
                except BlockingIOError:  # another process has made it so
                    _wait_for_room(self._fd)
        except OSError:
            with self._changed:
                self._dropped_bytes += len(left)
            raise

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self._on_trouble(reason)


def _wait_for_room(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    persist(poll.poll)
