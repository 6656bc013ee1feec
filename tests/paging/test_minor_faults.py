"""What has been received before the guest runs is mapped by and by, or when it is touched."""

import os
import threading

import numpy as np
import pytest

from fakes.cpus import CpusNoted
from fakes.guest import RAM, AskedPages, FakeGuest
from fakes.waiting import wait_until
from postcopy.abi.pagemap import PageCategory
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.memory.page_map import RECEIVED
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.minor_faults import BackgroundMapper
from postcopy.paging.pager import Pager
from postcopy.paging.placement import Placement

pytestmark = pytest.mark.userfaultfd

PAGES = 4096
BROUGHT = [*range(3, 40), 44, 1023, 1024, 1025, 4095]
BLANK = [50, 51, 2000]


class Arrived:
    """A guest whose memory precopy has brought in part, and that runs now."""

    def __init__(self):
        self.guest = FakeGuest(PAGES * 4096, 4096)
        self.ram = self.guest.incoming_ram()
        self.paged = self.ram[RAM]
        self.paged.block.pages[BROUGHT] = 7
        self.paged.pages.receive(np.array(BROUGHT + BLANK))
        self.userfaultfd = self.guest.open_userfaultfd()
        self.guest.unmap_missing()

    def mapped(self):
        """The pages that the guest's process has in its page tables."""
        base = self.paged.block.host_address
        found = []
        with PagemapScanner(os.getpid()) as scanner:
            categories = PageCategory.PRESENT
            for start, end in scanner.scan(
                base, base + PAGES * 4096, protect=False, categories=categories
            ):
                found += range((int(start) - base) // 4096, (int(end) - base) // 4096)
        return found

    def close(self):
        self.userfaultfd.close()
        self.guest.close()
        self.ram.close()


@pytest.fixture
def arrived():
    made = Arrived()
    yield made
    made.close()


def test_all_that_has_memory_is_mapped(arrived):
    assert arrived.mapped() == []
    mapper = BackgroundMapper(arrived.userfaultfd, arrived.ram)
    mapper.start()
    wait_until(lambda: arrived.mapped() == BROUGHT, what="pages are mapped")
    mapper.stop()


def test_it_does_not_mind_what_is_mapped_already(arrived):
    for page in (4, 5, 30, 4095):
        arrived.userfaultfd.map_existing(arrived.paged.block.host_address + page * 4096, 4096)
    mapper = BackgroundMapper(arrived.userfaultfd, arrived.ram)
    mapper.start()
    wait_until(lambda: arrived.mapped() == BROUGHT, what="pages are mapped")
    mapper.stop()


def test_what_is_touched_comes_without_the_source_and_with_its_neighbours(arrived):
    asked = AskedPages()
    pager = Pager(arrived.userfaultfd, arrived.ram, FaultTable(Blocktime({})), asked, CpusNoted())
    thread = threading.Thread(target=pager.run, daemon=True)
    thread.start()
    try:
        assert [arrived.guest.touch(page)[0] for page in (10, 44, 50, 1023)] == [7, 7, 0, 7]
    finally:
        pager.stop()
        thread.join()
    assert asked == []
    assert arrived.mapped() == [*range(10, 40), 44, 50, 1023, 1024, 1025]
    assert (arrived.paged.pages.states == RECEIVED).sum() == len(BROUGHT + BLANK)


def test_single_pages_that_nobody_waits_for_are_mapped_later(arrived):
    arrived.paged.block.pages[BROUGHT] = 0
    arrived.paged.pages.states[:] = 0
    later = []
    placement = Placement(arrived.ram, FaultTable(Blocktime({})))
    placement.listen(arrived.userfaultfd, lambda name, pages: later.append((name, pages.tolist())))
    run, single = list(range(100, 120)), [7, 9, 11, 200, 201]
    pages = np.array([*single[:3], *run, *single[3:]], np.uint64)
    content = np.full((len(pages), 4096), 3, np.uint8)
    placement.pages(RAM, pages * np.uint64(4096), content)
    assert arrived.mapped() == run
    assert later == [(RAM, single)]
    assert (arrived.paged.pages.states[single] == RECEIVED).all()
    mapper = BackgroundMapper(arrived.userfaultfd, arrived.ram)
    mapper.start()
    mapper.later(RAM, np.array(single))
    wait_until(lambda: arrived.mapped() == sorted(run + single), what="pages are mapped")
    mapper.stop()


def test_a_single_page_that_somebody_waits_for_is_mapped_at_once(arrived):
    arrived.paged.pages.states[:] = 0
    faults = FaultTable(Blocktime({}))
    asked = AskedPages()
    pager = Pager(arrived.userfaultfd, arrived.ram, faults, asked, CpusNoted())
    placement = Placement(arrived.ram, faults)
    placement.listen(arrived.userfaultfd, lambda *_: None)
    serving = threading.Thread(target=pager.run, daemon=True)
    touching = threading.Thread(target=arrived.guest.touch, args=(9,), daemon=True)
    serving.start()
    touching.start()
    wait_until(lambda: asked, what="a page is asked for")
    placement.pages(
        RAM, np.array([7, 9], np.uint64) * np.uint64(4096), np.ones((2, 4096), np.uint8)
    )
    touching.join(10)
    assert not touching.is_alive()
    assert arrived.mapped() == [9]
    pager.stop()
    serving.join()


class LateClear(threading.Event):
    """Whoever clears it is held up before that, in the very moment in which it is told to stop."""

    def __init__(self, stop):
        super().__init__()
        self._stop = stop
        self._set_twice = threading.Event()
        self._begun = False

    def set(self):
        super().set()
        if self._begun:
            self._set_twice.set()

    def clear(self):
        if not self._begun:
            self._begun = True
            threading.Thread(target=self._stop, daemon=True).start()
            assert self._set_twice.wait(10)
        super().clear()


def test_told_to_stop_in_the_moment_in_which_it_begins_a_round_it_ends(arrived):
    """Or the thread that reads the main channel would wait for it for ever, and answer no ping."""
    mapper = BackgroundMapper(arrived.userfaultfd, arrived.ram)
    mapper._more = LateClear(mapper.stop)
    mapper.start()
    mapper._thread.join(10)
    try:
        assert not mapper._thread.is_alive()
    finally:
        mapper._more.set()
        mapper._thread.join(10)
