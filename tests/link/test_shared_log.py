"""Other processes mark what they write in a log, of two files in turn; none of the marks is lost."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.waiting import wait_until
from postcopy.dirty.shared import SharedWrites
from postcopy.errors import GuestError, WrongState
from postcopy.guest import MappedRange, Region
from postcopy.link.guest.shared_log import SharedLog
from postcopy.vhost_user.dirty_log import DirtyLog

PAGE, HUGE, GIB = 4096, 2 << 20, 1 << 30


class Block:
    """A RAM block, as far as it matters which pages of it were written."""

    def __init__(self, region):
        self.name = region.name
        self.physical_ranges = region.physical_ranges
        self.page_count = region.size_bytes // region.page_size_bytes
        self.target_pages_per_page = region.page_size_bytes // PAGE


def regions():
    """Blocks of both sizes of pages; one stands on both sides of a hole, none begins at a whole byte."""
    low, high = (
        MappedRange("b", 0, 5 * PAGE, 3 * GIB - 5 * PAGE),
        MappedRange("b", 5 * PAGE, 6 * PAGE, 4 * GIB),
    )
    return (
        Region("a", 13 * PAGE, PAGE, 3 * PAGE, 0, -1),
        Region("huge", 3 * HUGE, HUGE, 7 * PAGE + HUGE, 0, -1),
        Region("b", 11 * PAGE, PAGE, low.address, 0, -1, parts=(low, high)),
    )


class Process:
    """Marks what it is told to, in the log that it has been given last."""

    name = "a process"
    logs_writes = True

    def __init__(self):
        self.log = None
        self.late = []
        self.given = 0
        self.failure = None
        self.held = False

    def log_writes(self, log, size_bytes=0):
        self.given += 1
        for address in self.late:  # until it answers, the log of before is right
            self.log.mark(address, 1)
        self.late = []
        if self.failure is not None:
            raise self.failure
        if self.log is not None:
            self.log.close()
        self.log = None if log is None else DirtyLog(size_bytes, 0, log)

    def hold(self):
        self.held = True

    def release(self):
        self.held = False


class Guest:
    """The guest's process, and the keeper of its log as an engine has it."""

    def __init__(self, processes=1):
        self.processes = [Process() for _ in range(processes)]
        self.log = SharedLog(self)
        self.start_shared_log = self.log.start
        self.fetch_shared_log = self.log.fetch
        self.stop_shared_log = self.log.stop

    def regions(self):
        return regions()

    def shared_with(self):
        return tuple(self.processes)

    def add(self):
        self.processes.append(Process())
        self.log.join(self.processes[-1])

    def told_of_the_end(self):
        wait_until(lambda: all(each.log is None for each in self.processes), what="they are told")


def address_of(block, page):
    """The guest-physical address of a page of 4 KiB of a block."""
    for part in block.physical_ranges:
        if part.offset <= page * PAGE < part.offset + part.length_bytes:
            return part.address + page * PAGE - part.offset
    raise AssertionError("no such page")


numbers = st.integers(0, 1 << 12)
writes = st.tuples(st.sampled_from(["write", "write late"]), st.integers(0, 2), numbers)
looks = st.tuples(st.sampled_from(["round", "look"]), st.integers(0, 2), numbers)
deaths = st.tuples(st.sampled_from(["death", "birth", "engine"]), st.integers(0, 2), numbers)


class Story:
    """What a tracker must tell, by what has been written and which pages have been protected."""

    def __init__(self):
        self.guest = Guest(2)
        self.blocks = [Block(region) for region in self.guest.regions()]
        self.unsent = {block.name: np.zeros(block.page_count, np.bool_) for block in self.blocks}
        self.late = []  # what is written before a process has answered: of whom, and where
        self.begin()

    def begin(self):
        """The first engine begins, or another in its place."""
        self.tracker = SharedWrites(self.guest)
        self.tracker.start()

    def look(self, block, end, *, protect):
        told = self.tracker.collect(block, 0, end, protect=protect)
        told = np.zeros(end, np.bool_) if told is None else told
        assert not (self.unsent[block.name][:end] & ~told).any()
        for _, name, page in self.late:
            self.unsent[name][page] = True
        self.late = []
        if protect:
            self.unsent[block.name][:end] &= ~told
        return told

    def take(self, step, block, number):
        processes = self.guest.processes
        process = processes[number % len(processes)] if processes else None
        target = number % (block.page_count * block.target_pages_per_page)
        page = target // block.target_pages_per_page
        if step in {"round", "look"}:
            self.look(block, page + 1, protect=step == "round")
        elif step == "birth":
            self.guest.add()
        elif step == "engine" and not any(mask.any() for mask in self.unsent.values()):
            self.begin()
        elif process is None:
            pass
        elif step == "write":
            process.log.mark(address_of(block, target), 1)
            self.unsent[block.name][page] = True
        elif step == "write late":
            process.late.append(address_of(block, target))
            self.late.append((process, block.name, page))
        elif step == "death":  # what it did not mark is done again by its successor
            processes.remove(process)
            self.late = [each for each in self.late if each[0] is not process]


@given(st.lists(st.one_of(writes, writes, looks, deaths), max_size=50))
def test_each_write_is_told_until_its_page_is_protected_whatever_happens_between(steps):
    story = Story()
    for step, which, number in steps:
        story.take(step, story.blocks[which], number)
    story.look(story.blocks[0], 1, protect=False)
    for block in story.blocks:
        told = story.look(block, block.page_count, protect=False)
        assert not (story.unsent[block.name] & ~told).any()
    story.tracker.stop()
    story.guest.told_of_the_end()


def marked(log):
    return np.flatnonzero(np.unpackbits(np.frombuffer(log, np.uint8), bitorder="little")).tolist()


def test_there_is_no_log_while_no_process_has_ever_had_the_memory():
    guest = Guest(0)
    assert guest.log.start() is False
    with pytest.raises(WrongState, match="not being logged"):
        guest.log.fetch()
    with pytest.raises(
        GuestError, match="a process: the guest is being moved or has a reset point"
    ):
        guest.add()
    guest.processes.clear()
    guest.log.stop()
    guest.add()
    guest.processes.clear()  # it has died, and another may come
    assert guest.log.start() is True
    guest.add()
    guest.processes[0].log.mark(5 * PAGE, 1)
    assert marked(guest.log.fetch()) == [5]
    guest.log.stop()
    guest.told_of_the_end()


def test_the_log_covers_all_addresses_and_can_be_neither_cut_off_nor_made_longer():
    guest = Guest()
    given = []
    guest.processes[0].log_writes = lambda log, size=0: given.append((log, size))
    guest.log.start()
    ((fd, size),) = given
    assert size == 135168  # 4 GiB and six pages, in whole pages
    assert os.fstat(fd).st_size == size
    for wrong in (0, size - 1, size + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, wrong)
    guest.log.stop()


def test_a_log_full_of_rubbish_says_that_all_is_written_and_no_more():
    guest = Guest()
    files = []
    guest.processes[0].log_writes = lambda log, size=0: log is None or files.append(os.dup(log))
    tracker = SharedWrites(guest)
    tracker.start()
    os.pwrite(files[0], b"\xff" * 135168, 0)
    for block in [Block(region) for region in guest.regions()]:
        assert tracker.collect(block, 0, block.page_count, protect=True).all()
    for block in [Block(region) for region in guest.regions()]:
        assert tracker.collect(block, 0, block.page_count, protect=True) is None
    tracker.stop()
    for fd in files:
        os.close(fd)


class TestProcessesThatDoNotAnswer:
    def test_nothing_is_taken_and_nothing_is_lost(self):
        guest = Guest(2)
        guest.log.start()
        first, second = guest.processes
        first.log.mark(PAGE, 1)
        second.failure = GuestError("the second does not answer")
        with pytest.raises(GuestError, match="the second does not answer"):
            guest.log.fetch()
        for page, process in ((2, first), (3, second)):
            process.log.mark(page * PAGE, 1)
        second.failure = None
        second.late = [4 * PAGE]
        assert marked(guest.log.fetch()) == [1, 2, 3, 4]
        assert marked(guest.log.fetch()) == []
        guest.log.stop()
        guest.told_of_the_end()

    def test_one_that_has_ended_meanwhile_is_done_without(self):
        guest = Guest(2)
        guest.log.start()
        dying = guest.processes[1]
        dying.log.mark(PAGE, 1)
        dying.failure = GuestError("it has ended")
        thread = threading.Thread(target=lambda: marks.append(marked(guest.log.fetch())))
        marks = []
        thread.start()
        wait_until(lambda: dying.given == 2, what="it is asked")
        guest.processes.remove(dying)
        thread.join()
        assert marks == [[1]]
        guest.log.stop()
        guest.told_of_the_end()

    def test_at_the_beginning_none_logs(self):
        guest = Guest(2)
        guest.processes[1].failure = GuestError("the second has no log")
        with pytest.raises(GuestError, match="the second has no log"):
            guest.log.start()
        guest.told_of_the_end()
        with pytest.raises(WrongState):
            guest.log.fetch()

    def test_neither_the_end_nor_a_fetch_under_way_holds_up_an_order(self):
        guest = Guest()
        guest.log.start()
        (process,) = guest.processes
        goes_on, asked, log_writes = threading.Event(), threading.Event(), process.log_writes

        def hang(log, size=0):
            asked.set()
            goes_on.wait()
            log_writes(log, size)

        process.log_writes = hang
        fetching = threading.Thread(target=guest.log.fetch)
        fetching.start()
        asked.wait()
        guest.log.hold()
        guest.log.release()
        guest.log.stop()  # returns, although the process hangs
        with pytest.raises(WrongState):
            guest.log.fetch()
        goes_on.set()
        fetching.join()
        guest.log.start()  # behind the last word about the log before
        assert process.log is not None
        guest.log.stop()
        guest.told_of_the_end()


def test_a_process_that_is_held_writes_nothing_and_one_that_joins_is_held_too():
    guest = Guest()
    guest.log.release()
    guest.log.hold()
    guest.add()
    assert [each.held for each in guest.processes] == [True, True]
    guest.log.release()
    guest.add()
    assert [each.held for each in guest.processes] == [False] * 3


def test_what_was_held_when_its_last_process_ended_is_released_with_the_next():
    guest = Guest()
    guest.log.hold()
    dead = guest.processes.pop()
    guest.log.release()
    guest.processes.append(dead)  # another process of the same device
    guest.log.join(dead)
    assert not dead.held
