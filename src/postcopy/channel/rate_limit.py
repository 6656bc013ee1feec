"""Pacing: no more than so many bytes a second, smoothly.

QEMU lets a tenth of a second's worth go in one burst, then stops until the tenth is over.  Ours
is a leaky bucket of the same size: a burst of at most a tenth, then at the rate, byte by byte.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

BURST_S = 0.1
"""After idling this much time's worth may be sent at once, as QEMU's slices allow."""


class Interrupt(Protocol):
    """Ends a wait early: a :class:`threading.Event`, or an object like it."""

    def wait(self, timeout: float, /) -> bool:
        """Wait so many seconds, or until it is set; return whether it is."""

    def is_set(self) -> bool:
        """Whether it is set."""


class RateLimiter:
    """What one sender may send; shared by the threads that send under the same limit.

    :param bytes_per_second: 0 = unlimited.
    :param clock: seconds, never going back.
    :param sleep: how ``wait`` waits where no event can interrupt it.
    :raises ValueError: the rate is negative.
    """

    def __init__(
        self,
        bytes_per_second: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        _check(bytes_per_second)
        self._rate = bytes_per_second
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        # When all that was spent has had its time.  Invariant, under the lock: never more than
        # BURST_S behind the clock when something is spent.
        self._due = clock() - BURST_S

    @property
    def bytes_per_second(self) -> int:
        """The rate now; 0 = unlimited."""
        return self._rate

    def set_rate(self, bytes_per_second: int) -> None:
        """Change the rate at once; what was overspent is owed in bytes, and paid at the new rate.

        :raises ValueError: the rate is negative.
        """
        _check(bytes_per_second)
        with self._lock:
            now = self._clock()
            debt_bytes = max(0.0, self._due - now) * self._rate
            if debt_bytes and bytes_per_second:
                self._due = now + debt_bytes / bytes_per_second
            else:
                self._due = min(self._due, now)
            self._rate = bytes_per_second

    def spend(self, n_bytes: int) -> float:
        """Count ``n_bytes`` as sent, and say how many seconds to wait before sending more."""
        with self._lock:
            if not self._rate:
                return 0.0
            now = self._clock()
            self._due = max(self._due, now - BURST_S) + n_bytes / self._rate
            return max(0.0, self._due - now)

    def wait(self, n_bytes: int, interrupted: Interrupt | None = None) -> bool:
        """Spend, and wait until more may be sent.

        A new rate counts within a tenth of a second for a thread that waits already.

        :param interrupted: when it is set, do not wait (any longer).
        :return: whether it slept to the end; False = interrupted.
        """
        if self._rate:
            self.spend(n_bytes)
        while (left_s := self._left()) > 0:
            nap_s = min(left_s, BURST_S)
            if interrupted is None:
                self._sleep(nap_s)
            elif interrupted.wait(nap_s):
                return False
        return interrupted is None or not interrupted.is_set()

    def _left(self) -> float:
        if not self._rate:
            return 0.0
        with self._lock:
            return self._due - self._clock()


def _check(bytes_per_second: int) -> None:
    if bytes_per_second < 0:
        raise ValueError(f"a rate of {bytes_per_second} bytes/s; 0 means unlimited")
