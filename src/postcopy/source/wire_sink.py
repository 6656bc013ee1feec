"""Pages as RAM records on a channel: what of them is zero, and the bytes of the others."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from postcopy.channel.channel import Channel
from postcopy.channel.rate_limit import Interrupt, RateLimiter
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, PageBlock
from postcopy.memory.runs import Indices, Mask
from postcopy.source.counters import Counters, Rate
from postcopy.source.dirty_pages import BlockPages
from postcopy.stream.encoder import RamPart, ram_setup
from postcopy.stream.numbers import RAM_SECTION_ID, SectionType
from postcopy.stream.ram_encoder import Iovecs, PageEncoder, Part, joined
from postcopy.stream.records import BlockEntry, Offsets, PageRows, RamSetup

BATCH_PAGES = 4096
"""The most target pages with data in one call.  Between two calls the processor's cache loses all of
Python, which costs as much as to send a hundred pages."""

PIECE_PAGES = 64
"""A huge page goes out in pieces of so many target pages where something more urgent may come between."""

Between: TypeAlias = Callable[[], object]


@dataclass(frozen=True, slots=True)
class EncodedPages:
    """Records for one call; valid until the next are encoded."""

    parts: list[Part]
    normal_pages: int
    zero_pages: int


def send_records(
    channel: Channel, encoded: EncodedPages, head: bytes = b"", tail: bytes = b""
) -> int:
    """Send records, and what stands around them; return how many bytes that took.

    :raises ChannelBroken: as :meth:`postcopy.channel.channel.Channel.send`.
    """
    parts = [part for part in (head, *encoded.parts, tail) if len(part)]
    buffers = [part for part in parts if not isinstance(part, Iovecs)]
    if len(buffers) == len(parts):
        channel.send_many(buffers)
    else:
        channel.send_gathered(joined(parts))
    return sum(map(len, parts))


class PacedChannel:
    """What all sinks share: what a channel has sent is counted, and kept to the bandwidth limit.

    One thread at a time.

    :param limiter: shared with all other senders under the same limit.
    """

    def __init__(self, channel: Channel, limiter: RateLimiter, counters: Counters) -> None:
        self._channel = channel
        self._limiter = limiter
        self._counters = counters
        self._unpaced_bytes = 0
        self.sent_bytes = 0
        self._counted_bytes = channel.sent_bytes
        self.rate = Rate()
        self.phase = "precopy_bytes"

    @property
    def limit(self) -> int:
        """The bandwidth limit now, in bytes a second; 0 = none."""
        return self._limiter.bytes_per_second

    def send_command(self, command: bytes) -> None:
        """Send a command behind the pages."""
        self._channel.send(command)

    def pace(self, interrupt: Interrupt) -> None:
        """Wait as long as the bandwidth limit requires, unless interrupted."""
        spent, self._unpaced_bytes = self._unpaced_bytes, 0
        self._limiter.wait(spent, interrupt)
        self.count()

    def count(self) -> None:
        """Bring the counters up to what the channel has sent."""
        sent = self._all_sent_bytes() - self._counted_bytes
        self._counted_bytes += sent
        self.rate.add(sent)
        setattr(self._counters, self.phase, getattr(self._counters, self.phase) + sent)

    def _all_sent_bytes(self) -> int:
        return self._channel.sent_bytes

    def abandon(self) -> None:
        """Touch no page any more; any number of times."""

    def end_of_round(self) -> None:
        """All pages have been sent once: from here on one may be sent again."""

    def end_of_precopy(self) -> None:
        """The guest is about to run at the destination, which requests pages from now on."""

    def _spent(self, sent_bytes: int) -> int:
        """Count bytes of pages; return them."""
        self._unpaced_bytes += sent_bytes
        self.sent_bytes += sent_bytes
        return sent_bytes


class PageRecords:
    """Encodes the records of one channel, which name a block when it changes; one thread at a time."""

    def __init__(self) -> None:
        self._encoder = PageEncoder(BATCH_PAGES)

    def forget(self) -> None:
        """Name the next block, whatever it is: something else has written to the channel."""
        self._encoder.forget()

    def encode(
        self, pages: BlockPages, batch: Indices, most: int | None = None
    ) -> Iterator[EncodedPages]:
        """Encode these pages of a block; send each result before asking for the next.

        :param batch: pages of the block's own size.
        :param most: target pages with data in one result; None: :data:`BATCH_PAGES`.
        """
        block = pages.block
        if block.target_pages_per_page == 1 and len(batch) == 1:
            yield self._page(pages, int(batch[0]))
            return
        has_data = pages.has_data(batch)
        if block.target_pages_per_page > 1:
            has_data = _without_zeros(block, batch, has_data)
        data = block.target_pages(batch[has_data])
        holes = block.target_pages(batch[~has_data])
        most = most or BATCH_PAGES
        while len(data) > most:
            yield self._pages(block, data[:most], holes[:0])
            data = data[most:]
        yield self._pages(block, data, holes)

    def encode_copies(
        self, block: str, target: Indices, contents: PageRows
    ) -> Iterator[EncodedPages]:
        """Encode copies of pages of the wire (4 KiB); send each result before asking for the next.

        :param contents: those pages and no others, in the order of ``target``.
        """
        for first in range(0, len(target), BATCH_PAGES):
            part = slice(first, first + BATCH_PAGES)
            offsets = page_offsets(target[part])
            data, zero = self._encoder.nonzero_copies(block, offsets, contents[part])
            zeros = offsets[zero]
            yield self._with_zeros(block, data, len(offsets) - len(zeros), zeros)

    def encode_zeros(self, block: str, target: Indices) -> EncodedPages:
        """Encode pages of the wire that are known to be zero."""
        return EncodedPages([self._encoder.zeros(block, page_offsets(target))], 0, len(target))

    def _page(self, pages: BlockPages, page: int) -> EncodedPages:
        block = pages.block
        if pages.known_data[page] or pages.has_data(np.array([page])).all():
            record = self._encoder.nonzero_page(block.name, page, block.page(page))
            if record is not None:
                return EncodedPages([*record], 1, 0)
        offset = np.array([page * TARGET_PAGE_BYTES], np.uint64)
        return EncodedPages([self._encoder.zeros(block.name, offset)], 0, 1)

    def _pages(self, block: PageBlock, data: Indices, holes: Indices) -> EncodedPages:
        """Encode pages of the wire.

        :param data: those with memory behind them. :param holes: the others.
        """
        if not len(data):
            return self.encode_zeros(block.name, holes)
        offsets = page_offsets(data)
        source, rows = block.gather(data)
        places = offsets if rows is data else page_offsets(rows)
        if block.target_pages_per_page > 1:
            # The pieces of a huge page must go out in their order, whatever they hold.
            records = self._encoder.pages(block.name, offsets, source, places)
            return self._with_zeros(block.name, records, len(data), page_offsets(holes))
        records, zero = self._encoder.nonzero_pages(block.name, offsets, source, places)
        found = offsets[zero]
        zeros = np.concatenate((found, page_offsets(holes)))
        return self._with_zeros(block.name, records, len(data) - len(found), zeros)

    def _with_zeros(
        self, block: str, records: Iovecs, normal_pages: int, zeros: Offsets
    ) -> EncodedPages:
        """Put the zero pages behind the others."""
        parts: list[Part] = [records]
        if len(zeros):
            parts.append(self._encoder.zeros(block, zeros))
        return EncodedPages(parts, normal_pages, len(zeros))


class WireSink(PacedChannel):
    """A :class:`postcopy.source.page_sink.PageSink` for a stream: pages in PART sections of RAM."""

    def __init__(self, channel: Channel, limiter: RateLimiter, counters: Counters) -> None:
        super().__init__(channel, limiter, counters)
        self._records = PageRecords()
        self._part = RamPart(RAM_SECTION_ID)

    def begin(self, blocks: Sequence[PageBlock], *, postcopy: bool) -> None:
        """Send the list of blocks.

        :param postcopy: it has been advised, so blocks of huge pages say their page size.
        """
        self._send_list(blocks, postcopy=postcopy)

    def _send_list(
        self, blocks: Sequence[PageBlock], *, postcopy: bool, multifd_flush: bool = False
    ) -> None:
        entries = tuple(_entry(block, postcopy=postcopy) for block in blocks)
        setup = RamSetup(RAM_SECTION_ID, entries, multifd_flush)
        self._channel.send(ram_setup(setup, postcopy=postcopy))

    def send(self, pages: BlockPages, batch: Indices, between: Between | None = None) -> int:
        """Send these pages of a block; return how many bytes that took.

        :param batch: pages of the block's own size.
        :param between: called between two pieces of huge pages.  These stay in one section: a QEMU takes
            the pieces of a page with nothing else between them on this channel.
        """
        if between is None or pages.block.target_pages_per_page == 1:
            return self._send(self._records.encode(pages, batch))
        sent_bytes, head = 0, self._part.head
        for encoded in self._records.encode(pages, batch, PIECE_PAGES):
            if sent_bytes:
                between()
            sent_bytes += send_records(self._channel, encoded, head)
            self._counters.add_pages(encoded.normal_pages, encoded.zero_pages)
            head = b""
        self._channel.send(self._part.tail)
        return self._spent(sent_bytes + len(self._part.tail))

    def send_copies(self, block: str, target: Indices, contents: PageRows) -> int:
        """Send pages whose bytes were copied before; return how many bytes that took.

        :param target: pages of the wire (4 KiB), whatever the block's own are.
        :param contents: those pages and no others, in the order of ``target``.
        """
        return self._send(self._records.encode_copies(block, target, contents))

    def send_zeros(self, block: str, target: Indices) -> int:
        """Send pages of the wire that are known to be zero; return how many bytes that took."""
        return self._send((self._records.encode_zeros(block, target),))

    def _send(self, encodings: Iterable[EncodedPages]) -> int:
        sent_bytes, part = 0, self._part
        for encoded in encodings:
            sent_bytes += send_records(self._channel, encoded, part.head, part.tail)
            self._counters.add_pages(encoded.normal_pages, encoded.zero_pages)
        return self._spent(sent_bytes)

    def end_of_ram(self) -> bytes:
        """Return RAM's END section."""
        return RamPart(RAM_SECTION_ID, SectionType.END).around()


def _entry(block: PageBlock, *, postcopy: bool) -> BlockEntry:
    huge = block.page_size_bytes if block.target_pages_per_page > 1 and postcopy else None
    return BlockEntry(block.name, block.size_bytes, huge)


def _without_zeros(block: PageBlock, batch: Indices, has_data: Mask) -> Mask:
    """Which of these huge pages hold anything: one that is all zero goes out as zeros.

    The kernel does not tell where a hugetlb file has holes.
    """
    has_data = has_data.copy()
    for at in np.flatnonzero(has_data).tolist():
        has_data[at] = not block.is_zero(int(batch[at]))
    return has_data


def page_offsets(target: Indices) -> Offsets:
    """Byte offsets in a block of its pages of the wire."""
    return target.astype(np.uint64) * np.uint64(TARGET_PAGE_BYTES)
