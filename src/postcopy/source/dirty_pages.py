"""The pages that the destination does not have as they are now.

A page is *pending* if it was never sent, or is known to have been written since.  Writes that the
tracker has not been asked about yet come on top; :meth:`DirtyPages.collect` adds them.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from postcopy.dirty.tracker import DirtyTracker, choose
from postcopy.errors import StreamError
from postcopy.guest import Guest
from postcopy.memory.ram_block import PageBlock, RamBlock
from postcopy.memory.runs import Indices, Mask, index_runs, next_set
from postcopy.source.counters import RedirtyEstimate

CHUNK_BYTES = 64 << 20
"""How much memory is protected, and then sent, at a time."""


_WINDOW_PAGES = 4096

_MOST_TOGETHER = 16
"""A batch may have so many times more pages than its limit says, if the others are holes."""

_NONE: Indices = np.empty(0, np.int64)


class SourceMemory(Protocol):
    """The memory that a source sends.

    :ivar leaves_zeros_out: whether zero pages are sent to a real QEMU only if it requests them.
    """

    leaves_zeros_out: bool

    def blocks(self) -> Sequence[PageBlock]:
        """Its blocks, in the order of the list that is sent; they become the caller's."""

    def tracker(self, wish: str) -> DirtyTracker:
        """What notices the writes to it.

        :param wish: the parameter ``x-dirty-tracking``.
        :raises Refused: that cannot be had here.
        """


class GuestMemory:
    """The memory of a guest that runs until the switchover: a :class:`SourceMemory`."""

    leaves_zeros_out = False  # precopy has sent nearly all of them

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def blocks(self) -> Sequence[PageBlock]:
        """Map them."""
        return [RamBlock(region) for region in self._guest.regions()]

    def tracker(self, wish: str) -> DirtyTracker:
        """See :func:`postcopy.dirty.tracker.choose`."""
        return choose(wish, self._guest)


class BlockPages:
    """The pages of one block, in pages of its own size.

    Changed by the sending thread alone, or under the lock of the push once requests come in.
    """

    def __init__(self, block: PageBlock) -> None:
        self.block = block
        self.pending: Mask = np.ones(block.page_count, np.bool_)
        self.known_data: Mask = np.zeros(block.page_count, np.bool_)
        """Pages known to have memory behind them; the others were holes at the last scan."""
        # Zero pages that are not pending, but are sent if they are requested; None: there are none.
        self._left_out: Mask | None = None
        self._scanned = (0, 0)
        # Windows that were scanned after the guest had stopped here: nothing in them changes.
        self._final: Mask = np.zeros(-(-block.page_count // _WINDOW_PAGES), np.bool_)

    def scan_chunk(self, start: int, end: int) -> None:
        """Find out for many pages at once what :meth:`has_data` then need not find out for each batch.

        The pages must be protected, or the guest stopped: a hole filled afterwards counts as written.
        The result is void once such writes are made pending: see :meth:`add_written`.
        """
        self._scan(start, end)
        self._scanned = start, end

    def add_written(self, written: Mask | None) -> None:
        """Make pages pending, any of which may have been a hole at the last scan.

        :param written: None if all are pending already.
        """
        self._scanned = (0, 0)
        self._final[:] = False  # a request may have come before the guest had stopped
        if written is not None:
            self.pending |= written

    def has_data(self, batch: Indices) -> Mask:
        """Tell which pages of an ascending batch have memory behind them; the others are zero.

        A page must be protected, or the guest stopped, before its last scan.
        """
        # First: the thread of the push may be scanning now.
        is_scanned = self._is_scanned(int(batch[0]), int(batch[-1]))
        has_data = self.known_data[batch]
        if has_data.all() or is_scanned:
            return has_data
        unknown = batch[~has_data]
        for start, end in index_runs(unknown).tolist():
            self._scan(int(unknown[start]), int(unknown[end - 1]) + 1)
        return self.known_data[batch]

    def scan_window(self, page: int) -> None:
        """Scan the window around a page of a guest that has stopped here, once."""
        window = page // _WINDOW_PAGES
        if not self._final[window]:
            start = window * _WINDOW_PAGES
            self._scan(start, min(start + _WINDOW_PAGES, len(self.pending)))
            self._final[window] = True

    def _is_scanned(self, first: int, last: int) -> bool:
        start, end = self._scanned
        if start <= first and last < end:
            return True
        return bool(self._final[first // _WINDOW_PAGES : last // _WINDOW_PAGES + 1].all())

    def _scan(self, start: int, end: int) -> None:
        if not self.known_data[start:end].all():
            self.known_data[start:end] = self.block.has_data(start, end)

    def next_batch(self, start: int, end: int, limit: int, held: Mask | None = None) -> Indices:
        """The next pending pages from ``start`` on, ascending; none is empty.

        :param limit: most pages with memory behind them.  Holes take nine bytes each on the wire, so
            there may be many more of those.
        :param held: which of the last pages before ``end`` are not to be had now; ``start`` is one of
            these pages.
        """
        first = 0 if held is None else end - len(held)
        ready = self.pending[first:end] if held is None else self.pending[first:end] & ~held
        batch = next_set(ready, start - first, limit) + first
        if not len(batch) or self.has_data(batch).all():
            return batch
        batch = next_set(ready, start - first, limit * _MOST_TOGETHER) + first
        return batch[np.cumsum(self.has_data(batch)) <= limit]

    def next_batch_of_stopped(self, start: int, limit: int) -> Indices:
        """As :meth:`next_batch`, of a guest that has stopped here, and within one window."""
        first = next_set(self.pending, start, 1)
        if not len(first):
            return first
        self.scan_window(int(first[0]))
        end = (int(first[0]) // _WINDOW_PAGES + 1) * _WINDOW_PAGES
        return self.next_batch(int(first[0]), min(end, len(self.pending)), limit)

    def take(self, first: int, end: int) -> Indices:
        """Take those of a few pages that are pending; they are not any more."""
        if self._left_out is not None:
            self.pending[first:end] |= self._left_out[first:end]
            self._left_out[first:end] = False
        if end - first == 1:  # the usual request
            if not self.pending[first]:
                return _NONE
            self.pending[first] = False
            return np.arange(first, end)
        taken: Indices = self.pending[first:end].nonzero()[0] + first
        self.pending[taken] = False
        return taken

    def leave_zeros_out(self) -> None:
        """Send the zero pages of a guest that has stopped here only if they are requested."""
        self._left_out = self.pending & ~self.block.has_data(0, self.block.page_count)
        self.pending &= ~self._left_out

    def end_requests(self) -> None:
        """Leave out what is left out for good."""
        self._left_out = None

    def keep_missing(self, received: Mask) -> None:
        """Make all pages pending but those that a destination has received.

        A page that was on its way when the link broke is sent again.  One that had arrived is not:
        the guest may have written to it.

        :param received: one bit for each target page.
        :raises StreamError: it is not as long as the block.
        """
        per_page = self.block.target_pages_per_page
        if len(received) != len(self.pending) * per_page:
            raise StreamError(
                f"the bitmap of block '{self.block.name}' is not as long as the block"
            )
        # A huge page has been received when all of its pieces have.
        whole: Mask = np.logical_and.reduceat(received, np.arange(0, len(received), per_page))
        self.pending, self._left_out = ~whole, None

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First and end page of each chunk."""
        step = max(1, CHUNK_BYTES // self.block.page_size_bytes)
        for start in range(0, self.block.page_count, step):
            yield start, min(start + step, self.block.page_count)


class DirtyPages:
    """What is still to send, over all blocks."""

    def __init__(self, blocks: Sequence[PageBlock], tracker: DirtyTracker) -> None:
        self._tracker = tracker
        self.blocks = [BlockPages(block) for block in blocks]
        self.syncs = 0
        self.passed = False
        """Whether every page has been sent once: those that are pending have been written since."""
        self._lock = threading.Lock()
        # Under the lock, together with the pending pages that they become: bytes that the chunks
        # still to come in this round will add to those.
        self._expected_bytes = 0
        self._redirtied = RedirtyEstimate()

    def start(self) -> None:
        """Begin to track; every page is pending."""
        self._tracker.start()
        self._redirtied.next_round(0)
        self.syncs = 1  # everything is dirty: QEMU counts that as well

    def collect(self, pages: BlockPages, start: int, end: int) -> None:
        """Protect a chunk and add what was written in it; it is to be scanned before it is sent."""
        written = self._tracker.collect(pages.block, start, end, protect=True)
        pending = pages.pending[start:end]
        with self._lock:
            found_bytes = int(np.count_nonzero(written & ~pending)) * pages.block.page_size_bytes
            self._expected_bytes = max(0, self._expected_bytes - found_bytes)
            pending |= written

    def written_again(self, pages: BlockPages, start: int, end: int) -> Mask | None:
        """Which of these pages were written since they were protected; None if that costs too much.

        It is not added to what is pending: the next round finds it again.
        """
        if not self._tracker.is_quick:
            return None
        return self._tracker.collect(pages.block, start, end, protect=False)

    def estimate_bytes(self) -> int:
        """Bytes that would be left to send if the guest stopped now; protects nothing."""
        left_bytes = sum(self._left_bytes(pages) for pages in self.blocks)
        with self._lock:
            self.syncs += 1
            self.passed = True
            self._expected_bytes = left_bytes - self._pending_bytes()
            self._redirtied.next_round(left_bytes)
        return left_bytes

    def sync(self) -> None:
        """Add the writes so far of a guest that runs on; protects nothing."""
        self._add_all()

    def collect_all(self) -> int:
        """Add every write of a guest that has stopped; return the bytes left to send."""
        self.syncs += 1
        return self._add_all()

    def sample_redirtied(self, passed: BlockPages, end: int) -> None:
        """Ask now and then in a long round what has been written of the memory up to there."""
        if self._redirtied.is_due:
            self._redirtied.sample(lambda: self._redirtied_bytes(passed, end))

    @property
    def remaining_bytes(self) -> int:
        """Bytes left as far as is known, or to be expected, without asking the tracker."""
        with self._lock:
            left_bytes = self._redirtied.left_bytes(self._expected_bytes + self._pending_bytes())
        return min(left_bytes, sum(pages.block.size_bytes for pages in self.blocks))

    def stop(self) -> None:
        """Stop tracking."""
        self._tracker.stop()

    def _pending_bytes(self) -> int:
        return sum(
            int(np.count_nonzero(pages.pending)) * pages.block.page_size_bytes
            for pages in self.blocks
        )

    def _add_all(self) -> int:
        written = [self._written(pages) for pages in self.blocks]
        with self._lock:  # no sample between the two: what was expected is among what was written
            for pages, found in zip(self.blocks, written, strict=True):
                pages.add_written(found)
            self._expected_bytes = 0
            self._redirtied.next_round(0)
            return self._pending_bytes()

    def _redirtied_bytes(self, passed: BlockPages, end: int) -> int:
        written_bytes = 0
        for pages in self.blocks:
            until = end if pages is passed else pages.block.page_count
            written = self._tracker.collect(pages.block, 0, until, protect=False)
            written &= ~pages.pending[:until]  # what was held back is pending, and counted as such
            written_bytes += int(np.count_nonzero(written)) * pages.block.page_size_bytes
            if pages is passed:
                break
        return written_bytes

    def _written(self, pages: BlockPages) -> Mask | None:
        """What has been written, protecting nothing; None if all is pending anyway."""
        if pages.pending.all():
            return None
        return self._tracker.collect(pages.block, 0, pages.block.page_count, protect=False)

    def _left_bytes(self, pages: BlockPages) -> int:
        written = self._written(pages)
        left = pages.pending if written is None else pages.pending | written
        return int(np.count_nonzero(left)) * pages.block.page_size_bytes
