"""Puts each page at its own place in a file: QEMU's ``mapped-ram``.

A page that is sent again overwrites its place; one that has become zero loses its bit, and its place
keeps what it was.  The bits are kept here, and go into the file with RAM's end: a file that was never
finished has none.  On the stream itself stand no pages, and so no sections but RAM's first and last.
"""

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np

from postcopy.channel.files import FileChannel
from postcopy.channel.rate_limit import RateLimiter
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, PageBlock
from postcopy.memory.runs import Indices, Mask, index_runs
from postcopy.multifd.threads import FileThreads
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages
from postcopy.source.wire_sink import Between, PacedChannel
from postcopy.stream.block_list import encode_list_end, encode_list_start
from postcopy.stream.encoder import RamPart
from postcopy.stream.mapped_ram import MappedBlock, encode_bitmap, encode_entry, lay_out
from postcopy.stream.numbers import RAM_SECTION_ID, SectionType
from postcopy.stream.ram_encoder import are_zero
from postcopy.stream.records import PageRows

_PIECE_PAGES: Final = 1024
"""Written by a thread before it looks for more: 4 MiB."""


class FileSink(PacedChannel):
    """A :class:`postcopy.source.page_sink.PageSink` for a file; one thread at a time.

    :param threads: write the pages; what they write is in the file at the end of the round.
    """

    def __init__(
        self,
        channel: FileChannel,
        limiter: RateLimiter,
        counters: Counters,
        threads: FileThreads | None = None,
    ) -> None:
        super().__init__(channel, limiter, counters)
        self._file = channel
        self._threads = threads
        self._places: dict[str, MappedBlock] = {}
        self._present: dict[str, Mask] = {}

    def begin(self, blocks: Sequence[PageBlock], *, postcopy: bool) -> None:
        """Lay out the places of all pages, and write the list of blocks around their places."""
        assert not postcopy  # QEMU's rules exclude it
        channel = self._file
        channel.send(encode_list_start(RAM_SECTION_ID, sum(block.size_bytes for block in blocks)))
        sizes = [(block.name, block.size_bytes) for block in blocks]
        places, end = lay_out(sizes, channel.position)
        for place in places:
            channel.send(encode_entry(place))
            self._places[place.name] = place
            self._present[place.name] = np.zeros(place.page_count, np.bool_)
            channel.seek(place.end_offset)
        assert channel.position == end
        channel.send(encode_list_end(RAM_SECTION_ID))

    def send(
        self,
        pages: BlockPages,
        batch: Indices,
        between: Between | None = None,  # noqa: ARG002 - a file has no urgent pages
    ) -> int:
        """Write these pages of a block to their places, run by run, straight from guest memory.

        :param batch: pages of the block's own size, ascending.
        """
        block = pages.block
        target = block.target_pages(batch)
        written = block.target_pages(batch[pages.has_data(batch)])
        pages_of, rows = block.gather(written)
        nonzero = ~are_zero(pages_of, rows)
        written, rows = written[nonzero], rows[nonzero]
        self._mark(block.name, target, written)
        for start, end in index_runs(written).tolist():
            row = int(rows[start])
            self._write(block.name, int(written[start]), pages_of[row : row + end - start])
        return self._count_sent(len(written), len(target) - len(written))

    def send_copies(self, block: str, target: Indices, contents: PageRows) -> int:
        """Write pages whose bytes were copied before.

        :param target: pages of the file, ascending.
        :param contents: those pages and no others, in the order of ``target``.
        """
        rows = np.flatnonzero(~are_zero(contents, np.arange(len(contents))))
        written = target[rows]
        self._mark(block, target, written)
        both = np.flatnonzero((np.diff(written) != 1) | (np.diff(rows) != 1)) + 1
        edges = [0, *both.tolist(), len(written)] if len(written) else []
        for start, end in itertools.pairwise(edges):
            row = int(rows[start])
            self._write(block, int(written[start]), contents[row : row + end - start])
        return self._count_sent(len(written), len(target) - len(written))

    def send_zeros(self, block: str, target: Indices) -> int:
        """Note that these pages of the file are zero."""
        self._present[block][target] = False
        return self._count_sent(0, len(target))

    def _mark(self, block: str, target: Indices, written: Indices) -> None:
        present = self._present[block]
        present[target] = False
        present[written] = True

    def _write(self, block: str, first: int, contents: PageRows) -> None:
        place = self._places[block]
        position = place.pages_offset + first * place.page_bytes
        if self._threads is None:
            self._file.write_at(position, contents.data)
            return
        for start in range(0, len(contents), _PIECE_PAGES):
            self._queue(
                self._threads, position + start * place.page_bytes, contents[start:][:_PIECE_PAGES]
            )

    @staticmethod
    def _queue(threads: FileThreads, position: int, contents: PageRows) -> None:
        threads.do(lambda file: file.write_at(position, contents.data))

    def _all_sent_bytes(self) -> int:
        beside = self._threads.moved_bytes if self._threads is not None else 0
        return super()._all_sent_bytes() + beside

    def count(self) -> None:
        """See :meth:`PacedChannel.count`; what the threads have written counts, too."""
        super().count()
        if self._threads is not None:
            self._counters.multifd_bytes = self._threads.moved_bytes

    def end_of_round(self) -> None:
        """Wait until all is written: a page may be written again from now on."""
        if self._threads is not None:
            self._threads.flush()

    def abandon(self) -> None:
        """See :meth:`PacedChannel.abandon`."""
        if self._threads is not None:
            self._threads.close()

    def _count_sent(self, normal_pages: int, zero_pages: int) -> int:
        sent_bytes = normal_pages * TARGET_PAGE_BYTES
        self._counters.add_pages(normal_pages, zero_pages)
        return self._spent(sent_bytes)

    def end_of_ram(self) -> bytes:
        """Write the bitmaps, and return RAM's END section, which marks the file as complete."""
        self.end_of_round()
        for name, place in self._places.items():
            self._file.write_at(place.bitmap_offset, encode_bitmap(self._present[name]))
        return RamPart(RAM_SECTION_ID, SectionType.END).around()
