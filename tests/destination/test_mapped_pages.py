"""Pages read from their places in a file, and what a file that changes meanwhile comes to."""

import os

import numpy as np
import pytest

from fakes.guest import RAM, FakeGuest
from postcopy.channel.address import FileAddress
from postcopy.channel.listen import Listener
from postcopy.destination.incoming_ram import read_pages
from postcopy.errors import StreamCut, StreamError
from postcopy.stream.mapped_ram import encode_bitmap, lay_out

PAGES = 300
PAGE = 4096


@pytest.fixture
def paged():
    guest = FakeGuest(PAGES * PAGE)
    ram = guest.incoming_ram()
    yield ram[RAM]
    ram.close()
    guest.close()


@pytest.fixture
def saved(tmp_path):
    """A block in a file, every place filled; and the pages."""
    (block,), end = lay_out([(RAM, PAGES * PAGE)], 100)
    path = tmp_path / "f"
    pages = np.random.default_rng(1).integers(1, 256, (PAGES, PAGE), np.uint8)
    with path.open("wb") as file:
        file.seek(block.pages_offset)
        file.write(pages.tobytes())
    assert path.stat().st_size == end
    return path, block, pages


def write_bitmap(path, block, present):
    with path.open("r+b") as file:
        file.seek(block.bitmap_offset)
        file.write(encode_bitmap(present))


def read(path, paged, block):
    with Listener(FileAddress(str(path))) as listener, listener.accept() as channel:
        read_pages(channel, paged, block)


@pytest.mark.parametrize("seed", range(3))
def test_only_what_has_its_bit(paged, saved, seed):
    path, block, pages = saved
    present = np.random.default_rng(seed).random(PAGES) < (0.02, 0.5, 0.98)[seed]
    write_bitmap(path, block, present)
    read(path, paged, block)
    assert (paged.block.pages[present] == pages[present]).all()
    assert not paged.block.pages[~present].any()
    assert not paged.pages.missing().any()


def test_what_had_come_before_is_overwritten(paged, saved):
    path, block, _ = saved
    paged.block.pages[:5] = 9
    paged.pages.receive(slice(0, 5))
    read(path, paged, block)
    assert not paged.block.pages.any()


def test_holes_take_no_memory(paged, saved):
    path, block, _ = saved
    write_bitmap(path, block, np.arange(PAGES) == 7)
    read(path, paged, block)
    assert paged.block.has_data(0, PAGES).sum() == 1


def test_a_file_that_was_cut_meanwhile(paged, saved):
    path, block, _ = saved
    write_bitmap(path, block, np.ones(PAGES, np.bool_))
    os.truncate(path, block.pages_offset + 20 * PAGE + 5)
    with pytest.raises(StreamCut, match=f"The file ends in the pages of {RAM}") as error:
        read(path, paged, block)
    assert error.value.offset == block.pages_offset + 20 * PAGE + 5
    os.truncate(path, block.bitmap_offset + 3)
    with pytest.raises(StreamCut, match=f"The file ends in the bitmap of {RAM}"):
        read(path, paged, block)


def test_a_bitmap_that_says_too_much(paged, saved):
    path, block, _ = saved
    write_bitmap(path, block, np.arange(PAGES + 1) == PAGES)
    with pytest.raises(StreamError, match="has bits behind the last page"):
        read(path, paged, block)
    assert not paged.block.pages.any()
