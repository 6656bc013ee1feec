"""A guest's memory in one more address space: a mapping of this process, with a userfaultfd of its own."""

import os

from fakes.guest import RAM, FakeGuest
from postcopy.guest import AddressSpace, MappedRange
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import MISSING_MODE, NO_FEATURES, Userfaultfd


class Elsewhere:
    """A part of the guest's memory, mapped once more; registered as the guest's process does it."""

    def __init__(self, guest: FakeGuest, first: int, pages: int, page_bytes: int = 4096) -> None:
        self.first = first
        self.page_bytes = page_bytes
        (region,) = guest.regions()
        self.memory = Mapping.shared(region.fd, pages * page_bytes, first * page_bytes)
        self.watch = Userfaultfd.open(NO_FEATURES)
        self.watch.register(self.memory.address, self.memory.length, MISSING_MODE)
        part = MappedRange(RAM, first * page_bytes, self.memory.length, self.memory.address)
        self.space = AddressSpace(os.getpid(), [part], os.dup(self.watch.fd))

    def touch(self, page: int) -> bytes:
        """Read a little of a page; waits while it is missing."""
        return self.memory.read((page - self.first) * self.page_bytes, 8)

    def close(self) -> None:
        self.watch.unregister(self.memory.address, self.memory.length)
        self.watch.close()
