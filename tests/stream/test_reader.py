"""The buffer grows for one large element, shrinks again, and never loses a byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import StreamError
from postcopy.stream.reader import FileBuffer, Incomplete, StreamBuffer


def test_numbers_and_names():
    reader = StreamBuffer()
    reader.feed(b"\1\0\2\0\0\0\3\0\0\0\0\0\0\0\4\3ram!")
    assert (reader.u8(), reader.u16(), reader.u32(), reader.u64()) == (1, 2, 3, 4)
    assert reader.name() == "ram"
    assert reader.peek() == ord("!")
    assert bytes(reader.rest()) == b"!"
    assert (reader.position, reader.consumed, reader.available, reader.pending) == (19, 0, 1, 20)


def test_incomplete_and_back():
    reader = StreamBuffer()
    reader.feed(b"\0\1\0")
    assert reader.u16() == 1
    with pytest.raises(Incomplete):
        reader.u16()
    reader.rollback()
    reader.feed(b"\2")
    assert (reader.u16(), reader.u16()) == (1, 2)
    reader.commit()
    assert reader.consumed == 4


def test_fail_says_where():
    reader = StreamBuffer()
    reader.feed(bytes(10))
    reader.skip(6)
    with pytest.raises(StreamError) as caught:
        reader.fail("wrong", 4)
    assert caught.value.offset == 2


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=40))
def test_nothing_is_lost_whatever_the_order(steps):
    reader = StreamBuffer(64)
    fed = bytearray()
    for count, read in steps:
        fresh = bytes((len(fed) + index) % 251 for index in range(count))
        reader.feed(fresh)
        fed += fresh
        at = reader.position
        taken = reader.take(min(read, reader.available))
        assert taken == fed[at : at + len(taken)]
        reader.commit()
        assert reader.consumed + reader.available == len(fed)


def test_shrinks_behind_a_large_element():
    reader = StreamBuffer(1000)
    reader.feed(bytes(100_000))
    assert len(reader.buffer()) > 0
    grown = len(reader._array)
    assert grown >= 100_000
    reader.take(99_990)
    reader.commit()
    assert len(reader.buffer()) == 990
    assert reader.position == 99_990


def test_views_into_an_outgrown_buffer_stay_readable():
    reader = StreamBuffer(100)
    reader.feed(b"a" * 90)
    rows = reader.rows(2, 10, 1, 5)
    reader.feed(bytes(1000))
    assert rows.tobytes() == b"a" * 10


class File:
    """Bytes in which each is known by its place, and how much of them has been read."""

    def __init__(self, size):
        self.data = (np.arange(size) * 7 % 251).astype(np.uint8)
        self.read_bytes = 0
        self.reader = FileBuffer(self.read, size)

    def read(self, start, count):
        self.read_bytes += count
        return self.data[start : start + count]


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "seek", "commit", "rollback"]), st.integers(0, 1 << 20)),
        max_size=40,
    )
)
def test_a_file_is_read_as_if_all_of_it_were_there(steps):
    file = File(1 << 20)
    reader, at, committed = file.reader, 0, 0
    for what, number in steps:
        match what:
            case "take" if at + number > len(file.data):
                with pytest.raises(Incomplete):
                    reader.take(number)
            case "take":
                assert reader.take(number) == file.data[at : at + number].tobytes()
                at += number
            case "seek":
                reader.seek(number)
                at = committed = number
            case "commit":
                reader.commit()
                committed = at
            case "rollback":
                reader.rollback()
                at = committed
        assert (reader.position, reader.consumed) == (at, committed)
        assert reader.available == len(file.data) - at
        rest = bytes(reader.rest())
        assert rest == file.data[at : at + len(rest)].tobytes()
        assert len(rest) >= min(1000, reader.available)
        assert reader.tail(10) == file.data[max(at, len(file.data) - 10) :].tobytes()


def test_no_more_of_a_file_is_read_than_is_looked_at():
    file = File(64 << 20)
    file.reader.u64()
    file.reader.seek(32 << 20)
    file.reader.u64()
    assert file.read_bytes <= 1 << 20


def test_a_file_is_read_about_once():
    file = File(64 << 20)
    while file.reader.available:
        file.reader.words(1024, 4096)
        file.reader.skip(4 << 20)
        file.reader.commit()
    assert file.read_bytes <= 2 * len(file.data)
