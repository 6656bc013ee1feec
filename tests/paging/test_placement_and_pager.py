"""Pages are placed whole and once, and a page is asked for once, whoever faults on it."""

import os
import select
import threading
import time

import numpy as np
import pytest

from fakes.cpus import CpusNoted
from fakes.guest import RAM, AskedPages, FakeGuest
from fakes.waiting import wait_until
from postcopy.destination.incoming_ram import discard
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.kernel.userfaultfd import MESSAGE
from postcopy.memory.page_map import RECEIVED
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.pager import Pager
from postcopy.paging.placement import Placement
from postcopy.paging.ram import mapped_pages

pytestmark = pytest.mark.userfaultfd

MIB = 1 << 20
HUGE = 2 * MIB


class Arriving:
    """A guest's memory under userfaultfd, and what places pages in it."""

    def __init__(self, memory_bytes=4 * MIB, page_size_bytes=4096):
        self.guest = FakeGuest(memory_bytes, page_size_bytes)
        self.ram = self.guest.incoming_ram()
        self.paged = self.ram[RAM]
        self.blocktime = Blocktime({})
        self.faults = FaultTable(self.blocktime)
        self.placement = Placement(self.ram, self.faults)
        self.userfaultfd = None

    def listen(self):
        self.userfaultfd = self.guest.open_userfaultfd()
        self.placement.listen(self.userfaultfd)

    def page(self, number):
        return self.guest.memory()[number * 4096 : (number + 1) * 4096]

    def place(self, pages, value):
        self.placement.pages(RAM, offsets(pages), filled(pages, value))

    def mapped(self):
        """Which pages the guest can see."""
        with PagemapScanner(os.getpid()) as scanner:
            return np.flatnonzero(mapped_pages(scanner, self.paged.block)).tolist()

    def received(self):
        return np.flatnonzero(~self.paged.pages.missing()).tolist()

    def close(self):
        if self.userfaultfd is not None:
            self.userfaultfd.close()
        self.guest.close()
        self.ram.close()


def offsets(pages):
    return np.array(pages, np.uint64) * np.uint64(4096)


def filled(pages, value):
    return np.full((len(pages), 4096), value, np.uint8)


@pytest.fixture
def arriving():
    made = Arriving()
    yield made
    made.close()


@pytest.fixture
def huge():
    made = Arriving(8 * MIB, HUGE)
    yield made
    made.close()


def test_before_the_guest_runs_the_later_copy_wins(arriving):
    arriving.place([3, 4, 9], 1)
    arriving.place([4], 2)
    arriving.placement.zeros(RAM, offsets([9, 10]))
    assert [arriving.page(n)[0] for n in (3, 4, 9, 10)] == [1, 2, 0, 0]
    assert arriving.received() == [3, 4, 9, 10]


def test_under_the_guests_eyes_the_first_copy_stays(arriving):
    arriving.listen()
    arriving.place([5], 1)
    arriving.place([3, 4, 5, 6, 9], 2)
    arriving.placement.zeros(RAM, offsets([3, 5, 7]))
    assert [arriving.page(n)[0] for n in (3, 4, 5, 6, 7, 9)] == [2, 2, 1, 2, 0, 2]
    assert arriving.received() == [3, 4, 5, 6, 7, 9]


@pytest.mark.parametrize("there", [[0], [7], [3, 4], [0, 2, 4, 6], list(range(8))])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_run_with_pages_that_exist(arriving, there, zeros):
    """What has been received stays, wherever in a run it is."""
    arriving.listen()
    arriving.place(there, 1)
    run = list(range(8))
    if zeros:
        arriving.placement.zeros(RAM, offsets(run))
    else:
        arriving.place(run, 2)
    late = 0 if zeros else 2
    assert [arriving.page(n)[0] for n in run] == [1 if n in there else late for n in run]
    assert arriving.received() == run


def test_a_page_that_was_discarded_does_not_come_back_by_itself(arriving):
    arriving.place([3], 9)
    discard(arriving.ram, RAM, np.array([[3 * 4096, 4096]], np.uint64))
    arriving.placement.zeros(RAM, offsets([3]))
    assert not any(arriving.page(3))


@pytest.mark.parametrize("listening", [False, True])
def test_only_what_was_discarded_is_written_over_with_zeros(arriving, listening):
    """Memory that has received nothing reads as zeros: to write to all of it would take its time."""
    arriving.place([3], 9)
    discard(arriving.ram, RAM, np.array([[3 * 4096, 4096]], np.uint64))
    arriving.paged.block.pages[5] = 1  # a mark
    if listening:
        arriving.listen()
    arriving.placement.zeros(RAM, offsets([3, 5]))
    assert [arriving.page(n)[0] for n in (3, 5)] == [0, 1]


def test_an_engine_that_died_while_placing(arriving):
    """What the guest could see may have been written to: it counts as received; the rest comes again."""
    pages = arriving.paged.pages
    assert pages.claim(np.array([1, 2])).all()
    assert not pages.claim(np.array([1])).any()
    pages.request(5)
    pages.receive(np.array([7]))
    mapped = np.zeros(len(pages.states), np.bool_)
    mapped[[2, 7]] = True
    pages.adopt(mapped)
    assert arriving.received() == [2, 7]
    assert pages.request(5)


@pytest.mark.parametrize("pages", [[5], [7, 8, 9], list(range(20, 60)), [3, 5, 9, 100]])
def test_what_the_guest_can_see_has_been_received(arriving, pages, monkeypatch):
    """An engine that dies in the very moment of mapping must not leave a page that is asked for again."""
    arriving.listen()
    show, states = arriving.userfaultfd.map_existing, arriving.paged.pages.states
    seen = []

    def watched(address, length_bytes):
        first = (address - arriving.paged.block.host_address) // 4096
        seen.extend(states[first : first + length_bytes // 4096].tolist())
        return show(address, length_bytes)

    monkeypatch.setattr(arriving.userfaultfd, "map_existing", watched)
    run = pages == list(range(pages[0], pages[0] + len(pages)))
    arriving.placement.pages(RAM, offsets(pages), filled(pages, 1), neighbours=run)
    assert seen == [RECEIVED] * len(pages)


def test_more_pages_than_are_staged_at_once(arriving):
    arriving.listen()
    pages = list(range(0, 1024, 2)) + list(range(1, 1024, 2))
    content = np.repeat(np.array([page % 251 for page in pages], np.uint8), 4096).reshape(-1, 4096)
    arriving.placement.pages(RAM, offsets(pages), content)
    assert [arriving.page(n)[17] for n in range(1024)] == [n % 251 for n in range(1024)]


def test_a_huge_page_is_placed_with_its_last_piece(huge):
    huge.listen()
    pieces = list(range(512, 1024))
    huge.place(pieces[:300], 7)
    huge.placement.zeros(RAM, offsets(pieces[300:310]))
    huge.place(pieces[310:511], 7)
    assert huge.received() == []
    assert huge.mapped() == []
    huge.place(pieces[511:], 7)
    assert huge.received() == huge.mapped() == [1]
    assert [huge.page(n)[0] for n in (511, 512, 811, 812, 821, 822, 1023)] == [
        0, 7, 7, 0, 0, 7, 7,
    ]  # fmt: skip


def test_zeros_of_a_huge_page_win_over_what_was_there(huge):
    """Memory that has never been written is not cleared again; what has been, is."""
    huge.place(list(range(512, 1024)), 5)
    discard(huge.ram, RAM, np.array([[HUGE, HUGE]], np.uint64))
    huge.listen()
    huge.place(list(range(100, 200)), 7)
    for first in (0, 512, 1024):
        huge.placement.zeros(RAM, offsets(list(range(first + 100, first + 512))))
        huge.placement.zeros(RAM, offsets(list(range(first, first + 100))))
    assert huge.received() == huge.mapped() == [0, 1, 2]
    assert not any(any(huge.page(n)) for n in range(3 * 512))


def test_a_huge_page_that_comes_again_is_left_alone(huge):
    huge.listen()
    for value in (1, 2):
        huge.place(list(range(512)), value)
    assert huge.page(0)[0] == 1


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_huge_pages_may_come_in_any_order_and_twice(huge, seed):
    huge.listen()
    order = np.random.default_rng(seed).permutation(np.r_[0:1024, 0:1024:7])
    values = (order % 251).astype(np.uint8)
    for pieces in np.array_split(np.arange(len(order)), 40):
        content = np.repeat(values[pieces], 4096).reshape(-1, 4096)
        huge.placement.pages(RAM, offsets(order[pieces]), content)
    assert huge.received() == [0, 1]
    assert [huge.page(n)[99] for n in range(1024)] == [n % 251 for n in range(1024)]


def test_a_huge_page_is_the_channels_that_it_has_begun_to_come_over(huge):
    """Its pieces on another channel are dropped: neither may map what the other has not written yet."""
    huge.listen()
    other = Placement(huge.ram, huge.faults)
    other.listen(huge.userfaultfd)
    pieces = list(range(512))
    huge.place(pieces[:100], 1)
    other.pages(RAM, offsets(pieces), filled(pieces, 2))
    assert huge.received() == huge.mapped() == []
    huge.place(pieces[100:], 1)
    assert huge.received() == huge.mapped() == [0]
    assert {huge.page(n)[0] for n in pieces} == {1}


def test_half_a_huge_page_comes_again_after_a_break(huge):
    huge.listen()
    pieces = list(range(512))
    huge.place(pieces[:100], 1)
    huge.placement.forget_halves()
    huge.ram.forget_claims()
    huge.place(pieces[100:], 2)
    assert huge.received() == huge.mapped() == []
    huge.place(pieces[:100], 2)
    assert huge.received() == huge.mapped() == [0]
    assert {huge.page(n)[0] for n in pieces} == {2}


@pytest.mark.parametrize("length", [1, 7, 256, 700])
def test_neighbours_may_reach_through_several_huge_pages(huge, length):
    huge.listen()
    for first in range(0, 1536, length):
        pieces = list(range(first, min(first + length, 1536)))
        content = np.repeat((np.array(pieces) % 256).astype(np.uint8), 4096).reshape(-1, 4096)
        huge.placement.pages(RAM, offsets(pieces), content, neighbours=True)
    assert huge.received() == huge.mapped() == [0, 1, 2]
    assert [huge.page(n)[17] for n in range(1536)] == [n % 256 for n in range(1536)]


def test_zero_pages_without_memory_take_none(arriving):
    arriving.listen()
    arriving.paged.block.pages[3] = 7  # what was discarded is in memory still
    arriving.paged.stale[3] = True
    arriving.placement.zeros(RAM, offsets(range(8)))
    assert arriving.received() == list(range(8))
    assert arriving.paged.block.has_data(0, 8).tolist() == [n == 3 for n in range(8)]
    assert not any(arriving.page(3))


# --- the pager


def pager_of(arriving, asked, cpus=None):
    return Pager(arriving.userfaultfd, arriving.ram, arriving.faults, asked, cpus or CpusNoted())


class Paging:
    """A pager at work, and what it has asked for."""

    def __init__(self, arriving):
        arriving.listen()
        self.asked = AskedPages()
        self.cpus = CpusNoted()
        self.pager = pager_of(arriving, self.asked, self.cpus)
        self.thread = threading.Thread(target=self.pager.run, daemon=True)
        self.thread.start()

    def close(self):
        self.pager.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def paging(arriving):
    made = Paging(arriving)
    yield made
    made.close()


def touch(arriving, pages, found):
    threads = [
        threading.Thread(target=lambda n=n: found.append((n, arriving.guest.touch(n))), daemon=True)
        for n in pages
    ]
    for thread in threads:
        thread.start()
    return threads


def test_eight_threads_on_one_page_ask_once(arriving, paging):
    found = []
    threads = touch(arriving, [5] * 8, found)
    wait_until(lambda: paging.pager.faults == 8, 20, "eight faults")
    assert [page for _, page in paging.asked] == [5]
    assert found == []
    arriving.place([5], 9)
    for thread in threads:
        thread.join(10)
    assert found == [(5, b"\x09" * 8)] * 8
    report = arriving.blocktime.report()
    assert report.faults == 8
    assert not arriving.faults.waiting(RAM)


def test_cpus_are_kept_awake_for_each_fault(arriving, paging):
    cpus = paging.cpus
    for page in (5, 9):
        (thread,) = touch(arriving, [page], [])
        wait_until(lambda page=page: page in [asked for _, asked in paging.asked], what="a request")
        cpus.calls.append("asked")
        arriving.place([page], 1)
        thread.join(10)
    assert cpus.calls == ["a while", "a while", "asked", "a while", "asked"]


def test_several_pages_at_once(arriving, paging):
    found = []
    threads = touch(arriving, range(8), found)
    wait_until(lambda: len(paging.asked) == 8, 20, "eight requests")
    assert sorted(page for _, page in paging.asked) == list(range(8))
    arriving.place([6, 7], 2)
    arriving.placement.zeros(RAM, offsets(range(6)))
    for thread in threads:
        thread.join(10)
    assert sorted(found) == [(n, bytes(8) if n < 6 else b"\x02" * 8) for n in range(8)]


def test_what_has_not_come_is_asked_for_again(arriving, paging):
    found = []
    threads = touch(arriving, [1, 2], found)
    wait_until(lambda: len(paging.asked) == 2, 20, "two requests")
    arriving.place([1], 1)
    paging.asked.clear()
    paging.pager.ask_again()
    assert [page for _, page in paging.asked] == [2]
    arriving.place([2], 1)
    for thread in threads:
        thread.join(10)
    assert len(found) == 2


def test_a_fault_that_is_read_late_only_wakes_its_thread(arriving):
    """The page comes after the kernel has queued the fault, and before the pager reads it."""
    arriving.listen()
    found, asked = [], AskedPages()
    threads = touch(arriving, [4], found)
    poll = arriving.userfaultfd
    wait_until(lambda: _has_events(poll), 20, "a fault")
    arriving.place([4], 3)
    pager = pager_of(arriving, asked)
    thread = threading.Thread(target=pager.run, daemon=True)
    thread.start()
    for waiting in threads:
        waiting.join(10)
    pager.stop()
    thread.join(10)
    assert asked == []
    assert found == [(4, b"\x03" * 8)]
    assert not arriving.faults.waiting(RAM)


def test_a_fault_whose_page_came_before_it_was_noted_is_no_sample(arriving):
    """Nobody knows how long its thread has waited; to count it as 0 would be an invention."""
    arriving.listen()
    threads = touch(arriving, [4], [])
    wait_until(lambda: _has_events(arriving.userfaultfd), 20, "a fault")
    faults = list(MESSAGE.iter_unpack(arriving.userfaultfd.read_messages(8)))
    arriving.place([4], 3)
    asked = AskedPages()
    pager = pager_of(arriving, asked)
    pager.serve(faults, 0)
    pager.discard()
    assert asked == []
    for thread in threads:
        thread.join(10)
    assert arriving.blocktime.report().faults == 0
    assert not arriving.faults.waiting(RAM)


def test_latency_is_the_time_from_fault_to_page(arriving, paging):
    began = time.monotonic_ns()
    threads = touch(arriving, [0], [])
    wait_until(lambda: paging.asked, 20, "asked")
    arriving.place([0], 1)
    for thread in threads:
        thread.join(10)
    report = arriving.blocktime.report()
    assert 0 < report.max_us * 1000 <= time.monotonic_ns() - began
    assert report.others_mean_ns == report.mean_ns > 0


def _has_events(userfaultfd):
    poll = select.poll()  # takes descriptors of any number
    poll.register(userfaultfd.fd, select.POLLIN)
    return bool(poll.poll(0))


def test_a_zero_page_without_memory_is_there_for_who_waits_and_who_comes_later(arriving, paging):
    found = []
    early = touch(arriving, [5], found)
    wait_until(lambda: len(paging.asked) == 1, what="the request")
    arriving.placement.zeros(RAM, offsets(range(8)))
    for thread in (*early, *touch(arriving, [6], found)):
        thread.join(10)
    assert sorted(found) == [(5, bytes(8)), (6, bytes(8))]
    assert arriving.paged.block.has_data(0, 8).tolist() == [n in {5, 6} for n in range(8)]


def test_a_page_whose_placing_has_failed_is_missing_still(arriving):
    """In the next connection it comes again, and what had been written of it does not show."""
    arriving.listen()
    arriving.paged.pages.request(7)
    arriving.paged.block.pages[7] = 1  # as far as the placing had come
    arriving.paged.pages.claim(np.array([7]))
    arriving.ram.forget_claims()
    assert arriving.paged.pages.requested().tolist() == [7]
    arriving.placement.zeros(RAM, offsets([7]))
    assert arriving.received() == [7]
    assert arriving.page(7) == bytes(4096)


def test_what_has_been_placed_is_not_forgotten_with_it(arriving):
    arriving.listen()
    arriving.place([3], 1)
    arriving.ram.forget_claims()
    assert arriving.received() == [3]
    assert not arriving.paged.stale.any()
