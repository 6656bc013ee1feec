"""Pages as packets of multifd: the counterpart of :mod:`postcopy.stream.multifd`, without a socket.

Plain pages are not copied: a packet is its header here and its pages where they lie, and the kernel gathers
them.  Compressed ones are copied first: a page that changes while it is compressed would spoil the stream.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from postcopy.stream.multifd import INITIAL_BYTES
from postcopy.stream.multifd_header import HEADER, MAGIC, PACKET_BYTES, PACKET_PAGES, VERSION
from postcopy.stream.numbers import TARGET_PAGE_BYTES
from postcopy.stream.ram_encoder import IovecTable, address_of
from postcopy.stream.records import Offsets, PageRows

Headers = npt.NDArray[np.void]
"""The headers of some packets, as they stand on the wire."""

_SYNC: Final = 1
_NAME_BYTES: Final = HEADER["block"].itemsize
_FLAGS: Final[Mapping[str, int]] = {"none": 0 << 1, "zlib": 1 << 1, "zstd": 2 << 1}


class Compressor(Protocol):
    """Compresses the pages of one channel, packet by packet; one stream over all of them."""

    def __call__(self, pages: memoryview, /) -> bytes:
        """Compress the pages of a packet; the interpreter lock is free meanwhile."""


class _Zlib:
    def __init__(self, level: int) -> None:
        self._stream = zlib.compressobj(level)

    def __call__(self, pages: memoryview, /) -> bytes:
        return self._stream.compress(pages) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class _Zstd:
    def __init__(self, level: int) -> None:
        import zstandard  # few streams are compressed

        self._stream = zstandard.ZstdCompressor(level).compressobj()
        self._flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK

    def __call__(self, pages: memoryview, /) -> bytes:
        return self._stream.compress(pages) + self._stream.flush(self._flush)


COMPRESSORS: Final[Mapping[str, Callable[[int], Compressor]]] = {"zlib": _Zlib, "zstd": _Zstd}
"""By the value of ``multifd-compression``; each is made for a level."""


def encode_initial(channel: int, uuid: bytes = bytes(16)) -> bytes:
    """Write what a channel begins with.

    :param uuid: of the machine, 16 bytes; all zero if it has none.
    """
    return struct.pack(">II16sB", MAGIC, VERSION, uuid, channel).ljust(INITIAL_BYTES, b"\0")


def encode_sync(number: int) -> bytes:
    """Write a packet that is this channel's part of a rendezvous."""
    header = _headers(1, _SYNC)
    header["slots"] = 0
    header["number"] = number
    return header.tobytes()


def page_headers(block: str, offsets: Offsets, compression: str) -> Headers:
    """Write the headers of packets of pages, each full but the last.

    :param offsets: byte offsets in the block, in the order of the pages.
    :param compression: ``none``: the size of the data is known; else it is to be filled in.
    """
    headers = _filled("normal", block, offsets, compression)
    headers["size"] = headers["normal"] * np.uint32(TARGET_PAGE_BYTES)
    return headers


def zero_headers(block: str, offsets: Offsets, compression: str) -> Headers:
    """Write the headers of packets of zero pages, which have no data."""
    return _filled("zero", block, offsets, compression)


def _filled(kind: str, block: str, offsets: Offsets, compression: str) -> Headers:
    count = -(-len(offsets) // PACKET_PAGES)
    headers = _headers(count, _FLAGS[compression])
    headers["block"] = np.void(block.encode().ljust(_NAME_BYTES, b"\0"))
    places = np.zeros(count * PACKET_PAGES, ">u8")
    places[: len(offsets)] = offsets
    headers["offsets"] = places.reshape(count, PACKET_PAGES)
    headers[kind] = PACKET_PAGES
    headers[kind][-1] = len(offsets) - (count - 1) * PACKET_PAGES
    return headers


def _headers(count: int, flags: int) -> Headers:
    headers: npt.NDArray[Any] = np.zeros(count, HEADER)
    headers["magic"], headers["version"], headers["flags"] = MAGIC, VERSION, flags
    headers["slots"] = PACKET_PAGES
    return headers


def gathered(headers: Headers, source: PageRows, rows: npt.NDArray[np.int64]) -> IovecTable:
    """Say where the bytes of packets of plain pages lie, in their order.

    :param source: rows of 4096 bytes, contiguous.
    :param rows: which of them are the pages; the packets have them in this order.
    :return: holds as long as ``headers`` and ``source`` are there.
    """
    starts, pages = _page_pieces(source, rows)
    packets = starts // PACKET_PAGES
    table = np.empty((len(starts) + len(headers), 2), np.uint64)
    table[np.arange(len(starts)) + packets + 1] = pages
    numbers = np.arange(len(headers))
    heads = np.searchsorted(packets, numbers) + numbers
    table[heads, 0] = numbers * PACKET_BYTES
    table[heads, 0] += np.uint64(address_of(headers))
    table[heads, 1] = PACKET_BYTES
    return table


def page_pieces(source: PageRows, rows: npt.NDArray[np.int64]) -> IovecTable:
    """As :func:`gathered`, of the pages of one packet without its header."""
    return _page_pieces(source, rows)[1]


def _page_pieces(
    source: PageRows, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.intp], IovecTable]:
    """Where neighbouring pages of the same packet lie, and which of ``rows`` each piece begins with."""
    new_run = np.ones(len(rows), np.bool_)
    new_run[1:] = rows[1:] != rows[:-1] + 1
    new_run[::PACKET_PAGES] = True
    starts = np.flatnonzero(new_run)
    table = np.empty((len(starts), 2), np.uint64)
    table[:, 0] = rows[starts] * TARGET_PAGE_BYTES
    table[:, 0] += np.uint64(address_of(source))
    table[:, 1] = np.diff(starts, append=len(rows)) * TARGET_PAGE_BYTES
    return starts, table
