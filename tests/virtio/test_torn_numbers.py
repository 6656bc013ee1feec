"""A number that the other side of a ring changes is never seen half changed, nor shown so.

0x00ff and 0x0100 take turns: by one access for each byte, 0 and 0x01ff would be seen too.  The other
side is a process of its own that writes, or reads, as often as the processor can, by single accesses.
"""

import os
import signal
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.machine.address_map import AddressMap
from postcopy.machine.guest_memory import GuestMemory
from postcopy.vhost_user.memory import RingArea

PAGE = 4096
AT = 2
TURNS = np.tile(np.array([0x00FF, 0x0100], np.uint16), 1 << 15)


class OfMapping:
    """The numbers of a mapping, as an area has them."""

    def __init__(self, mapping):
        self.mapping = mapping

    def load(self, offset):
        return self.mapping.load(offset, 2)

    def store(self, offset, value):
        self.mapping.store(offset, value, 2)


AREAS = pytest.mark.parametrize(
    "area_of",
    [
        OfMapping,
        lambda mapping: GuestMemory(mapping, AddressMap.flat(PAGE)).area(0, PAGE, 2),
        lambda mapping: RingArea(mapping.buffer()),
    ],
    ids=["mapping", "device", "back-end"],
)


@pytest.fixture
def memory():
    fd = memfd.create("numbers", PAGE)
    with Mapping.shared(fd, PAGE) as mapping:
        os.close(fd)
        mapping.store(AT, 0x0100, 2)
        yield mapping


@contextmanager
def other_process(memory, act):
    """Has ``act`` done again and again, with the number as an array of as many items as there are turns."""
    number = memory.view()[AT : AT + 2].view(np.uint16)
    pid = os.fork()
    if pid == 0:
        try:
            every_turn = as_strided(number, TURNS.shape, (0,))
            while act(every_turn):
                pass
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@AREAS
def test_half_of_a_number_is_never_seen(memory, area_of):
    def write(every_turn):
        every_turn[:] = TURNS
        return True

    area = area_of(memory)
    with other_process(memory, write):
        seen = {area.load(AT) for _ in range(50_000)}
    assert seen <= {0x00FF, 0x0100}


@AREAS
def test_half_of_a_number_is_never_shown(memory, area_of):
    found, told = os.pipe()

    def look(every_turn):
        seen = set(np.unique(every_turn.copy()).tolist())
        if seen <= {0x00FF, 0x0100}:
            return True
        os.write(told, repr(seen).encode())
        return False

    area = area_of(memory)
    with other_process(memory, look):
        for value in TURNS[:20_000].tolist():
            area.store(AT, value)
    os.close(told)
    with os.fdopen(found, "rb") as answers:
        assert answers.read() == b""
