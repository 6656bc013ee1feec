"""Puts pages on the wire: finds the zero ones, stages the others, and keeps to the bandwidth limit."""

import threading

import numpy as np

from postcopy.channel.channel import Channel
from postcopy.channel.rate_limit import RateLimiter
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Indices, Mask
from postcopy.source.counters import Counters, Rate
from postcopy.source.dirty_pages import BlockPages
from postcopy.stream.encoder import RamPart
from postcopy.stream.numbers import SectionType
from postcopy.stream.ram_encoder import PageEncoder
from postcopy.stream.records import Offsets

BATCH_PAGES = 256
"""Target pages sent in one go: a mebibyte."""

RAM_SECTION_ID = 2
"""As QEMU's own machines have it; 0 is taken for "never seen" by its reader."""


class PageSender:
    """Sends the pages of one channel; one thread at a time.

    :param limiter: shared with whoever else sends under the same limit.
    """

    def __init__(self, channel: Channel, limiter: RateLimiter, counters: Counters) -> None:
        self._channel = channel
        self._limiter = limiter
        self._counters = counters
        self._encoder = PageEncoder(BATCH_PAGES)
        self._part = RamPart(RAM_SECTION_ID)
        self._unpaced_bytes = 0
        self._counted_bytes = channel.sent_bytes
        self.rate = Rate()
        self.phase = "precopy_bytes"

    def send(self, pages: BlockPages, batch: Indices) -> int:
        """Send these pages of a block, as one PART section; return the bytes that it took.

        :param batch: pages of the block's own size.
        """
        per_page = pages.block.target_pages_per_page
        if per_page == 1:
            return self._send_target(pages, batch, pages.look_for_data(batch))
        sent_bytes = 0
        has_data_of = dict(zip(batch.tolist(), pages.look_for_data(batch).tolist(), strict=True))
        for page in batch.tolist():
            target = np.arange(page * per_page, (page + 1) * per_page)
            has_data = np.full(per_page, has_data_of[page])
            for first in range(0, per_page, BATCH_PAGES):
                part = slice(first, first + BATCH_PAGES)
                sent_bytes += self._send_target(pages, target[part], has_data[part])
        return sent_bytes

    def say(self, command: bytes) -> None:
        """Send a command behind the pages."""
        self._channel.send(command)

    def pace(self, interrupt: threading.Event) -> None:
        """Sleep as long as the bandwidth limit wants it, unless interrupted."""
        spent, self._unpaced_bytes = self._unpaced_bytes, 0
        self._limiter.wait(spent, interrupt)
        self.count()

    def end_of_ram(self) -> bytes:
        """Return RAM's END section."""
        return RamPart(RAM_SECTION_ID, SectionType.END).around()

    def count(self) -> None:
        """Bring the counters up to what the channel has sent."""
        sent = self._channel.sent_bytes - self._counted_bytes
        self._counted_bytes += sent
        self.rate.add(sent)
        setattr(self._counters, self.phase, getattr(self._counters, self.phase) + sent)

    def _send_target(
        self,
        pages: BlockPages,
        target: Indices,
        has_data: Mask,
    ) -> int:
        block = pages.block
        buffers: list[bytes | memoryview] = [self._part.head]
        offsets = _offsets(target)
        zero = ~has_data
        present = offsets[has_data]
        if block.target_pages_per_page > 1 and len(present):
            # The pieces of a huge page must come in their order, whatever they hold.
            buffers.append(self._encoder.pages(block.name, offsets, block.pages))
            zero[:] = False
        elif len(present):
            data, zero[has_data] = self._encoder.nonzero_pages(block.name, present, block.pages)
            buffers.append(data)
        zeros = int(np.count_nonzero(zero))
        if zeros:
            buffers.append(self._encoder.zeros(block.name, offsets[zero]))
        buffers.append(self._part.tail)
        self._channel.send_many(buffers)
        sent_bytes = sum(len(buffer) for buffer in buffers)
        self._unpaced_bytes += sent_bytes
        self._counters.normal_pages += len(target) - zeros
        self._counters.zero_pages += zeros
        return sent_bytes


def _offsets(target: Indices) -> Offsets:
    return target.astype(np.uint64) * np.uint64(TARGET_PAGE_BYTES)
