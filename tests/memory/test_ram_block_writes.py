"""Runs of pages are written whole, to where they belong, without a fault for each."""

import os
import resource

import numpy as np
import pytest

from postcopy.errors import KernelError
from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.memory.ram_block import RamBlock

PAGE = 4096
BEFORE = 3  # pages of the file before the block
PAGES = 512
HEADER = 8


@pytest.fixture
def block():
    fd = memfd.create("ram", (BEFORE + PAGES) * PAGE)
    made = RamBlock(Region("ram", PAGES * PAGE, PAGE, 0, 1 << 40, fd, BEFORE * PAGE))
    yield made
    made.close()


def contents(count):
    return np.random.default_rng(count).integers(1, 256, (count, PAGE), dtype=np.uint8)


def records(rows):
    """The same pages as they stand in a stream: each behind a header."""
    made = np.zeros((len(rows), HEADER + PAGE), np.uint8)
    made[:, HEADER:] = rows
    return made[:, HEADER:]


@pytest.mark.parametrize("there", [[], [0, 40, 511], range(100), range(512)], ids=len)
@pytest.mark.parametrize("count", [1, 15, 16, 400])
@pytest.mark.parametrize("as_it_stands", [np.array, records])
def test_all_of_a_run_and_nothing_else(block, there, count, as_it_stands):
    wanted = np.zeros((PAGES, PAGE), np.uint8)
    for page in there:
        block.pages[page] = wanted[page] = 7
    rows = contents(count)
    block.write_run(50, as_it_stands(rows))
    wanted[50 : 50 + count] = rows
    filled = len({*there, *range(50, 50 + count)})
    assert os.fstat(block._fd).st_blocks * 512 == filled * PAGE
    np.testing.assert_array_equal(block.pages, wanted)


def test_a_run_of_new_pages_takes_no_fault_for_each(block):
    rows = contents(PAGES)
    assert not block.is_quick_to_touch(0, PAGES)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    block.write_run(0, rows)
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < PAGES // 4
    assert block.is_quick_to_touch(0, PAGES)
    np.testing.assert_array_equal(block.pages, rows)


def test_no_memory_is_one_error(block, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("postcopy.channel.writev.write_pieces", full)
    with pytest.raises(KernelError, match="400 pages of RAM block 'ram'"):
        block.write_run(0, contents(400))
