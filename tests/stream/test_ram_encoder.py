"""Pages are written as the slow, obvious way writes them."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.streams import PAGE, SOURCES, offsets
from postcopy.stream.ram_encoder import PageEncoder

indices = st.lists(st.integers(0, 63), min_size=1, max_size=64)
SOURCE = SOURCES["ram"]


def slowly(block, last, where, flag, contents):
    out = b""
    for index, content in zip(where, contents, strict=True):
        same = block == last
        out += struct.pack(">Q", index * PAGE | flag | (0x20 if same else 0))
        out += b"" if same else bytes([len(block)]) + block.encode()
        out += content
        last = block
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ram", "r" * 255]), indices, st.booleans())))
def test_against_the_obvious_way(calls):
    encoder = PageEncoder(64)
    last = None
    for block, where, zero in calls:
        if zero:
            found = encoder.zeros(block, offsets(*where))
            wanted = slowly(block, last, where, 0x02, [b"\0"] * len(where))
        else:
            found = encoder.pages(block, offsets(*where), SOURCE)
            wanted = slowly(block, last, where, 0x08, [SOURCE[i].tobytes() for i in where])
        assert bytes(found) == wanted
        last = block


def test_runs_and_single_pages_are_written_alike():
    rows = np.random.default_rng(0).integers(0, 256, (2000, PAGE), dtype=np.uint8)
    encoder = PageEncoder(256)
    encoder.zeros("ram", offsets(0))
    for where in (range(256), [*range(100), *range(1000, 1100)], range(0, 512, 2)):
        data = np.frombuffer(bytes(encoder.pages("ram", offsets(*where), rows)), np.uint8)
        assert (data.reshape(-1, 8 + PAGE)[:, 8:] == rows[list(where)]).all()


def test_what_cannot_be_written():
    encoder = PageEncoder(4)
    with pytest.raises(ValueError, match="5 pages; 1 to 4 fit"):
        encoder.pages("ram", offsets(1, 2, 3, 4, 5), SOURCE)
    with pytest.raises(ValueError, match="0 pages"):
        encoder.pages("ram", offsets(), SOURCE)
    with pytest.raises(ValueError, match="no zero pages"):
        encoder.zeros("ram", offsets())
    with pytest.raises(IndexError, match="page 64 of a block of 64 pages"):
        encoder.pages("ram", offsets(64), SOURCE)
