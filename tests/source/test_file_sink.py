"""Pages at their places: the file is what the pages were when they were sent last."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy.channel.address import FileAddress
from postcopy.channel.connect import connect
from postcopy.channel.rate_limit import RateLimiter
from postcopy.errors import ChannelBroken, Refused
from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.memory.ram_block import RamBlock
from postcopy.parameters import Capabilities, Capability
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages
from postcopy.source.file_sink import FileSink
from postcopy.source.page_sink import page_sink_for
from postcopy.source.wire_sink import WireSink
from postcopy.stream.block_list import encode_list_start
from postcopy.stream.mapped_ram import decode_bitmap, read_list

PAGES = 40
HEAD = len(encode_list_start(2, 0))
MAPPED = Capabilities(frozenset({Capability.MAPPED_RAM}))


def a_block(name, pages=PAGES, per_page=1):
    size = pages * 4096
    # A block of huge pages, but for the pages themselves.
    return RamBlock(Region(name, size, 4096 * per_page, 0, 0, memfd.create(name, size)))


class Saved:
    """A sender into a file, and what the file says in the end."""

    def __init__(self, path, blocks):
        self.path = path
        self.total = sum(block.size_bytes for block in blocks)
        self.counters = Counters()
        self.channel = connect(FileAddress(str(path)))
        self.sender = page_sink_for(self.channel, MAPPED, RateLimiter(0), self.counters)
        self.sender.begin(blocks, postcopy=False)

    def finish(self):
        self.channel.send(self.sender.end_of_ram())
        self.channel.close()
        return self.read()

    def read(self):
        raw = self.path.read_bytes()
        found, _ = read_list(lambda at, n: raw[at : at + n], HEAD, self.total, len(raw))
        return {block.name: self._pages(raw, block) for block in found}

    def _pages(self, raw, block):
        present = decode_bitmap(
            block, raw[block.bitmap_offset : block.bitmap_offset + block.bitmap_bytes]
        )
        data = raw[block.pages_offset : block.end_offset]
        pages = np.frombuffer(data, np.uint8).reshape(-1, 4096).copy()
        pages[~present] = 0
        return pages


steps = st.lists(
    st.tuples(
        st.sets(st.integers(0, PAGES - 1), min_size=1).map(sorted),
        st.integers(0, 3),  # what is written to them; 0 makes them zero
        st.sampled_from(["send", "copies", "zeros"]),
    ),
    max_size=12,
)


@settings(max_examples=40)
@given(steps)
def test_the_last_that_was_sent_is_there(tmp_path_factory, steps):
    block = a_block("ram")
    saved = Saved(tmp_path_factory.mktemp("saved") / "f", [block])
    expected = np.zeros((PAGES, 4096), np.uint8)
    pages = BlockPages(block)
    for batch, value, how in steps:
        target = np.array(batch)
        if how == "zeros":
            saved.sender.send_zeros("ram", target)
            expected[target] = 0
        elif how == "copies":
            contents = np.full((len(target), 4096), value, np.uint8)
            saved.sender.send_copies("ram", target[::-1], contents)
            expected[target] = value
        else:
            block.pages[target, 4000:] = value
            block.pages[target, :4000] = 0
            saved.sender.send(pages, target)
            expected[target] = block.pages[target]
    assert (saved.finish()["ram"] == expected).all()
    block.close()


def test_two_blocks_and_their_figures(tmp_path):
    blocks = [a_block("ram"), a_block("rom", 70)]
    blocks[0].pages[3:9] = 7
    blocks[1].pages[69] = 9
    saved = Saved(tmp_path / "f", blocks)
    for block in blocks:
        taken = saved.sender.send(BlockPages(block), np.arange(block.page_count))
        assert taken == 4096 * int(block.pages.any(axis=1).sum())
    saved.sender.count()
    found = saved.finish()
    assert all((found[block.name] == block.pages).all() for block in blocks)
    assert (saved.counters.normal_pages, saved.counters.zero_pages) == (7, 103)
    assert saved.sender.sent_bytes == 7 * 4096
    assert 7 * 4096 < saved.counters.precopy_bytes < 8 * 4096
    assert saved.path.stat().st_blocks * 512 < 20 * 4096
    for block in blocks:
        block.close()


def test_pages_larger_than_those_of_the_file(tmp_path):
    block = a_block("ram", 64, per_page=16)
    block.pages[16:33] = 5
    saved = Saved(tmp_path / "f", [block])
    saved.sender.send(BlockPages(block), np.array([1, 2]))
    found = saved.finish()["ram"]
    assert (found == block.pages).all()
    assert (saved.counters.normal_pages, saved.counters.zero_pages) == (17, 15)
    block.close()


def test_a_file_that_was_never_finished_has_no_pages(tmp_path):
    block = a_block("ram")
    block.pages[:] = 7
    saved = Saved(tmp_path / "f", [block])
    saved.sender.send(BlockPages(block), np.arange(PAGES))
    assert not saved.read()["ram"].any()
    saved.channel.shutdown()
    with pytest.raises(ChannelBroken):
        saved.sender.end_of_ram()
    saved.channel.close()
    block.close()


def test_the_capability_chooses(tmp_path):
    with connect(FileAddress(str(tmp_path / "f"))) as channel:
        plain = page_sink_for(channel, Capabilities(), RateLimiter(0), Counters())
        mapped = page_sink_for(channel, MAPPED, RateLimiter(0), Counters())
        assert isinstance(plain, WireSink)
        assert isinstance(mapped, FileSink)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    channel = connect(FileAddress(str(fifo)))
    with pytest.raises(Refused, match=f"mapped-ram needs a file .* file:{fifo} is not"):
        page_sink_for(channel, MAPPED, RateLimiter(0), Counters())
    os.close(reader)
