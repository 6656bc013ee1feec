"""The transport's registers, and a driver that behaves, or does not."""

import struct
import tempfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.waiting import wait_until
from machine.machines import MIB
from postcopy.errors import GuestError
from postcopy.kernel.mapping import Mapping
from postcopy.machine.address_map import AddressMap
from postcopy.machine.drive import Drive
from postcopy.machine.guest_memory import GuestMemory
from postcopy.machine.request_queue import RequestQueue
from postcopy.machine.virtio_mmio import (
    CONFIG,
    DEVICE_FEATURES,
    DEVICE_FEATURES_SELECT,
    DEVICE_ID,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SELECT,
    INTERRUPT_ACKNOWLEDGE,
    INTERRUPT_STATUS,
    MAGIC,
    QUEUE_ENTRIES,
    QUEUE_MOST,
    QUEUE_NOTIFY,
    QUEUE_READY,
    QUEUE_SELECT,
    STATUS,
    VERSION,
    VirtioMmio,
)

FLUSH, VERSION_1 = 1 << 9, 1 << 32
NEXT, WRITE = 1, 2
DESCRIPTORS, AVAILABLE, USED, DATA = 0x1000, 0x2000, 0x3000, 0x4000
ENTRIES = 8
SLOT = 7 * 0x200
DRIVER, FEATURES_OK, DRIVER_OK, NEEDS_RESET = 3, 8, 4, 64
DONE, CHANGED = 1, 2


class Echo:
    """A device that copies what it may read into what it may write.

    :ivar gate: what a request waits for while it is in the device.
    """

    device_id = 2
    features = FLUSH | VERSION_1
    config = b"0123456789"

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()

    def check_config(self, config):
        if config != self.config:
            raise GuestError("another one")

    def handle(self, memory, chain):
        self.inside.set()
        self.gate.wait()
        data = b"".join(memory.read(*each) for each in chain.readable)
        for each in chain.writable:
            memory.write(each.address, data[: each.length])
        return sum(each.length for each in chain.writable)

    def flush(self):
        pass

    def close(self):
        pass


class Guest:
    """A driver over a mapping, with a device behind its registers."""

    def __init__(self, device=None, *, memory_bytes=MIB):
        self.lost = []
        self.device = device or Echo()
        self.ram = Mapping.anonymous(memory_bytes)
        self.memory = GuestMemory(self.ram, AddressMap.flat(memory_bytes))
        self.queue = RequestQueue(self.device, self.memory, self.lost.append)
        self.mmio = VirtioMmio(self.queue)
        self.index = 0
        self.mmio.runner.want()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if isinstance(self.device, Echo):
            self.device.gate.set()
        assert self.mmio.close()
        self.ram.close()

    def get(self, register, size=4):
        return self.mmio.read(SLOT + register, size)

    def put(self, register, value, size=4):
        self.mmio.write(SLOT + register, size, value)

    def begin(self, *, entries=ENTRIES, features=VERSION_1, at=(DESCRIPTORS, AVAILABLE, USED)):
        self.put(STATUS, 0)
        self.put(STATUS, DRIVER)
        for half in (0, 1):
            self.put(DRIVER_FEATURES_SELECT, half)
            self.put(DRIVER_FEATURES, features >> 32 * half & 0xFFFFFFFF)
        self.put(STATUS, DRIVER | FEATURES_OK)
        self.put(QUEUE_SELECT, 0)
        self.put(QUEUE_ENTRIES, entries)
        for register, address in zip((0x80, 0x90, 0xA0), at, strict=True):
            self.put(register, address & 0xFFFFFFFF)
            self.put(register + 4, address >> 32)
        self.put(QUEUE_READY, 1)
        self.put(STATUS, DRIVER | FEATURES_OK | DRIVER_OK)

    def describe(self, number, address, length, flags=0, following=0):
        self.ram.write(
            DESCRIPTORS + 16 * number, struct.pack("<QIHH", address, length, flags, following)
        )

    def offer(self, head=0, *, by=1):
        self.ram.write(AVAILABLE + 4 + 2 * (self.index % ENTRIES), struct.pack("<H", head))
        self.index = (self.index + by) % 65536
        self.ram.write(AVAILABLE + 2, struct.pack("<H", self.index))
        self.put(QUEUE_NOTIFY, 0)

    @property
    def done(self):
        return int.from_bytes(self.ram.read(USED + 2, 2), "little")

    def has_settled(self):
        index = int.from_bytes(self.ram.read(AVAILABLE + 2, 2), "little")
        served = self.mmio.save().rings[0].next_available == index
        return served or self.get(STATUS) & NEEDS_RESET

    def echo(self, text=b"text"):
        """One request, done; return what came back."""
        self.ram.write(DATA, text)
        self.describe(0, DATA, len(text), NEXT, 1)
        self.describe(1, DATA + 0x1000, len(text), WRITE)
        self.offer()
        wait_until(lambda: self.done == self.index, 10, "the request is not done")
        return self.ram.read(DATA + 0x1000, len(text))


@pytest.fixture
def guest():
    with Guest() as made:
        yield made


def test_what_a_driver_looks_for(guest):
    assert guest.get(MAGIC) == 0x74726976
    assert guest.get(VERSION) == 2
    assert guest.get(DEVICE_ID) == 2
    assert guest.get(QUEUE_MOST) == 256
    assert guest.get(STATUS) == 0
    assert [guest.get(CONFIG + at, 1) for at in (0, 9, 10)] == [0x30, 0x39, 0]
    assert guest.get(CONFIG, 8) == int.from_bytes(b"01234567", "little")


def test_there_is_nothing_in_the_other_places(guest):
    for slot in range(7):
        assert guest.mmio.read(slot * 0x200, 4) == 0x74726976
        assert guest.mmio.read(slot * 0x200 + DEVICE_ID, 4) == 0
        guest.mmio.write(slot * 0x200 + STATUS, 4, DRIVER)
        assert guest.mmio.read(slot * 0x200 + STATUS, 4) == 0


def test_features_are_offered_and_agreed_on_word_by_word(guest):
    words = []
    for half in range(3):
        guest.put(DEVICE_FEATURES_SELECT, half)
        words.append(guest.get(DEVICE_FEATURES))
    assert words == [FLUSH, 1, 0]
    guest.begin(features=FLUSH | VERSION_1)
    assert guest.get(STATUS) & FEATURES_OK
    assert guest.mmio.save().features == FLUSH | VERSION_1


@pytest.mark.parametrize("features", [FLUSH, VERSION_1 | 1 << 28, 0])
def test_features_that_cannot_be_are_not_agreed_on(guest, features):
    guest.begin(features=features)
    guest.put(STATUS, DRIVER)
    guest.put(STATUS, DRIVER | FEATURES_OK)
    assert not guest.get(STATUS) & FEATURES_OK


def test_requests_are_done_in_order_and_past_the_end_of_the_ring(guest):
    guest.begin()
    for number in range(3 * ENTRIES):
        text = f"request {number}".encode()
        assert guest.echo(text) == text
        head, length = struct.unpack("<II", guest.ram.read(USED + 4 + 8 * (number % ENTRIES), 8))
        assert (head, length) == (0, len(text))
    assert guest.get(INTERRUPT_STATUS) == DONE
    guest.put(INTERRUPT_ACKNOWLEDGE, DONE)
    assert guest.get(INTERRUPT_STATUS) == 0


def test_a_driver_that_polls_gets_no_interrupt(guest):
    guest.begin()
    guest.ram.write(AVAILABLE, b"\1\0")
    guest.echo()
    assert guest.mmio.runner.wait_parked(10)
    assert guest.get(INTERRUPT_STATUS) == 0


def test_what_was_offered_before_the_driver_was_ready_is_done(guest):
    guest.describe(0, DATA, 4, WRITE)
    guest.offer()
    guest.begin()
    wait_until(lambda: guest.done == 1, 10, "the request is not done")


def test_nothing_is_done_while_the_guest_stands_still(guest):
    guest.begin()
    guest.mmio.runner.unwant()
    assert guest.mmio.runner.wait_parked(10)
    guest.describe(0, DATA, 4, WRITE)
    guest.offer()
    assert guest.mmio.save().rings[0].next_available == 0
    assert guest.done == 0
    guest.mmio.runner.want()
    wait_until(lambda: guest.done == 1, 10, "the request is not done")


HOSTILE = {
    "index far ahead": lambda guest: guest.offer(by=ENTRIES + 1),
    "head outside": lambda guest: guest.offer(ENTRIES),
    "a circle": lambda guest: (guest.describe(0, DATA, 4, NEXT, 0), guest.offer()),
    "next outside": lambda guest: (guest.describe(0, DATA, 4, NEXT, 9), guest.offer()),
    "indirect": lambda guest: (guest.describe(0, DATA, 16, 4), guest.offer()),
    "no ram": lambda guest: (guest.describe(0, MIB, 4, WRITE), guest.offer()),
    "past the end of ram": lambda guest: (guest.describe(0, MIB - 2, 4), guest.offer()),
    "no end": lambda guest: (guest.describe(0, DATA, 0xFFFFFFFF, WRITE), guest.offer()),
    "address wraps": lambda guest: (guest.describe(0, (1 << 64) - 2, 4), guest.offer()),
    "to read behind to write": lambda guest: (
        guest.describe(0, DATA, 4, WRITE | NEXT, 1),
        guest.describe(1, DATA, 4),
        guest.offer(),
    ),
}


@pytest.mark.parametrize("deed", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_ring_asks_for_a_reset_and_all_is_well_after_it(guest, deed):
    guest.begin()
    deed(guest)
    wait_until(lambda: guest.get(STATUS) & NEEDS_RESET, 10, "no reset is asked for")
    assert guest.get(INTERRUPT_STATUS) & CHANGED
    assert guest.mmio.save().broken
    assert not guest.lost
    guest.put(STATUS, DRIVER | FEATURES_OK | DRIVER_OK)
    assert guest.get(STATUS) & NEEDS_RESET  # it stays, until the device is reset
    guest.ram.write(AVAILABLE, bytes(4))
    guest.ram.write(USED, bytes(4))
    guest.index = 0
    guest.begin()
    assert guest.echo() == b"text"


@pytest.mark.parametrize(
    "ring",
    [
        {"entries": 3},
        {"entries": 0xFFFF},
        {"at": (DESCRIPTORS + 1, AVAILABLE, USED)},
        {"at": (DESCRIPTORS, AVAILABLE + 1, USED)},
        {"at": (DESCRIPTORS, AVAILABLE, USED + 2)},
        {"at": (MIB, AVAILABLE, USED)},
        {"at": (DESCRIPTORS, MIB - 2, USED)},
        {"at": (DESCRIPTORS, AVAILABLE, (1 << 64) - 4)},
    ],
    ids=str,
)
def test_a_ring_that_cannot_be_asks_for_a_reset(guest, ring):
    guest.begin(**ring)
    wait_until(lambda: guest.get(STATUS) & NEEDS_RESET, 10, "no reset is asked for")


descriptors = st.tuples(
    st.sampled_from([0, DATA, DESCRIPTORS, AVAILABLE, USED, MIB - 1, MIB, 1 << 63, (1 << 64) - 1]),
    st.sampled_from([0, 1, 15, 16, 17, 512, 513, 4096, 1 << 20, (1 << 32) - 1]),
    st.sampled_from([0, 1, 2, 3, 1, 3, 4, 0xFFFF]),
    st.integers(0, ENTRIES),
)
headers = st.tuples(st.sampled_from([0, 1, 4, 8, 9]), st.sampled_from([0, 1, 127, 128, 1 << 60]))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(descriptors, min_size=ENTRIES, max_size=ENTRIES),
    st.lists(st.integers(0, ENTRIES), min_size=ENTRIES, max_size=ENTRIES),
    st.integers(0, ENTRIES + 1),
    headers,
)
def test_no_ring_ends_the_device(table, heads, index, header):
    """A ring of any bytes is served or asks for a reset; after that the device serves a good one."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(1 << 16)
        with Guest(Drive(file.name)) as guest:
            for number, entry in enumerate(table):
                guest.describe(number, *entry)
            guest.ram.write(AVAILABLE, struct.pack(f"<HH{ENTRIES}H", 0, index, *heads))
            guest.ram.write(DATA, struct.pack("<IIQ", header[0], 0, header[1]))
            guest.begin()
            wait_until(guest.has_settled, 10, "it neither serves the ring nor asks for a reset")
            assert not guest.lost
            for at in (AVAILABLE, USED):
                guest.ram.write(at, bytes(4))
            guest.begin()
            guest.ram.write(DATA, bytes(16))  # read sector 0
            guest.describe(0, DATA, 16, NEXT, 1)
            guest.describe(1, DATA + 0x1000, 513, WRITE)
            guest.ram.write(DATA + 0x1000, b"x" * 513)
            guest.offer()
            wait_until(lambda: guest.done == 1, 10, "the request is not done")
            assert guest.ram.read(DATA + 0x1000, 513) == bytes(513)


def test_a_reset_waits_for_the_request_under_way(guest):
    """Or the device would write into memory that is the driver's again."""
    guest.begin()
    guest.device.gate.clear()
    guest.describe(0, DATA, 4, WRITE)
    guest.offer()
    assert guest.device.inside.wait(10)
    resetting = threading.Thread(target=guest.put, args=(STATUS, 0))
    resetting.start()
    assert not guest.mmio.runner.wait_parked(0)
    assert guest.get(QUEUE_READY) == 1  # other accesses are answered meanwhile
    guest.device.gate.set()
    resetting.join(10)
    assert not resetting.is_alive()
    assert guest.get(STATUS) == 0
    assert guest.done == 1


def test_a_state_goes_on_in_another_device(guest):
    guest.begin(features=FLUSH | VERSION_1)
    for _ in range(11):
        guest.echo()
    guest.mmio.runner.unwant()
    assert guest.mmio.runner.wait_parked(10)
    state = guest.mmio.save()
    with Guest() as other:
        other.mmio.runner.unwant()
        other.ram.write(0, guest.ram.read(0, 0x6000))
        other.mmio.check(state)
        other.mmio.load(state)
        assert other.mmio.save() == state
        other.index = guest.index
        other.mmio.runner.want()
        assert other.echo(b"more") == b"more"
        assert other.get(STATUS) == DRIVER | FEATURES_OK | DRIVER_OK


def test_a_state_of_another_device_is_refused(guest):
    guest.begin(features=FLUSH | VERSION_1)
    state = guest.mmio.save()

    class Poorer(Echo):
        features = VERSION_1

    with Guest(Poorer()) as other, pytest.raises(GuestError, match="virtio features 0x200, which"):
        other.mmio.check(state)

    class Larger(Echo):
        config = b"9"

    with Guest(Larger()) as other, pytest.raises(GuestError, match="another one"):
        other.mmio.check(state)


def test_the_log_has_every_page_that_the_device_has_written(guest):
    guest.begin()
    guest.memory.start_log()
    guest.echo(b"x" * 20)
    log = guest.memory.fetch_log(0, MIB)
    pages = [n for n in range(len(log) * 8) if log[n // 8] >> n % 8 & 1]
    assert pages == [USED // 4096, (DATA + 0x1000) // 4096]
    assert not guest.memory.fetch_log(0, MIB).any()
    guest.memory.stop_log()
