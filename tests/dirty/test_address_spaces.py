"""A guest's memory may be mapped by several processes; a write through any of them counts."""

import os

import numpy as np
import pytest

from postcopy.abi.userfaultfd import RegisterMode
from postcopy.dirty.pagemap import PagemapTracker
from postcopy.errors import HostCannot
from postcopy.guest import AddressSpace, MappedRange, Region
from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import WRITE_FEATURES, Userfaultfd
from postcopy.memory.ram_block import RamBlock

PAGES = 64
SIZE = PAGES * 4096


class Shared:
    """Memory that is mapped several times: here by one process, at several addresses."""

    def __init__(self, mappings):
        self.fd = memfd.create("shared", SIZE)
        os.pwrite(self.fd, bytes(SIZE), 0)
        self.mappings = [Mapping.shared(self.fd, SIZE) for _ in range(mappings)]
        self._watches = []

    def address_spaces(self):
        return [
            AddressSpace(os.getpid(), [MappedRange("ram", 0, SIZE, each.address)])
            for each in self.mappings
        ]

    def watch_writes(self):
        for each in self.mappings:
            each.read(0, SIZE)
            watch = Userfaultfd.open(WRITE_FEATURES, user_mode_only=True)
            watch.register(each.address, SIZE, RegisterMode.WP)
            self._watches.append(watch)

    def unwatch_writes(self):
        for watch in self._watches:
            watch.close()
        self._watches = []

    def close(self):
        self.unwatch_writes()
        for each in self.mappings:
            each.close()
        os.close(self.fd)


@pytest.mark.parametrize("mappings", [1, 2, 3])
def test_a_write_through_any_of_them_is_told_once(mappings):
    try:
        Userfaultfd.open(WRITE_FEATURES, user_mode_only=True).close()
    except HostCannot as reason:
        pytest.skip(str(reason))
    shared = Shared(mappings)
    address, fd = shared.mappings[0].address, os.dup(shared.fd)
    block = RamBlock(Region("ram", SIZE, 4096, 0, address, fd))
    tracker = PagemapTracker(shared)
    tracker.start()
    try:
        assert tracker.collect(block, 0, PAGES, protect=True).all()  # nothing was protected
        for number, mapping in enumerate(shared.mappings):
            mapping.write((3 * number + 8) * 4096, b"x")
            mapping.write(40 * 4096, b"y")  # by all of them
        written = sorted([3 * number + 8 for number in range(mappings)] + [40])
        found = tracker.collect(block, 5, PAGES, protect=True)
        assert (np.flatnonzero(found) + 5).tolist() == written
        assert not tracker.collect(block, 0, PAGES, protect=True).any()
    finally:
        tracker.stop()
        block.close()
        shared.close()
