"""Pages over channels of multifd, beside a main channel that has everything else."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from postcopy.channel.channel import Channel
from postcopy.channel.rate_limit import RateLimiter
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, PageBlock
from postcopy.memory.runs import Indices
from postcopy.multifd.sender import MultifdSender
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages
from postcopy.source.wire_sink import Between, WireSink, page_offsets, send_records
from postcopy.stream.encoder import RamPart, multifd_flush
from postcopy.stream.numbers import RAM_SECTION_ID, SectionType
from postcopy.stream.ram_encoder import are_zero

_ZEROS: Final = np.zeros((128, TARGET_PAGE_BYTES), np.uint8)


class MultifdSink(WireSink):
    """A :class:`postcopy.source.page_sink.PageSink` for a stream with channels of multifd.

    Pages go over these until :meth:`end_of_precopy`, and over the main channel from then on.
    """

    def __init__(
        self,
        channel: Channel,
        limiter: RateLimiter,
        counters: Counters,
        sender: MultifdSender,
    ) -> None:
        super().__init__(channel, limiter, counters)
        self._sender = sender
        self._zero_pages = sender.zero_pages
        self._parallel = True
        self._seen_bytes = 0

    def begin(self, blocks: Sequence[PageBlock], *, postcopy: bool) -> None:
        """Send the list of blocks, and let all channels meet."""
        self._sender.sync()
        self._send_list(blocks, postcopy=postcopy, multifd_flush=True)

    def send(self, pages: BlockPages, batch: Indices, between: Between | None = None) -> int:
        """Have these pages of a block sent; return how many bytes they are without compression.

        They are read later, but before :meth:`end_of_round` returns.
        """
        if not self._parallel:
            return super().send(pages, batch, between)
        block = pages.block
        has_data = pages.has_data(batch)
        data, zeros = block.target_pages(batch[has_data]), block.target_pages(batch[~has_data])
        if len(data):
            source, rows = block.gather(data)
            if self._zero_pages != "none":
                zero = are_zero(source, rows)
                zeros = np.concatenate((zeros, data[zero]))
                data, rows = data[~zero], rows[~zero]
            self._sender.queue_pages(block.name, page_offsets(data), source, rows)
        self._counters.add_pages(len(data), len(zeros))
        self._send_zero_pages(block.name, zeros)
        self._spent(self._sent_since())
        return len(data) * TARGET_PAGE_BYTES

    def _send_zero_pages(self, block: str, zeros: Indices) -> None:
        """Send zero pages as the user wants it."""
        offsets = page_offsets(zeros)
        if not len(offsets):
            return
        if self._zero_pages == "legacy":
            self._spent(
                send_records(
                    self._channel,
                    self._records.encode_zeros(block, zeros),
                    self._part.head,
                    self._part.tail,
                )
            )
        elif self._zero_pages == "multifd":
            self._sender.queue_zeros(block, offsets)
        else:
            self._sender.queue_pages(block, offsets, _ZEROS, np.arange(len(offsets)) % len(_ZEROS))

    def _sent_since(self) -> int:
        """Bytes that the channels have sent since the last call."""
        before, self._seen_bytes = self._seen_bytes, self._sender.sent_bytes
        return self._seen_bytes - before

    def count(self) -> None:
        """See :meth:`PacedChannel.count`; the channels count, too."""
        super().count()
        self._counters.multifd_bytes = self._sender.sent_bytes
        self._counters.missed_zero_copy = self._sender.missed_zero_copy

    def _all_sent_bytes(self) -> int:
        return super()._all_sent_bytes() + self._sender.sent_bytes

    def end_of_round(self) -> None:
        """Let all channels meet: a page may be sent again from now on."""
        if self._parallel and self._sender.unsynced:
            self._sender.sync()
            self._channel.send(RamPart(RAM_SECTION_ID).around(multifd_flush()))

    def end_of_precopy(self) -> None:
        """Let all channels meet, and use only the main one from now on."""
        self.end_of_round()
        self._parallel = False

    def end_of_ram(self) -> bytes:
        """Return RAM's END section."""
        if not self._parallel:
            return super().end_of_ram()
        self._sender.sync()
        self._spent(self._sent_since())
        return RamPart(RAM_SECTION_ID, SectionType.END).around(multifd_flush())
