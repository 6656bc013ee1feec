"""How pages get into place: the calls of a userfaultfd for one block, and what they may answer.

A page may be there already (``EEXIST``): in the file and not mapped, then it is mapped; or mapped, then the
threads that wait for it are woken.  While the address space changes nothing can be placed; then threads are
woken too: they fault again, and by then the event of that change has been read.
"""

import errno
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from postcopy.errors import KernelError, PageExists
from postcopy.kernel.userfaultfd import PageCopier, Userfaultfd

_GONE: Final = frozenset({errno.EFAULT, errno.ENOENT})
"""A page that has been removed, or a range that has been unmapped, since it was decided to map it."""

_MAPPED: Final = frozenset({errno.EEXIST, errno.EINVAL})
"""A page that is mapped, as each page of anonymous memory is, which ``UFFDIO_CONTINUE`` does not know."""

_NOT_IN_A_FILE: Final = frozenset({errno.EFAULT, errno.EINVAL})
"""A hole of a file; or anonymous memory, which has no pages but those that are mapped."""


class PlacedBlock(Protocol):
    """A block as one process has it mapped: see :class:`postcopy.memory.ram_block.RamBlock`."""

    @property
    def host_address(self) -> int:
        """Where its first byte is in that process."""

    @property
    def page_size_bytes(self) -> int:
        """The block's own page size."""

    @property
    def target_pages_per_page(self) -> int:
        """How many pages of 4 KiB that is."""

    @property
    def pages(self) -> npt.NDArray[np.uint8]:
        """The engine's own mapping of it, shape ``(n, 4096)``."""


class BlockPlacer:
    """Places pages of one block, numbered in its own page size; for one thread.

    :ivar placed_pages: how many pages have been copied or filled with zeros.
    """

    def __init__(self, userfaultfd: Userfaultfd, block: PlacedBlock) -> None:
        self._userfaultfd = userfaultfd
        self._block = block
        self._size = block.page_size_bytes
        self._copier = PageCopier(userfaultfd, block.page_size_bytes)
        self.placed_pages = 0

    def map(self, page: int, count: int = 1) -> None:
        """Map pages that are in memory already; all threads that wait for them go on."""
        done = 0
        while done < count:
            address = self._at(page + done)
            length = (count - done) * self._size
            try:
                mapped = self._userfaultfd.map_existing(address, length)
            except KernelError as error:
                gone = self._userfaultfd.tells_of_changes and error.errno in _GONE
                if not gone and error.errno not in _MAPPED:
                    raise
                self.wake(page + done)
                mapped = self._size
            if not mapped:
                self._userfaultfd.wake(address, length)
                return
            done += mapped // self._size

    def copy(self, page: int, count: int, source: int) -> int:
        """Copy pages into place, unless they are there.

        :param source: the address in this process of the first one.
        :return: how many pages, from the first one on, are in place; 0: the address space is changing.
        :raises KernelError: ``EFAULT`` if they cannot be read.
        """
        if count == 1:
            return self.copy_page(page, source)
        try:
            done = self._userfaultfd.copy(self._at(page), source, count * self._size) // self._size
        except PageExists:
            self.map(page)
            return 1
        except KernelError as error:
            return self._changed(page, error)
        self.placed_pages += done
        return done or self._changing(page)

    def copy_page(self, page: int, source: int) -> int:
        """As :meth:`copy`, in the shortest time: a thread waits for this page."""
        try:
            if self._copier.place(self._block.host_address + page * self._size, source):
                self.placed_pages += 1
            else:
                self.map(page)
        except KernelError as error:
            return self._changed(page, error)
        return 1

    def zero(self, page: int) -> None:
        """Place a page of zeros, unless there is a page."""
        try:
            if self._block.target_pages_per_page == 1:
                placed = self._userfaultfd.zeropage(self._at(page), self._size)
            else:
                # Huge pages have no page of zeros.  No other thread writes to this one.
                per_page = self._block.target_pages_per_page
                self._block.pages[page * per_page : (page + 1) * per_page] = 0
                placed = self._userfaultfd.map_existing(self._at(page), self._size)
        except PageExists:
            self.wake(page)
        except KernelError as error:
            self._changed(page, error)
        else:
            self.placed_pages += placed // self._size
            if not placed:
                self._changing(page)

    def resolve(self, page: int, count: int = 1) -> None:
        """Let threads see what the memory has, which is what they are to see: zeros where it has nothing.

        :param count: map so many pages, if they are all in memory.
        """
        try:
            mapped = self._userfaultfd.map_existing(self._at(page), count * self._size)
        except PageExists:
            self.wake(page)
        except KernelError as error:
            if error.errno in _NOT_IN_A_FILE:
                self.zero(page)
            else:
                self._changed(page, error)
        else:
            if not mapped:
                self._changing(page)

    def poison(self, page: int) -> None:
        """Mark a page as lost: what touches it fails, and never reads zeros."""
        try:
            self._userfaultfd.poison(self._at(page), self._size)
        except PageExists:
            pass  # an engine before this one has done it

    def wake(self, page: int) -> None:
        """Let threads that wait for a page fault again."""
        self._userfaultfd.wake(self._at(page), self._size)

    def _at(self, page: int) -> int:
        return self._block.host_address + page * self._size

    def _changing(self, page: int) -> int:
        """Nothing can be placed now: threads fault again."""
        self.wake(page)
        return 0

    def _changed(self, page: int, error: KernelError) -> int:
        """Tell a change of the address space from a failure."""
        if self._userfaultfd.tells_of_changes and error.errno in {errno.EAGAIN, errno.ENOENT}:
            return self._changing(page)
        raise error
