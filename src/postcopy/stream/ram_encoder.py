"""RAM records of pages and zero pages.

Pages are not copied: a page's record is its header here and its bytes there, and the kernel gathers
them.  The headers stand in an array of words; in the table of pieces each has its place for good, so
that only the addresses of the pages are written anew::

      table      word 0 │ page 0 │ word 1 │ page 1 │ ...

The first record of another block bears its name: it has a word of its own, with the name behind it.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from postcopy.stream.configuration import encode_name
from postcopy.stream.numbers import (
    HEADER_BYTES,
    PAGE_RECORD_BYTES,
    TARGET_PAGE_BITS,
    TARGET_PAGE_BYTES,
    ZERO_RECORD_BYTES,
    RamFlag,
)
from postcopy.stream.records import Offsets, PageRows

IovecTable: TypeAlias = npt.NDArray[np.uint64]
"""Address and length in bytes of each piece (``struct iovec``, see ``readv(2)``), shape ``(n, 2)``."""


@dataclass(frozen=True, slots=True, eq=False)
class Iovecs:
    """Pieces of memory, as the kernel's gathering calls want them.

    :ivar n_bytes: what they come to.
    :ivar keeps: what the memory belongs to, which is there as long as this is.
    """

    table: IovecTable
    n_bytes: int
    keeps: tuple[object, ...]

    def __len__(self) -> int:
        return self.n_bytes

    def __bytes__(self) -> bytes:
        """Copy them together, as they are now."""
        return b"".join(ctypes.string_at(at, length) for at, length in self.table.tolist())


Part: TypeAlias = bytes | memoryview | Iovecs


def joined(parts: Sequence[Part]) -> IovecTable:
    """One table for all of them; it holds as long as the parts are there."""
    return np.concatenate([_table(part) for part in parts])


def _table(part: Part) -> IovecTable:
    if isinstance(part, Iovecs):
        return part.table
    data = np.frombuffer(part, np.uint8)
    return np.array(((address_of(data), len(data)),), np.uint64)


def address_of(data: npt.NDArray[Any]) -> int:
    """Where an array begins."""
    address: int = data.__array_interface__["data"][0]
    return address


_SAMPLES = (511, 256, 64)
_COPIED_PAGES = 32


def are_zero(rows: PageRows, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Tell which of these pages are all zero; a bit in one of a few words settles it for most.

    :param rows: pages, shape ``(n, 4096)``, each contiguous.
    :param numbers: of the rows to look at.
    """
    words = rows.view(np.uint64)
    zero: npt.NDArray[np.bool_] = words[numbers, 0] == 0
    if not zero.any():
        return zero
    candidates = np.flatnonzero(zero)
    for word in _SAMPLES:
        candidates = candidates[words[numbers[candidates], word] == 0]
    zero[:] = False
    # Few at a time: a copy of many is in fresh memory each time, which the kernel has to clear.
    for start in range(0, len(candidates), _COPIED_PAGES):
        some = candidates[start : start + _COPIED_PAGES]
        zero[some] = np.bitwise_or.reduce(words[numbers[some]], axis=1) == 0
    return zero


_WORD = struct.Struct(">Q")
_PAGE, _CONTINUE = int(RamFlag.PAGE), int(RamFlag.CONTINUE)
_XBZRLE, _XBZRLE_ENCODING = int(RamFlag.XBZRLE), 1
_DELTA = struct.Struct(">BH")


class PageEncoder:
    """Writes the pages of one channel, which remembers the block named last.  One thread only."""

    def __init__(self, max_pages: int = 256) -> None:
        """Make the table.

        :param max_pages: the most that one call may be given, but for zeros.
        """
        self._max_pages = max_pages
        self._block: str | None = None
        ramp: Offsets = np.arange(max_pages, dtype=np.uint64)
        self._words: npt.NDArray[np.uint64] = np.zeros(max_pages, ">u8")
        table = np.empty((max_pages, 2, 2), np.uint64)
        table[:, 0, 0] = ramp * np.uint64(HEADER_BYTES)
        table[:, 0, 0] += np.uint64(address_of(self._words))
        table[:, 0, 1] = HEADER_BYTES
        table[:, 1, 1] = TARGET_PAGE_BYTES
        self._page_addresses = table[:, 1, 0]
        self._table = table.reshape(-1, 2)
        self._first_word = self._table[0].copy()
        self._ramp = ramp << np.uint64(TARGET_PAGE_BITS)

    def forget(self) -> None:
        """Name the next block, whatever it is: another encoder has written to the channel."""
        self._block = None

    def pages(
        self, block: str, offsets: Offsets, source: PageRows, places: Offsets | None = None
    ) -> Iovecs:
        """Write pages of a block, in the order of ``offsets``, whatever they hold.

        :param offsets: byte offsets in the block, multiples of 4096.
        :param source: the whole block, shape ``(m, 4096)``, contiguous.
        :param places: byte offsets of the pages in ``source``, if that is not the whole block.
        :return: the records; valid until the next call.
        :raises ValueError: more pages than ``max_pages``, or none.
        :raises IndexError: an offset lies outside of the block.
        """
        places = offsets if places is None else places
        self._check(places, source)
        return self._records(block, offsets, places, source)

    def nonzero_pages(
        self, block: str, offsets: Offsets, source: PageRows, places: Offsets | None = None
    ) -> tuple[Iovecs, npt.NDArray[np.bool_]]:
        """As :meth:`pages`, without those that are all zero; and tell which are.

        :return: the records (perhaps none), valid until the next call; and for each of ``offsets``
            whether it is a zero page, which :meth:`zeros` is to write.
        """
        places = offsets if places is None else places
        self._check(places, source)
        return self._nonzero(block, offsets, places, source)

    def nonzero_copies(
        self, block: str, offsets: Offsets, contents: PageRows
    ) -> tuple[Iovecs, npt.NDArray[np.bool_]]:
        """As :meth:`nonzero_pages`, of pages that have been copied out of the block before.

        :param contents: those pages and no others, in the order of ``offsets``; contiguous.
        """
        return self.nonzero_pages(block, offsets, contents, self._ramp[: len(offsets)])

    def nonzero_page(
        self, block: str, page: int, contents: PageRows
    ) -> list[bytes | memoryview] | None:
        """As :meth:`nonzero_pages`, of one page that a vCPU waits for: the shortest way.

        :param contents: the page, shape ``(4096,)``, contiguous.
        :return: the record, in pieces, or ``None`` if the page is zero.
        """
        data = contents.data
        if not (any(data[:8]) or contents.any()):
            return None
        word = page << TARGET_PAGE_BITS | _PAGE
        if block == self._block:
            return [_WORD.pack(word | _CONTINUE), data]
        self._block = block
        return [_WORD.pack(word), encode_name(block), data]

    def delta(self, block: str, offset: int, delta: bytes) -> bytes:
        """Write what has changed in a page: see :func:`postcopy.stream.encoded_records.encode_delta`."""
        head = _DELTA.pack(_XBZRLE_ENCODING, len(delta))
        if block == self._block:
            return _WORD.pack(offset | _XBZRLE | _CONTINUE) + head + delta
        self._block = block
        return _WORD.pack(offset | _XBZRLE) + encode_name(block) + head + delta

    def zeros(self, block: str, offsets: Offsets) -> bytes:
        """Write zero pages of a block, in the order of ``offsets``; any number of them.

        :raises ValueError: none.
        """
        if not len(offsets):
            raise ValueError("no zero pages to write")
        records = np.zeros((len(offsets), ZERO_RECORD_BYTES), np.uint8)
        words = np.ndarray((len(offsets),), ">u8", records, 0, (ZERO_RECORD_BYTES,))
        words[:] = offsets | np.uint64(RamFlag.ZERO | RamFlag.CONTINUE)
        if block == self._block:
            return records.tobytes()
        self._block = block
        lead = struct.pack(">Q", int(offsets[0]) | RamFlag.ZERO) + encode_name(block) + b"\0"
        return lead + records[1:].tobytes()

    def _check(self, places: Offsets, source: PageRows) -> None:
        """Only what lies in ``source`` may be read: the kernel is given addresses."""
        count = len(places)
        if not 0 < count <= self._max_pages:
            raise ValueError(f"{count} pages; 1 to {self._max_pages} fit in one call")
        last = int(places.max()) >> TARGET_PAGE_BITS
        if last >= len(source):
            raise IndexError(f"page {last} of a block of {len(source)} pages")
        if not source.flags.c_contiguous:
            raise ValueError("the pages of a block must lie one behind the other")

    def _nonzero(
        self, block: str, offsets: Offsets, places: Offsets, source: PageRows
    ) -> tuple[Iovecs, npt.NDArray[np.bool_]]:
        zero = are_zero(source, places >> np.uint64(TARGET_PAGE_BITS))
        if zero.any():
            offsets, places = offsets[~zero], places[~zero]
        return self._records(block, offsets, places, source), zero

    def _records(self, block: str, offsets: Offsets, places: Offsets, source: PageRows) -> Iovecs:
        """Fill the table.

        :param places: where each page begins in ``source``, in bytes.
        """
        count = len(offsets)
        if not count:
            return Iovecs(self._table[:0], 0, ())
        self._words[:count] = offsets | np.uint64(_PAGE | _CONTINUE)
        self._page_addresses[:count] = places + np.uint64(address_of(source))
        n_bytes = count * PAGE_RECORD_BYTES
        table = self._table[: 2 * count]
        if block == self._block:
            table[0] = self._first_word
            return Iovecs(table, n_bytes, (self._words, source))
        name = encode_name(block)
        first = np.frombuffer(_WORD.pack(int(offsets[0]) | _PAGE) + name, np.uint8)
        table[0] = address_of(first), len(first)
        self._block = block
        return Iovecs(table, n_bytes + len(name), (self._words, source, first))
