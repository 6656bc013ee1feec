"""Pages that are sent again as what has changed in them: the capability ``xbzrle``.

A cache has copies of pages as the destination has them. What is sent of a page that is in it is the
delta of two copies, and never of memory that the guest may be writing: so a page is copied first, and
the copy is both sent and cached. As in QEMU the cache is direct-mapped, is first used in the second
round, and is not used in postcopy.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.channel.channel import Channel
from postcopy.channel.rate_limit import RateLimiter
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, PageBlock
from postcopy.memory.runs import Indices, Mask
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages
from postcopy.source.wire_sink import Between, EncodedPages, WireSink
from postcopy.statistics import XbzrleStatistics
from postcopy.stream.encoded_records import encode_delta
from postcopy.stream.ram_encoder import PageEncoder, Part, are_zero
from postcopy.stream.records import PageRows

_BATCH_PAGES: Final = 512
_RECORD_BYTES: Final = 3
_PHASES: Final = frozenset({"precopy_bytes", "downtime_bytes"})


class PageCache:
    """Copies of pages, each at the one place where it may be.

    :ivar size_bytes: of all of them.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        count = size_bytes // TARGET_PAGE_BYTES
        # Allocated by the kernel when it is first touched.
        self.rows: PageRows = np.zeros((count, TARGET_PAGE_BYTES), np.uint8)
        self._keys: npt.NDArray[np.int64] = np.full(count, -1, np.int64)

    def find(self, keys: Indices) -> tuple[Indices, Mask, Mask]:
        """Where these pages may be, which of them are there, and which may be put there.

        Of two pages with one place, the second may not.
        """
        places = keys % len(self._keys)
        first = np.zeros(len(keys), np.bool_)
        first[np.unique(places, return_index=True)[1]] = True
        return places, (self._keys[places] == keys) & first, first

    def put(self, keys: Indices, places: Indices, rows: PageRows) -> None:
        """Put pages at their places."""
        self._keys[places] = keys
        self.rows[places] = rows

    def remove(self, keys: Indices) -> None:
        """Remove those of these pages that are there."""
        places = keys % len(self._keys)
        self._keys[places[self._keys[places] == keys]] = -1


class XbzrleSink(WireSink):
    """A :class:`postcopy.source.wire_sink.WireSink` with a cache.

    :param cache_bytes: the parameter ``xbzrle-cache-size``, asked before each batch: it may change.
    """

    def __init__(
        self,
        channel: Channel,
        limiter: RateLimiter,
        counters: Counters,
        cache_bytes: Callable[[], int],
    ) -> None:
        super().__init__(channel, limiter, counters)
        self._cache_bytes = cache_bytes
        self._cache = PageCache(cache_bytes())
        self._encoder = PageEncoder(_BATCH_PAGES)
        self._first_keys: dict[str, int] = {}
        self._looked = 0
        self._spared_bytes = 0
        counters.xbzrle = XbzrleStatistics(self._cache.size_bytes)

    def begin(self, blocks: Sequence[PageBlock], *, postcopy: bool) -> None:
        """See :meth:`WireSink.begin`."""
        key = 0
        for block in blocks:
            self._first_keys[block.name] = key
            key += block.size_bytes // TARGET_PAGE_BYTES
        super().begin(blocks, postcopy=postcopy)

    def send(self, pages: BlockPages, batch: Indices, between: Between | None = None) -> int:
        """See :meth:`WireSink.send`."""
        is_again = self._counters.syncs > 1 and self.phase in _PHASES
        if not is_again or pages.block.target_pages_per_page > 1:
            return super().send(pages, batch, between)
        if (size_bytes := self._cache_bytes()) != self._cache.size_bytes:
            self._cache = PageCache(size_bytes)
        return self._send(self._encoded(pages, batch))

    def count(self) -> None:
        """See :meth:`PacedChannel.count`; the rate is that of pages, as they were before they were encoded.

        By the bytes of deltas it would never be said that the rest can be sent within the downtime.
        """
        super().count()
        spared, self._spared_bytes = self._spared_bytes, 0
        self.rate.add(spared)

    def _encoded(self, pages: BlockPages, batch: Indices) -> Iterator[EncodedPages]:
        # Two encoders on one channel: each names its block anew.
        for first in range(0, len(batch), _BATCH_PAGES):
            part = batch[first : first + _BATCH_PAGES]
            yield self._encode(pages.block, part, pages.has_data(part))

    def _encode(self, block: PageBlock, batch: Indices, has_data: Mask) -> EncodedPages:
        source, rows = block.gather(batch[has_data])
        contents: PageRows = source[rows]  # a copy
        zero = are_zero(contents, np.arange(len(contents)))
        keys = batch + self._first_keys[block.name]
        data_keys = keys[has_data]
        zeros = np.concatenate((batch[~has_data], batch[has_data][zero]))
        self._cache.remove(zeros + self._first_keys[block.name])
        data, contents = data_keys[~zero], contents[~zero]
        self._encoder.forget()
        parts, normal = self._deltas(block.name, data, contents)
        if len(zeros):
            parts.append(self._encoder.zeros(block.name, _offsets(zeros)))
        self._records.forget()
        return EncodedPages(parts, normal, len(zeros))

    def _deltas(self, block: str, keys: Indices, contents: PageRows) -> tuple[list[Part], int]:
        """Encode pages that hold something, as they are in ``contents``; return how many are sent whole."""
        if not len(keys):
            return [], 0
        cache, pages = self._cache, keys - self._first_keys[block]
        places, found, may_stay = cache.find(keys)
        deltas: list[tuple[int, bytes]] = []
        whole, overflow = ~found, 0
        old = cache.rows[places[found]]
        for at, changed in zip(np.flatnonzero(found).tolist(), old != contents[found], strict=True):
            if not changed.any():
                continue  # the destination has it as it is
            delta = encode_delta(changed, contents[at])
            if delta is None:
                whole[at], overflow = True, overflow + 1
            else:
                deltas.append((int(pages[at]) * TARGET_PAGE_BYTES, delta))
        cache.put(keys[may_stay], places[may_stay], contents[may_stay])
        cache.remove(keys[~may_stay])
        self._count(deltas, len(keys), int((~found).sum()), overflow)
        parts: list[Part] = []
        if whole.any():
            records, _ = self._encoder.nonzero_copies(
                block, _offsets(pages[whole]), np.ascontiguousarray(contents[whole])
            )
            parts.append(records)
        if deltas:
            parts.append(b"".join(self._encoder.delta(block, *each) for each in deltas))
        return parts, int(whole.sum())

    def _count(
        self, deltas: Sequence[tuple[int, bytes]], looked: int, misses: int, overflow: int
    ) -> None:
        before = self._counters.xbzrle
        assert before is not None
        self._looked += looked
        sent_bytes = sum(len(delta) + _RECORD_BYTES for _, delta in deltas)
        unchanged = looked - misses - overflow - len(deltas)
        self._spared_bytes += (len(deltas) + unchanged) * TARGET_PAGE_BYTES - sent_bytes
        n_bytes = before.bytes + sent_bytes
        count, missed = before.pages + len(deltas), before.cache_miss + misses
        self._counters.xbzrle = XbzrleStatistics(
            self._cache.size_bytes,
            n_bytes,
            count,
            missed,
            missed / self._looked,
            count * TARGET_PAGE_BYTES / n_bytes if n_bytes else 0.0,
            before.overflow + overflow,
        )


def _offsets(pages: Indices) -> npt.NDArray[np.uint64]:
    return pages.astype(np.uint64) * np.uint64(TARGET_PAGE_BYTES)
