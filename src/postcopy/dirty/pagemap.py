"""Dirty tracking by ``PAGEMAP_SCAN`` and asynchronous write-protection (Linux 6.7).

The guest's process registers a userfaultfd with ``WP_ASYNC``; the kernel then lifts the protection of a
page at its first write, and notes it.  The engine reads and renews the protection from outside, for any
kind of guest.  Writes past the guest's own mapping (``pwrite`` to the memfd, another mapping) are not seen:
other processes log theirs (:mod:`postcopy.dirty.shared`).
"""

import numpy as np
import numpy.typing as npt

from postcopy.guest import AddressSpace, Keeper
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.memory.ram_block import PageBlock
from postcopy.memory.runs import Mask, mask_of, runs


class PagemapTracker:
    """Tracks the writes of one guest, in each address space that has its memory mapped."""

    is_quick = True

    def __init__(self, guest: Keeper) -> None:
        self._guest = guest
        self._scanners: list[tuple[AddressSpace, PagemapScanner]] = []

    def start(self) -> None:
        """Arm the protection; nothing is protected yet, so all counts as written."""
        self._guest.watch_writes()
        for space in self._guest.address_spaces():
            self._scanners.append((space, PagemapScanner(space.process_id)))

    def collect(self, block: PageBlock, start: int, end: int, *, protect: bool) -> Mask:
        """Return which pages were written, and protect them again if asked."""
        ranges = self.collect_runs(block, start, end, protect=protect)
        return mask_of(ranges - start, end - start)

    def collect_runs(
        self, block: PageBlock, start: int, end: int, *, protect: bool
    ) -> npt.NDArray[np.int64]:
        """As :meth:`collect`, as runs: what this costs depends on how many there are.

        :return: first page and end page (not included) of each, ascending, shape ``(n, 2)``.
        """
        size, found = block.page_size_bytes, []
        for space, scanner in self._scanners:
            for part in space.ranges:
                if part.block != block.name:
                    continue
                base = part.address - part.offset
                first = max(start, part.offset // size)
                last = min(end, (part.offset + part.length_bytes) // size)
                written = scanner.scan(base + first * size, base + last * size, protect=protect)
                found.append(((written - np.uint64(base)) // np.uint64(size)).astype(np.int64))
        if len(found) == 1:
            return found[0]
        masks = [mask_of(ranges - start, end - start) for ranges in found]
        return runs(np.logical_or.reduce(masks)) + start

    def stop(self) -> None:
        """Disarm."""
        if self._scanners:
            for _, scanner in self._scanners:
                scanner.close()
            self._scanners = []
            self._guest.unwatch_writes()
