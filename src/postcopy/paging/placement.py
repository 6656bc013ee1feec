"""Put arriving pages in place: whole, and once.

The engine writes every page through its own mapping of the memory.  Before the guest runs here that is
all, and a later copy wins.  Once the guest runs under userfaultfd (``listen``), a page that is missing is
not mapped there: it is written where the guest cannot see it yet, and then mapped in one step
(``UFFDIO_CONTINUE``).  A page that has been received is never written again, since the guest may have
written to it.

Called by the threads that read channels.  Each thread has a :class:`Placement` of its own; what they
share is the page map, where a page is claimed before it is written, and the fault table.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory.page_map import RECEIVED
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Indices, Mask, index_runs
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.host_pages import HostPageAssembler
from postcopy.paging.minor_faults import resolve_minor_fault
from postcopy.paging.placer import BlockPlacer
from postcopy.paging.ram import IncomingBlock, IncomingRam

_LONG_RUN_PAGES = 8


class Placement:
    """Places the pages of one channel."""

    def __init__(self, ram: IncomingRam, faults: FaultTable) -> None:
        self._ram = ram
        self._faults = faults
        self._placers: dict[str, BlockPlacer] | None = None  # while the guest runs
        self._later: Callable[[str, Indices], None] | None = None
        self._assemblers = {
            paged.block.name: HostPageAssembler(paged)
            for paged in ram
            if paged.block.target_pages_per_page > 1
        }

    def listen(
        self, userfaultfd: Userfaultfd, later: Callable[[str, Indices], None] | None = None
    ) -> None:
        """From now on pages are placed while the guest runs.

        :param later: maps pages of a block, by and by, that no thread waits for.
        """
        self._placers = {p.block.name: BlockPlacer(userfaultfd, p.block) for p in self._ram}
        self._later = later

    def forget_halves(self) -> None:
        """Drop the pieces of huge pages that have not come whole: another connection begins."""
        for assembler in self._assemblers.values():
            assembler.clear()

    def pages(
        self,
        name: str,
        offsets: npt.NDArray[np.uint64],
        data: npt.NDArray[np.uint8],
        *,
        neighbours: bool = False,
    ) -> None:
        """Place target pages of block ``name``.

        :param offsets: byte offsets in the block, shape ``(n,)``.
        :param data: their contents, shape ``(n, 4096)``.
        :param neighbours: they are known to follow one another.
        """
        paged = self._ram[name]
        if neighbours:
            first = int(offsets[0]) // TARGET_PAGE_BYTES
            if self._take_run(paged, first, first + len(data), data):
                return
        target = (offsets // TARGET_PAGE_BYTES).astype(np.int64)
        if self._placers is None:
            self._write(paged, target, data)
        else:
            self._place(paged, target, data)

    def begin_page(self, paged: IncomingBlock, page: int) -> bool:
        """Claim a huge page of which nothing has come; its bytes are then written without this object.

        :return: whether that may be done: :meth:`end_page` or :meth:`leave_page` is to follow.
        """
        if self._placers is not None:
            return paged.pages.claim_run(page, page + 1)
        if paged.pages.states[page] == RECEIVED or paged.stale[page]:
            return False
        paged.pages.receive(slice(page, page + 1))
        return True

    def end_page(self, paged: IncomingBlock, page: int) -> None:
        """All of a page has been written since :meth:`begin_page`."""
        if self._placers is not None:
            self._map_written(paged, page, page + 1)

    def leave_page(self, paged: IncomingBlock, page: int, pieces: int) -> None:
        """Only the first pieces of the page have come; what was written behind them belongs elsewhere."""
        if self._placers is not None:
            paged.stale[page] = True
            self._assemblers[paged.block.name].begun(page, pieces)
        else:
            per_page = paged.block.target_pages_per_page
            paged.block.pages[page * per_page + pieces : (page + 1) * per_page] = 0

    def zeros(self, name: str, offsets: npt.NDArray[np.uint64]) -> None:
        """Place target pages that are all zero."""
        paged = self._ram[name]
        target = (offsets // TARGET_PAGE_BYTES).astype(np.int64)
        if self._placers is None:
            self._write_zeros(paged, target)
        else:
            self._place(paged, target, None)

    def place(self, name: str, offset: int, length: int) -> memoryview:
        """Give the memory of target pages, in bytes, to be received there.

        They count as received: the guest does not run yet, and never will if only a part of them comes.
        """
        assert self._placers is None
        paged = self._ram[name]
        first, end = offset // TARGET_PAGE_BYTES, (offset + length) // TARGET_PAGE_BYTES
        per_page = paged.block.target_pages_per_page
        paged.pages.receive(slice(first // per_page, -(-end // per_page)))
        return paged.block.pages[first:end].data.cast("B")

    def _take_run(
        self, paged: IncomingBlock, first: int, end: int, data: npt.NDArray[np.uint8]
    ) -> bool:
        """Take neighbouring pages on the shortest way; return whether that was possible."""
        if self._placers is None:
            paged.block.write_run(first, data)
            per_page = paged.block.target_pages_per_page
            paged.pages.receive(slice(first // per_page, -(-end // per_page)))
            return True
        assembler = self._assemblers.get(paged.block.name)
        if assembler is not None:
            for page in assembler.add_run(first, end, data):
                self._map_written(paged, page, page + 1)
            return True
        return self._write_and_map(paged, first, end, data)

    # --- before the guest runs

    def _write(self, paged: IncomingBlock, target: Indices, data: npt.NDArray[np.uint8]) -> None:
        pages = paged.block.pages
        first, last = int(target[0]), int(target[-1])
        if last - first + 1 == len(target) and (len(target) == 1 or (np.diff(target) == 1).all()):
            pages[first : last + 1] = data
        else:
            pages[target] = data
        paged.pages.receive(target // paged.block.target_pages_per_page)

    def _write_zeros(self, paged: IncomingBlock, target: Indices) -> None:
        # Memory that has received nothing yet reads as zeros as it is.
        host = target // paged.block.target_pages_per_page
        stale = target[(paged.pages.states[host] == RECEIVED) | paged.stale[host]]
        if len(stale):
            paged.block.pages[stale] = 0
        paged.pages.receive(host)

    # --- under userfaultfd

    def _place(
        self, paged: IncomingBlock, target: Indices, data: npt.NDArray[np.uint8] | None
    ) -> None:
        assembler = self._assemblers.get(paged.block.name)
        if assembler is not None:
            for page in assembler.add(target, data):
                self._map_written(paged, page, page + 1)
            return
        claimed = paged.pages.claim(target)
        if not claimed.all():
            target = target[claimed]
            data = None if data is None else data[claimed]
        in_memory = target
        if data is not None:
            paged.block.pages[target] = data
        else:
            in_memory = target[_has_data(paged, target)]
            if len(stale := in_memory[paged.stale[in_memory]]):
                paged.block.pages[stale] = 0
        removed = paged.pages.complete(target)
        if len(removed):
            self._finish_removal(paged, removed)
        self._map_scattered(paged, in_memory)
        self._map_waited_for(paged, target)

    def _write_and_map(
        self, paged: IncomingBlock, first: int, end: int, rows: npt.NDArray[np.uint8]
    ) -> bool:
        """Write neighbouring pages of 4 KiB and map them; return False if one of them has come before."""
        if not paged.pages.claim_run(first, end):
            return False
        paged.block.write_run(first, rows)
        self._map_written(paged, first, end)
        return True

    def _map_written(self, paged: IncomingBlock, first: int, end: int) -> None:
        """Map neighbouring pages that have been claimed and written.

        They are noted as received, and then mapped: what the guest may have written to is never taken
        for missing, whenever this engine dies.
        """
        assert self._placers is not None
        removed = paged.pages.complete_run(first, end)
        if len(removed):
            self._finish_removal(paged, removed)
        name = paged.block.name
        self._placers[name].map(first, end - first)
        if waiting := self._faults.waiting(name):
            arrived = [page for page in waiting if first <= page < end]
            self._show_elsewhere(paged, arrived)
            self._faults.end(name, arrived, time.monotonic_ns())

    def _finish_removal(self, paged: IncomingBlock, removed: Indices) -> None:
        """Pages were removed while they were written: drop them, and let threads fault again."""
        assert self._placers is not None
        paged.finish_removal(removed)
        for page in removed.tolist():
            self._placers[paged.block.name].wake(page)

    def _map_scattered(self, paged: IncomingBlock, target: Indices) -> None:
        """Map long runs now, and the rest later if ``later`` was given: each run costs a call."""
        assert self._placers is not None
        ranges = index_runs(target)
        if self._later is not None:
            lengths = ranges[:, 1] - ranges[:, 0]
            short = lengths < _LONG_RUN_PAGES
            if short.any():
                self._later(paged.block.name, target[np.repeat(short, lengths)])
                ranges = ranges[~short]
        for start, end in ranges.tolist():
            self._placers[paged.block.name].map(int(target[start]), end - start)

    def _map_waited_for(self, paged: IncomingBlock, target: Indices) -> None:
        """Map received pages for the threads that wait for them.

        A thread that touches such a page from now on is served by the pager, which finds it received.
        One that has touched it before is in the fault table.
        """
        assert self._placers is not None
        name = paged.block.name
        for page in self._faults.waiting(name):
            if (target == page).any():
                resolve_minor_fault(self._placers[name], paged, page)
                self._show_elsewhere(paged, [page])
                self._faults.end(name, [page], time.monotonic_ns())

    def _show_elsewhere(self, paged: IncomingBlock, pages: Sequence[int]) -> None:
        """Let threads of other processes go on that wait for these pages."""
        for space, page in self._faults.waiting_elsewhere(paged.block.name, pages):
            space.show(paged, page)


def _has_data(paged: IncomingBlock, target: Indices) -> Mask:
    """Which pages have memory behind them: a large guest that has used little of it stays small."""
    found = np.zeros(len(target), np.bool_)
    for start, end in index_runs(target).tolist():
        first = int(target[start])
        found[start:end] = paged.block.has_data(first, first + end - start)
    return found
