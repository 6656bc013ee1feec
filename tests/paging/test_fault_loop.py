"""The loop of a postcopy's pager while the kernel tells it that the address space changes."""

import os
import threading

import numpy as np
import pytest

from fakes.cpus import CpusNoted
from fakes.guest import RAM, AskedPages, need_missing_pages
from fakes.uffd_events import read_events
from fakes.waiting import wait_until
from postcopy.abi import linux
from postcopy.abi.userfaultfd import EventCode, Feature
from postcopy.errors import GuestError
from postcopy.guest import Region
from postcopy.kernel import calls, memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import MESSAGE, MISSING_FEATURES, MISSING_MODE, Userfaultfd
from postcopy.memory import page_map_file
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.fault_loop import FaultLoop
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.pager import Pager
from postcopy.paging.placement import Placement
from postcopy.paging.ram import IncomingRam

PAGE = 4096
PAGES = 64
EVENTS = Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EVENT_REMAP
MREMAP, MAY_MOVE, FIXED = 25, 1, 2


class TellsOfReads(Userfaultfd):
    """Calls ``on_event`` between the reading of an event and its handling."""

    def read_messages(self, limit):
        messages = super().read_messages(limit)
        if any(message[0] != EventCode.PAGEFAULT for message in MESSAGE.iter_unpack(messages)):
            self.on_event()
        return messages

    def on_event(self):
        """What happens then; replaced by tests."""


class Told:
    """Memory whose changes are told, a pager, and what places pages."""

    def __init__(self):
        self.fd = memfd.create(RAM, PAGES * PAGE)
        self.memory = Mapping.shared(self.fd, PAGES * PAGE)
        self.userfaultfd = TellsOfReads.open(MISSING_FEATURES | EVENTS)
        self.userfaultfd.register(self.memory.address, PAGES * PAGE, MISSING_MODE)
        region = Region(RAM, PAGES * PAGE, PAGE, 0, self.memory.address, os.dup(self.fd))
        self.ram = IncomingRam([region], [page_map_file.create(PAGES)])
        self.table = FaultTable(Blocktime({}))
        self.placement = Placement(self.ram, self.table)
        self.placement.listen(self.userfaultfd)
        self.asked = AskedPages()
        self.pager = Pager(self.userfaultfd, self.ram, self.table, self.asked, CpusNoted())
        self.error = None
        self.thread = self.begin(self._run)

    def _run(self):
        try:
            self.pager.run()
        except GuestError as error:
            self.error = error

    def begin(self, call, *arguments):
        thread = threading.Thread(target=call, args=arguments, daemon=True)
        thread.start()
        return thread

    def wait_for(self, thread):
        thread.join(10)
        assert not thread.is_alive()

    def do(self, call, *arguments):
        """Change the address space: that waits until the pager has read of it."""
        self.wait_for(self.begin(call, *arguments))

    def remove(self, page, count=1):
        at = self.memory.address + page * PAGE
        self.do(calls.madvise, at, count * PAGE, linux.MADV_REMOVE)

    def place(self, pages, value):
        offsets = np.array(pages, np.uint64) * np.uint64(PAGE)
        self.placement.pages(RAM, offsets, np.full((len(pages), PAGE), value, np.uint8))

    def close(self):
        self.pager.stop()
        self.wait_for(self.thread)
        self.userfaultfd.unregister(self.ram[RAM].block.host_address, PAGES * PAGE)
        self.userfaultfd.close()
        self.ram.close()
        os.close(self.fd)


@pytest.fixture
def told():
    need_missing_pages()
    made = Told()
    yield made
    made.close()


def test_a_removed_page_is_zero_and_what_comes_for_it_later_is_dropped(told):
    told.place([3], 7)
    assert told.memory.read(3 * PAGE, 1) == b"\x07"
    told.remove(3, 3)
    told.place([3, 4, 5, 6], 8)
    assert [told.memory.read(page * PAGE, 1)[0] for page in (3, 4, 5, 6)] == [0, 0, 0, 8]
    assert told.asked == []


@pytest.mark.parametrize("pages", [[4], [3, 4, 5]])
def test_what_comes_after_a_removal_and_before_it_is_handled_is_dropped(told, pages):
    """The process goes on as soon as the event has been read: its pages may be gone by then."""
    placing = []

    def place():
        removing.join(10)  # the memory is removed now
        placing.append(told.begin(told.place, pages, 8))
        placing[0].join(0.2)  # it ends if nothing holds it up

    told.userfaultfd.on_event = place
    at = told.memory.address + 3 * PAGE
    arguments = at, 3 * PAGE, linux.MADV_REMOVE
    removing = threading.Thread(target=calls.madvise, args=arguments, daemon=True)
    removing.start()
    wait_until(lambda: placing, what="the event")
    told.wait_for(placing[0])
    assert [told.memory.read(page * PAGE, 1)[0] for page in (3, 4, 5)] == [0, 0, 0]


def test_a_thread_that_waits_for_a_page_that_is_removed_goes_on_with_zeros(told):
    seen = []
    waiting = told.begin(lambda: seen.append(told.memory.read(9 * PAGE, 1)))
    wait_until(lambda: told.asked, what="the request")
    told.remove(9)
    told.wait_for(waiting)
    assert seen == [b"\0"]
    wait_until(lambda: not told.table.waiting(RAM), what="nothing waits")
    told.place([9], 8)
    assert told.memory.read(9 * PAGE, 1) == b"\0"


def test_nothing_is_placed_where_memory_was_unmapped(told):
    told.do(calls.munmap, told.memory.address + 5 * PAGE, 2 * PAGE)
    told.place([4, 5, 6, 7], 8)
    assert [told.memory.read(page * PAGE, 1)[0] for page in (4, 7)] == [8, 8]
    told.do(calls.mmap, 2 * PAGE, linux.PROT_READ, linux.MAP_PRIVATE | linux.MAP_ANONYMOUS)
    assert told.ram.missing_pages == PAGES - 4


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="mremap's number: run it on x86_64")
class TestMoves:
    def move(self, told, source, pages):
        target = Mapping.anonymous(pages * PAGE)
        sizes = (pages * PAGE, pages * PAGE)
        at = told.memory.address + source * PAGE
        flags = MAY_MOVE | FIXED
        moving = told.begin(calls.syscall, "mremap", MREMAP, at, *sizes, flags, target.address)
        return target, moving

    def test_a_block_that_has_moved_is_served_where_it_is(self, told):
        told.place([3], 7)
        target, moving = self.move(told, 0, PAGES)
        told.wait_for(moving)
        wait_until(lambda: told.ram[RAM].block.host_address == target.address, what="the move")
        seen = []
        waiting = told.begin(lambda: seen.append(target.read(9 * PAGE, 1)))
        wait_until(lambda: told.asked, what="the request")
        told.place([9], 8)
        told.wait_for(waiting)
        assert seen == [b"\x08"]
        assert target.read(3 * PAGE, 1) == b"\x07"

    def test_a_part_of_a_block_that_moves_cannot_be_served(self, told):
        _, moving = self.move(told, 4, 2)
        told.wait_for(told.thread)
        assert "has moved a part of RAM block" in str(told.error)
        wait_until(lambda: self.has_ended(told, moving), what="the end of the move")

    def has_ended(self, told, moving):
        """The move waits until all that the kernel tells of it has been read."""
        read_events(told.userfaultfd)
        return not moving.is_alive()


class Forking:
    """As the userfaultfd of a process that forks: one message, and a pipe in place of the child's."""

    tells_of_changes = True

    def __init__(self):
        self.child, self.other = os.pipe()
        self.fd, ready = os.pipe()
        os.write(ready, b"!")
        os.close(ready)

    def read_messages(self, _limit):
        os.read(self.fd, 1)
        return MESSAGE.pack(EventCode.FORK, self.child, 0, 0) if not self.told() else b""

    def told(self):
        return False


def test_the_watcher_of_a_forked_child_is_held_open_up_to_the_end():
    """Closed at once, it would let the child read zeros in place of pages that have not come."""
    forking = Forking()
    loop = FaultLoop(forking, handler=None)
    forking.told = loop.stop
    loop.run()
    os.fstat(forking.child)
    loop.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(forking.child)
    os.close(forking.fd)
    os.close(forking.other)
