"""The writes of other processes that have a guest's memory mapped, beside those of the guest.

Neither write-protection here nor KVM's log tells of them: each process marks what it has written in a log
by guest-physical addresses, as vhost-user has it.  The guest's process exchanges the log when it is fetched
(:meth:`postcopy.guest.Keeper.fetch_shared_log`).  A write is marked behind it: a page that is sent before
is told of again.
"""

import numpy as np

from postcopy.guest import Keeper
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, PageBlock
from postcopy.memory.runs import Mask


class SharedWrites:
    """What other processes have written.  Used by one thread."""

    def __init__(self, guest: Keeper) -> None:
        self._guest = guest
        self._is_on = False
        # In pages of 4 KiB of the guest-physical addresses, as far as marks go: fetched, and not yet told
        # for the last time.
        self._marked: Mask = np.zeros(0, np.bool_)

    def start(self) -> None:
        """Begin, or go on if an engine that has died had begun.

        :raises PostcopyError: a process cannot log its writes.
        """
        self._is_on = self._guest.start_shared_log()

    def stop(self) -> None:
        """They need not log any more."""
        if self._is_on:
            self._is_on = False
            self._guest.stop_shared_log()

    def collect(self, block: PageBlock, start: int, end: int, *, protect: bool) -> Mask | None:
        """See :meth:`postcopy.dirty.tracker.DirtyTracker.collect`.

        The log of all blocks is fetched when the first page of a block is asked about: often enough for a
        round, and for a last look.

        :return: None: none was written.
        :raises PostcopyError: a process does not answer.
        """
        if not self._is_on:
            return None
        if start == 0:
            self._fetch()
        per_page = block.target_pages_per_page
        first, last = start * per_page, end * per_page
        found: Mask = np.zeros(last - first, np.bool_)
        for part in block.physical_ranges:
            offset, pages = part.offset // TARGET_PAGE_BYTES, part.length_bytes // TARGET_PAGE_BYTES
            begin, stop = max(first, offset), min(last, offset + pages)
            if begin < stop:
                at = part.address // TARGET_PAGE_BYTES - offset
                marked = self._marked[at + begin : at + stop]
                found[begin - first :][: len(marked)] = marked
                if protect:
                    marked[:] = False
        if not found.any():
            return None
        whole: Mask = np.logical_or.reduceat(found, np.arange(0, len(found), per_page))
        return whole

    def _fetch(self) -> None:
        packed = np.frombuffer(self._guest.fetch_shared_log(), np.uint8)
        bits = np.unpackbits(packed, bitorder="little").view(np.bool_)
        if len(bits) > len(self._marked):
            bits[: len(self._marked)] |= self._marked
            self._marked = bits
        else:
            self._marked[: len(bits)] |= bits
