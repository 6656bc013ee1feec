"""What the destination has of each page, in memory that outlives an engine.

One byte a page in a memfd that the guest's process keeps.  When an engine dies, the next one maps
the same bytes and knows what had been placed; recovery after a broken network sends them to the
source as QEMU's received-bitmap.  Behind them stands another byte a page, for restores: whether
a thread has waited for it.  That half costs nothing as long as nothing is written to it.
"""

import os
import threading

import numpy as np
import numpy.typing as npt

from postcopy.kernel.mapping import Mapping
from postcopy.memory.page_map_file import size_bytes
from postcopy.memory.runs import Indices, Mask

MISSING, REQUESTED, RECEIVED, PLACING = range(4)
UNTOUCHED, EARLY, LATE = range(3)


class PageMap:
    """The state of every page of one RAM block.

    Invariant, kept under ``lock``: a page goes from missing by way of requested and placing to
    received; back from placing, when the engine that was to write it has died; and back from received
    to missing, when it is discarded, never while the guest runs.
    Only the thread that has claimed a page (placing) writes to it.
    """

    def __init__(self, fd: int, pages: int) -> None:
        self._mapping = Mapping.shared(fd, size_bytes(pages))
        room = size_bytes(pages) // 2
        self.states: npt.NDArray[np.uint8] = self._mapping.view()[:pages]
        self.touched: npt.NDArray[np.uint8] = self._mapping.view()[room : room + pages]
        """Which pages a thread has waited for since the map was made, and whether these were among the
        first; no lock, one pager writes."""
        self.lock = threading.Lock()
        os.close(fd)

    def request(self, page: int) -> bool:
        """Note that ``page`` is being asked for; return whether this is the first request."""
        with self.lock:
            if self.states[page] != MISSING:
                return False
            self.states[page] = REQUESTED
            return True

    def is_received(self, page: int) -> bool:
        """Tell whether the page is in place."""
        return bool(self.states[page] == RECEIVED)

    def claim(self, pages: Indices) -> Mask:
        """Claim pages to write to; return which of them were neither received nor claimed before."""
        with self.lock:
            states = self.states[pages]
            free: Mask = states < RECEIVED
            self.states[pages[free]] = PLACING
        return free

    def claim_run(self, first: int, end: int) -> bool:
        """Claim neighbouring pages, all of them or none."""
        with self.lock:
            if end - first == 1:  # a thread waits for it
                if self.states[first] >= RECEIVED:
                    return False
                self.states[first] = PLACING
                return True
            states = self.states[first:end]
            if (states >= RECEIVED).any():
                return False
            states[:] = PLACING
        return True

    def unclaim(self) -> Mask:
        """The engine that was to write the claimed pages has died: each is to be asked for again.

        :return: which ones.
        """
        with self.lock:
            claimed: Mask = self.states == PLACING
            self.states[claimed] = REQUESTED
        return claimed

    def receive(self, pages: Indices | slice) -> None:
        """Note that these pages are in place, whole."""
        with self.lock:
            self.states[pages] = RECEIVED

    def forget(self, pages: Indices) -> Indices:
        """Note that these pages are to come again.

        :return: those of them that were in place.
        """
        with self.lock:
            received: Indices = pages[self.states[pages] == RECEIVED]
            self.states[received] = MISSING
        return received

    def adopt(self, mapped: Mask) -> None:
        """Take over from an engine that has died, whatever it had asked for.

        :param mapped: which pages the guest can see: of those being placed, these had come so far
            that the guest may have written to them.
        """
        with self.lock:
            placing = self.states == PLACING
            self.states[placing & mapped] = RECEIVED
            self.states[placing & ~mapped] = MISSING
            self.states[self.states == REQUESTED] = MISSING

    def missing(self) -> Mask:
        """Return the mask of pages that are not in place."""
        missing: Mask = self.states != RECEIVED
        return missing

    def requested(self) -> Indices:
        """Return the pages that were asked for and have not come."""
        return np.flatnonzero(self.states == REQUESTED)

    def any_expected(self) -> bool:
        """Tell whether a page that was asked for is not in place yet."""
        return bool(((self.states == REQUESTED) | (self.states == PLACING)).any())

    def close(self) -> None:
        """Unmap; the memory itself lives on with the guest's process."""
        self.states = np.empty(0, np.uint8)
        self.touched = np.empty(0, np.uint8)
        self._mapping.close()
