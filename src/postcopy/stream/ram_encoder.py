"""RAM records of pages and zero pages, written run by run into a staging buffer.

In the staging buffer every record has its 4104 bytes, so words and pages of a run are set by one
assignment each.  The first record of another block bears its name; so that the name needs no
gap, the first word and the name are written *before* where that record would begin::

      spare room      record 0           record 1
    ├────────────────┼───────┬──────────┼───────┬──────────┤
           ▲ word, name ────►│ page 0   │ word  │ page 1   │
"""

import itertools
import struct

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

_WORD = struct.Struct(">Q")
_PAGE, _CONTINUE = int(RamFlag.PAGE), int(RamFlag.CONTINUE)
_FIRST = 264  # where record 0 begins if it has no name: behind the longest name, words aligned
_FEW_RUNS = 8  # pages a run from which on copies of slices beat picking page by page


class PageEncoder:
    """Writes the pages of one channel, which remembers the block named last.  One thread only."""

    def __init__(self, max_pages: int = 256) -> None:
        """Make the staging buffer.

        :param max_pages: the most that one call of :meth:`pages` may be given.
        """
        self._max_pages = max_pages
        self._block: str | None = None
        staging = np.zeros(_FIRST + max_pages * PAGE_RECORD_BYTES, np.uint8)
        self._staging = staging.data
        self._words: npt.NDArray[np.uint64] = np.ndarray(
            (max_pages,), ">u8", staging, _FIRST, (PAGE_RECORD_BYTES,)
        )
        self._rows: PageRows = np.ndarray(
            (max_pages, TARGET_PAGE_BYTES),
            np.uint8,
            staging,
            _FIRST + HEADER_BYTES,
            (PAGE_RECORD_BYTES, 1),
        )
        self._ramp = np.arange(max_pages, dtype=np.uint64) << np.uint64(TARGET_PAGE_BITS)
        self._page_words: npt.NDArray[np.uint64] = np.ndarray(
            (max_pages, TARGET_PAGE_BYTES // 8),
            np.uint64,
            staging,
            _FIRST + HEADER_BYTES,
            (PAGE_RECORD_BYTES, 8),
        )

    @property
    def max_pages(self) -> int:
        """The most that one call of :meth:`pages` may be given."""
        return self._max_pages

    def forget(self) -> None:
        """Forget the block named last: on a new connection it must be named afresh."""
        self._block = None

    def pages(self, block: str, offsets: Offsets, source: PageRows) -> memoryview:
        """Write pages of a block, in the order of ``offsets``.

        :param offsets: byte offsets in the block, multiples of 4096.
        :param source: the whole block, shape ``(m, 4096)``.
        :return: the records; valid until the next call.
        :raises ValueError: more pages than :attr:`max_pages`, or none.
        :raises IndexError: an offset lies outside of the block.
        """
        self._stage(offsets, source)
        return self._records(block, offsets)

    def nonzero_pages(
        self, block: str, offsets: Offsets, source: PageRows
    ) -> tuple[memoryview, npt.NDArray[np.bool_]]:
        """Write those pages that are not all zero, and tell which are.

        They are looked at where they have just been copied to, in the processor's cache.

        :return: the records (perhaps none), valid until the next call; and for each of ``offsets``
            whether it is a zero page, which :meth:`zeros` is to write.
        """
        self._stage(offsets, source)
        return self._without_zeros(block, offsets)

    def nonzero_run(
        self, block: str, first: int, count: int, source: PageRows
    ) -> tuple[memoryview, npt.NDArray[np.bool_] | None]:
        """As :meth:`nonzero_pages`, of ``count`` neighbouring pages: the usual case, the shortest way.

        :return: the records, and which pages are zero, or ``None`` if none is.
        """
        self._check(count)
        if first + count > len(source):
            raise IndexError(f"page {first + count - 1} of a block of {len(source)} pages")
        self._rows[:count] = source[first : first + count]
        offsets = self._ramp[:count] + np.uint64(first << TARGET_PAGE_BITS)
        if self._page_words[:count, 0].all():
            return self._records(block, offsets), None
        return self._without_zeros(block, offsets)

    def nonzero_page(
        self, block: str, page: int, source: PageRows
    ) -> list[bytes | memoryview] | None:
        """As :meth:`nonzero_run`, of one page that somebody waits for: it is not even copied.

        :return: the record, in pieces, or ``None`` if the page is zero.
        """
        contents = source[page]
        data = contents.data
        if not (any(data[:8]) or contents.any()):
            return None
        word = page << TARGET_PAGE_BITS | _PAGE
        if block == self._block:
            return [_WORD.pack(word | _CONTINUE), data]
        self._block = block
        return [_WORD.pack(word), encode_name(block), data]

    def nonzero_copies(
        self, block: str, offsets: Offsets, contents: PageRows
    ) -> tuple[memoryview, npt.NDArray[np.bool_]]:
        """As :meth:`nonzero_pages`, of pages that have been copied out of the block before.

        :param contents: those pages and no others, in the order of ``offsets``.
        """
        self._check(len(offsets))
        self._rows[: len(offsets)] = contents
        return self._without_zeros(block, offsets)

    def _without_zeros(
        self, block: str, offsets: Offsets
    ) -> tuple[memoryview, npt.NDArray[np.bool_]]:
        count = len(offsets)
        zero = _all_zero(self._page_words[:count])
        if zero.any():
            offsets = offsets[~zero]
            self._rows[: len(offsets)] = self._rows[:count][~zero]
            if not len(offsets):
                return self._staging[:0], zero
        return self._records(block, offsets), zero

    def _stage(self, offsets: Offsets, source: PageRows) -> None:
        self._check(len(offsets))
        self._copy(offsets >> np.uint64(TARGET_PAGE_BITS), source)

    def _check(self, count: int) -> None:
        if not 0 < count <= self._max_pages:
            raise ValueError(f"{count} pages; 1 to {self._max_pages} fit in one call")

    def _records(self, block: str, offsets: Offsets) -> memoryview:
        """Put the words before the pages that are staged."""
        count = len(offsets)
        self._words[:count] = offsets | np.uint64(RamFlag.PAGE | RamFlag.CONTINUE)
        start = _FIRST
        if block != self._block:
            name = encode_name(block)
            start -= len(name)
            lead = struct.pack(">Q", int(offsets[0]) | RamFlag.PAGE) + name
            self._staging[start : start + len(lead)] = lead
            self._block = block
        return self._staging[start : _FIRST + count * PAGE_RECORD_BYTES]

    def _copy(self, indices: Offsets, source: PageRows) -> None:
        if int(indices.max()) >= len(source):
            raise IndexError(f"page {int(indices.max())} of a block of {len(source)} pages")
        breaks = np.flatnonzero(np.diff(indices.view(np.int64)) != 1) + 1
        count = len(indices)
        if len(breaks) and count < len(breaks) * _FEW_RUNS:
            self._rows[:count] = source[indices]
            return
        edges = [0, *breaks.tolist(), count]
        for begin, end in itertools.pairwise(edges):
            first = int(indices[begin])
            self._rows[begin:end] = source[first : first + end - begin]

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


def _all_zero(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Tell which rows hold nothing but zeros; a bit in the first word settles it for most."""
    zero: npt.NDArray[np.bool_] = words[:, 0] == 0
    if zero.any():
        candidates = np.flatnonzero(zero)
        zero[candidates] = np.bitwise_or.reduce(words[candidates], axis=1) == 0
    return zero
