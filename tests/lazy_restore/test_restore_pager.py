"""The pager of a restore by itself: what it brings, in which order, and what it leaves alone."""

import errno
import os
import threading

import numpy as np
import pytest

from fakes.cpus import CpusNoted
from fakes.guest import RAM, FakeGuest
from fakes.waiting import wait_until
from postcopy.channel.rate_limit import RateLimiter
from postcopy.errors import ImageError, KernelError
from postcopy.image import page_copies
from postcopy.image.page_copies import CopiedPages, PageCopies
from postcopy.lazy_restore import block_restorer, restore_pager
from postcopy.lazy_restore.block_restorer import BlockRestorer
from postcopy.lazy_restore.prefetch_budget import LEAST_BYTES, HeadStart
from postcopy.lazy_restore.restore_pager import Pace, RestorePager
from postcopy.lazy_restore.restore_statistics import RestoreStatistics
from postcopy.memory.page_map import EARLY, LATE, RECEIVED, UNTOUCHED
from postcopy.status import Status

PAGE = 4096
PAGES = 256


class FakeSource:
    """Pages full of their own number, but for those that are zero and those that cannot be had."""

    def __init__(self, *, fixed=True, zero=(), bad=()):
        numbers = np.arange(1, PAGES + 1, dtype=np.uint64)
        self.rows = np.repeat(numbers[:, None], PAGE // 8, axis=1)
        self.data = np.ones(PAGES, np.bool_)
        self.data[list(zero)] = False
        self.wrong = set(bad)
        self.base = self.rows.ctypes.data if fixed else 0
        self.asked = []

    def has(self, page):
        return bool(self.data[page])

    def has_data(self, first, end):
        return self.data[first:end]

    def is_good(self, page):
        return page not in self.wrong

    def good(self, page, count):
        good = [each not in self.wrong for each in range(page, page + count)]
        return count if all(good) else good.index(False)

    def address(self, page, count):
        self.asked.append((page, count))
        if not self.base:
            count = min(count, 3)  # as an image that has fewer in one piece
        return self.rows[page:].ctypes.data, count

    def bad(self, page):
        return page // 4 * 4, page // 4 * 4 + 4

    def reason(self, page):
        return f"page {page} is wrong"


class Scene:
    """Memory under userfaultfd, and a pager that fills it."""

    def __init__(self, source, working_set=None, rate=0, **pace):
        self.guest = FakeGuest(PAGES * PAGE)
        self.ram = self.guest.incoming_ram()
        (self.paged,) = self.ram
        self.userfaultfd = self.guest.open_userfaultfd()
        self.lost = []
        self.restorer = BlockRestorer(self.userfaultfd, self.paged, source, self.lost.append)
        self.pager = RestorePager(
            self.userfaultfd,
            [self.restorer],
            {} if working_set is None else {RAM: working_set},
            Pace(RateLimiter(rate), **pace),
        )
        self.thread = threading.Thread(target=self.pager.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.pager.stop()
        self.thread.join(10)
        self.close()

    def close(self):
        self.pager.close()
        self.guest.unwatch_missing()
        self.userfaultfd.close()
        self.ram.close()
        self.guest.close()

    def finish(self):
        self.pager.may_end()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def words(self):
        return np.frombuffer(self.guest.memory(), np.uint64).reshape(PAGES, -1)[:, 0]

    def received(self):
        return np.flatnonzero(self.paged.pages.states == RECEIVED).tolist()


@pytest.mark.parametrize("fixed", [True, False])
def test_everything_comes_unasked_but_zeros(fixed):
    with Scene(FakeSource(fixed=fixed, zero=range(100, 200))) as scene:
        scene.finish()
        expected = np.arange(1, PAGES + 1, dtype=np.uint64)
        expected[100:200] = 0
        assert (scene.words() == expected).all()
        assert len(scene.received()) == PAGES - 100
        assert scene.pager.faults == 0


@pytest.mark.parametrize("fixed", [True, False])
def test_what_is_touched_comes_although_nothing_else_does(fixed):
    source = FakeSource(fixed=fixed, zero=[7])
    with Scene(source, rate=1) as scene:
        for page in (200, 9, 133):
            assert int.from_bytes(scene.guest.touch(page), "little") == page + 1
        assert scene.guest.touch(7) == bytes(8)
        wait_until(lambda: {200, 9, 133, 7} <= set(scene.received()))
        wait_until(lambda: scene.pager.faults >= 4)
        assert np.flatnonzero(scene.restorer.touched).tolist() == [7, 9, 133, 200]
        assert len(scene.received()) < 10


def test_cpus_are_kept_awake_for_each_fault_until_it_ends(monkeypatch):
    cpus = CpusNoted()
    monkeypatch.setattr(restore_pager, "CpusAwake", lambda: cpus)
    with Scene(FakeSource(), rate=1) as scene:
        for page in (200, 9):
            scene.guest.touch(page)
        wait_until(lambda: scene.pager.faults >= 2)
    *before, last = cpus.calls
    assert len(before) >= 2
    assert set(before) == {"a while"}
    assert last == "close"


def test_the_working_set_comes_first_and_no_rate_holds_it():
    wanted = np.zeros(PAGES, np.bool_)
    wanted[[5, 6, 7, 250]] = True
    with Scene(FakeSource(), wanted, rate=1) as scene:
        wait_until(lambda: scene.pager.ready_ns is not None)
        assert {5, 6, 7, 250} <= set(scene.received())
        assert len(scene.received()) < 10
        scene.pager.new_rate(0)
        scene.finish()
        assert len(scene.received()) == PAGES


@pytest.mark.parametrize("fixed", [True, False])
def test_a_guest_is_let_run_when_all_of_a_small_set_is_in(fixed):
    wanted = np.zeros(PAGES, np.bool_)
    wanted[::3] = True
    wanted[40:80] = True
    with Scene(FakeSource(fixed=fixed, zero=[42]), wanted, rate=1) as scene:
        assert scene.pager.head_start.wait()
        assert set(np.flatnonzero(wanted)) - {42, 0} <= set(scene.received())
        assert scene.pager.ready_ns is not None
        for page in (3, 40, 79, 252):
            assert int.from_bytes(scene.guest.touch(page), "little") == page + 1
        assert scene.pager.faults == 0


def copies_of(tmp_path, source, *wanted):
    """Copies of pages of an image; they say that they are copies by their second word."""

    def read(_, first, count):
        rows = source.rows[first : first + count].copy()
        rows[:, 1] = 0
        return rows.view(np.uint8).reshape(count, PAGE)

    parts = [CopiedPages(RAM, np.array(pages, np.int64)) for pages in wanted]
    page_copies.save(tmp_path / "copies", "image", parts, read)
    return PageCopies(tmp_path / "copies", "image", {RAM: PAGES})


def test_copies_come_first_and_in_their_order(tmp_path):
    source = FakeSource()
    wanted = np.zeros(PAGES, np.bool_)
    wanted[[7, 30, 31, 32, 200]] = True
    copies = copies_of(tmp_path, source, [200], [30, 31, 32])
    placed = []
    with Scene(source, wanted, rate=1, copies=copies) as scene:
        scene.pager.look_ahead()
        assert scene.pager.head_start.wait()
        assert scene.received() == [7, 30, 31, 32, 200]
        second = np.frombuffer(scene.guest.memory(), np.uint64).reshape(PAGES, -1)[:, 1]
        placed = second[[7, 30, 31, 32, 200]].tolist()
        assert scene.restorer.missing_pages == PAGES - 5
    assert placed == [8, 0, 0, 0, 0]
    copies.close()


def test_a_copy_of_the_first_page_of_memory_is_placed(tmp_path):
    source = FakeSource()
    copies = copies_of(tmp_path, source, [0, 1, 9])
    with Scene(source, np.zeros(PAGES, np.bool_), rate=1, copies=copies) as scene:
        assert scene.pager.head_start.wait()
        assert scene.received() == [0, 1, 9]
        assert scene.words()[[0, 1, 9]].tolist() == [1, 2, 10]
    copies.close()


def test_what_is_there_is_not_placed_again_from_a_copy(tmp_path):
    source = FakeSource()
    copies = copies_of(tmp_path, source, range(20, 60))
    scene = Scene(source, np.zeros(PAGES, np.bool_), rate=1, copies=copies)
    scene.paged.block.pages[40:50] = 99
    scene.restorer.adopt(os.getpid())
    scene.paged.pages.states[45] = 0  # as if nobody had noted it
    with scene:
        assert scene.pager.head_start.wait()
        assert scene.received() == list(range(20, 60))
        assert (scene.words()[40:50] == 0x6363636363636363).all()
        assert (scene.words()[20:40] == np.arange(21, 41)).all()
    copies.close()


def test_bad_copies_are_left_to_the_image(tmp_path):
    source = FakeSource()
    pages = np.arange(0, PAGES, 2)
    copies_of(tmp_path, source, pages).close()
    raw = bytearray((tmp_path / "copies").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "copies").write_bytes(raw)
    copies = PageCopies(tmp_path / "copies", "image", {RAM: PAGES})
    wanted = np.zeros(PAGES, np.bool_)
    wanted[pages] = True
    with Scene(source, wanted, rate=1, copies=copies) as scene:
        assert scene.pager.head_start.wait()
        assert scene.received() == pages.tolist()
        second = np.frombuffer(scene.guest.memory(), np.uint64).reshape(PAGES, -1)[pages, 1]
        assert (second[:64] == 0).all()
        assert (second[64:] == pages[64:] + 1).all()
        assert not scene.lost
    copies.close()


def test_what_is_missing_is_counted_once_and_kept(tmp_path):
    with Scene(FakeSource(zero=range(100, 120), bad=[8]), rate=1) as scene:
        assert scene.restorer.missing_pages == PAGES - 20
        scene.pager.guest_runs()
        wait_until(scene.received)
        before = scene.restorer.missing_pages
        for page in (250, 110, 3):
            scene.guest.touch(page)
        wait_until(lambda: scene.pager.faults >= 3)
        expected = scene.restorer.source.data & (scene.paged.pages.states != RECEIVED)
        assert scene.restorer.missing_pages == expected.sum() < before
        scene.pager.new_rate(0)
        scene.finish()
        assert scene.restorer.missing_pages == 0


def test_the_first_that_are_touched_are_told_from_the_others(monkeypatch):
    monkeypatch.setattr(block_restorer, "_EARLY_FAULTS", 2)
    with Scene(FakeSource(), rate=1) as scene:
        for page in (9, 200, 30):
            scene.guest.touch(page)
        wait_until(lambda: scene.pager.faults >= 3)
        touched = scene.restorer.touched
        assert [touched[page] for page in (9, 200, 30, 31)] == [EARLY, EARLY, LATE, UNTOUCHED]


def test_faults_are_served_until_it_may_end():
    with Scene(FakeSource(zero=[40])) as scene:
        scene.pager.guest_runs()
        assert scene.pager.wait_all_in()
        assert scene.thread.is_alive()
        assert scene.guest.touch(40) == bytes(8)
        scene.finish()
    assert scene.pager.wait_all_in()


def test_a_large_set_holds_a_guest_up_for_its_first_part_only():
    head_start = HeadStart(wanted=True)
    head_start.brought(LEAST_BYTES)
    assert not head_start.ended
    assert head_start.wait()
    assert head_start.ended


def test_nobody_waits_without_a_set_or_for_one_that_is_being_recorded():
    assert HeadStart(wanted=False).wait()
    with Scene(FakeSource(), np.ones(PAGES, np.bool_), holds_for_recording=True) as scene:
        assert scene.pager.head_start.wait()
        assert scene.received() == []


def test_no_guest_is_let_run_by_a_pager_that_was_stopped():
    scene = Scene(FakeSource(bad=range(PAGES)), np.ones(PAGES, np.bool_))
    scene.pager.stop()
    scene.pager.run()
    assert not scene.pager.head_start.wait()
    assert not scene.pager.wait_all_in()  # nobody takes what has been touched by then for all
    scene.close()


def test_no_guest_is_let_run_by_a_pager_that_has_failed():
    """What is missing would be zero, or never come."""
    source = FakeSource(fixed=False)

    def no_memory(page, count):
        raise KernelError("UFFDIO_COPY", errno.ENOMEM)

    source.address = no_memory
    scene = Scene(source, np.ones(PAGES, np.bool_))
    with pytest.raises(KernelError, match="UFFDIO_COPY"):
        scene.pager.run()
    assert not scene.pager.head_start.wait()
    assert not scene.pager.wait_all_in()
    scene.close()


def test_who_is_late_does_not_write_to_what_has_its_descriptors_now(monkeypatch):
    with Scene(FakeSource()) as scene:
        scene.finish()
    written = []
    monkeypatch.setattr(os, "write", lambda *call: written.append(call))
    scene.pager.hurry()
    scene.pager.new_rate(0)
    assert written == []


def test_scattered_pages_of_a_wrong_chunk_are_lost_and_never_served():
    wanted = np.zeros(PAGES, np.bool_)
    wanted[::2] = True
    with Scene(FakeSource(bad=[8, 9, 10, 11]), wanted, rate=1) as scene:
        assert scene.pager.head_start.wait()
        assert [(lost.pages, lost.reason) for lost in scene.lost] == [(4, "page 8 is wrong")]
        assert (scene.words()[8:12] == 0).all()
        assert int.from_bytes(scene.guest.touch(12), "little") == 13


def test_who_waits_for_the_end_gets_it_at_full_speed():
    with Scene(FakeSource(), rate=1) as scene:
        scene.guest.touch(3)
        scene.pager.hurry()
        scene.finish()
        assert len(scene.received()) == PAGES


def test_recording_holds_the_rest_back_until_hurried():
    with Scene(FakeSource(), holds_for_recording=True) as scene:
        scene.guest.touch(3)
        wait_until(scene.received)
        assert scene.received() == [3]
        scene.pager.hurry()
        scene.finish()
        assert len(scene.received()) == PAGES


def test_recording_waits_for_a_guest_whose_devices_take_long(monkeypatch):
    """What it touches can be seen only when it runs; nothing is over before."""
    monkeypatch.setattr(restore_pager, "_SETTLED_NS", 1)
    monkeypatch.setattr(restore_pager, "_LONGEST_RECORDING_NS", 1)
    with Scene(FakeSource(), holds_for_recording=True) as scene:
        scene.guest.touch(3)
        wait_until(lambda: scene.pager.faults)
        assert scene.pager.due_in_ms() is None
        scene.pager.guest_runs()
        assert scene.pager.wait_all_in()
        assert len(scene.received()) == PAGES


def test_recording_ends_when_nothing_is_touched_any_more():
    with Scene(FakeSource(), holds_for_recording=True) as scene:
        scene.guest.touch(3)
        scene.finish()
        assert len(scene.received()) == PAGES


@pytest.mark.parametrize("fixed", [True, False])
def test_what_is_there_is_left_alone(fixed):
    """As a successor finds it, whatever the page map said."""
    scene = Scene(FakeSource(fixed=fixed))
    scene.paged.block.pages[40:50] = 99
    scene.paged.pages.states[60:70] = RECEIVED  # noted before they were in place
    scene.restorer.adopt(os.getpid())
    with scene:
        scene.finish()
        assert (scene.words()[40:50] == 0x6363636363636363).all()
        others = np.r_[0:40, 50:PAGES]
        assert (scene.words()[others] == others + 1).all()


def test_a_page_that_is_there_but_not_seen_is_shown():
    scene = Scene(FakeSource(), rate=1)
    scene.paged.block.pages[40] = 99
    with scene:
        assert scene.guest.touch(40) == bytes([99] * 8)


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_wrong_is_never_served(asked):
    with Scene(FakeSource(bad=[81, 82]), rate=1 if asked else 0) as scene:
        if asked:
            with pytest.raises(Exception, match="process_vm_readv"):
                scene.guest.touch(81)
            scene.pager.new_rate(0)
        scene.finish()
        (lost,) = scene.lost
        assert (lost.block_name, lost.reason) == (RAM, "page 81 is wrong")
        assert lost.pages == (4 if asked else 3)  # 80 had come before anybody looked at 81
        assert (scene.words()[81:84] == 0).all()
        others = np.r_[0:80, 84:PAGES]
        assert (scene.words()[others] == others + 1).all()
        for page in (81, 82, 83):
            with pytest.raises(Exception, match="process_vm_readv"):
                scene.guest.touch(page)


def test_what_cannot_be_read_is_lost_alone():
    source = FakeSource(fixed=False)
    address = source.address

    def failing(page, count):
        if page <= 30 < page + count:
            if page == 30:
                raise ImageError("image", "cannot be read")
            count = 30 - page
        return address(page, count)

    source.address = failing
    source.bad = lambda page: (page, page + 1)
    with Scene(source) as scene:
        scene.finish()
        assert [each.pages for each in scene.lost] == [1]
        assert (scene.words()[[29, 30, 31]] == [30, 0, 32]).all()


def test_a_large_page_of_zeros_counts_once():
    """There is no page of zeros of its size, so it is copied."""
    guest = FakeGuest(PAGES * PAGE, 2 * PAGE)
    ram = guest.incoming_ram()
    (paged,) = ram
    userfaultfd = guest.open_userfaultfd()
    filled = BlockRestorer(userfaultfd, paged, FakeSource(zero=[5]), pytest.fail)
    filled.bring(5)
    assert filled.placer.placed_pages == 1
    pager_of_it = RestorePager(userfaultfd, [filled], {}, Pace(RateLimiter(0)))
    statistics = RestoreStatistics(0, lazy=True)
    statistics.watch([filled], pager_of_it, {})
    told = statistics.info(Status.ACTIVE, None).ram
    assert (told.page_size, told.normal, told.normal_bytes) == (PAGE, 2, 2 * PAGE)
    pager_of_it.close()
    for each in (userfaultfd, ram, guest):
        each.close()
