"""The file of an image whose pages arrive in any order, and any number of times.

It has the form of a mapped-ram file from the beginning: each page has its place.  Pages that are all zero,
or never come, are holes.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from postcopy.channel.whole_file import WholeFile
from postcopy.errors import StreamError
from postcopy.image.digests import ChunkDigests
from postcopy.memory.runs import Indices, Mask, index_runs
from postcopy.receive.running_digests import RunningDigests
from postcopy.stream.block_list import encode_list_end, encode_list_start
from postcopy.stream.encoded_records import apply_delta
from postcopy.stream.encoder import (
    RamPart,
    description,
    device_section,
    end_of_stream,
    stream_start,
)
from postcopy.stream.mapped_ram import (
    CAPABILITY,
    MappedBlock,
    encode_bitmap,
    encode_entry,
    lay_out,
)
from postcopy.stream.numbers import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, SectionType
from postcopy.stream.ram_encoder import are_zero
from postcopy.stream.records import (
    Configuration,
    DeviceSection,
    PageRows,
    Pages,
    RamSetup,
    XbzrlePage,
    ZeroPages,
)

_MOST_RUN_PAGES: Final = 1024


@dataclass(slots=True)
class _Block:
    """A block, and which of its pages have data.  The mask takes memory only where pages have come."""

    place: MappedBlock
    present: Mask


@dataclass(frozen=True, slots=True)
class WrittenImage:
    """A whole file that has not got its name yet."""

    digests: ChunkDigests
    data_bytes: int


class PageFile:
    """Writes one image.  Any thread may write pages; those of one page are written in some order.

    :param file: empty; its errors (``OSError``: the disk is full) come out of every method.
    :raises OSError: no file can be as large as the source's memory.
    :raises MemoryError: the memory is too large for this host to keep account of.
    """

    def __init__(self, file: WholeFile, configuration: Configuration, setup: RamSetup) -> None:
        self._file = file
        self._section_id = setup.section_id
        sizes = [(block.name, block.size_bytes) for block in setup.blocks]
        start = stream_start(replace(configuration, capabilities=(CAPABILITY,)))
        self._head = start + encode_list_start(setup.section_id, sum(size for _, size in sizes))
        places, self._end = lay_out(sizes, len(self._head))
        _make_room(file, self._end)
        self._blocks = {
            place.name: _Block(place, np.zeros(place.page_count, np.bool_)) for place in places
        }
        # Held while bytes are written and noted, so that a digest is never that of earlier bytes.
        self._lock = threading.Lock()
        self._digests = RunningDigests(file.fd, self._end, self._lock)
        self._sealed = False  # under the lock
        self.data_pages = self.zero_pages = self.changed_pages = 0
        """How many have come so far, repeated ones too."""

    def write(self, pages: Pages) -> None:
        """Write pages of a block."""
        block = self._blocks[pages.block]
        numbers = (pages.offsets >> np.uint64(TARGET_PAGE_BITS)).astype(np.int64)
        rows, neighbours = pages.data, pages.neighbours
        if not neighbours and len(numbers) > 1 and (np.diff(numbers) <= 0).any():
            order = np.argsort(numbers, kind="stable")
            order = order[np.append(np.diff(numbers[order]) != 0, True)]  # the last copy of each
            numbers, rows = numbers[order], rows[order]
        zero = are_zero(rows, np.arange(len(rows)))
        if zero.any():
            self._clear(block, numbers[zero])
            numbers, rows, neighbours = numbers[~zero], rows[~zero], False
        found = ((0, len(numbers)),) if neighbours else index_runs(numbers).tolist()
        for start, end in found:
            self._write_run(block, int(numbers[start]), rows[start:end])

    def clear(self, zeros: ZeroPages) -> None:
        """Make pages of a block zero."""
        numbers = (zeros.offsets >> np.uint64(TARGET_PAGE_BITS)).astype(np.int64)
        self._clear(self._blocks[zeros.block], numbers)

    def change(self, delta: XbzrlePage) -> None:
        """Change a page by what has become different in it.

        :raises StreamError: it does not fit a page.
        """
        block, number = self._blocks[delta.block], delta.offset >> TARGET_PAGE_BITS
        page = np.zeros((1, TARGET_PAGE_BYTES), np.uint8)
        if block.present[number]:
            os.preadv(self._file.fd, [page.data], block.place.pages_offset + delta.offset)
        apply_delta(delta, page[0])
        with self._lock:
            self.changed_pages += 1
        if page.any():
            self._write_run(block, number, page)
        else:
            self._clear(block, np.array([number]))

    def finish(self, devices: Sequence[DeviceSection], text: str | None) -> WrittenImage:
        """Write all besides the pages: none is written any more.

        :param text: the description of the devices.
        """
        with self._lock:
            self._sealed = True
        self._write(0, self._head)
        data = 0
        for block in self._blocks.values():
            place = block.place
            entry = encode_entry(place)
            self._write(place.bitmap_offset - len(entry), entry + encode_bitmap(block.present))
            data += int(block.present.sum())
        last = self._tail(devices, text)
        self._write(self._end, last)
        digests = self._digests.finish(self._end + len(last))
        return WrittenImage(digests, data * TARGET_PAGE_BYTES)

    def _tail(self, devices: Sequence[DeviceSection], text: str | None) -> bytes:
        end = RamPart(self._section_id, SectionType.END).around()
        parts = [encode_list_end(self._section_id), end, *map(device_section, devices)]
        parts.append(end_of_stream())
        return b"".join(parts) + (b"" if text is None else description(text))

    def close(self) -> None:
        """End the thread of the digests.  Any number of times."""
        self._digests.close()

    def _write_run(self, block: _Block, first: int, rows: PageRows) -> None:
        rows = np.ascontiguousarray(rows)
        start = block.place.pages_offset + first * TARGET_PAGE_BYTES
        whole = self._digests.of_whole_chunks(start, rows.reshape(-1))
        with self._lock:
            self._check_open()
            self.data_pages += len(rows)
            self._file.write_at(start, rows.data)
            self._digests.note(start, rows.reshape(-1), whole)
            block.present[first : first + len(rows)] = True

    def _clear(self, block: _Block, numbers: Indices) -> None:
        """Only what has been written before must be overwritten."""
        with self._lock:
            self.zero_pages += len(numbers)
        stale = np.unique(numbers[block.present[numbers]])
        for start, end in index_runs(stale).tolist():
            for first in range(start, end, _MOST_RUN_PAGES):
                here = stale[first : min(end, first + _MOST_RUN_PAGES)]
                at = block.place.pages_offset + int(here[0]) * TARGET_PAGE_BYTES
                with self._lock:
                    self._check_open()
                    self._file.write_at(at, bytes(len(here) * TARGET_PAGE_BYTES))
                    self._digests.touch(at, len(here) * TARGET_PAGE_BYTES)
                    block.present[here] = False

    def _check_open(self) -> None:
        if self._sealed:
            raise StreamError("pages behind the end of the memory")

    def _write(self, offset: int, data: bytes) -> None:
        with self._lock:
            self._file.write_at(offset, data)
            self._digests.touch(offset, len(data))


def _make_room(file: WholeFile, size: int) -> None:
    """Let the file have its length: what is read of it never ends early."""
    try:
        os.ftruncate(file.fd, size)
    except OSError as failure:
        raise OSError(failure.errno, failure.strerror, str(file.path)) from failure
