"""The dirty log of one machine, shared by those who read it: a migration, a measurement of the dirty rate.

A fetch clears the log.  So what one user fetches is kept for the others until they fetch it.
"""

import threading
from typing import TYPE_CHECKING, Protocol

from postcopy.machine.guest_memory import GuestMemory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_PAGE_BYTES = 4096

MIGRATION = "migration"
"""The user of the log that is not named: an engine."""


class AcceleratorLog(Protocol):
    """The log of what vCPUs write: see :class:`postcopy.machine.accelerator.Accelerator`."""

    def start_dirty_log(self) -> None:
        """Begin; harmless when begun."""

    def stop_dirty_log(self) -> None:
        """Stop; harmless when stopped."""

    def fetch_dirty_log(self, start: int, end: int) -> "npt.NDArray[np.uint8]":
        """Fetch and clear the part of whole blocks, offsets in RAM."""


class DirtyLog:
    """What the vCPUs and the drive have written, for several users.

    Any thread may call any method.

    :param accelerator: has the log of the vCPUs.
    :param memory: has the log of the drive.
    :param size_bytes: of all RAM.
    """

    def __init__(self, accelerator: AcceleratorLog, memory: GuestMemory, size_bytes: int) -> None:
        self._accelerator = accelerator
        self._memory = memory
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        # What others have fetched since a user's last fetch, by page.
        self._kept: dict[str, npt.NDArray[np.bool_]] = {}

    def start(self, user: str) -> None:
        """Begin for this user, with nothing written.

        :raises HostCannot: the accelerator has no such log.
        """
        import numpy as np

        with self._lock:
            if not self._kept:
                self._accelerator.start_dirty_log()
                self._memory.start_log()
            self._kept[user] = np.zeros(self._size_bytes // _PAGE_BYTES, np.bool_)
            self._collect(0, self._size_bytes)
            self._kept[user][:] = False

    def stop(self, user: str) -> None:
        """Stop for this user; harmless when not begun."""
        with self._lock:
            if self._kept.pop(user, None) is not None and not self._kept:
                self._accelerator.stop_dirty_log()
                self._memory.stop_log()

    def fetch(self, user: str, start: int, end: int) -> "npt.NDArray[np.uint8]":
        """Fetch and clear a user's log of whole blocks: one bit a 4 KiB page, the first in bit 0 of byte 0.

        :param start: offsets in RAM: first and end.
        """
        import numpy as np

        with self._lock:
            self._collect(start, end)
            written = self._kept[user][start // _PAGE_BYTES : end // _PAGE_BYTES]
            bits = np.packbits(written, bitorder="little")
            written[:] = False
        return bits

    def _collect(self, start: int, end: int) -> None:
        import numpy as np

        first, last = start // _PAGE_BYTES, end // _PAGE_BYTES
        packed = self._accelerator.fetch_dirty_log(start, end) | self._memory.fetch_log(start, end)
        found = np.unpackbits(packed, count=last - first, bitorder="little").view(np.bool_)
        for kept in self._kept.values():
            kept[first:last] |= found
