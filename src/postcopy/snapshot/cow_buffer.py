"""Copies of pages that wait for the sink, in a bounded buffer."""

import threading
from collections import deque

from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.snapshot.bitmap import PageBatch

COW_BUFFER_BYTES = 32 << 20
"""Its limit.  When it is full, a vCPU that writes to unsaved memory waits for the sink."""


class CowBuffer:
    """Pages that the fault handler has copied before a write, and that are not written out yet.

    Invariant, under the lock: ``_bytes`` is what has been reserved and not released.
    """

    def __init__(self, limit_bytes: int = COW_BUFFER_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._waiting: deque[PageBatch] = deque()
        self._bytes = 0
        self._closed = False
        self.most_bytes = 0
        """The most bytes that it has held."""
        self.total_bytes = 0
        """All bytes that have been put into it."""

    @property
    def is_roomy(self) -> bool:
        """Whether more than half of it is free."""
        return self._bytes * 2 < self._limit_bytes

    def reserve(self, n_bytes: int) -> bool:
        """Wait until there is room; an empty buffer takes any number of bytes.

        :return: False if the buffer is closed.
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

    def put(self, copies: PageBatch, reserved_bytes: int) -> None:
        """Append copies; bytes that were reserved for them and are not needed are released."""
        with self._changed:
            self._bytes -= reserved_bytes - _size(copies)
            self.total_bytes += _size(copies)
            if len(copies.data) or len(copies.zeros):
                self._waiting.append(copies)
            self._changed.notify_all()

    def take(self) -> PageBatch | None:
        """Return the oldest copies, or None; :meth:`written` releases their bytes."""
        return self._waiting.popleft() if self._waiting else None

    def take_rest(self) -> PageBatch | None:
        """As :meth:`take`, once every page is saved: waits for copies that are being made.

        :return: None when there are no more copies, or the buffer is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._bytes or self._closed)
            return self.take()

    def written(self, copies: PageBatch) -> None:
        """Release the bytes of copies that have been written."""
        with self._changed:
            self._bytes -= _size(copies)
            self._changed.notify_all()

    def close(self) -> None:
        """Close it: each :meth:`reserve` that waits returns False."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _size(copies: PageBatch) -> int:
    return len(copies.data) * TARGET_PAGE_BYTES
