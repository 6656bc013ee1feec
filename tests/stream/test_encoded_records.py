"""Deltas of XBZRLE give the page that they were made of, and wrong ones are named."""

import re
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import StreamError
from postcopy.stream.encoded_records import EncodedRamRecords, apply_delta, encode_delta
from postcopy.stream.layout import BlockLayout, Limits, Receiver
from postcopy.stream.reader import Incomplete, StreamBuffer
from postcopy.stream.records import MultifdFlush, Pages, XbzrlePage, ZeroPages

PAGE = 4096
RECEIVER = Receiver({"ram": BlockLayout(16 * PAGE)})


def number(value: int) -> bytes:
    return bytes((value,)) if value < 0x80 else bytes((value & 0x7F | 0x80, value >> 7))


def encode(old: bytes, new: bytes) -> bytes:
    """As QEMU does: numbers of unchanged and of changed bytes, and the changed bytes."""
    same = np.frombuffer(old, np.uint8) == np.frombuffer(new, np.uint8)
    edges = [0, *(np.flatnonzero(np.diff(same)) + 1).tolist(), PAGE]
    if not same[0]:
        edges.insert(0, 0)
    delta = b""
    for start, middle, end in zip(edges[::2], edges[1::2], edges[2::2], strict=False):
        delta += number(middle - start) + number(end - middle) + new[middle:end]
    return delta


def word(offset: int, flags: int) -> bytes:
    return struct.pack(">Q", offset | flags)


def read(*parts: bytes):
    """All records of a body."""
    reader = StreamBuffer()
    reader.feed(b"".join(parts))
    records = EncodedRamRecords(RECEIVER, Limits())
    found = []
    while (record := records.read_any(reader)) is not None:
        found.append(record)
    return found


@given(
    st.lists(st.tuples(st.integers(0, PAGE - 1), st.integers(1, 300)), max_size=20),
    st.integers(0, 9),
)
def test_a_delta_gives_the_page(changes, seed):
    old = np.random.default_rng(seed).integers(0, 256, PAGE, dtype=np.uint8)
    new = old.copy()
    for at, count in changes:
        new[at : at + count] ^= 0x5A
    page = old.copy()
    apply_delta(XbzrlePage("ram", 0, encode(old.tobytes(), new.tobytes()), 0), page)
    np.testing.assert_array_equal(page, new)


@given(
    st.lists(st.tuples(st.integers(0, PAGE - 1), st.integers(1, 3000)), max_size=20),
    st.booleans(),
    st.integers(0, 9),
)
def test_what_is_encoded_is_applied(changes, every_other, seed):
    old = np.random.default_rng(seed).integers(0, 256, PAGE, dtype=np.uint8)
    new = old.copy()
    for at, count in changes:
        new[at : at + count] ^= 0x5A
    if every_other:
        new[::2] ^= 0x33
    delta = encode_delta(old != new, new)
    if delta is None:  # only what would be no shorter
        assert len(encode(old.tobytes(), new.tobytes())) >= PAGE
        return
    assert len(delta) < PAGE
    apply_delta(XbzrlePage("ram", 0, delta, 0), old)
    np.testing.assert_array_equal(old, new)


def test_all_kinds_of_records():
    delta = number(5) + number(2) + b"ab"
    counted = bytes((1,)) + struct.pack(">H", len(delta)) + delta
    found = read(
        word(PAGE, 0x40), b"\3ram", counted, word(0, 0x200), word(2 * PAGE, 0x60), counted,
        word(3 * PAGE, 0x28), bytes(PAGE), word(0, 0x22), b"\0", word(0, 0x10),
    )  # fmt: skip
    assert found[:3] == [
        XbzrlePage("ram", PAGE, delta, 15), MultifdFlush(), XbzrlePage("ram", 2 * PAGE, delta, 38),
    ]  # fmt: skip
    assert [type(each) for each in found[3:]] == [Pages, ZeroPages]


@pytest.mark.parametrize(
    ("parts", "text", "offset"),
    [
        ([word(0, 0x60)], "Ack, bad migration stream!", 0),
        ([word(0, 0x40), b"\3rom"], "Can't find block rom", 9),
        ([word(16 * PAGE, 0x40), b"\3ram"], "Illegal RAM offset 10000", 0),
        ([word(0, 0x40), b"\3ram\2\0\0"], "wrong compression! (2)", 12),
        ([word(0, 0x40), b"\3ram\1\x10\1"], "len overflow!", 13),
        ([word(PAGE, 0x200)], "multifd is off here", 0),
    ],
)
def test_wrong_records(parts, text, offset):
    with pytest.raises(StreamError, match=re.escape(text)) as caught:
        read(*parts)
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("delta", "at"),
    [
        (b"\0", 1), (b"\x80", 0), (b"\x80\x80", 0), (b"\0\0", 1), (b"\0\5abc", 1),
        (b"\xff\x1f\2ab", 2), (b"\0\1a\0\1b", 3), (b"\xff\x7f\1a", 2),
    ],
)  # fmt: skip
def test_wrong_deltas(delta, at):
    page = np.zeros(PAGE, np.uint8)
    with pytest.raises(StreamError, match="decode error") as caught:
        apply_delta(XbzrlePage("ram", 0, delta, 100), page)
    assert caught.value.offset == 100 + at


def test_a_delta_may_come_in_pieces():
    delta = number(5) + number(2) + b"ab"
    whole = word(PAGE, 0x40) + b"\3ram\1" + struct.pack(">H", len(delta)) + delta
    records = EncodedRamRecords(RECEIVER, Limits())
    reader = StreamBuffer()
    for byte in whole[:-1]:
        reader.feed(bytes((byte,)))
        with pytest.raises(Incomplete):
            records.read_any(reader)
        reader.rollback()
    reader.feed(whole[-1:])
    assert records.read_any(reader).delta == delta
