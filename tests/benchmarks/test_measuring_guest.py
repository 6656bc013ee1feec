"""The measuring guest's image, records and check, on memory made here."""

import struct

import numpy as np
import pytest

from benchmarks.workload import HOT_SET_AT, MIB, Records, Workload

SEED = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
STATE_AT = 0x7100
WORKLOAD = Workload(hot_bytes=MIB, fill_bytes=MIB, random=True)


class Memory:
    """Guest memory as the measuring guest would have made it."""

    def __init__(self):
        self.bytes = bytearray(HOT_SET_AT + 2 * MIB)
        words = np.frombuffer(self.bytes, "<u8")
        addresses = np.arange(HOT_SET_AT, HOT_SET_AT + 2 * MIB, 8, dtype=np.uint64)
        words[HOT_SET_AT // 8 :] = [mix(int(address)) for address in addresses]
        words[HOT_SET_AT // 8 : (HOT_SET_AT + MIB) // 8 : 512] = 3
        self.note(0x18, 3 * 256)

    def read(self, address, n_bytes):
        return bytes(self.bytes[address : address + n_bytes])

    def note(self, offset, value):
        struct.pack_into("<Q", self.bytes, STATE_AT + offset, value)


def mix(address):
    """splitmix64, word by word: what ``measure.S`` does."""
    word = (address + SEED) & MASK
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & MASK
    return word ^ word >> 31


@pytest.fixture(scope="module")
def pristine():
    return bytes(Memory().bytes)


@pytest.fixture
def memory(pristine):
    fresh = Memory.__new__(Memory)
    fresh.bytes = bytearray(pristine)
    return fresh


def test_intact_memory_is_intact(memory):
    found = Records(memory, WORKLOAD).verify()
    assert found.ok
    assert (found.counted_writes, found.bad_words) == (768, 0)


def test_the_write_in_flight_may_be_counted_already(memory):
    memory.note(0x18, 767)
    assert Records(memory, WORKLOAD).verify().ok


@pytest.mark.parametrize("noted", [766, 769])
def test_one_write_too_few_or_too_many_shows(memory, noted):
    memory.note(0x18, noted)
    assert not Records(memory, WORKLOAD).verify().ok


@pytest.mark.parametrize("at", [HOT_SET_AT + 8, HOT_SET_AT + MIB, HOT_SET_AT + 2 * MIB - 1])
def test_one_changed_byte_shows(memory, at):
    memory.bytes[at] ^= 1
    found = Records(memory, WORKLOAD).verify()
    assert not found.ok
    assert found.bad_words == 1


def test_the_image_carries_the_parameters():
    image = Workload(64 * MIB, 512 * MIB, random=True, write_fraction=0.5).image(tsc_hz=2.5e9)
    assert image[0x10:0x18] == b"PCYBIMG1"
    assert image[0x40:0x48] == b"PCYBPAR1"
    fields = struct.unpack_from("<15Q", image, 0x48)
    assert fields[:6] == (1, HOT_SET_AT, 64 * MIB, 4096, 1, 128)
    assert fields[9:13] == (80 * MIB, 512 * MIB, 25_000, 25_000_000)


def test_the_disk_boots_the_image():
    disk = WORKLOAD.disk(tsc_hz=2.5e9)
    image = WORKLOAD.image(tsc_hz=2.5e9)
    assert disk[510:512] == b"\x55\xaa"
    assert disk[512 : 512 + len(image)] == image
    assert len(image) <= 16 * 512  # what the boot sector loads


def test_a_ring_that_has_come_around_is_told_in_order(memory):
    memory.note(0x60, 8192 + 2)
    rows = np.zeros((8192, 4), dtype="<u8")
    rows[:, 0] = [8192, 8193, *range(2, 8192)]
    memory.bytes[0x20000 : 0x20000 + rows.nbytes] = rows.tobytes()
    assert list(Records(memory, WORKLOAD).series()[:, 0]) == list(range(2, 8194))
