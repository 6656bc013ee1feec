"""The pages of multifd's packets: plain, or compressed by zlib or zstd.

A channel is one compressed stream over all of its packets, flushed at the end of each: so the data of a
packet yield exactly its pages.  A compressor of another mind cannot make the reader take more memory: what
is beyond the pages of the packet is refused before it is kept.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import IO, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from postcopy.errors import StreamError
from postcopy.stream.numbers import TARGET_PAGE_BYTES
from postcopy.stream.reader import StreamBuffer
from postcopy.stream.records import PageRows

PageData: TypeAlias = Callable[[StreamBuffer, int, int], PageRows]
"""``data(reader, size, count)`` reads ``size`` bytes, which are ``count`` pages; valid until the next call.

:raises StreamError: they are not.
"""

_LARGEST_WINDOW_BYTES: Final = 32 << 20
"""Of zstd: what level 20, the highest that QEMU has, asks for."""
_WRITE_BYTES: Final = 640 << 10
"""The output of one call of zstd: the pages of a packet, and one block of zstd."""


def plain_pages(reader: StreamBuffer, size: int, count: int) -> PageRows:
    """Pages as they are: see :data:`PageData`.  They are not copied."""
    rows = reader.rows(count, TARGET_PAGE_BYTES, 0, TARGET_PAGE_BYTES)
    reader.skip(size)
    return rows


class ZlibPages:
    """Pages that zlib has compressed: see :data:`PageData`."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj()

    def __call__(self, reader: StreamBuffer, size: int, count: int) -> PageRows:
        """See :data:`PageData`."""
        reader.need(size)
        want = count * TARGET_PAGE_BYTES
        try:
            data = self._stream.decompress(reader.rest()[:size], want)
            # The mark of the flush is still to be read.  It yields nothing.
            more = self._stream.decompress(self._stream.unconsumed_tail, 1)
        except zlib.error as error:
            raise StreamError(f"multifd: zlib: {error}", reader.position) from error
        if more or self._stream.unconsumed_tail or self._stream.eof:
            reader.fail(f"multifd: zlib: the data are more than {want} bytes of pages")
        if len(data) < want:
            reader.fail(f"multifd: zlib: {len(data)} bytes of pages in place of {want}")
        reader.skip(size)
        return np.frombuffer(data, np.uint8).reshape(count, TARGET_PAGE_BYTES)


class _Room:
    """Where zstd puts the pages of one packet."""

    def __init__(self) -> None:
        self._array: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self.filled = 0

    def begin(self, size: int) -> None:
        if len(self._array) < size:
            self._array = np.empty(size, np.uint8)
        self._want, self.filled = size, 0

    def write(self, data: bytes) -> int:
        end = self.filled + len(data)
        if end > self._want:
            raise OverflowError
        self._array[self.filled : end] = np.frombuffer(data, np.uint8)
        self.filled = end
        return len(data)

    def pages(self) -> PageRows:
        return self._array[: self.filled].reshape(-1, TARGET_PAGE_BYTES)


class ZstdPages:
    """Pages that zstd has compressed: see :data:`PageData`."""

    def __init__(self) -> None:
        import zstandard  # few streams are compressed

        self._error = zstandard.ZstdError
        self._room = _Room()
        self._stream = zstandard.ZstdDecompressor(
            max_window_size=_LARGEST_WINDOW_BYTES
        ).stream_writer(cast("IO[bytes]", self._room), write_size=_WRITE_BYTES, closefd=False)

    def __call__(self, reader: StreamBuffer, size: int, count: int) -> PageRows:
        """See :data:`PageData`."""
        reader.need(size)
        want = count * TARGET_PAGE_BYTES
        self._room.begin(want)
        try:
            self._stream.write(reader.rest()[:size])
        except self._error as error:
            raise StreamError(f"multifd: {error}", reader.position) from error
        except OverflowError:
            reader.fail(f"multifd: zstd: the data are more than {want} bytes of pages")
        if self._room.filled < want:
            reader.fail(f"multifd: zstd: {self._room.filled} bytes of pages in place of {want}")
        reader.skip(size)
        return self._room.pages()


COMPRESSIONS: Final[Mapping[int, Callable[[], PageData] | str]] = {
    0 << 1: lambda: plain_pages,
    1 << 1: ZlibPages,
    2 << 1: ZstdPages,
    4 << 1: "qpl",
    8 << 1: "uadk",
    16 << 1: "qatzip",
}
"""By the flags of a packet; a name: it needs hardware that is not asked for here."""
