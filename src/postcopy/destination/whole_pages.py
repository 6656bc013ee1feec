"""Whole huge pages, received to where they belong.

A page of 2 MiB comes in 512 records of 4 KiB.  Once the first one has begun, it is known what is to follow,
if the page comes whole: header and page in turns.  So the kernel puts each page to its place in memory,
and each header into a table, which is compared with what was expected.  That saves a copy of all memory,
and most of what Python does for each record (``docs/decisions``, 0034).

Where something else follows (a real QEMU sends zero pages among the others) what has been received too far
is given back to the decoder, and from then on all of the channel is received into its buffer.
"""

from typing import Final

import numpy as np

from postcopy.channel.channel import Channel
from postcopy.channel.sockets import SocketChannel
from postcopy.channel.writev import PendingPieces
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.paging.placement import Placement
from postcopy.paging.ram import IncomingBlock, IncomingRam
from postcopy.stream.decoder import Decoder, PreemptDecoder
from postcopy.stream.layout import Layout
from postcopy.stream.numbers import HEADER_BYTES, PAGE_RECORD_BYTES, RamFlag
from postcopy.stream.ram_encoder import address_of
from postcopy.stream.records import BegunPage

_MOST_PIECES: Final = 512
"""Larger pages go the usual way."""

_AHEAD_BYTES: Final = 4000
"""Less than a page: what stands between two huge pages, and the beginning of the second."""


class PageReceiver:
    """Receives one channel.  One thread only.

    :param layout: which blocks the decoder knows.
    """

    def __init__(self, ram: IncomingRam, layout: Layout, placement: Placement) -> None:
        self._ram = ram
        self._layout = layout
        self._placement = placement
        self._come_whole = any(_is_huge(paged) for paged in ram)
        pieces = np.arange(_MOST_PIECES, dtype=np.uint64)
        self._offsets = pieces * np.uint64(TARGET_PAGE_BYTES)
        self._headers = np.zeros(_MOST_PIECES, ">u8")
        table = np.empty((_MOST_PIECES, 2, 2), np.uint64)
        table[:, 0, 0] = address_of(self._headers) + pieces * np.uint64(HEADER_BYTES)
        table[:, 0, 1] = HEADER_BYTES
        table[:, 1, 1] = TARGET_PAGE_BYTES
        self._table = table

    def receive(self, channel: Channel, decoder: Decoder | PreemptDecoder) -> int:
        """Receive what comes next, into the memory or into the decoder.

        :return: how many bytes; 0 = the peer has ended the stream.
        :raises ChannelBroken: as :meth:`Channel.receive_into`.
        """
        # Bytes of a kind of socket of its own may have to be changed first.
        if self._come_whole and type(channel) is SocketChannel:
            begun = decoder.begun_page()
            if begun is not None and (paged := self._begin(begun)) is not None:
                return self._receive_page(channel, decoder, paged, begun)
            view = decoder.buffer()[: self._most_bytes(decoder)]
        else:
            view = decoder.buffer()
        count = channel.receive_into(view)
        decoder.received(count)
        return count

    def _begin(self, begun: BegunPage) -> IncomingBlock | None:
        """Claim a page of which the first piece has begun; None: it is not to be received here."""
        if begun.block not in self._layout:
            return None
        paged = self._ram[begun.block]
        page, rest = divmod(begun.offset, paged.block.page_size_bytes)
        if rest or not _is_huge(paged) or not self._placement.begin_page(paged, page):
            return None
        return paged

    def _most_bytes(self, decoder: Decoder | PreemptDecoder) -> int | None:
        """How much to receive, so that it ends in the first piece of the next huge page; None: any."""
        name, offset = decoder.page_read
        if name is None or offset is None or name not in self._layout:
            return None
        paged = self._ram[name]
        if not _is_huge(paged):
            return None
        per_page = paged.block.target_pages_per_page
        left = per_page - 1 - offset // TARGET_PAGE_BYTES % per_page
        most = left * PAGE_RECORD_BYTES + _AHEAD_BYTES - decoder.pending
        return most if most >= _AHEAD_BYTES // 4 else None

    def _receive_page(
        self,
        channel: Channel,
        decoder: Decoder | PreemptDecoder,
        paged: IncomingBlock,
        begun: BegunPage,
    ) -> int:
        per_page = paged.block.target_pages_per_page
        page = begun.offset // paged.block.page_size_bytes
        first = page * per_page
        paged.block.pages[first, : len(begun.data)] = np.frombuffer(begun.data, np.uint8)
        addresses = self._table[:per_page, 1, 0]
        addresses[:] = self._offsets[:per_page] + np.uint64(address_of(paged.block.pages[first:]))
        flags = np.uint64(begun.offset | RamFlag.PAGE | RamFlag.CONTINUE)
        expected = self._offsets[:per_page] + flags
        left = PendingPieces(self._table[:per_page].reshape(-1, 2))
        done = left.passed(HEADER_BYTES + len(begun.data))
        self._headers[0] = expected[0]
        while left:
            count = channel.receive_pieces(left)
            if not count:
                return 0
            done += count
            come = min(per_page, (done - HEADER_BYTES) // PAGE_RECORD_BYTES + 1)
            # Nothing may come behind what is no page, so look before more is waited for.
            # What is no page puts the last header out of its place, too: that is looked at first.
            if left and self._headers[come - 1] == expected[come - 1]:
                continue
            wrong = np.flatnonzero(self._headers[:come] != expected[:come])
            if len(wrong):
                self._give_back(decoder, paged, page, int(wrong[0]), done)
                return done
        decoder.taken(per_page * PAGE_RECORD_BYTES)
        self._placement.end_page(paged, page)
        return done

    def _give_back(
        self,
        decoder: Decoder | PreemptDecoder,
        paged: IncomingBlock,
        page: int,
        pieces: int,
        done: int,
    ) -> None:
        """Only so many pieces of the page have come: what is behind them is the decoder's."""
        self._come_whole = False
        per_page = paged.block.target_pages_per_page
        start = page * per_page
        records = np.empty((per_page - pieces, PAGE_RECORD_BYTES), np.uint8)
        headers = self._headers[pieces:per_page].view(np.uint8)
        records[:, :HEADER_BYTES] = headers.reshape(-1, HEADER_BYTES)
        records[:, HEADER_BYTES:] = paged.block.pages[start + pieces : start + per_page]
        self._placement.leave_page(paged, page, pieces)
        decoder.taken(pieces * PAGE_RECORD_BYTES)
        decoder.feed(records.reshape(-1)[: done - pieces * PAGE_RECORD_BYTES].data)


def _is_huge(paged: IncomingBlock) -> bool:
    return 1 < paged.block.target_pages_per_page <= _MOST_PIECES
