"""Faults are served in every address space that has the guest's memory mapped, each page asked for once.

The other spaces are mappings of this process with a userfaultfd each, or, where it has to end, a process.
"""

import os
import threading
from functools import partial

import numpy as np
import pytest

from fakes.back_end import BackEnd
from fakes.cpus import CpusNoted
from fakes.elsewhere import Elsewhere
from fakes.guest import RAM, AskedPages, FakeGuest
from fakes.uffd_events import read_events
from fakes.waiting import wait_until
from postcopy.abi.userfaultfd import PagefaultFlag, RegisterMode
from postcopy.kernel.userfaultfd import MISSING_MODE, NO_FEATURES, Userfaultfd
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.pager import Pager
from postcopy.paging.placement import Placement
from postcopy.paging.shared_space import SharedSpaces

pytestmark = pytest.mark.userfaultfd

PAGE = 4096
PAGES = 256
HUGE = 2 << 20


class Scene:
    """A guest whose memory is mapped in more spaces than its own, and what serves all of them."""

    def __init__(self, pages=PAGES, page_bytes=PAGE, parts=((0, PAGES), (0, PAGES))):
        self.page_bytes = page_bytes
        self.guest = FakeGuest(pages * page_bytes, page_bytes, in_pool=page_bytes == HUGE)
        self.ram = self.guest.incoming_ram()
        self.paged = self.ram[RAM]
        self.table = FaultTable(Blocktime({}))
        self.placement = Placement(self.ram, self.table)
        self.userfaultfd = self.guest.open_userfaultfd()
        self.placement.listen(self.userfaultfd)
        self.elsewhere = [Elsewhere(self.guest, *part, page_bytes) for part in parts]
        self.shared = SharedSpaces(self.ram)
        for each in self.elsewhere:
            self.shared.add(each.space)
        self.asked = AskedPages()
        self.pager = None
        self.threads = []

    def serve(self):
        cpus = CpusNoted()
        self.pager = Pager(self.userfaultfd, self.ram, self.table, self.asked, cpus, self.shared)
        self.serving = threading.Thread(target=self.pager.run, daemon=True)
        self.serving.start()

    def touch(self, toucher, page):
        """Have a thread touch a page; return where its first byte will be."""
        found = []
        thread = threading.Thread(target=lambda: found.append(toucher.touch(page)[0]), daemon=True)
        thread.start()
        self.threads.append(thread)
        return found

    def touch_everywhere(self, page):
        """In every space, until all of these faults have been read."""
        before = self.pager.faults
        touchers = [self.guest, *self.elsewhere]
        found = [self.touch(toucher, page) for toucher in touchers]
        wait_until(lambda: self.pager.faults == before + len(touchers), what="the faults")
        return found

    def asked_pages(self):
        return [page for _, page in self.asked]

    def place(self, pages, value, **more):
        target = np.concatenate([self._pieces(page) for page in pages])
        content = np.full((len(target), PAGE), value, np.uint8)
        self.placement.pages(RAM, target * np.uint64(PAGE), content, **more)

    def _pieces(self, page):
        per_page = self.page_bytes // PAGE
        return np.arange(page * per_page, (page + 1) * per_page, dtype=np.uint64)

    def join(self):
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive(), "a thread still waits for its page"

    def close(self):
        if self.pager is not None:
            self.pager.stop()
            self.serving.join(10)
        for each in self.elsewhere:
            each.close()
        self.shared.close()
        self.guest.unwatch_missing()
        self.join()
        self.userfaultfd.close()
        self.guest.close()
        self.ram.close()


@pytest.fixture
def scene():
    made = Scene()
    yield made
    made.close()


@pytest.mark.parametrize("pages", [[9], [9, 40], [8, 9, 10]], ids=["alone", "scattered", "run"])
@pytest.mark.parametrize("neighbours", [False, True])
def test_a_page_is_asked_for_once_and_shown_wherever_it_is_waited_for(scene, pages, neighbours):
    scene.serve()
    found = scene.touch_everywhere(9)
    assert scene.asked_pages() == [9]
    assert found == [[], [], []]
    scene.place(pages, 7, neighbours=neighbours and pages[-1] - pages[0] == len(pages) - 1)
    scene.join()
    assert found == [[7], [7], [7]]
    assert not scene.table.waiting(RAM)
    assert scene.asked_pages() == [9]


def test_zeros_are_shown_too(scene):
    scene.serve()
    found = scene.touch_everywhere(9)
    scene.placement.zeros(RAM, np.array([9 * PAGE], np.uint64))
    scene.join()
    assert found == [[0], [0], [0]]


def test_what_has_been_received_is_shown_without_the_source_whatever_is_behind_it(scene):
    scene.place([3, 4, 5], 7)
    scene.placement.zeros(RAM, np.array([50 * PAGE], np.uint64))
    scene.serve()
    for each in scene.elsewhere:
        found = [scene.touch(each, page) for page in (3, 5, 50)]
        scene.join()
        assert found == [[7], [7], [0]]
    assert scene.asked == []


def test_a_write_elsewhere_is_the_guests(scene):
    scene.serve()
    scene.place([3], 7)
    scene.elsewhere[0].memory.write(3 * PAGE, b"\x08")
    found = [scene.touch(toucher, 3) for toucher in (scene.guest, scene.elsewhere[1])]
    scene.join()
    assert found == [[8], [8]]
    scene.place([3], 9)  # a second copy
    assert scene.guest.touch(3)[0] == 8


def test_parts_of_a_block():
    """As a back end maps what is below and what is above the hole for devices."""
    made = Scene(parts=((16, 16), (64, 192)))
    try:
        made.serve()
        low, high = made.elsewhere
        found = [made.touch(low, 16), made.touch(low, 31), made.touch(high, 255)]
        wait_until(lambda: len(made.asked) == 3, what="three requests")
        assert sorted(made.asked_pages()) == [16, 31, 255]
        made.place(range(8, 40), 7)  # neighbours that are received, but not mapped there
        made.place([255], 8)
        made.join()
        assert found == [[7], [7], [8]]
    finally:
        made.close()


def test_huge_pages(huge_pages):
    huge_pages(8)
    made = Scene(8, HUGE, parts=((0, 8), (4, 4)))
    try:
        made.serve()
        found = made.touch_everywhere(5)
        assert made.asked_pages() == [5]
        made.place([5], 7)
        made.join()
        assert found == [[7], [7], [7]]
    finally:
        made.close()


class TestHalfAPage:
    """An engine writes a page where another process may look: through the file that both have mapped."""

    def half(self, scene):
        """As far as a thread that places page 5 may have come."""
        assert scene.paged.pages.claim_run(5, 6)
        scene.paged.block.pages[5, : PAGE // 2] = 7

    def test_is_a_fault_in_a_space_that_is_registered_for_minor_faults(self, scene):
        self.half(scene)
        found = scene.touch(scene.elsewhere[0], 5)
        watch, told = scene.elsewhere[0].watch, []
        wait_until(lambda: told.extend(read_events(watch)) or told, what="the fault")
        assert [fault.flags for fault in told] == [PagefaultFlag.MINOR]
        assert found == []
        scene.elsewhere[0].close()  # it goes on
        scene.elsewhere.pop(0)

    def test_waits_until_it_is_whole(self, scene):
        scene.serve()
        self.half(scene)
        found = scene.touch(scene.elsewhere[0], 5)
        wait_until(lambda: scene.pager.faults == 1, what="the fault")
        assert found == []
        assert scene.asked == []  # it is on its way
        scene.paged.pages.unclaim()
        scene.place([5], 9)
        scene.join()
        assert found == [9]

    def test_is_seen_in_one_that_is_registered_for_missing_pages_alone(self, scene):
        """Why it is not left at what the process itself has registered."""
        other = scene.elsewhere[0]
        other.watch.unregister(other.memory.address, other.memory.length)
        other.watch.register(other.memory.address, other.memory.length, RegisterMode.MISSING)
        self.half(scene)
        assert other.memory.read(5 * PAGE, PAGE) == b"\x07" * (PAGE // 2) + bytes(PAGE // 2)


def test_pages_are_never_torn_while_many_come():
    """A thread of another space follows the one that places pages, page by page."""
    made = Scene(2048, parts=((0, 2048),))
    other, torn = made.elsewhere[0].memory, []

    def follow():
        seen = (len(set(other.read(page * PAGE, PAGE))) for page in range(2048))
        torn.extend(page for page, values in enumerate(seen) if values != 1)

    try:
        made.serve()
        following = threading.Thread(target=follow, daemon=True)
        following.start()
        for page in range(2048):
            made.place([page], 1 + page % 255)
        following.join(30)
        assert not following.is_alive()
        assert torn == []
    finally:
        made.close()


def test_a_page_that_is_removed_is_zero_wherever_it_is_waited_for(scene):
    scene.serve()
    found = scene.touch_everywhere(9)
    (region,) = scene.guest.regions()
    at = region.host_address + 9 * PAGE
    scene.pager.removed(at, at + PAGE)  # as the loop does when the guest's process tells of it
    scene.userfaultfd.wake(at, PAGE)
    scene.join()
    assert found == [[0], [0], [0]]
    scene.place([9], 7)
    assert scene.elsewhere[0].touch(9)[0] == 0


def test_what_was_read_and_never_answered_comes_again(scene):
    """The engine that had read the faults has died."""
    found = [scene.touch(each, 9) for each in scene.elsewhere]
    for each in scene.elsewhere:
        wait_until(partial(read_events, each.watch), what="the fault")
    scene.serve()
    scene.place([9], 7)
    assert found == [[], []]
    scene.shared.wake_all()
    scene.join()
    assert found == [[7], [7]]


@pytest.mark.parametrize("when", ["before the page comes", "after it has come"])
def test_a_process_that_ends_does_no_harm(scene, when):
    (region,) = scene.guest.regions()
    back_end = BackEnd([region])
    try:
        space = back_end.watch_missing()
        Userfaultfd(os.dup(space.userfaultfd), NO_FEATURES).register(
            space.ranges[0].address, space.ranges[0].length_bytes, MISSING_MODE
        )
        scene.serve()
        scene.shared.add(space)  # at any time
        reading = back_end.read([9, 10])
        wait_until(lambda: scene.asked_pages() == [9], what="its request")
        if when == "after it has come":
            scene.place([9], 7)
            wait_until(lambda: scene.asked_pages() == [9, 10], what="its next request")
        back_end.kill()
        found = scene.touch_everywhere(9) if when != "after it has come" else []
        scene.place([9, 10], 7)
        scene.join()
        assert all(each == [7] for each in found)
        assert [each.touch(10)[0] for each in scene.elsewhere] == [7, 7]
        with pytest.raises(ConnectionResetError):
            reading.result()
    finally:
        back_end.close()
