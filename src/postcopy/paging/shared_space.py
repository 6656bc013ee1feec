"""Another process that has the guest's memory mapped, such as a back end of one of its devices.

Its pages are placed where the guest's own are: in the file that both have mapped.  In its page tables they
are mapped when a thread of it has touched them.  Its mappings are registered for missing and for minor
faults (:mod:`postcopy.link.guest.sharing`): a page that is in the file and not mapped there may be half
written, and a touch of it is a fault like any other.

Whatever becomes of the process, the guest and the other processes go on.
"""

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.errors import KernelError
from postcopy.guest import AddressSpace, MappedRange
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.paging.minor_faults import resolve_minor_fault
from postcopy.paging.placer import BlockPlacer
from postcopy.paging.ram import IncomingBlock, IncomingRam

_ENDED: Final = frozenset({errno.ESRCH, errno.ENOENT})
"""The process has ended; or it has unmapped the range by itself."""


@dataclass(frozen=True, slots=True)
class _MappedBlock:
    """A block at another address: see :class:`postcopy.paging.placer.PlacedBlock`."""

    host_address: int
    page_size_bytes: int
    target_pages_per_page: int
    pages: npt.NDArray[np.uint8]


class _Part:
    """A part of one block in the process, with its pages' numbers in the block."""

    def __init__(self, mapped: MappedRange, paged: IncomingBlock, userfaultfd: Userfaultfd) -> None:
        block = paged.block
        self.paged = paged
        self.address = mapped.address
        self.length_bytes = mapped.length_bytes
        self.page_size_bytes = size = block.page_size_bytes
        self.first = mapped.offset // size
        self.end = self.first + mapped.length_bytes // size
        pieces = block.target_pages_per_page
        there = _MappedBlock(mapped.address - mapped.offset, size, pieces, block.pages)
        self.placer = BlockPlacer(userfaultfd, there)


class SharedSpace:
    """The address space of one other process; any thread may call any method.

    :param space: its descriptor is ours from now on.
    """

    def __init__(self, space: AddressSpace, ram: IncomingRam) -> None:
        self.process_id = space.process_id
        self.userfaultfd = Userfaultfd.from_fd(space.userfaultfd)
        self._parts = [_Part(each, ram[each.block], self.userfaultfd) for each in space.ranges]

    def find(self, address: int) -> tuple[IncomingBlock, int] | None:
        """The block and the number of the page at an address of the process."""
        for part in self._parts:
            offset = address - part.address
            if 0 <= offset < part.length_bytes:
                return part.paged, part.first + offset // part.page_size_bytes
        return None

    def show(self, paged: IncomingBlock, page: int) -> None:
        """Let threads see a page that has come, or is zero by now; its next neighbours are mapped, too.

        :raises KernelError: the host cannot do that.
        """

        def resolve(part: _Part) -> None:
            resolve_minor_fault(part.placer, paged, page, part.end - page)

        self._each(paged, page, resolve)

    def map(self, paged: IncomingBlock, page: int) -> bool:
        """Map a page that is in memory; return False if there is none.

        :raises KernelError: the host cannot do that.
        """
        try:
            self._each(paged, page, lambda part: part.placer.map(page))
        except KernelError as error:
            if error.errno != errno.EFAULT:
                raise
            return False
        return True

    def poison(self, paged: IncomingBlock, page: int) -> None:
        """Mark a page as lost: what touches it fails, and never reads zeros."""
        self._each(paged, page, lambda part: part.placer.poison(page))

    def wake(self, paged: IncomingBlock, page: int) -> None:
        """Let threads that wait for a page fault again."""
        self._each(paged, page, lambda part: part.placer.wake(page))

    def wake_all(self) -> None:
        """Let every thread that waits fault again."""
        for part in self._parts:
            self.userfaultfd.wake(part.address, part.length_bytes)

    def close(self) -> None:
        """Let go of the descriptor; the guest's process has another.  Harmless when closed."""
        self.userfaultfd.close()

    def _each(self, paged: IncomingBlock, page: int, call: Callable[[_Part], None]) -> None:
        """Call for each part that has the page mapped; a process that has ended needs nothing any more."""
        for part in self._parts:
            if part.paged is paged and part.first <= page < part.end:
                try:
                    call(part)
                except KernelError as error:
                    if error.errno not in _ENDED:
                        raise


class SharedSpaces:
    """The address spaces of all other processes that have a guest's memory mapped; for any thread."""

    def __init__(self, ram: IncomingRam) -> None:
        self._ram = ram
        self._lock = threading.Lock()
        # Under the lock: all of them, and whether they have been closed.
        self._spaces: list[SharedSpace] = []
        self._closed = False
        self.on_added: Callable[[], None] = lambda: None
        """Called when there is one more."""

    def add(self, space: AddressSpace) -> None:
        """Serve this one, too, from now on; its descriptor is ours."""
        made = SharedSpace(space, self._ram)
        with self._lock:
            if self._closed:
                made.close()  # there is nothing left to serve
                return
            self._spaces.append(made)
        self.on_added()

    def all(self) -> list[SharedSpace]:
        """Those that there are."""
        with self._lock:
            return list(self._spaces)

    def wake_all(self) -> None:
        """Let every thread of theirs that waits fault again."""
        for space in self.all():
            space.wake_all()

    def close(self) -> None:
        """Let go of all descriptors, when none is read any more.  Harmless when closed."""
        with self._lock:
            self._closed = True
            while self._spaces:
                self._spaces.pop().close()
