"""Pages of any block, in batches of any size, become records of each of them."""

import socket
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.channel.rate_limit import RateLimiter
from postcopy.channel.sockets import SocketChannel
from postcopy.memory.ram_block import RamBlock
from postcopy.source import wire_sink
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages
from postcopy.source.wire_sink import PageRecords, WireSink, send_records
from postcopy.stream.numbers import PAGE_RECORD_BYTES, RamFlag

COUNT = 24  # pages of the wire


class Block:
    """Memory in which some pages are holes: to read one of those would be wrong."""

    name = "ram"
    target_pages = RamBlock.target_pages
    is_zero = RamBlock.is_zero

    def __init__(self, per_page, holes, zeros, *, copies=False):
        self._copies = copies  # the pages are not mapped, but must be read
        self.target_pages_per_page = per_page
        self.page_count = COUNT // per_page
        self._holes = holes
        self.pages = np.repeat(np.arange(1, COUNT + 1, dtype=np.uint8), 4096).reshape(COUNT, 4096)
        self.pages[sorted(zeros)] = 0
        for hole in holes:
            self.pages[hole * per_page : (hole + 1) * per_page] = 0xEE  # never to be seen

    def has_data(self, start, end):
        return np.array([page not in self._holes for page in range(start, end)])

    def page(self, page):
        return self.pages[page].copy() if self._copies else self.pages[page]

    def gather(self, target):
        if self._copies:
            return self.pages[target], np.arange(len(target))
        return self.pages, target

    def contents(self, target):
        hole = target // self.target_pages_per_page in self._holes
        return bytes(4096) if hole else self.pages[target].tobytes()


def parse(data):
    """Each record: (page, its bytes); in the order of the wire."""
    at = 0
    while at < len(data):
        word = int.from_bytes(data[at : at + 8], "big")
        at += 8
        if not word & RamFlag.CONTINUE:
            at += 1 + data[at]
        length = 4096 if word & RamFlag.PAGE else 1
        yield word >> 12, data[at : at + length].ljust(4096, b"\0")
        at += length


@given(
    per_page=st.sampled_from([1, 4]),
    holes=st.sets(st.integers(0, COUNT - 1)),
    zeros=st.sets(st.integers(0, COUNT - 1)),
    batch=st.sets(st.integers(0, COUNT - 1), min_size=1).map(sorted),
    most=st.sampled_from([1, 3, 8, 100]),
    copies=st.booleans(),
)
def test_whatever_a_batch_holds(per_page, holes, zeros, batch, most, copies):
    block = Block(per_page, holes, zeros, copies=copies)
    batch = np.array(sorted({page // per_page for page in batch}))
    wanted = block.target_pages(batch).tolist()
    with mock.patch.object(wire_sink, "BATCH_PAGES", most):
        found, normal, zero = [], 0, 0
        for encoded in PageRecords().encode(BlockPages(block), batch):
            found += parse(b"".join(bytes(part) for part in encoded.parts))
            normal += encoded.normal_pages
            zero += encoded.zero_pages
    assert sorted(found) == [(page, block.contents(page)) for page in wanted]
    assert normal + zero == len(wanted)
    assert type(normal) is type(zero) is int  # it becomes JSON
    pages = [page for page, _ in found]
    for page in batch.tolist():  # a huge page comes whole, its pieces in their order
        at = pages.index(page * per_page)
        assert pages[at : at + per_page] == list(range(page * per_page, (page + 1) * per_page))


def test_a_huge_page_that_is_all_zero_goes_out_as_zeros():
    block = Block(4, set(), {8, 9, 10, 11, 13})
    (encoded,) = PageRecords().encode(BlockPages(block), np.arange(block.page_count))
    assert (encoded.normal_pages, encoded.zero_pages) == (COUNT - 4, 4)
    found = list(parse(b"".join(bytes(part) for part in encoded.parts)))
    assert [page for page, _ in found[-4:]] == [8, 9, 10, 11]
    assert sorted(found) == [(page, block.contents(page)) for page in range(COUNT)]


@pytest.mark.parametrize("batch", [[3], [3, 4, 5], [0], [0, 1], [2, 3, 5], [0, 1, 2]])
def test_they_are_sent_with_what_stands_around_them(batch):
    block = Block(1, {0, 1}, {2})
    ours, theirs = socket.socketpair()
    with SocketChannel(ours, "t") as channel, theirs:
        (encoded,) = PageRecords().encode(BlockPages(block), np.array(batch))
        sent_bytes = send_records(channel, encoded, b"head", b"tail")
        assert channel.sent_bytes == sent_bytes
        found = theirs.recv(10 * PAGE_RECORD_BYTES, socket.MSG_WAITALL | socket.MSG_DONTWAIT)
    assert found[:4] + found[-4:] == b"headtail"
    assert len(found) == sent_bytes
    assert sorted(parse(found[4:-4])) == [(page, block.contents(page)) for page in batch]


@pytest.mark.parametrize(("per_page", "calls"), [(1, 0), (4, 4)], ids=["small", "huge"])
def test_something_may_come_between_the_pieces_of_huge_pages(per_page, calls):
    """On another channel: on this one nothing but the pieces, in their order and in one section."""
    block = Block(per_page, {3}, {2})
    pages, batch = BlockPages(block), np.arange(block.page_count)
    came = []
    plain, interrupted = (
        sent_of(lambda sink, between=between: sink.send(pages, batch, between))
        for between in (None, lambda: came.append(1))
    )
    assert interrupted == plain
    assert len(came) == calls


def sent_of(send):
    """What a sink sends over a channel, and what it counts."""
    ours, theirs = socket.socketpair()
    with (
        SocketChannel(ours, "t") as channel,
        theirs,
        mock.patch.object(wire_sink, "PIECE_PAGES", 4),
    ):
        counters = Counters()
        sink = WireSink(channel, RateLimiter(0), counters)
        n_bytes = send(sink)
        found = theirs.recv(1 << 20, socket.MSG_DONTWAIT)
        assert len(found) == n_bytes == sink.sent_bytes
        return found, counters.normal_pages, counters.zero_pages


def test_memory_stays_as_long_as_its_records():
    """A block may be closed by another thread, while the kernel is reading its pages."""
    block = Block(1, set(), set())
    (encoded,) = PageRecords().encode(BlockPages(block), np.arange(4))
    rows = block.pages
    (records,) = encoded.parts
    assert any(kept is rows for kept in records.keeps)
