"""Pages as RAM records: what of them is zero, and the bytes of the others."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from postcopy.channel.channel import Channel
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, RamBlock
from postcopy.memory.runs import Indices
from postcopy.source.dirty_pages import BlockPages
from postcopy.stream.iovecs import Iovecs, Part, joined
from postcopy.stream.ram_encoder import PageEncoder
from postcopy.stream.records import Offsets, PageRows

BATCH_PAGES = 4096
"""The most target pages with data that go out in one go.  Between two of those the processor's cache
has forgotten all of Python, which costs as much as to send a hundred pages."""


@dataclass(frozen=True, slots=True)
class EncodedPages:
    """Records of one go; they hold until the next."""

    parts: list[Part]
    normal_pages: int
    zero_pages: int

    def send(self, channel: Channel, head: bytes = b"", tail: bytes = b"") -> int:
        """Send them, and what stands around them; return the bytes that it took.

        :raises ChannelBroken: as :meth:`postcopy.channel.channel.Channel.send`.
        """
        parts = [part for part in (head, *self.parts, tail) if len(part)]
        buffers = [part for part in parts if not isinstance(part, Iovecs)]
        if len(buffers) == len(parts):
            channel.send_many(buffers)
        else:
            channel.send_gathered(joined(parts))
        return sum(map(len, parts))


class PageRecords:
    """Writes the records of one channel, which remembers the block named last.  One thread at a time."""

    def __init__(self) -> None:
        self._encoder = PageEncoder(BATCH_PAGES)

    def encode(self, pages: BlockPages, batch: Indices) -> Iterator[EncodedPages]:
        """Write these pages of a block; send what is given before asking for more.

        :param batch: pages of the block's own size.
        """
        block = pages.block
        if block.target_pages_per_page == 1 and len(batch) == 1:
            yield self._page(pages, int(batch[0]))
            return
        has_data = pages.has_data(batch)
        data = block.target_pages(batch[has_data])
        holes = block.target_pages(batch[~has_data])
        while len(data) > BATCH_PAGES:
            yield self._pages(block, data[:BATCH_PAGES], holes[:0])
            data = data[BATCH_PAGES:]
        yield self._pages(block, data, holes)

    def encode_copies(
        self, block: str, target: Indices, contents: PageRows
    ) -> Iterator[EncodedPages]:
        """Write pages of the wire whose bytes were copied aside; send each before asking for more.

        :param contents: those pages and no others, in the order of ``target``.
        """
        for first in range(0, len(target), BATCH_PAGES):
            part = slice(first, first + BATCH_PAGES)
            offsets = _offsets(target[part])
            data, zero = self._encoder.nonzero_copies(block, offsets, contents[part])
            zeros = offsets[zero]
            yield self._with_zeros(block, data, len(offsets) - len(zeros), zeros)

    def encode_zeros(self, block: str, target: Indices) -> EncodedPages:
        """Write pages of the wire that are known to be zero."""
        return EncodedPages([self._encoder.zeros(block, _offsets(target))], 0, len(target))

    def _page(self, pages: BlockPages, page: int) -> EncodedPages:
        block = pages.block
        if pages.known_data[page] or pages.has_data(np.array([page])).all():
            record = self._encoder.nonzero_page(block.name, page, block.pages)
            if record is not None:
                return EncodedPages([*record], 1, 0)
        offset = np.array([page * TARGET_PAGE_BYTES], np.uint64)
        return EncodedPages([self._encoder.zeros(block.name, offset)], 0, 1)

    def _pages(self, block: RamBlock, data: Indices, holes: Indices) -> EncodedPages:
        """Write pages of the wire.

        :param data: those with memory behind them. :param holes: the others.
        """
        if not len(data):
            return self.encode_zeros(block.name, holes)
        offsets = _offsets(data)
        if block.target_pages_per_page > 1:
            # The pieces of a huge page must come in their order, whatever they hold.
            records = self._encoder.pages(block.name, offsets, block.pages)
            return self._with_zeros(block.name, records, len(data), _offsets(holes))
        records, zero = self._encoder.nonzero_pages(block.name, offsets, block.pages)
        found = offsets[zero]
        zeros = np.concatenate((found, _offsets(holes)))
        return self._with_zeros(block.name, records, len(data) - len(found), zeros)

    def _with_zeros(
        self, block: str, records: Iovecs, normal_pages: int, zeros: Offsets
    ) -> EncodedPages:
        """Put the zero pages behind the others."""
        parts: list[Part] = [records]
        if len(zeros):
            parts.append(self._encoder.zeros(block, zeros))
        return EncodedPages(parts, normal_pages, len(zeros))


def _offsets(target: Indices) -> Offsets:
    return target.astype(np.uint64) * np.uint64(TARGET_PAGE_BYTES)
