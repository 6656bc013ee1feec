"""What a sink with a cache sends gives the destination each page as it is, whatever the cache has."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postcopy.channel.rate_limit import RateLimiter
from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.memory.ram_block import RamBlock
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages
from postcopy.source.xbzrle_sink import XbzrleSink
from postcopy.stream.encoded_records import EncodedRamRecords, apply_delta
from postcopy.stream.layout import BlockLayout, Limits, Receiver
from postcopy.stream.reader import StreamBuffer
from postcopy.stream.records import Pages, ZeroPages

PAGE, COUNT = 4096, 32
HEAD, FOOTER = 5, 5  # of a section of RAM around its records


class Wire:
    """A channel whose other end has memory."""

    sent_bytes = 0

    def __init__(self):
        self.there = {name: np.full((COUNT, PAGE), 0xEE, np.uint8) for name in ("low", "high")}
        layout = {name: BlockLayout(COUNT * PAGE) for name in self.there}
        self._records = EncodedRamRecords(Receiver(layout), Limits())
        self.kinds = []

    def send(self, data):
        pass  # the list of blocks

    def send_many(self, parts):
        self._take(b"".join(map(bytes, parts)))

    def send_gathered(self, table):
        import ctypes

        self._take(b"".join(ctypes.string_at(at, length) for at, length in table.tolist()))

    def _take(self, section):
        reader = StreamBuffer()
        reader.feed(section[HEAD:])
        while (record := self._records.read_or_delta(reader)) is not None:
            self.kinds.append(type(record).__name__)
            memory = self.there[record.block]
            if isinstance(record, Pages):
                memory[(record.offsets // PAGE).astype(int)] = record.data
            elif isinstance(record, ZeroPages):
                memory[(record.offsets // PAGE).astype(int)] = 0
            else:
                apply_delta(record, memory[record.offset // PAGE])


class Rounds:
    """Two blocks, and rounds in which all of them, or some pages, are sent."""

    def __init__(self, cache_bytes=64 * PAGE):
        self.blocks = [
            RamBlock(Region(name, COUNT * PAGE, PAGE, 0, 1 << 40, memfd.create("t", COUNT * PAGE)))
            for name in ("low", "high")
        ]
        for block in self.blocks:
            block.pages[:] = np.random.default_rng(1).integers(1, 256, (COUNT, PAGE), np.uint8)
        self.pages = [BlockPages(block) for block in self.blocks]
        self.counters, self.wire, self.cache_bytes = Counters(syncs=1), Wire(), cache_bytes
        self.sink = XbzrleSink(self.wire, RateLimiter(0), self.counters, lambda: self.cache_bytes)
        self.sink.begin(self.blocks, postcopy=False)
        self.send(range(COUNT), range(COUNT))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for block in self.blocks:
            block.close()

    def send(self, *numbers):
        """Send pages of each block, and return the kinds of records that went."""
        self.wire.kinds.clear()
        for pages, some in zip(self.pages, numbers, strict=True):
            if len(some):
                pages.known_data[:] = False
                self.sink.send(pages, np.array(sorted(some)))
        self.counters.syncs += 1
        return self.wire.kinds

    def check(self):
        for block in self.blocks:
            np.testing.assert_array_equal(self.wire.there[block.name], block.pages)


ALL = range(COUNT)


def test_a_page_is_cached_in_the_second_round_and_a_delta_from_then_on():
    with Rounds() as rounds:
        low, high = rounds.blocks
        assert "XbzrlePage" not in rounds.send(ALL, [])
        low.pages[3, 100:110] ^= 1
        low.pages[5] ^= 0x55  # all of it
        high.pages[0, 0] ^= 1
        assert sorted(rounds.send(ALL, [0])) == ["Pages", "Pages", "XbzrlePage"]
        rounds.check()
        found = rounds.counters.xbzrle.to_qapi()
        assert (found["pages"], found["overflow"], found["cache-miss"]) == (1, 1, COUNT + 1)
        assert found["cache-size"] == 64 * PAGE
        assert (
            found["bytes"] == 1 + 1 + 10 + 3
        )  # two numbers and what has changed, behind encoding and length
        assert rounds.send([3], []) == []  # nothing has changed


def test_zero_pages_and_what_comes_after_them():
    with Rounds() as rounds:
        low, _ = rounds.blocks
        rounds.send(ALL, ALL)
        low.pages[7] = 0
        assert rounds.send([7], []) == ["ZeroPages"]
        rounds.check()
        low.pages[7, 5] = 1
        assert rounds.send([7], []) == ["Pages"]
        rounds.check()
        low.pages[7, 6] = 1
        assert rounds.send([7], []) == ["XbzrlePage"]
        rounds.check()


def test_in_postcopy_pages_go_whole():
    with Rounds() as rounds:
        rounds.send(ALL, ALL)
        rounds.sink.phase = "postcopy_bytes"
        rounds.blocks[0].pages[3, 0] ^= 1
        assert rounds.send([3], []) == ["Pages"]
        rounds.check()


@pytest.mark.parametrize("cache_pages", [1, 4, 16, 128])
@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_other_end_has_every_page_after_every_round(cache_pages, data):
    some = st.sets(st.integers(0, COUNT - 1), max_size=COUNT)
    with Rounds(cache_pages * PAGE) as rounds:
        for _ in range(data.draw(st.integers(1, 6))):
            numbers = [data.draw(some), data.draw(some)]
            for block, written in zip(rounds.blocks, numbers, strict=True):
                for page in written:
                    what = data.draw(st.sampled_from(["nothing", "a byte", "half", "zero"]))
                    if what == "a byte":
                        block.pages[page, data.draw(st.integers(0, PAGE - 1))] ^= 0xFF
                    elif what == "half":
                        block.pages[page, ::2] ^= 0x5A
                    elif what == "zero":
                        block.pages[page] = 0
            if data.draw(st.booleans()):
                rounds.cache_bytes = data.draw(st.sampled_from([1, 8, 64])) * PAGE
            rounds.send(*numbers)
            rounds.check()
