"""A plain stream as an image: pages lie in the order in which they were sent.

One pass over the file finds the offset of each page.  Of a page that was sent more than once the last copy
is valid, also if that is a zero page.  What a source with ``xbzrle`` has sent of a page since its last
whole copy are deltas, which are applied in order when the page is read.
"""

import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from postcopy.errors import StreamError
from postcopy.image.base import Image, ImageBlock, PageRows
from postcopy.image.file import ImageFile
from postcopy.image.parser import read_elements, read_plain_blocks, read_start
from postcopy.memory.runs import Indices, Mask, index_runs
from postcopy.stream.encoded_records import EncodedRamRecords, apply_delta
from postcopy.stream.layout import BlockLayout, Limits, Receiver
from postcopy.stream.numbers import (
    FLAGS_MASK,
    HEADER_BYTES,
    PAGE_RECORD_BYTES,
    TARGET_PAGE_BITS,
    TARGET_PAGE_BYTES,
    ZERO_RECORD_BYTES,
    RamFlag,
)
from postcopy.stream.reader import FileBuffer
from postcopy.stream.records import MultifdFlush, Pages, XbzrlePage, ZeroPages

_SPARSE_BYTES = 64 << 30
"""RAM for which the file may have no record.  Writers send at least a zero record for each page, except for
memory that the guest has discarded.  So a mask of all pages takes little more memory than the file takes on
the disk."""

_WORD = struct.Struct(">Q")
_PAGE = int(RamFlag.PAGE | RamFlag.CONTINUE)
_ZERO_PAGE = int(RamFlag.ZERO | RamFlag.CONTINUE)
_PLAIN = frozenset({_PAGE, _ZERO_PAGE})
_SHORT_RUN = 16


_DELTA = 1 << 62
_LENGTH_SHIFT = 48
_POSITION = (1 << _LENGTH_SHIFT) - 1


def _delta(page: XbzrlePage) -> int:
    """Encode where a delta is: an array of numbers holds it, whatever the file claims."""
    return _DELTA | len(page.delta) << _LENGTH_SHIFT | page.position


def kinds_of(places: Indices) -> npt.NDArray[np.int8]:
    """Return what has been found of each page: 0 a zero page, 1 its data, 2 a delta."""
    return (places > 0).astype(np.int8) + (places >= _DELTA).astype(np.int8)


def offset_of(place: int) -> int:
    """Return the offset in the file of what has been found of a page."""
    return place & _POSITION if place >= _DELTA else abs(place)


@dataclass(frozen=True, slots=True)
class _PageIndex:
    """Where the pages of a block are.

    :ivar pages: those whose last copy is whole and has data, ascending; ``places``: the offset of each.
    :ivar chains: for a page that has been changed since, its whole copy, if there is one, and its deltas.
    """

    pages: Indices
    places: Indices
    chains: dict[int, Indices]


class _BlockIndex:
    """Offsets of the pages of one block; grows with the records of the file, not with its claims.

    The offset of a page with data is that of its data; that of a zero page is negative; a delta is a number
    of :func:`_delta`.
    """

    def __init__(self) -> None:
        self._pages: list[Indices] = []
        self._places: list[Indices] = []

    def add(self, pages: Indices, places: Indices) -> None:
        self._pages.append(pages)
        self._places.append(places)

    def finish(self) -> "_PageIndex":
        """Return where the pages are."""
        if not self._pages:
            return _PageIndex(np.empty(0, np.int64), np.empty(0, np.int64), {})
        pages, places = np.concatenate(self._pages), np.concatenate(self._places)
        order = np.argsort(pages, kind="stable")
        pages, places = pages[order], places[order]
        last = np.append(pages[1:] != pages[:-1], True)
        good = last & (places > 0) & (places < _DELTA)
        chains = {}
        changed = np.flatnonzero(last & (places >= _DELTA))
        for begin, end in zip(
            np.searchsorted(pages, pages[changed]).tolist(), (changed + 1).tolist(), strict=True
        ):
            copies = places[begin:end]
            whole = np.flatnonzero(copies < _DELTA)
            chains[int(pages[begin])] = copies[whole[-1] if len(whole) else 0 :]
        return _PageIndex(pages[good], places[good], chains)


class StreamRam:
    """Reads the memory's sections: see :class:`postcopy.image.parser.RamReader`."""

    def __init__(self) -> None:
        self._records: EncodedRamRecords | None = None
        self.index: dict[str, _BlockIndex] = {}
        self._last: dict[str, int] = {}  # the offset of each block's last page

    def read_blocks(
        self, reader: FileBuffer, total_bytes: int, page_sizes: int
    ) -> list[ImageBlock]:
        """See :meth:`postcopy.image.parser.RamReader.read_blocks`."""
        file_bytes = reader.position + reader.available
        if total_bytes > _SPARSE_BYTES + file_bytes * TARGET_PAGE_BYTES:
            reader.fail(f"RAM of {total_bytes:#x} bytes in a file of {file_bytes:#x}", 8)
        blocks = read_plain_blocks(reader, total_bytes, page_sizes)
        layout = {block.name: BlockLayout(block.size_bytes) for block in blocks}
        self._records = EncodedRamRecords(Receiver(layout), Limits())
        self.index = {block.name: _BlockIndex() for block in blocks}
        self._last = {block.name: block.size_bytes - TARGET_PAGE_BYTES for block in blocks}
        return blocks

    def read_body(self, reader: FileBuffer) -> None:
        """See :meth:`postcopy.image.parser.RamReader.read_body`."""
        assert self._records is not None
        reader.commit()  # the reader goes back to the last commit at the start of a run
        deltas = _Deltas(self)
        while (record := self._records.read_any(reader)) is not None:
            if isinstance(record, MultifdFlush):
                reader.fail("multifd: the pages are not in this file", HEADER_BYTES)
            if isinstance(record, XbzrlePage):
                deltas.add(record)
                continue
            deltas.flush()
            self._note(record, reader.position)
            if len(record.offsets) < _SHORT_RUN:
                self._read_short_runs(reader, record.block)
        deltas.flush()

    def _read_short_runs(self, reader: FileBuffer, block: str) -> None:
        """Read records one by one while pages and zero pages alternate.

        A vectorised read pays only for long runs.  Other records are left to :class:`RamRecords`.
        """
        view, last, base = reader.rest(), self._last[block], reader.position
        pages: list[int] = []
        places: list[int] = []
        at = run = kind = 0
        end = len(view) - PAGE_RECORD_BYTES
        while at <= end and run < _SHORT_RUN:
            word = _WORD.unpack_from(view, at)[0]
            flags = word & FLAGS_MASK
            if flags not in _PLAIN or word - flags > last or (flags == _ZERO_PAGE and view[at + 8]):
                break
            run = run + 1 if flags == kind else 0
            kind = flags
            pages.append(word >> TARGET_PAGE_BITS)
            place = base + at + HEADER_BYTES
            places.append(place if flags == _PAGE else -place)
            at += PAGE_RECORD_BYTES if flags == _PAGE else ZERO_RECORD_BYTES
        if pages:
            self.add(block, np.array(pages, np.int64), np.array(places, np.int64))
            reader.skip(at)
            reader.commit()

    def _note(self, record: Pages | ZeroPages, end: int) -> None:
        pages = (record.offsets // np.uint64(TARGET_PAGE_BYTES)).astype(np.int64)
        back = np.arange(len(pages) - 1, -1, -1, dtype=np.int64)
        if isinstance(record, Pages):
            places = end - TARGET_PAGE_BYTES - PAGE_RECORD_BYTES * back
        else:
            places = ZERO_RECORD_BYTES * back - (end - 1)
        self.add(record.block, pages, places)

    def add(self, block: str, pages: Indices, places: Indices) -> None:
        """Take in pages of a block, in the order of the file; see :func:`kinds_of` and :func:`offset_of`.

        :param places: the offset in the file of each page's data, or of the byte 0 of a zero page, negated.
        """
        self.index[block].add(pages, places)


class _Deltas:
    """Deltas that follow one another, on their way into the index."""

    def __init__(self, ram: StreamRam) -> None:
        self._ram = ram
        self._block = ""
        self._pages, self._places = array("q"), array("q")

    def add(self, page: XbzrlePage) -> None:
        if page.block != self._block:
            self.flush()
            self._block = page.block
        self._pages.append(page.offset >> TARGET_PAGE_BITS)
        self._places.append(_delta(page))

    def flush(self) -> None:
        if self._pages:
            pages, places = np.array(self._pages, np.int64), np.array(self._places, np.int64)
            self._ram.add(self._block, pages, places)
            self._pages, self._places = array("q"), array("q")


class StreamImage(Image):
    """A plain stream.

    :raises StreamError: the file is not valid.
    :raises Incomplete: the file is truncated.
    """

    def __init__(self, path: Path, file: ImageFile, reader: FileBuffer) -> None:
        ram = StreamRam()
        super().__init__(path, "stream", read_elements(reader, read_start(reader), ram))
        self._file = file
        self._index = {name: index.finish() for name, index in ram.index.items()}

    def has_data(self, block_name: str) -> Mask:
        """See :meth:`Image.has_data`."""
        mask = np.zeros(self._blocks[block_name].pages, np.bool_)
        index = self._index[block_name]
        mask[index.pages] = True
        mask[list(index.chains)] = True
        return mask

    def locate(self, start: int, end: int) -> tuple[str, int] | None:
        """See :meth:`Image.locate`."""
        for name, index in self._index.items():
            pages, places = index.pages, index.places
            within = np.flatnonzero((places < end) & (start < places + TARGET_PAGE_BYTES))
            if len(within):
                first = within[places[within].argmin()]
                inside = max(start - int(places[first]), 0)
                return name, int(pages[first]) * TARGET_PAGE_BYTES + inside
        return None

    def _copy(self, block: ImageBlock, first: int, rows: PageRows) -> None:
        index = self._index[block.name]
        pages, places = index.pages, index.places
        begin, end = np.searchsorted(pages, (first, first + len(rows))).tolist()
        pages, places = pages[begin:end] - first, places[begin:end]
        for start, stop in _runs(pages, places).tolist():
            count = stop - start
            where, to = int(places[start]), int(pages[start])
            raw = self._file.read(where, (count - 1) * PAGE_RECORD_BYTES + TARGET_PAGE_BYTES)
            rows[to : to + count] = np.ndarray(
                (count, TARGET_PAGE_BYTES), np.uint8, raw, 0, (PAGE_RECORD_BYTES, 1)
            )
        if index.chains:
            for page in range(first, first + len(rows)):
                if page in index.chains:
                    self._apply(block, page, index.chains[page], rows[page - first])

    def _apply(self, block: ImageBlock, page: int, chain: Indices, row: PageRows) -> None:
        """Fill a page of zeros with its whole copy, and change it by its deltas."""
        for place in chain.tolist():
            if place < _DELTA:
                if place > 0:
                    self._file.read_into(place, row)
                continue
            position = offset_of(place)
            length = (place & ~_DELTA) >> _LENGTH_SHIFT
            delta = self._file.read(position, length).tobytes()
            record = XbzrlePage(block.name, page * TARGET_PAGE_BYTES, delta, position)
            try:
                apply_delta(record, row)
            except StreamError as error:
                raise self.fail(error.message, error.offset) from error

    def close(self) -> None:
        """See :meth:`Image.close`."""
        self._file.close()


def _runs(pages: Indices, places: Indices) -> npt.NDArray[np.int64]:
    """Find the runs of pages that follow one another both in memory and in the file."""
    # Constant while page number and file offset both advance by one record.
    pace = PAGE_RECORD_BYTES + 1
    steps = np.cumsum(np.append(0, (np.diff(pages) != 1) | (np.diff(places) != PAGE_RECORD_BYTES)))
    return index_runs(np.arange(len(pages)) + steps * pace)
