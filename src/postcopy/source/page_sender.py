"""Puts pages on the wire, section by section, and keeps to the bandwidth limit."""

from collections.abc import Iterable, Sequence

from postcopy.channel.channel import Channel
from postcopy.channel.rate_limit import RateLimiter
from postcopy.memory.ram_block import RamBlock
from postcopy.memory.runs import Indices
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages
from postcopy.source.outflow import Outflow
from postcopy.source.page_records import EncodedPages, PageRecords
from postcopy.stream.encoder import RamPart, ram_setup
from postcopy.stream.numbers import RAM_SECTION_ID, SectionType
from postcopy.stream.records import BlockEntry, PageRows, RamSetup


class PageSender(Outflow):
    """Sends the pages of one channel; one thread at a time.

    :param limiter: shared with whoever else sends under the same limit.
    """

    def __init__(self, channel: Channel, limiter: RateLimiter, counters: Counters) -> None:
        super().__init__(channel, limiter, counters)
        self._records = PageRecords()
        self._part = RamPart(RAM_SECTION_ID)

    def begin(self, blocks: Sequence[RamBlock], *, postcopy: bool) -> None:
        """Say what blocks there are.

        :param postcopy: it has been advised, so blocks of huge pages say their page size.
        """
        entries = tuple(_entry(block, postcopy=postcopy) for block in blocks)
        self._channel.send(ram_setup(RamSetup(RAM_SECTION_ID, entries), postcopy=postcopy))

    def send(self, pages: BlockPages, batch: Indices) -> int:
        """Send these pages of a block, in PART sections; return the bytes that it took.

        :param batch: pages of the block's own size.
        """
        return self._send(self._records.encode(pages, batch))

    def send_copies(self, block: str, target: Indices, contents: PageRows) -> int:
        """Send pages whose bytes were copied aside before; return the bytes that it took.

        :param target: pages of the wire (4 KiB), whatever the block's own are.
        :param contents: those pages and no others, in the order of ``target``.
        """
        return self._send(self._records.encode_copies(block, target, contents))

    def send_zeros(self, block: str, target: Indices) -> int:
        """Say of pages of the wire that they are zero; return the bytes that it took."""
        return self._send((self._records.encode_zeros(block, target),))

    def _send(self, encodings: Iterable[EncodedPages]) -> int:
        sent_bytes = 0
        for encoded in encodings:
            sent_bytes += encoded.send(self._channel, self._part.head, self._part.tail)
            self._counters.add_pages(encoded.normal_pages, encoded.zero_pages)
        return self._spent(sent_bytes)

    def end_of_ram(self) -> bytes:
        """Return RAM's END section."""
        return RamPart(RAM_SECTION_ID, SectionType.END).around()


def _entry(block: RamBlock, *, postcopy: bool) -> BlockEntry:
    huge = block.page_size_bytes if block.target_pages_per_page > 1 and postcopy else None
    return BlockEntry(block.name, block.size_bytes, huge)
