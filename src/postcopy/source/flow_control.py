"""How much is sent at once, and how much may be under way.

Sizes are bytes, times seconds.  A number behind a field of :class:`PushPolicy` is that of the decision in
``docs/decisions`` that holds the measurement.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from postcopy.stream.pings import FIRST_WINDOW_PING, WINDOW_PINGS

LEAST_BYTES = 1 << 20

MOMENT_S = 0.01
"""The user's requests (to switch to postcopy, for example) are checked between two batches."""


@dataclass(frozen=True, slots=True)
class PushPolicy:
    """The sizes and times of the push after switchover, chosen by measurement.

    On the main channel a requested page waits for the present batch and for all bytes sent before it.  But
    each batch, each ping and each wake-up costs CPU time, and all CPUs may be busy.
    """

    most_batch_bytes: int = 2048 << 10
    """Most data in a batch, without a bandwidth limit (0024)."""
    least_batch_bytes: int = 256 << 10
    """A slow channel makes batches no smaller than this (0024)."""
    batch_s: float = 0.005
    """A batch that takes longer makes the next ones smaller (0024)."""

    preempt_batch_bytes: int = 1024 << 10
    """Most data in a batch while pages are requested over a preempt channel (0020, 0024)."""
    calm_s: float = 0.02
    """No page has been requested for so long: the preempt channel does not bound batches (0024)."""

    limited_batch_s: float = 0.003
    """Under a bandwidth limit: a batch has so much time's worth of it (0022)."""
    preempt_limited_batch_s: float = 0.06
    """As above, with a preempt channel: a requested page seldom meets a batch, if these are few (0024)."""
    least_limited_bytes: int = 32 << 10
    """Least data in a batch under a bandwidth limit (0022)."""
    busy_bytes_per_second: int = 170 << 20
    """Under a bandwidth limit below this, the pushing thread reads the return path (0022).

    At a higher limit the push hardly waits, and a request would wait for it.
    """

    request_pages: int = 256
    """Most pages of one request in a batch: other threads wait for the channel as well."""

    interrupt_s: float = 0.05
    """Requested pages on a preempt channel hold up half a huge page for so long at most: a thread may wait
    for that one, too."""

    window_bytes: int = 6144 << 10
    """Most bytes of the push that are not answered for (0004, 0012)."""
    ping_bytes: int = 2048 << 10
    """How much is pushed between two pings: each wakes a thread on both sides (0004, 0012)."""
    send_buffer_bytes: int = 1024 << 10
    """Most bytes of the push in the kernel of the source, on a short round trip (0020)."""

    first_batch_bytes: int = 64 << 10
    """The first batch goes out while the destination starts the guest, which needs the CPU (0004)."""
    begin_s: float = 0.05
    """Then the push holds back for so long at most, while the guest requests its first pages (0004)."""
    quiet_s: float = 0.005
    """The push goes on as soon as no page has been requested for so long (0004)."""

    def batch_bytes(self, limit: int, calm_s: float, *, preempt: bool) -> int:
        """Return the most data in a batch.

        :param limit: bandwidth limit in bytes a second; 0 = none.
        :param calm_s: time since the last request.
        :param preempt: there is a preempt channel.
        """
        is_bounded = preempt and calm_s <= self.calm_s
        most = self.preempt_batch_bytes if is_bounded else self.most_batch_bytes
        if not limit:
            return most
        worth_s = self.preempt_limited_batch_s if preempt else self.limited_batch_s
        return min(most, max(self.least_limited_bytes, int(limit * worth_s)))


class BatchSize:
    """The size of a batch: follows the rate at which bytes go out, grows step by step and shrinks at once.

    :param most_bytes: upper bound.
    :param clock: seconds, never going back.
    :param least_bytes: first size, and lower bound.
    :param moment_s: the time that a batch should not exceed.
    """

    def __init__(
        self,
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        least_bytes: int = LEAST_BYTES,
        moment_s: float = MOMENT_S,
    ) -> None:
        self._most_bytes = most_bytes
        self._least_bytes = least_bytes
        self._moment_s = moment_s
        self._clock = clock
        self._began = clock()
        self.bytes = least_bytes

    def begin(self) -> None:
        """A batch is being sent from now on."""
        self._began = self._clock()

    def waited(self, seconds: float) -> None:
        """For so long nothing was sent since :meth:`begin`: that does not count."""
        self._began += seconds

    def end(self, sent_bytes: int) -> None:
        """So much has gone out since :meth:`begin`, which may be less than :attr:`bytes`.

        It is less in most batches, by a part of a page or by pages that were zero.
        """
        elapsed_s = self._clock() - self._began
        if elapsed_s > self._moment_s:
            fitting = int(sent_bytes * self._moment_s / elapsed_s)
            self.bytes = max(self._least_bytes, min(self.bytes, fitting))
        elif sent_bytes >= self.bytes // 2 and (
            elapsed_s * 2 * self.bytes < self._moment_s * sent_bytes
        ):
            self.bytes = min(2 * self.bytes, self._most_bytes)


class FlightWindow:
    """Bounds how much of the push is under way.

    A requested page on the same channel waits for all bytes sent before it: megabytes in socket buffers.
    So the push sends a ping behind every few batches, and stops while more than the window is not
    answered for.  Pings are part of QEMU's stream: this works with a real QEMU as well.

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
        """Take an answer; pongs of other pings have no effect."""
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
        """Wait until another batch may be sent."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_open)

    def close(self) -> None:
        """End all waits: the channel is gone."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
