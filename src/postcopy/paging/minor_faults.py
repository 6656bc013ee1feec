"""Map pages that are in memory already in the guest's process, where they are not mapped yet.

What precopy brings is only written: until the guest runs here no thread touches it, and what is not mapped
need not be unmapped when it is discarded.  When the guest runs, a touch of such a page is a fault that
the pager answers at once, without the source (``UFFDIO_CONTINUE``).  So that these become few, all that
has been received is mapped by and by; and single pages that no thread waits for are left to that, too.
"""

import threading
import time
from typing import Final

from postcopy.errors import KernelError
from postcopy.kernel import threads
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory.page_map import RECEIVED
from postcopy.memory.runs import Indices, Mask, next_set, runs
from postcopy.paging.placer import BlockPlacer
from postcopy.paging.ram import IncomingBlock, IncomingRam

_STEP_PAGES: Final = 1024
_MOST_REST_S: Final = 0.01
_BETWEEN_PASSES_S: Final = 0.05

_NEIGHBOURS: Final = 64
"""Pages that a touch of one brings along, if they have been received."""


class BackgroundMapper:
    """The thread ``mapper``: at most half of the time at work, since no thread waits for it."""

    def __init__(self, userfaultfd: Userfaultfd, ram: IncomingRam) -> None:
        # Of each block, what is to be mapped still: set by the threads that receive pages, cleared here.
        self._blocks = {
            paged.block.name: (
                paged,
                BlockPlacer(userfaultfd, paged.block),
                paged.pages.states == RECEIVED,
            )
            for paged in ram
        }
        self._more = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mapper", daemon=True)

    def start(self) -> None:
        """Begin with all that has been received so far."""
        self._more.set()
        threads.start_if_possible(self._thread)

    def later(self, name: str, pages: Indices) -> None:
        """Have received pages, with memory behind them, mapped by and by."""
        self._blocks[name][2][pages] = True
        self._more.set()

    def stop(self) -> None:
        """End after the step at hand, and wait for that: the rest is mapped when it is touched."""
        self._stopped.set()
        self._more.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._more.wait()
                # A stop that is said here must be found below: what it has set is forgotten now.
                self._more.clear()
                self._map_all()
                self._stopped.wait(_BETWEEN_PASSES_S)
        except KernelError:
            return  # what is not mapped here is when it is touched: nothing depends on this

    def _map_all(self) -> None:
        for paged, placer, wanted in self._blocks.values():
            start = 0
            while len(found := next_set(wanted, start, 1)) and not self._stopped.is_set():
                start = int(found[0]) // _STEP_PAGES * _STEP_PAGES
                end = start + _STEP_PAGES
                began = time.monotonic()
                self._map_step(paged, placer, wanted[start:end], start)
                self._stopped.wait(min(time.monotonic() - began, _MOST_REST_S))
                start = end

    def _map_step(
        self, paged: IncomingBlock, placer: BlockPlacer, wanted: Mask, start: int
    ) -> None:
        now = wanted.copy()
        wanted[now] = False
        # A zero page may have been received where there is no memory: it takes some when touched.
        now &= paged.block.has_data(start, start + len(now))
        for first, last in runs(now).tolist():
            placer.map(start + first, last - first)


def resolve_minor_fault(
    placer: BlockPlacer, paged: IncomingBlock, page: int, most: int = _NEIGHBOURS
) -> None:
    """Map a page that has come and that a thread waits for, with its next neighbours.

    :param most: pages there are from this one on.
    """
    placer.resolve(page, _received_from(paged, page, min(most, _NEIGHBOURS)))


def _received_from(paged: IncomingBlock, page: int, most: int) -> int:
    """How many pages from this one on have been received without a gap: at least this one."""
    if paged.block.target_pages_per_page > 1:
        return 1
    received = paged.pages.states[page : page + most] == RECEIVED
    return len(received) if received.all() else max(1, int(received.argmin()))
