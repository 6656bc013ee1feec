"""The oracle finds a flipped bit, a stale page, a misplaced page; and nothing where nothing is."""

import pytest

from machine.machines import MIB, Watched, config_for, need, wait_for_progress, wait_for_work
from postcopy.errors import GuestError
from postcopy.machine import oracle, workload, workload_records
from postcopy.machine.workload import BASE_ADDRESS

PAGE = 4096
HOT = BASE_ADDRESS + 16 * PAGE


@pytest.fixture(scope="module")
def stopped():
    """A stopped guest's memory before and after it worked on, and what it was told to do."""
    accelerator = "kvm"
    need(accelerator)
    work = workload.load("hammer", 4 * MIB, 2, hot_bytes=MIB)
    with Watched(config_for(work, accelerator)) as watched:
        machine = watched.machine
        machine.start()
        wait_for_work(machine, work)
        machine.pause()
        before = machine.read_memory(0, 4 * MIB)
        machine.resume()
        page = int.from_bytes(before[HOT : HOT + 8], "little")
        while int.from_bytes(machine.read_memory(HOT, 8), "little") < page + 2:
            wait_for_progress(machine, work)
        machine.pause()
        return work, before, machine.read_memory(0, 4 * MIB)


def check(work, memory):
    return oracle.verify(lambda address, length: bytes(memory[address : address + length]), work)


def test_what_the_guest_left_is_right(stopped):
    work, before, after = stopped
    assert check(work, before).ok
    found = check(work, after)
    assert found.ok
    assert found.pages_checked == work.pages + 1


@pytest.mark.parametrize("offset", [8, 2048, PAGE - 1])
def test_a_flipped_byte(stopped, offset):
    work, _, after = stopped
    memory = bytearray(after)
    memory[HOT + offset] ^= 1
    found = check(work, memory)
    assert not found.ok
    assert found.bad_pages == (HOT,)
    assert found.lost_writes == 0


def test_a_stale_page(stopped):
    work, before, after = stopped
    memory = bytearray(after)
    memory[HOT : HOT + PAGE] = before[HOT : HOT + PAGE]
    found = check(work, memory)
    assert not found.ok
    assert found.bad_page_count == 0
    assert found.lost_writes >= 1


def test_swapped_pages(stopped):
    work, _, after = stopped
    other = HOT + PAGE
    memory = bytearray(after)
    memory[HOT : HOT + PAGE], memory[other : other + PAGE] = (
        after[other : other + PAGE],
        after[HOT : HOT + PAGE],
    )
    found = check(work, memory)
    assert not found.ok
    assert found.bad_pages == (HOT, other)


def test_a_zero_page_and_a_torn_one(stopped):
    work, _, after = stopped
    memory = bytearray(after)
    memory[HOT : HOT + PAGE] = bytes(PAGE)
    assert check(work, memory).bad_pages == (HOT,)
    memory = bytearray(after)
    memory[HOT + 2048 : HOT + PAGE] = after[HOT + PAGE + 2048 : HOT + 2 * PAGE]
    assert check(work, memory).bad_pages == (HOT,)


def test_a_changed_image(stopped):
    work, _, after = stopped
    memory = bytearray(after)
    memory[0x10200] ^= 0x80
    assert check(work, memory).bad_pages == (0x10000,)


def test_a_stale_record(stopped):
    work, before, after = stopped
    memory = bytearray(after)
    memory[workload_records.RECORDS_ADDRESS : workload_records.RECORDS_ADDRESS + PAGE] = before[
        workload_records.RECORDS_ADDRESS : workload_records.RECORDS_ADDRESS + PAGE
    ]
    assert not check(work, memory).ok


def test_not_before_the_memory_is_filled():
    work = workload.load("hammer", 4 * MIB)
    with pytest.raises(GuestError, match="has not filled its memory yet"):
        check(work, bytes(4 * MIB))


def test_records(stopped):
    work, _, after = stopped
    for record in workload_records.read_records(lambda at, n: after[at : at + n], work):
        # The guest may have been stopped between counting an iteration and noting how long it took.
        assert record.iterations - int(record.latencies.sum()) in {0, 1}
        assert record.iterations - int(record.gaps.sum()) in {0, 1}
        assert record.largest_gap_ms(1e9) == pytest.approx(record.max_gap / 1e6)
        assert 0 < record.latency_us(50, 1e9) <= record.latency_us(99, 1e9)
        assert record.max_latency / 1e3 <= record.latency_us(100, 1e9)
