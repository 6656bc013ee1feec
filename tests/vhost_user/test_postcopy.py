"""A back end in a postcopy: it waits for each page, and for no page for ever."""

import os
import signal
import struct

import pytest

from fakes.vhost_back_end import TIMEOUT_S, Guest
from fakes.vhost_front_end import IN, OUT, PAGE, BlockDriver, Ram, Ring
from fakes.vhost_postcopy import Destination
from fakes.waiting import wait_until

pytestmark = pytest.mark.userfaultfd

HUGE = 2 << 20


def sector(number):
    return struct.pack("<Q", number) * 64


class Moving:
    """A guest with a write and a read in its ring, whose memory is empty here."""

    def __init__(self, path, *, ram=None, **more):
        self.source = ram or Ram()
        self.driver = BlockDriver(Ring(self.source))
        self.write = self.driver.submit(OUT, 8, b"w" * PAGE)
        self.read = self.driver.submit(IN, 16, length=PAGE)
        self.guest = Guest(path, ram=Ram(PAGE))
        self.destination = Destination(self.guest.front_end, self.source, **more)
        self.ring = Ring(self.destination.ram)

    def start(self):
        self.ring.set_up(self.guest.front_end)
        self.ring.notify()

    def finished(self):
        """Both have been done, which is seen without touching a page that is missing."""
        used = self.ring.used + 2
        return os.pread(self.destination.ram.fd, 2, used) == b"\2\0"

    def at(self, offset, length):
        return os.pread(self.destination.ram.fd, length, offset)

    def close(self):
        self.destination.close()
        self.guest.close()
        self.ring.close()
        self.driver.ring.close()
        self.source.close()


@pytest.fixture
def moving(back_end):
    """``moving(...)``: one more guest that is on its way."""
    made = []

    def move(**more):
        made.append(Moving(back_end.path, **more))
        return made[-1]

    yield move
    for each in made:
        each.close()


def check_both_requests(moved, disk):
    driver = moved.driver
    assert moved.at(driver.STATUSES, 2) == b"\0\0"
    assert moved.at(driver.data_at(moved.read), PAGE) == b"".join(map(sector, range(16, 24)))
    assert disk.read_bytes()[8 * 512 : 16 * 512] == b"w" * PAGE


@pytest.mark.parametrize("one_by_one", [False, True], ids=["a table", "region by region"])
@pytest.mark.parametrize("parts", [1, 4])
def test_requests_are_done_with_pages_that_come_when_asked_for(moving, disk, one_by_one, parts):
    moved = moving(one_by_one=one_by_one, ram=Ram(parts=parts, gap=1 << 16))
    moved.start()
    wait_until(moved.finished, TIMEOUT_S, "both requests")
    check_both_requests(moved, disk)
    driver, ring = moved.driver, moved.ring
    touched = {ring.descriptors, ring.available, ring.used, driver.HEADERS, driver.STATUSES}
    touched |= {driver.data_at(moved.write), driver.data_at(moved.read)}
    assert set(moved.destination.asked) == touched
    moved.destination.end()
    assert moved.guest.front_end.configuration(8) == struct.pack("<Q", 4096)


def test_pages_of_2_mib_are_waited_for_too(moving, disk, huge_pages):
    huge_pages(8)
    moved = moving(ram=Ram(2 * HUGE, flags=os.MFD_HUGETLB), page_bytes=HUGE)
    moved.start()
    wait_until(moved.finished, TIMEOUT_S, "both requests")
    assert set(moved.destination.asked) == {0}
    moved.destination.end()
    ram, driver = moved.destination.ram.bytes, moved.driver
    assert ram[driver.STATUSES : driver.STATUSES + 2] == b"\0\0"
    assert disk.read_bytes()[8 * 512 : 16 * 512] == b"w" * PAGE


def waits_for(moving, offset_of):
    """A guest whose back end waits for a page that does not come."""
    source = Ram()
    held = offset_of(BlockDriver(Ring(source)))
    moved = moving(ram=source, held=[held])
    moved.start()
    wait_until(lambda: moved.destination.has_asked_for(held), TIMEOUT_S, "the page asked for")
    return moved, held


WHICH = pytest.mark.parametrize(
    "which",
    [
        pytest.param(lambda driver: driver.ring.available, id="the available ring"),
        pytest.param(lambda driver: driver.HEADERS, id="a header"),
        pytest.param(lambda driver: driver.data_at(0), id="data to be written"),
        pytest.param(lambda driver: driver.data_at(1), id="data to be read"),
    ],
)


@WHICH
def test_it_ends_at_once_while_a_page_is_missing(moving, back_end, which):
    waits_for(moving, which)
    assert back_end.end(signal.SIGTERM) == 0
    assert not back_end.path.exists()


@WHICH
def test_a_front_end_that_dies_holds_up_no_other_and_no_zeros_are_written(
    moving, back_end, disk, connected, which
):
    before = disk.read_bytes()
    moved, _ = waits_for(moving, which)
    moved.destination.stop()
    moved.destination.userfaultfd.close()
    moved.guest.front_end.close()
    guest = connected().start()
    assert guest.driver.read(0, 512) == sector(0)
    wait_until(lambda: "it is killed" in back_end.said, 10, "a word of it")
    after = bytearray(before)
    if disk.read_bytes()[8 * 512 :][:1] == b"w":  # that was done before the page was missed
        after[8 * 512 : 16 * 512] = b"w" * PAGE
    assert disk.read_bytes() == after


def test_a_page_that_comes_late_is_waited_for(moving, disk):
    moved, held = waits_for(moving, lambda driver: driver.data_at(0))
    assert not moved.finished()
    moved.destination.place(held)
    wait_until(moved.finished, TIMEOUT_S, "both requests")
    check_both_requests(moved, disk)


def test_data_on_a_page_that_is_lost_is_an_error_of_its_request(moving, disk, back_end):
    moved, held = waits_for(moving, lambda driver: driver.data_at(0))
    moved.destination.lose(held)
    wait_until(moved.finished, TIMEOUT_S, "both requests")
    assert moved.at(moved.driver.STATUSES, 2) == b"\1\0"
    assert disk.read_bytes()[8 * 512 : 9 * 512] == sector(8)
    assert "OUT at sector 8: Bad address" in back_end.said


def test_a_ring_on_a_page_that_is_lost_ends_one_front_end_only(moving, back_end, connected):
    moved, held = waits_for(moving, lambda driver: driver.ring.available)
    moved.destination.lose(held)
    wait_until(lambda: "SIGBUS" in back_end.said, 10, "a word of it")
    assert connected().start().driver.read(0, 512) == sector(0)
