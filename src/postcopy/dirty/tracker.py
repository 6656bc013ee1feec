"""What the source needs of dirty tracking, and how one is chosen.

Tracking works chunk by chunk: a page is write-protected just before it is sent, not all memory at the
start of a round.  A page that is written many times before its turn costs the guest nothing.
"""

from typing import Protocol

from postcopy.dirty.kvm_log import KvmLogTracker
from postcopy.dirty.pagemap import PagemapTracker
from postcopy.errors import HostCannot, Refused
from postcopy.guest import Guest
from postcopy.kernel.userfaultfd import WRITE_FEATURES, Userfaultfd
from postcopy.memory.ram_block import RamBlock
from postcopy.memory.runs import Mask


class DirtyTracker(Protocol):
    """Notices every write of the guest.  Used by one thread.

    :ivar is_quick: whether asking about a few pages costs little.
    """

    is_quick: bool

    def start(self) -> None:
        """Begin; what was written before counts as written."""

    def collect(self, block: RamBlock, start: int, end: int, *, protect: bool) -> Mask:
        """Return which of the block's pages ``start`` to ``end`` were written since last protected.

        :param protect: protect these again, so that the next call tells only of later writes.
            Without it they are told of again.
        """

    def stop(self) -> None:
        """Lift all protection; the guest runs at full speed again."""


def choose(wish: str, guest: Guest) -> DirtyTracker:
    """Make the tracker that the parameter ``x-dirty-tracking`` wishes for.

    Where no userfaultfd can be had KVM's log does for both wishes.

    :raises Refused: KVM's log was asked for, and this guest does not run on KVM.
    """
    if wish == "kvm":
        if not guest.kvm:
            raise Refused("x-dirty-tracking=kvm needs a guest on KVM; use pagemap")
        return KvmLogTracker(guest)
    return PagemapTracker(guest) if not guest.kvm or _can_protect() else KvmLogTracker(guest)


def _can_protect() -> bool:
    """Whether this host lets us have writes noted by write-protection."""
    try:
        Userfaultfd.open(WRITE_FEATURES, user_mode_only=True).close()
    except HostCannot:
        return False
    return True
