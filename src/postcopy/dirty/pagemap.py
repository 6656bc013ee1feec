"""Dirty tracking by ``PAGEMAP_SCAN`` and asynchronous write-protection (Linux 6.7).

The guest's process registers a userfaultfd with ``WP_ASYNC``; the kernel then lifts the protection of a
page at its first write, and notes it.  The engine reads and renews the protection from outside, for any
kind of guest.  Writes past the guest's own mapping (``pwrite`` to the memfd, another mapping) are not seen:
other processes log theirs (:mod:`postcopy.dirty.shared`).
"""

import numpy as np
import numpy.typing as npt

from postcopy.dirty.huge_pages import HUGE_BYTES, HugePages
from postcopy.guest import AddressSpace, Keeper, MappedRange
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, PageBlock
from postcopy.memory.runs import Mask, mask_of, runs


class PagemapTracker:
    """Tracks the writes of one guest, in each address space that has its memory mapped."""

    is_quick = True

    def __init__(self, guest: Keeper) -> None:
        self._guest = guest
        self._scanners: list[tuple[AddressSpace, PagemapScanner]] = []
        self._huge: dict[MappedRange, HugePages] = {}

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
                here = base + first * size, base + last * size
                if protect and size == TARGET_PAGE_BYTES:
                    written = self._protect(scanner, part, *here)
                else:
                    written = scanner.scan(*here, protect=protect)
                found.append(((written - np.uint64(base)) // np.uint64(size)).astype(np.int64))
        if len(found) == 1:
            return found[0]
        masks = [mask_of(ranges - start, end - start) for ranges in found]
        return runs(np.logical_or.reduce(masks)) + start

    def _protect(
        self, scanner: PagemapScanner, part: MappedRange, start: int, end: int
    ) -> npt.NDArray[np.uint64]:
        """Find what was written, and protect it, some of the huge pages in small pieces."""
        huge = self._huge.setdefault(part, HugePages(part.address, part.length_bytes))
        chosen = []
        if huge.may_split(start, end):
            chosen = huge.to_split(scanner.scan(start, end, protect=False), start, end)
        found = [
            scanner.scan(at, at + HUGE_BYTES // 2, protect=True)
            for each in chosen
            for at in (each, each + HUGE_BYTES // 2)
        ]
        written = scanner.scan(start, end, protect=True)
        if found:
            written = _united(np.concatenate(found), written, start, end)
        huge.note(written, start, end)
        return written

    def stop(self) -> None:
        """Disarm."""
        if self._scanners:
            for _, scanner in self._scanners:
                scanner.close()
            self._scanners = []
            self._huge = {}
            self._guest.unwatch_writes()


def _united(
    pieces: npt.NDArray[np.uint64], written: npt.NDArray[np.uint64], start: int, end: int
) -> npt.NDArray[np.uint64]:
    """Return the addresses that are in one of two results, or in both, as one result.

    The ranges of each may touch each other, and do not overlap.
    """
    count = (end - start) // TARGET_PAGE_BYTES
    one, other = (
        mask_of((each - np.uint64(start)).astype(np.int64) // TARGET_PAGE_BYTES, count)
        for each in (pieces, written)
    )
    return (runs(one | other) * TARGET_PAGE_BYTES + start).astype(np.uint64)
