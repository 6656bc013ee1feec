"""Dirty tracking by KVM's own log, which the guest's process fetches for the engine.

Cheaper for a vCPU than a fault on a page table, but it sees the writes of vCPUs alone, and only a
guest on KVM has it.  The log is fetched for all memory at once, which protects all of it again; what
belongs to chunks whose turn has not come is kept here until it does.
"""

import numpy as np

from postcopy.link.guest_proxy import GuestProxy
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, RamBlock
from postcopy.memory.runs import Mask


class KvmLogTracker:
    """Tracks the writes of a guest on KVM, whose RAM is one block."""

    is_quick = False  # it fetches the log of all memory

    def __init__(self, guest: GuestProxy) -> None:
        self._guest = guest
        self._kept: Mask | None = None

    def start(self) -> None:
        """Switch the log on; what was written before counts as written."""
        self._guest.kvm_dirty_log("start")

    def collect(self, block: RamBlock, start: int, end: int, *, protect: bool) -> Mask:
        """Return which pages were written, and forget them if asked to protect them again."""
        per_page = block.page_size_bytes // TARGET_PAGE_BYTES
        if self._kept is None:
            self._kept = np.ones(block.page_count, np.bool_)
        if start == 0 or not protect:
            packed = np.frombuffer(self._guest.kvm_dirty_log("fetch"), np.uint8)
            bits = np.unpackbits(packed, bitorder="little").view(np.bool_)
            fresh = bits[: block.page_count * per_page].reshape(-1, per_page)
            self._kept |= fresh.any(axis=1)
        found = self._kept[start:end].copy()
        if protect:
            self._kept[start:end] = False
        return found

    def stop(self) -> None:
        """Switch the log off."""
        self._guest.kvm_dirty_log("stop")
