"""How much background push may be under way at once.

A page that a vCPU waits for, on the same channel, has to wait for all bytes sent before it.  In socket
buffers that can be megabytes.  So the push sends a ping after every few pages, and stops while more
than a window's worth of bytes is not yet answered for; then an urgent page never waits for more than
the window.  Pings are part of QEMU's stream: this works against a real QEMU as well.
"""

import threading
from collections import deque

from postcopy.stream.pings import FIRST_WINDOW_PING, WINDOW_PINGS


class FlightWindow:
    """Counts what is under way.

    :param window_bytes: most bytes that may be unanswered for when another batch is sent.
    :param ping_bytes: how many bytes go out between two pings; less than the window.
    """

    def __init__(self, window_bytes: int, ping_bytes: int = 0) -> None:
        self._window_bytes = window_bytes
        self._ping_bytes = ping_bytes
        self._unpinged_bytes = 0
        self._changed = threading.Condition()
        # Under `_changed`: bytes sent and answered for, and the pings that are out.
        self._sent_bytes = 0
        self._answered_bytes = 0
        self._pings: deque[tuple[int, int]] = deque()
        self._next_ping = FIRST_WINDOW_PING
        self._closed = False

    def sent(self, n_bytes: int) -> int | None:
        """Count a batch; return the number of the ping to send behind it, if one is due."""
        with self._changed:
            self._sent_bytes += n_bytes
            self._unpinged_bytes += n_bytes
            if self._unpinged_bytes < self._ping_bytes:
                return None
            self._unpinged_bytes = 0
            ping = self._next_ping
            self._next_ping = FIRST_WINDOW_PING + (ping + 1 - FIRST_WINDOW_PING) % WINDOW_PINGS
            self._pings.append((ping, self._sent_bytes))
            return ping

    def pong(self, value: int) -> None:
        """Take an answer; others than those of the window do not matter here."""
        with self._changed:
            while self._pings and any(ping == value for ping, _ in self._pings):
                ping, self._answered_bytes = self._pings.popleft()
                if ping == value:
                    break
            self._changed.notify_all()

    @property
    def is_open(self) -> bool:
        """Whether another batch may be sent."""
        return self._closed or self._sent_bytes - self._answered_bytes <= self._window_bytes

    def wait(self) -> None:
        """Sleep until another batch may be sent."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_open)

    def close(self) -> None:
        """Let everybody go: the channel is gone."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
