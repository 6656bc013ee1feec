"""What the destination has of each page, in memory that outlives an engine.

One byte a page in a memfd that the guest's process keeps.  When an engine dies, the next one maps
the same bytes and knows what had been placed; recovery after a broken network sends them to the
source as QEMU's received-bitmap.  Behind them stands another byte a page, for restores: whether
a thread has waited for it.  That half costs nothing as long as nothing is written to it.
"""

import os
import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.kernel.mapping import Mapping
from postcopy.memory.page_map_file import size_bytes
from postcopy.memory.runs import Indices, Mask

MISSING, REQUESTED, PLACING, RECEIVED, REMOVING, REMOVED = range(6)
"""In this order: below ``PLACING`` nothing has been done for a page, and from ``RECEIVED`` on nothing more
is to come for it."""
UNTOUCHED, EARLY, LATE = range(3)
_NONE: Final = np.empty(0, np.int64)


class PageMap:
    """The state of every page of one RAM block.

    Invariant, kept under ``lock``: a page goes from missing by way of requested and placing to
    received; back from placing, when the engine that was to write it has died; and back from received
    to missing, when it is discarded, never while the guest runs.
    Only the thread that has claimed a page (placing) writes to it.

    A page that the guest's process has removed is ``REMOVED`` to the end: nothing is placed there, and it
    is what the memory itself is, which is zero.  If a thread was writing to it at that moment, it is
    ``REMOVING`` until that thread has thrown away what it wrote; up to then it must not be mapped.
    """

    def __init__(self, fd: int, pages: int) -> None:
        self._mapping = Mapping.shared(fd, size_bytes(pages))
        room = size_bytes(pages) // 2
        self.states: npt.NDArray[np.uint8] = self._mapping.view()[:pages]
        self.touched: npt.NDArray[np.uint8] = self._mapping.view()[room : room + pages]
        """Which pages a thread has waited for since the map was made, and whether these were among the
        first; no lock, one pager writes."""
        self.lock = threading.RLock()  # also held while events are read that change it
        os.close(fd)

    def request(self, page: int) -> bool:
        """Note that ``page`` is being asked for; return whether this is the first request."""
        with self.lock:
            if self.states[page] != MISSING:
                return False
            self.states[page] = REQUESTED
            return True

    def is_settled(self, page: int) -> bool:
        """Tell whether what is in memory is what the guest is to see."""
        return bool(self.states[page] in {RECEIVED, REMOVED})

    def claim(self, pages: Indices) -> Mask:
        """Claim pages to write to; return which of them were neither received nor claimed before."""
        with self.lock:
            states = self.states[pages]
            free: Mask = states < PLACING
            self.states[pages[free]] = PLACING
        return free

    def claim_run(self, first: int, end: int) -> bool:
        """Claim neighbouring pages, all of them or none."""
        with self.lock:
            if end - first == 1:  # a thread waits for it
                if self.states[first] >= PLACING:
                    return False
                self.states[first] = PLACING
                return True
            states = self.states[first:end]
            if (states >= PLACING).any():
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
        """Note that these pages are in place, whole, in a guest that does not run yet."""
        with self.lock:
            self.states[pages] = RECEIVED

    def complete(self, pages: Indices) -> Indices:
        """Note that these pages, claimed before, are in place, whole.

        :return: those that have been removed meanwhile; see :meth:`removal_done`.
        """
        with self.lock:
            states = self.states[pages]
            removed: Indices = pages[states == REMOVING]
            self.states[pages[states == PLACING] if len(removed) else pages] = RECEIVED
        return removed

    def complete_run(self, first: int, end: int) -> Indices:
        """As :meth:`complete`, of neighbouring pages."""
        with self.lock:
            if end - first == 1 and self.states[first] == PLACING:  # a thread waits for it
                self.states[first] = RECEIVED
                return _NONE
        return self.complete(np.arange(first, end))

    def remove(self, first: int, end: int) -> Mask:
        """Note that the guest's process has removed these pages.

        :return: which of them had not come and are not being written either.
        """
        with self.lock:
            states = self.states[first:end]
            unwritten: Mask = states < PLACING
            writing = (states == PLACING) | (states == REMOVING)
            states[:] = REMOVED
            states[writing] = REMOVING
        return unwritten

    def removal_done(self, pages: Indices) -> None:
        """What was written to pages that had been removed is gone."""
        with self.lock:
            self.states[pages] = REMOVED

    def removing(self) -> Indices:
        """Return the pages that were removed while a thread wrote to them."""
        return np.flatnonzero(self.states == REMOVING)

    def forget(self, pages: Indices) -> Indices:
        """Note that these pages are to come again.

        :return: those of them that were in place.
        """
        with self.lock:
            received: Indices = pages[self.states[pages] == RECEIVED]
            self.states[received] = MISSING
        return received

    def adopt(self, mapped: Mask) -> None:
        """Take over from an engine that has died; pages that it had requested are missing again.

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
        missing: Mask = self.states < RECEIVED
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
