"""The device's side of a split virtqueue: what a driver offers is taken, and what cannot be is refused."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import RingError
from postcopy.virtio.ring import MOST_DESCRIPTORS, Buffer, RingLayout, check_size
from virtio.rings import INDIRECT, NEXT, WRITE, Driver


def test_sizes_of_the_areas_are_those_of_the_specification():
    layout = RingLayout(256)
    assert (layout.descriptors_bytes, layout.available_bytes, layout.used_bytes) == (
        4096,
        518,
        2054,
    )


@pytest.mark.parametrize("size", [0, 3, 65536, -8])
def test_a_size_that_no_ring_has_is_refused(size):
    with pytest.raises(RingError, match="a power of 2 up to 32768"):
        check_size(size)


def test_a_chain_is_taken_with_its_buffers_in_order():
    driver = Driver()
    driver.describe(5, 0x100, 16, NEXT, 2)
    driver.describe(2, 0x200, 4096, NEXT | WRITE, 7)
    driver.describe(7, 0x300, 1, WRITE)
    driver.offer(5)
    assert driver.queue.waiting() == 1
    chain = driver.queue.take()
    assert chain == (5, [Buffer(0x100, 16)], [Buffer(0x200, 4096), Buffer(0x300, 1)])
    assert driver.queue.waiting() == 0


@pytest.mark.parametrize("start", [0, 0xFFFD])
def test_many_chains_go_round_the_ring_and_come_back_in_order(start):
    driver = Driver(4, start=start)
    for number in range(4):
        driver.describe(number, 0x1000 * number, 8)
    for turn in range(10):
        driver.offer(turn % 4)
        chain = driver.queue.take()
        driver.queue.complete(chain.head, turn)
        elements, index = driver.used_entries()
        assert index == (start + turn + 1) & 0xFFFF
        assert elements[(start + turn) % 4] == (turn % 4, turn)


def test_an_indirect_table_is_followed_behind_direct_descriptors():
    driver = Driver(indirect=True)
    table = struct.pack("<QIHH", 0x20, 512, NEXT | WRITE, 1) + struct.pack(
        "<QIHH", 0x30, 1, WRITE, 0
    )
    driver.memory.write(0x1000, table)
    driver.describe(0, 0x10, 16, NEXT, 3)
    driver.describe(3, 0x1000, len(table), INDIRECT)
    driver.offer(0)
    assert driver.queue.take() == (0, [Buffer(0x10, 16)], [Buffer(0x20, 512), Buffer(0x30, 1)])


def offer_circle(driver):
    driver.describe(0, 0, 8, NEXT, 1)
    driver.describe(1, 0, 8, NEXT, 0)
    driver.offer(0)


def offer_next_outside(driver):
    driver.describe(0, 0, 8, NEXT, 8)
    driver.offer(0)


def offer_head_outside(driver):
    driver.offer(8)


def offer_read_behind_write(driver):
    driver.describe(0, 0, 8, NEXT | WRITE, 1)
    driver.describe(1, 0, 8)
    driver.offer(0)


def offer_indirect(length, flags=INDIRECT, table=b""):
    def offer(driver):
        driver.memory.write(0x1000, table)
        driver.describe(0, 0x1000, length, flags)
        driver.offer(0)

    return offer


NESTED = struct.pack("<QIHH", 0x2000, 16, INDIRECT, 0)
BEYOND = struct.pack("<QIHH", 0x2000, 16, NEXT, 1)
CIRCLE = struct.pack("<QIHH", 0x2000, 16, NEXT, 0)


@pytest.mark.parametrize(
    ("offer", "why"),
    [
        (offer_circle, f"a circle, or a chain of more than {MOST_DESCRIPTORS}"),
        (offer_next_outside, r"descriptor 0: next is 8 of 8 \(at byte 0x0\)"),
        (
            offer_head_outside,
            r"available ring: head 8 of a ring with 8 descriptors \(at byte 0x4\)",
        ),
        (offer_read_behind_write, r"descriptor 1: it is to be read, and follows .*0x10"),
        (offer_indirect(0), "an indirect table of 0 bytes"),
        (offer_indirect(17), "an indirect table of 17 bytes"),
        (offer_indirect(16 * 1025), "an indirect table of 16400 bytes"),
        (offer_indirect(16, INDIRECT | NEXT), "it is indirect, and has a next one"),
        (offer_indirect(16, table=NESTED), "indirect descriptor 0: an indirect table in an"),
        (offer_indirect(16, table=BEYOND), "indirect descriptor 0: next is 1 of 1"),
        (offer_indirect(16, table=CIRCLE), "indirect descriptor 0: a circle"),
    ],
)
def test_what_is_no_chain_is_refused_by_place(offer, why):
    driver = Driver(indirect=True)
    offer(driver)
    with pytest.raises(RingError, match=why):
        driver.queue.take()


def test_indirect_is_refused_unless_it_was_agreed_on():
    driver = Driver()
    offer_indirect(16)(driver)
    with pytest.raises(RingError, match="indirect, which was not agreed on"):
        driver.queue.take()


def test_an_index_that_runs_away_is_refused():
    driver = Driver()
    driver.available.write(2, struct.pack("<H", 9))
    with pytest.raises(RingError, match=r"index 9 is 9 after 0, and the ring has 8 .*0x2"):
        driver.queue.waiting()


@given(st.binary(min_size=128, max_size=128), st.binary(min_size=22, max_size=22), st.data())
def test_no_driver_makes_the_device_do_anything_but_take_or_refuse(descriptors, available, data):
    driver = Driver(indirect=True)
    driver.descriptors.write(0, descriptors)
    driver.available.write(0, available)
    driver.memory.write(0, data.draw(st.binary(max_size=256)) * 16)
    try:
        if driver.queue.waiting():
            chain = driver.queue.take()
            assert 0 < len(chain.readable) + len(chain.writable) <= MOST_DESCRIPTORS
    except RingError:
        pass


def test_both_sides_can_do_without_being_told():
    driver = Driver()
    assert driver.queue.wants_interrupt()
    driver.available.write(0, struct.pack("<H", 1))
    assert not driver.queue.wants_interrupt()
    driver.queue.set_notified(notified=False)
    assert driver.used.read(0, 2) == b"\1\0"
    driver.queue.set_notified(notified=True)
    assert driver.used.read(0, 2) == b"\0\0"
