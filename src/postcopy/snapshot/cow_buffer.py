"""Copies that wait for the sink: a bounded store, so that a slow sink costs no more memory than it."""

import threading
from collections import deque

from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.snapshot.bitmap import Copies

ASIDE_BYTES = 32 << 20
"""The most that copies put aside may take.  When it is full, who writes to memory waits for the sink."""


class Aside:
    """What the fault handler has copied and the writer has not written yet.

    Invariant, under the lock: ``_bytes`` is what was reserved and not given back.
    """

    def __init__(self, limit_bytes: int = ASIDE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._waiting: deque[Copies] = deque()
        self._bytes = 0
        self._closed = False
        self.most_bytes = 0
        """The most that it ever held."""
        self.total_bytes = 0
        """All that ever went through it."""

    @property
    def is_roomy(self) -> bool:
        """Whether more than half of it is free."""
        return self._bytes * 2 < self._limit_bytes

    def reserve(self, n_bytes: int) -> bool:
        """Wait for room; an empty store takes anything.

        :return: whether there is; False = closed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed or not self._bytes or self._bytes + n_bytes <= self._limit_bytes
                )
            )
            if self._closed:
                return False
            self._bytes += n_bytes
            self.most_bytes = max(self.most_bytes, self._bytes)
            return True

    def put(self, copies: Copies, reserved_bytes: int) -> None:
        """Leave copies; what was reserved for them and is not needed is given back."""
        with self._changed:
            self._bytes -= reserved_bytes - _size(copies)
            self.total_bytes += _size(copies)
            if len(copies.data) or len(copies.zeros):
                self._waiting.append(copies)
            self._changed.notify_all()

    def take(self) -> Copies | None:
        """The oldest copies, or none; :meth:`written` gives their room back."""
        return self._waiting.popleft() if self._waiting else None

    def take_rest(self) -> Copies | None:
        """As :meth:`take`, once every page is saved: waits for what is being copied at this moment.

        :return: None when nothing more will come, or nobody takes it any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._bytes or self._closed)
            return self.take()

    def written(self, copies: Copies) -> None:
        """They are on their way, and take no more room here."""
        with self._changed:
            self._bytes -= _size(copies)
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody writes any more: who waits for room goes on without."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _size(copies: Copies) -> int:
    return len(copies.data) * TARGET_PAGE_BYTES
