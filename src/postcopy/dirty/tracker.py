"""What the source needs of dirty tracking, and how one is chosen.

Tracking works chunk by chunk: a page is write-protected just before it is sent, not all memory at the
start of a round.  A page that is written many times before its turn costs the guest nothing.
"""

from typing import Protocol

import numpy as np

from postcopy.dirty.pagemap import PagemapTracker
from postcopy.dirty.shared import SharedWrites
from postcopy.errors import HostCannot, Refused
from postcopy.guest import Guest, Keeper
from postcopy.kernel.userfaultfd import WRITE_FEATURES, Userfaultfd
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, PageBlock
from postcopy.memory.runs import Mask


class DirtyTracker(Protocol):
    """Notices every write to a guest's memory.  Used by one thread.

    :ivar is_quick: whether asking about a few pages costs little.
    """

    is_quick: bool

    def start(self) -> None:
        """Begin; what was written before counts as written."""

    def collect(self, block: PageBlock, start: int, end: int, *, protect: bool) -> Mask:
        """Return which of the block's pages ``start`` to ``end`` were written since last protected.

        :param protect: protect these again, so that the next call tells only of later writes.
            Without it they are told of again.
        """

    def stop(self) -> None:
        """Lift all protection; the guest runs at full speed again."""


def choose(wish: str, guest: Guest) -> DirtyTracker:
    """Make the tracker that the parameter ``x-dirty-tracking`` asks for.

    Where there is no userfaultfd, either value means KVM's log.

    :raises Refused: KVM's log was asked for, and this guest does not run on KVM.
    """
    return UnitedTracker(_choose_own(wish, guest), SharedWrites(guest))


def _choose_own(wish: str, guest: Guest) -> DirtyTracker:
    if wish == "kvm":
        if not guest.kvm:
            raise Refused("x-dirty-tracking=kvm needs a guest on KVM; use pagemap")
        return KvmLogTracker(guest)
    return PagemapTracker(guest) if not guest.kvm or _can_protect() else KvmLogTracker(guest)


def _can_protect() -> bool:
    """Whether this host can track writes by write-protection."""
    try:
        Userfaultfd.open(WRITE_FEATURES, user_mode_only=True).close()
    except HostCannot:
        return False
    return True


class UnitedTracker:
    """Tracks the writes of a guest, and those of other processes that have its memory mapped."""

    def __init__(self, own: DirtyTracker, others: SharedWrites) -> None:
        self._own = own
        self._others = others
        self.is_quick = own.is_quick

    def start(self) -> None:
        """Begin with both."""
        self._others.start()
        self._own.start()

    def collect(self, block: PageBlock, start: int, end: int, *, protect: bool) -> Mask:
        """Return which pages were written by any of them."""
        own = self._own.collect(block, start, end, protect=protect)
        others = self._others.collect(block, start, end, protect=protect)
        return own if others is None else own | others

    def stop(self) -> None:
        """Stop both."""
        self._own.stop()
        self._others.stop()


class KvmLogTracker:
    """Tracks the writes of a guest by KVM's dirty log, which the guest's process fetches for the engine.

    It costs a vCPU less than a fault on a page table, but has the writes of vCPUs alone.  The log is
    fetched, and all protected again, for a whole block at once; what belongs to chunks that are still to be
    collected is kept here.

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

    def collect(self, block: PageBlock, start: int, end: int, *, protect: bool) -> Mask:
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

    def _fetch(self, block: PageBlock) -> Mask:
        per_page = block.page_size_bytes // TARGET_PAGE_BYTES
        packed = np.frombuffer(self._guest.fetch_dirty_log(block.name), np.uint8)
        bits = np.unpackbits(packed, bitorder="little").view(np.bool_)
        pages = bits[: block.page_count * per_page].reshape(-1, per_page)
        written: Mask = pages.any(axis=1)  # type: ignore[assignment]  # of two axes, one is left
        return written

    def stop(self) -> None:
        """Switch the log off."""
        self._guest.stop_dirty_log()
