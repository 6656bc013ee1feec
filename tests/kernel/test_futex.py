"""A bit of shared memory is set whatever other processes set at the same time."""

import os

import pytest

from postcopy.errors import KernelError
from postcopy.kernel import futex, memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.processes import Child

WORDS = 20_000
PROCESSES = 4


def test_no_bit_that_processes_set_in_the_same_words_is_lost():
    fd = memfd.create("words", 4 * WORDS)
    with Mapping.shared(fd, 4 * WORDS) as words:
        start, go = os.pipe()

        def set_one_of_each(bit):
            os.read(start, 1)
            for at in range(0, 4 * WORDS, 4):
                futex.set_bit(words.address + at, bit)

        children = [Child(lambda bit=bit: set_one_of_each(8 * bit)) for bit in range(PROCESSES)]
        os.write(go, b"x" * PROCESSES)
        assert [child.wait() for child in children] == [0] * PROCESSES
        assert set(words.read(0, 4 * WORDS)) == {1}
    for each in (fd, start, go):
        os.close(each)


@pytest.mark.parametrize("bit", [0, 10, 11, 31])
def test_each_bit_is_its_own(bit):
    with Mapping.anonymous(4096) as memory:
        memory.write(0, (1 << 5).to_bytes(4, "little"))
        futex.set_bit(memory.address, bit)
        assert int.from_bytes(memory.read(0, 8), "little") == 1 << 5 | 1 << bit


def test_memory_that_is_not_there_is_an_error():
    with pytest.raises(KernelError, match=r"futex failed: Bad address"):
        futex.set_bit(4096, 0)
