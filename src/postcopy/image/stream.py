"""A plain stream as an image: pages lie in the order in which they were sent.

One pass over the file finds the offset of each page.  Of a page that was sent more than once the last copy
is valid, also if that is a zero page.
"""

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from postcopy.image.base import Image, ImageBlock, PageRows
from postcopy.image.file import ImageFile
from postcopy.image.parser import read_elements, read_plain_blocks, read_start
from postcopy.memory.runs import Indices, Mask, index_runs
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
from postcopy.stream.ram_records import RamRecords
from postcopy.stream.reader import FileBuffer
from postcopy.stream.records import Pages, ZeroPages

_SPARSE_BYTES = 64 << 30
"""RAM for which the file may have no record.  Writers send at least a zero record for each page, except for
memory that the guest has discarded.  So a mask of all pages takes little more memory than the file takes on
the disk."""

_WORD = struct.Struct(">Q")
_PAGE = int(RamFlag.PAGE | RamFlag.CONTINUE)
_ZERO_PAGE = int(RamFlag.ZERO | RamFlag.CONTINUE)
_PLAIN = frozenset({_PAGE, _ZERO_PAGE})
_SHORT_RUN = 16


class _BlockIndex:
    """Offsets of the pages of one block; grows with the records of the file, not with its claims.

    The offset of a page with data is that of its data; that of a zero page is negative.
    """

    def __init__(self) -> None:
        self._pages: list[Indices] = []
        self._places: list[Indices] = []

    def add(self, pages: Indices, places: Indices) -> None:
        self._pages.append(pages)
        self._places.append(places)

    def finish(self) -> tuple[Indices, Indices]:
        """Return the pages with data, ascending, and the file offset of each."""
        if not self._pages:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        pages, places = np.concatenate(self._pages), np.concatenate(self._places)
        order = np.argsort(pages, kind="stable")
        pages, places = pages[order], places[order]
        last = np.append(pages[1:] != pages[:-1], True)
        good = last & (places > 0)
        return pages[good], places[good]


class StreamRam:
    """Reads the memory's sections: see :class:`postcopy.image.parser.RamReader`."""

    def __init__(self) -> None:
        self._records: RamRecords | None = None
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
        self._records = RamRecords(Receiver(layout), Limits())
        self.index = {block.name: _BlockIndex() for block in blocks}
        self._last = {block.name: block.size_bytes - TARGET_PAGE_BYTES for block in blocks}
        return blocks

    def read_body(self, reader: FileBuffer) -> None:
        """See :meth:`postcopy.image.parser.RamReader.read_body`."""
        assert self._records is not None
        reader.commit()  # the reader goes back to the last commit at the start of a run
        while (record := self._records.read(reader)) is not None:
            self._note(record, reader.position)
            if len(record.offsets) < _SHORT_RUN:
                self._read_short_runs(reader, record.block)

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
        """Take in pages of a block, in the order of the file.

        :param places: the offset in the file of each page's data, or of the byte 0 of a zero page, negated.
        """
        self.index[block].add(pages, places)


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
        mask[self._index[block_name][0]] = True
        return mask

    def locate(self, start: int, end: int) -> tuple[str, int] | None:
        """See :meth:`Image.locate`."""
        for name, (pages, places) in self._index.items():
            within = np.flatnonzero((places < end) & (start < places + TARGET_PAGE_BYTES))
            if len(within):
                first = within[places[within].argmin()]
                inside = max(start - int(places[first]), 0)
                return name, int(pages[first]) * TARGET_PAGE_BYTES + inside
        return None

    def _copy(self, block: ImageBlock, first: int, rows: PageRows) -> None:
        pages, places = self._index[block.name]
        begin, end = np.searchsorted(pages, (first, first + len(rows))).tolist()
        pages, places = pages[begin:end] - first, places[begin:end]
        for start, stop in _runs(pages, places).tolist():
            count = stop - start
            where, to = int(places[start]), int(pages[start])
            raw = self._file.read(where, (count - 1) * PAGE_RECORD_BYTES + TARGET_PAGE_BYTES)
            rows[to : to + count] = np.ndarray(
                (count, TARGET_PAGE_BYTES), np.uint8, raw, 0, (PAGE_RECORD_BYTES, 1)
            )

    def close(self) -> None:
        """See :meth:`Image.close`."""
        self._file.close()


def _runs(pages: Indices, places: Indices) -> npt.NDArray[np.int64]:
    """Find the runs of pages that follow one another both in memory and in the file."""
    # Constant while page number and file offset both advance by one record.
    pace = PAGE_RECORD_BYTES + 1
    steps = np.cumsum(np.append(0, (np.diff(pages) != 1) | (np.diff(places) != PAGE_RECORD_BYTES)))
    return index_runs(np.arange(len(pages)) + steps * pace)
