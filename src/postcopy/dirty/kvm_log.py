"""Dirty tracking by KVM's own log, which the guest's process fetches for the engine.

Cheaper for a vCPU than a fault on a page table, but it sees the writes of vCPUs alone, and only a
guest on KVM has it.  The log is fetched for a whole block at once, which protects all of it again; what
belongs to chunks whose turn has not come is kept here until it does.
"""

import numpy as np

from postcopy.guest import Keeper
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, RamBlock
from postcopy.memory.runs import Mask


class KvmLogTracker:
    """Tracks the writes of a guest on KVM.

    What is not in ``_kept`` of a block has not been written since it was last protected, as far as KVM
    has told.
    """

    is_quick = False  # it fetches the log of a whole block

    def __init__(self, guest: Keeper) -> None:
        self._guest = guest
        self._kept: dict[str, Mask] = {}  # by block

    def start(self) -> None:
        """Switch the log on; what was written before counts as written."""
        self._guest.start_dirty_log()

    def collect(self, block: RamBlock, start: int, end: int, *, protect: bool) -> Mask:
        """Return which pages were written, and forget them if asked to protect them again."""
        kept = self._kept.get(block.name)
        if kept is None:
            kept = self._kept[block.name] = np.ones(block.page_count, np.bool_)
        # A round over a block begins with its first page, and needs no more than one look.
        if start == 0 or not protect:
            kept |= self._fetch(block)
        found = kept[start:end].copy()
        if protect:
            kept[start:end] = False
        return found

    def _fetch(self, block: RamBlock) -> Mask:
        per_page = block.page_size_bytes // TARGET_PAGE_BYTES
        packed = np.frombuffer(self._guest.fetch_dirty_log(block.name), np.uint8)
        bits = np.unpackbits(packed, bitorder="little").view(np.bool_)
        pages = bits[: block.page_count * per_page].reshape(-1, per_page)
        written: Mask = pages.any(axis=1)  # type: ignore[assignment]  # of two axes, one is left
        return written

    def stop(self) -> None:
        """Switch the log off."""
        self._guest.stop_dirty_log()
