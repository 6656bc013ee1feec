"""Send the memory of a guest that goes on writing to it.

A round goes once through all memory, chunk by chunk: protect a chunk, then send what is pending in it.
In the first round, pages that the guest has written since are held back: the next round has to send
them anyway.  Each chunk is protected while the one before it is sent, which leaves time to see which
pages are hot.  Later rounds consist of hot pages: held back, these rounds would be empty, and each would
cost the guest a fault for every page it writes.  At the end of a round the tracker is asked how much was
written meanwhile.  Rounds end when the rest could be sent within the downtime that the user allows, or
when the user asks for postcopy.

The bytes left are compared between rounds only: within a round the chunks already sent are written again
while the others shrink.
"""

import enum
import itertools
import time
from collections.abc import Callable
from typing import Final

from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Mask
from postcopy.parameters import Parameters
from postcopy.source.auto_converge import Convergence
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages, DirtyPages
from postcopy.source.flow_control import BatchSize
from postcopy.source.page_sink import PageSink
from postcopy.source.user_requests import UserRequests
from postcopy.source.wire_sink import BATCH_PAGES

_WINDOW_PAGES: Final = 4096
"""After so many pages the tracker is asked again which are being written."""


class Outcome(enum.Enum):
    """Why the rounds ended."""

    SMALL_ENOUGH = enum.auto()
    POSTCOPY = enum.auto()
    CANCELLED = enum.auto()


class Precopy:
    """The rounds of one migration.

    :param parameters: read anew each time, since the user may change them meanwhile.
    :param on_pass: called with the number of passes over the dirty log, as QEMU counts them.
    :param convergence: slows the guest down if it writes too fast.
    """

    def __init__(
        self,
        dirty: DirtyPages,
        sender: PageSink,
        counters: Counters,
        requests: UserRequests,
        parameters: Callable[[], Parameters],
        on_pass: Callable[[int], None],
        convergence: Convergence | None = None,
    ) -> None:
        self._dirty = dirty
        self._sender = sender
        self._counters = counters
        self._requests = requests
        self._parameters = parameters
        self._on_pass = on_pass
        self._convergence = convergence
        self._batch_size = BatchSize(BATCH_PAGES * TARGET_PAGE_BYTES)

    def run(self) -> Outcome:
        """Send round after round until there is a reason to stop."""
        while True:
            self._counters.syncs = self._dirty.syncs
            began, before = time.monotonic(), self._counters.precopy_bytes
            outcome = self._round(is_first=self._dirty.syncs == 1)
            if outcome is not None:
                return outcome
            self._sender.end_of_round()
            left_bytes = self._dirty.estimate_bytes()
            self._counters.syncs = self._dirty.syncs
            self._on_pass(self._dirty.syncs)
            self._note_dirty_rate(left_bytes, time.monotonic() - began)
            if left_bytes <= self._affordable_bytes():
                return Outcome.SMALL_ENOUGH
            if self._convergence is not None:
                self._convergence.round_ended(self._counters.precopy_bytes - before, left_bytes)

    def _round(self, *, is_first: bool) -> Outcome | None:
        chunks = [(pages, *chunk) for pages in self._dirty.blocks for chunk in pages.chunks()]
        unprotected = iter(chunks)
        due = 2 if is_first else 1
        for pages, start, end in chunks:
            if (outcome := self._interrupted()) is not None:
                return outcome
            for chunk in itertools.islice(unprotected, due):
                self._dirty.collect(*chunk)
            due = 1
            pages.scan_chunk(start, end)
            send = self._send_but_hot if is_first else self._send
            if (outcome := send(pages, start, end)) is not None:
                return outcome
        return None

    def _send_but_hot(self, pages: BlockPages, start: int, end: int) -> Outcome | None:
        for first in range(start, end, _WINDOW_PAGES):
            window_end = min(first + _WINDOW_PAGES, end)
            held = self._dirty.written_again(pages, first, window_end)
            if (outcome := self._send(pages, first, window_end, held)) is not None:
                return outcome
        return None

    def _send(
        self, pages: BlockPages, start: int, end: int, held: Mask | None = None
    ) -> Outcome | None:
        while len(batch := pages.next_batch(start, end, self._batch_pages(pages), held)):
            if (outcome := self._interrupted()) is not None:
                return outcome
            pages.pending[batch] = False
            self._batch_size.begin()
            sent_bytes = self._sender.send(pages, batch)
            self._sender.pace(self._requests.interrupt)
            self._batch_size.end(sent_bytes)
            start = int(batch[-1]) + 1
            self._dirty.sample_redirtied(pages, start)
        return None

    def _batch_pages(self, pages: BlockPages) -> int:
        return max(1, self._batch_size.bytes // pages.block.page_size_bytes)

    def _interrupted(self) -> Outcome | None:
        self._requests.interrupt.clear()
        if self._requests.cancelled:
            return Outcome.CANCELLED
        return Outcome.POSTCOPY if self._requests.postcopy_wanted else None

    def _affordable_bytes(self) -> float:
        parameters = self._parameters()
        bandwidth = parameters.avail_switchover_bandwidth or self._sender.rate.bytes_per_second
        return bandwidth * parameters.downtime_limit / 1000

    def _note_dirty_rate(self, left_bytes: int, elapsed_s: float) -> None:
        pages = left_bytes / self._counters.page_bytes
        self._counters.dirty_pages_per_second = round(pages / max(elapsed_s, 1e-3))
