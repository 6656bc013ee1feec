"""A guest that writes here and there in huge pages is found out, and its writes are told by 4 KiB."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from postcopy.abi.userfaultfd import RegisterMode
from postcopy.dirty.huge_pages import HUGE_BYTES, HugePages
from postcopy.dirty.pagemap import PagemapTracker
from postcopy.errors import KernelError
from postcopy.guest import AddressSpace, MappedRange
from postcopy.kernel import huge_tmpfs
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import WRITE_FEATURES, Userfaultfd

HUGE_PAGES = 16
SIZE = HUGE_PAGES * HUGE_BYTES
IN_HUGE = HUGE_BYTES // 4096
PAGES = SIZE // 4096


class Memory:
    """Memory of transparent huge pages of this process, with what a tracker needs of a guest."""

    def __init__(self):
        try:
            self._fd = huge_tmpfs.create(SIZE)
        except KernelError as error:
            pytest.skip(f"needs root, to mount a tmpfs of huge pages: {error}")
        self._mapping = Mapping.shared(self._fd, SIZE, 0)
        self.pages = self._mapping.view().reshape(-1, 4096)
        self.pages[:] = 1
        self._userfaultfd = None
        self.block = SimpleNamespace(name="ram", page_size_bytes=4096, page_count=PAGES)

    def watch_writes(self):
        self._userfaultfd = Userfaultfd.open(WRITE_FEATURES, user_mode_only=True)
        self._userfaultfd.register(self._mapping.address, SIZE, RegisterMode.WP)

    def unwatch_writes(self):
        self._userfaultfd.close()

    def address_spaces(self):
        return [AddressSpace(0, [MappedRange("ram", 0, SIZE, self._mapping.address)])]

    def write(self, pages):
        for page in pages:
            self.pages[page] += 1

    def close(self):
        self.pages = None
        self._mapping.close()
        os.close(self._fd)


@pytest.fixture
def memory():
    made = Memory()
    yield made
    made.close()


@pytest.fixture
def tracker(memory):
    made = PagemapTracker(memory)
    made.start()
    yield made
    made.stop()


def look(tracker, memory):
    found = tracker.collect(memory.block, 0, PAGES, protect=True)
    return set(np.flatnonzero(found).tolist())


def test_few_writes_are_told_by_the_page_in_the_end(memory, tracker):
    assert len(look(tracker, memory)) == PAGES
    told = []
    for turn in range(6):
        # One page of each huge page, each time another one.
        written = {huge * IN_HUGE + (37 * turn + huge) % IN_HUGE for huge in range(HUGE_PAGES)}
        memory.write(written)
        found = look(tracker, memory)
        assert written <= found
        told.append(len(found))
    assert told[0] == PAGES  # the kernel protects huge pages as one, and cannot tell
    assert told[-1] == HUGE_PAGES


def test_no_write_is_missed_whatever_is_split(memory, tracker):
    random = np.random.default_rng(3)
    shadow = np.zeros_like(memory.pages)
    for _ in range(30):
        memory.write(random.integers(0, PAGES, random.integers(1, 400)).tolist())
        start, end = sorted(random.integers(0, PAGES + 1, 2).tolist())
        mask = tracker.collect(memory.block, start, end, protect=True)
        found = np.flatnonzero(mask) + start
        shadow[found] = memory.pages[found]
    found = tracker.collect(memory.block, 0, PAGES, protect=False)
    shadow[found] = memory.pages[found]
    assert (shadow == memory.pages).all()


def test_a_guest_that_writes_to_all_of_them_is_not_slowed_down(memory, tracker):
    """Seven of eight huge pages stay whole: a write to one page shows as one to all of it."""
    look(tracker, memory)
    for _ in range(5):
        memory.write(range(PAGES))
        assert len(look(tracker, memory)) == PAGES
    memory.write(range(0, PAGES, IN_HUGE))
    found = look(tracker, memory)
    whole = sum(found.issuperset(range(at, at + IN_HUGE)) for at in range(0, PAGES, IN_HUGE))
    assert whole == HUGE_PAGES - HUGE_PAGES // 8


BASE = 0x7F0000000000


def ranges(*pages):
    """Addresses of ranges of huge pages, in halves of them."""
    half = HUGE_BYTES // 2
    found = [(BASE + first * half, BASE + end * half) for first, end in pages]
    return np.array(found, np.uint64).reshape(-1, 2)


def test_only_whole_ones_that_were_protected_before_are_chosen():
    huge, all_of_it = HugePages(BASE, 8 * HUGE_BYTES), (BASE, BASE + 8 * HUGE_BYTES)
    assert not huge.may_split(*all_of_it)
    huge.note(ranges((0, 16)), BASE, BASE + 4 * HUGE_BYTES)
    assert huge.may_split(*all_of_it)
    # The first by half, the second and the third wholly, and what was not protected yet.
    assert huge.to_split(ranges((1, 6), (8, 16)), *all_of_it) == [BASE + HUGE_BYTES]


@pytest.mark.parametrize("offset", [0, 4096, HUGE_BYTES - 4096])
@pytest.mark.parametrize("length", [0, 4096, HUGE_BYTES, 3 * HUGE_BYTES + 4096])
def test_memory_may_begin_and_end_anywhere(offset, length):
    start, end = BASE + offset, BASE + offset + length
    huge = HugePages(start, length)
    written = np.array([[start, end]] if length else [], np.uint64).reshape(-1, 2)
    huge.note(written, start, end)
    first = -(-start // HUGE_BYTES) * HUGE_BYTES
    expected = [first] if first + HUGE_BYTES <= end else []
    assert huge.to_split(written, start, end) == expected
