"""A buffer that bytes are received into, and a bounded big-endian reader over it.

A parser reads with the cursor and commits when it has a whole element.  When the bytes run out the
reader raises :class:`Incomplete`; the parser goes back to the last commit and tries again once more
bytes are there.  So a parser needs no state for half an element, and can be cut anywhere.

Memory is bounded by the parser: the buffer grows only to hold one element, and the reader
of an element's length checks it before it asks for the bytes.
"""

import struct
from collections.abc import Callable
from typing import NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from postcopy.errors import StreamCut, StreamError

CAPACITY_BYTES = (1 << 20) + (64 << 10)

SMALL_BYTES = 8 << 10

SMALLEST_WINDOW_BYTES = 64 << 10
LARGEST_WINDOW_BYTES = 4 << 20

BytesLike: TypeAlias = bytes | bytearray | memoryview

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class Incomplete(Exception):
    """The bytes run out in the middle of an element; never leaves this package."""


class StreamBuffer:
    """Received bytes and a cursor in them.  One thread only.

    :param position: what the first byte counts as, for a stream that begins within a file.
    """

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES, position: int = 0) -> None:
        self._capacity = capacity_bytes
        self._allocate(capacity_bytes)
        self._start = 0  # all before is consumed
        self._cursor = 0
        self._end = 0
        self._base = position  # of the buffer's first byte, in the stream

    def _allocate(self, size: int) -> None:
        # Never resized in place: views into the old one may be about.
        self._array: npt.NDArray[np.uint8] = np.empty(size, np.uint8)
        self._view = self._array.data

    # Section: filling

    def buffer(self) -> memoryview:
        """Give the free space to receive into; never empty.  Ends the life of views given out."""
        # Half a record is moved at once: the longer the free space, the longer the runs of pages.
        small = self._start and self._end - self._start <= SMALL_BYTES
        if small or len(self._array) - self._end < self._capacity // 2:
            self._make_room()
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """Say that ``count`` bytes of what :meth:`buffer` gave have been filled."""
        self._end += count

    def feed(self, data: BytesLike) -> None:
        """Take a copy of ``data``."""
        view = memoryview(data).cast("B")
        while len(view):
            free = self.buffer()
            count = min(len(free), len(view))
            free[:count] = view[:count]
            self.received(count)
            view = view[count:]

    def _make_room(self) -> None:
        kept = self._end - self._start
        old, start = self._array, self._start
        if kept > len(old) // 2:
            self._allocate(2 * len(old))
        elif len(old) > self._capacity and kept <= self._capacity // 4:
            self._allocate(self._capacity)
        self._array[:kept] = old[start : start + kept]
        self._base += start
        self._start = self._cursor = 0
        self._end = kept

    # Section: reading

    @property
    def position(self) -> int:
        """Bytes from the start of the stream to the cursor."""
        return self._base + self._cursor

    @property
    def consumed(self) -> int:
        """Bytes from the start of the stream to the last commit."""
        return self._base + self._start

    @property
    def available(self) -> int:
        """Bytes behind the cursor."""
        return self._end - self._cursor

    @property
    def pending(self) -> int:
        """Bytes behind the last commit."""
        return self._end - self._start

    def commit(self) -> None:
        """Consume all before the cursor."""
        self._start = self._cursor

    def rollback(self) -> None:
        """Put the cursor back to the last commit."""
        self._cursor = self._start

    def drop_all(self) -> None:
        """Consume everything that is there."""
        self._start = self._cursor = self._end

    def jump(self, position: int) -> None:
        """Drop everything that is there; what is received next stands at ``position``."""
        self.drop_all()
        self._base = position - self._end

    def fail(self, message: str, back: int = 0) -> NoReturn:
        """Raise a :class:`StreamError` for what stands ``back`` bytes before the cursor."""
        raise StreamError(message, self.position - back)

    def _advance(self, count: int) -> int:
        at = self._cursor
        if self._end - at < count:
            raise Incomplete
        self._cursor = at + count
        return at

    def need(self, count: int) -> None:
        """Make sure that ``count`` bytes are there, without reading them."""
        if self._end - self._cursor < count:
            raise Incomplete

    def skip(self, count: int) -> None:
        """Read ``count`` bytes and forget them."""
        self._advance(count)

    def peek(self) -> int:
        """Look at the next byte."""
        self.need(1)
        return self._view[self._cursor]

    def u8(self) -> int:
        """Read one byte."""
        at = self._advance(1)  # first: another view may be there afterwards
        return self._view[at]

    def u16(self) -> int:
        """Read two bytes."""
        at = self._advance(2)
        value: int = _U16.unpack_from(self._view, at)[0]
        return value

    def u32(self) -> int:
        """Read four bytes."""
        at = self._advance(4)
        value: int = _U32.unpack_from(self._view, at)[0]
        return value

    def u64(self) -> int:
        """Read eight bytes."""
        at = self._advance(8)
        value: int = _U64.unpack_from(self._view, at)[0]
        return value

    def take(self, count: int) -> bytes:
        """Read ``count`` bytes; the caller has checked the count against a bound."""
        at = self._advance(count)
        return bytes(self._view[at : at + count])

    def text(self, count: int) -> str:
        """Read ``count`` bytes of UTF-8.

        :raises StreamError: they are not UTF-8.
        """
        raw = self.take(count)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"not UTF-8: {raw[:32]!r}", count)

    def name(self) -> str:
        """Read a name: one byte with its length, then that many bytes."""
        return self.text(self.u8())

    def rest(self) -> memoryview:
        """Look at all that is there behind the cursor."""
        return self._view[self._cursor : self._end]

    def words(self, count: int, stride: int) -> npt.NDArray[np.uint64]:
        """Look at ``count`` 64-bit words that stand ``stride`` bytes apart, from the cursor on."""
        self.need(count * stride)
        raw = np.ndarray((count,), ">u8", self._array, self._cursor, (stride,))
        return raw.astype(np.uint64)

    def rows(self, count: int, stride: int, skip: int, width: int) -> npt.NDArray[np.uint8]:
        """Look at ``count`` rows of ``width`` bytes, ``skip`` bytes into records of ``stride``."""
        self.need(count * stride)
        return np.ndarray((count, width), np.uint8, self._array, self._cursor + skip, (stride, 1))


class FileBuffer(StreamBuffer):
    """A file that is read as the cursor gets there, through a window; nothing comes after.

    What is handed out counts up to the next call, as with any buffer.

    :param read: gives so many bytes from an offset in the file on.
    :param size_bytes: of the file.
    """

    def __init__(self, read: Callable[[int, int], npt.NDArray[np.uint8]], size_bytes: int) -> None:
        super().__init__(0)
        self._read = read
        self._size = size_bytes
        self._window = SMALLEST_WINDOW_BYTES

    @property
    def available(self) -> int:
        """Bytes behind the cursor, up to the end of the file."""
        return self._size - self.position

    def need(self, count: int) -> None:
        """Make sure that ``count`` bytes are there: read them, and some more at the same time."""
        if self._end - self._cursor >= count:
            return
        if self.available < count:
            raise Incomplete
        # All from the last commit on: the parser may go back to it.
        kept = self._cursor - self._start
        first = self.consumed
        self._window = min(2 * self._window, LARGEST_WINDOW_BYTES)
        self._array = self._read(first, min(kept + count + self._window, self._size - first))
        self._view = self._array.data
        self._base, self._start, self._cursor, self._end = first, 0, kept, len(self._array)

    def rest(self) -> memoryview:
        """Look at some of what is behind the cursor: as much as has been needed, or more."""
        self.need(min(SMALLEST_WINDOW_BYTES, self.available))
        return super().rest()

    def tail(self, most: int) -> bytes:
        """Look at the end of the file, no further back than the cursor.

        :param most: bytes.
        """
        count = min(most, self.available)
        return self._read(self._size - count, count).tobytes()

    def seek(self, position: int) -> None:
        """Put the cursor anywhere, and consume what is before it.

        :raises Incomplete: it lies behind the end.
        """
        if position > self._size:
            raise Incomplete
        if self._base <= position <= self._base + self._end:
            self._start = self._cursor = position - self._base
            return
        self.jump(position)
        self._window = SMALLEST_WINDOW_BYTES

    def _advance(self, count: int) -> int:
        self.need(count)
        at = self._cursor
        self._cursor = at + count
        return at


class DecoderInput:
    """The receiving half of a decoder.  One thread only."""

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self._reader = StreamBuffer(capacity_bytes)

    def buffer(self) -> memoryview:
        """Give the free space to receive into; ends the life of :class:`Pages` given out."""
        return self._reader.buffer()

    def received(self, count: int) -> None:
        """Say that ``count`` bytes of what :meth:`buffer` gave have been filled."""
        self._reader.received(count)

    def feed(self, data: BytesLike) -> None:
        """Take a copy of ``data``; to receive into :meth:`buffer` saves the copy."""
        self._reader.feed(data)

    def taken(self, count: int) -> None:
        """Say that ``count`` bytes, from the last consumed one on, have been received elsewhere.

        Those of them that are here are dropped, and no others may be here.
        """
        self._reader.jump(self._reader.consumed + count)

    @property
    def pending(self) -> int:
        """Bytes that have been received and not been consumed."""
        return self._reader.pending

    @property
    def position(self) -> int:
        """Bytes consumed, from the start of the stream or package."""
        return self._reader.consumed

    def _cut(self, element: str) -> StreamCut:
        reader = self._reader
        return StreamCut(f"The stream ends in {element}", reader.consumed + reader.pending)
