"""Pages as RAM records: what of them is zero, and the bytes of the others."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Indices, Mask
from postcopy.source.dirty_pages import BlockPages
from postcopy.stream.ram_encoder import PageEncoder
from postcopy.stream.records import Offsets, PageRows

BATCH_PAGES = 256
"""Target pages with data that are encoded in one go: a mebibyte."""


@dataclass(frozen=True, slots=True)
class EncodedPages:
    """Records of one go; the buffers hold until the next."""

    buffers: list[bytes | memoryview]
    normal_pages: int
    zero_pages: int


class PageRecords:
    """Writes the records of one channel, which remembers the block named last.  One thread at a time."""

    def __init__(self) -> None:
        self._encoder = PageEncoder(BATCH_PAGES)

    def encode(self, pages: BlockPages, batch: Indices) -> Iterator[EncodedPages]:
        """Write these pages of a block; send what is given before asking for more.

        :param batch: pages of the block's own size.
        """
        per_page = pages.block.target_pages_per_page
        if per_page == 1 and len(batch) == 1:
            yield self._page(pages, int(batch[0]))
            return
        if per_page == 1 and (run := _data_run(pages, batch)) is not None:
            yield self._run(pages, *run)
            return
        with_data = pages.look_for_data(batch)
        if per_page == 1:
            yield self._target_pages(pages, batch, with_data)
            return
        for page, is_data in zip(batch.tolist(), with_data.tolist(), strict=True):
            target = np.arange(page * per_page, (page + 1) * per_page)
            has_data = np.full(per_page, is_data)
            for first in range(0, per_page, BATCH_PAGES):
                part = slice(first, first + BATCH_PAGES)
                yield self._target_pages(pages, target[part], has_data[part])

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
            buffers: list[bytes | memoryview] = [data] if len(data) else []
            zeros = int(np.count_nonzero(zero))
            if zeros:
                buffers.append(self._encoder.zeros(block, offsets[zero]))
            yield EncodedPages(buffers, len(offsets) - zeros, zeros)

    def encode_zeros(self, block: str, target: Indices) -> EncodedPages:
        """Write pages of the wire that are known to be zero."""
        return EncodedPages([self._encoder.zeros(block, _offsets(target))], 0, len(target))

    def _page(self, pages: BlockPages, page: int) -> EncodedPages:
        block = pages.block
        if pages.has_data[page] or pages.look_for_data(np.array([page])).all():
            record = self._encoder.nonzero_page(block.name, page, block.pages)
            if record is not None:
                return EncodedPages(record, 1, 0)
        offset = np.array([page * TARGET_PAGE_BYTES], np.uint64)
        return EncodedPages([self._encoder.zeros(block.name, offset)], 0, 1)

    def _run(self, pages: BlockPages, first: int, count: int) -> EncodedPages:
        block = pages.block
        data, zero = self._encoder.nonzero_run(block.name, first, count, block.pages)
        if zero is None:
            return EncodedPages([data], count, 0)
        zeros = int(np.count_nonzero(zero))
        buffers: list[bytes | memoryview] = [data]
        if zeros:
            buffers.append(self._encoder.zeros(block.name, _offsets(np.flatnonzero(zero) + first)))
        return EncodedPages(buffers, count - zeros, zeros)

    def _target_pages(self, pages: BlockPages, target: Indices, has_data: Mask) -> EncodedPages:
        block = pages.block
        buffers: list[bytes | memoryview] = []
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
        return EncodedPages(buffers, len(target) - zeros, zeros)


def _data_run(pages: BlockPages, batch: Indices) -> tuple[int, int] | None:
    """First page and number of a batch of neighbours known to have memory behind them."""
    first, count = int(batch[0]), len(batch)
    if count > BATCH_PAGES or int(batch[-1]) - first != count - 1:
        return None
    return (first, count) if pages.has_data[first : first + count].all() else None


def _offsets(target: Indices) -> Offsets:
    return target.astype(np.uint64) * np.uint64(TARGET_PAGE_BYTES)
