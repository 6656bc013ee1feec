"""Put arriving pages in place: whole, and once.

The engine writes every page through its own mapping of the memory.  Before the guest runs here that is
all, and a later copy wins.  Once the guest runs under userfaultfd (``listen``), a page that is missing is
not mapped there: it is written where the guest cannot see it yet, and then mapped in one step
(``UFFDIO_CONTINUE``).  A page that has been received is never written again, since the guest may have
written to it.

Called by the threads that read channels.  Each thread has a :class:`Placement` of its own; what they
share is the page map, where a page is claimed before it is written.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from postcopy.errors import StreamError
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory.page_map import RECEIVED
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Indices, Mask, index_runs
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.minor_faults import map_pages, resolve_minor_fault
from postcopy.paging.ram import IncomingBlock, IncomingRam

_LONG_RUN_PAGES = 8


class Placement:
    """Places the pages of one channel."""

    def __init__(self, ram: IncomingRam, blocktime: Blocktime) -> None:
        self._ram = ram
        self._blocktime = blocktime
        self._userfaultfd: Userfaultfd | None = None  # while the guest runs
        self._later: Callable[[str, Indices], None] | None = None
        # The host page being put together from target pages: a huge page comes in 512 pieces.
        self._partial: tuple[str, int, npt.NDArray[np.uint8], int] | None = None

    def listen(
        self, userfaultfd: Userfaultfd, later: Callable[[str, Indices], None] | None = None
    ) -> None:
        """From now on pages are placed under the guest's eyes.

        :param later: shows pages of a block, by and by, that nobody waits for.
        """
        self._userfaultfd = userfaultfd
        self._later = later

    def forget_halves(self) -> None:
        """Drop the pieces of a huge page that has not come whole: another connection begins."""
        self._partial = None

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
        if neighbours and paged.block.target_pages_per_page == 1:
            first = int(offsets[0]) // TARGET_PAGE_BYTES
            if self._take_run(paged, first, first + len(data), data):
                return
        target = (offsets // TARGET_PAGE_BYTES).astype(np.int64)
        if self._userfaultfd is None:
            self._write(paged, target, data)
        elif paged.block.target_pages_per_page > 1:
            for page, content in zip(target.tolist(), data, strict=True):
                self._gather(paged, page, content)
        else:
            self._place(paged, target, data)

    def zeros(self, name: str, offsets: npt.NDArray[np.uint64]) -> None:
        """Place target pages that are all zero."""
        paged = self._ram[name]
        target = (offsets // TARGET_PAGE_BYTES).astype(np.int64)
        if self._userfaultfd is None:
            self._write_zeros(paged, target)
        elif paged.block.target_pages_per_page > 1:
            for page in target.tolist():
                self._gather(paged, page, None)
        else:
            self._place(paged, target, None)

    def _take_run(
        self, paged: IncomingBlock, first: int, end: int, data: npt.NDArray[np.uint8]
    ) -> bool:
        """Take neighbouring pages on the shortest way; return whether that was possible."""
        if self._userfaultfd is None:
            paged.block.pages[first:end] = data
            paged.pages.receive(slice(first, end))
            return True
        if not paged.pages.claim_run(first, end):
            return False
        paged.block.pages[first:end] = data
        self._map(paged, first, end - first)
        return True

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
        paged.pages.receive(target)
        self._show(paged, in_memory)
        self._help_waiting(paged, target)

    def _show(self, paged: IncomingBlock, target: Indices) -> None:
        """Show long runs now; the rest later, if there is somebody for that: each costs a call."""
        assert self._userfaultfd is not None
        ranges = index_runs(target)
        if self._later is not None:
            lengths = ranges[:, 1] - ranges[:, 0]
            short = lengths < _LONG_RUN_PAGES
            if short.any():
                self._later(paged.block.name, target[np.repeat(short, lengths)])
                ranges = ranges[~short]
        for start, end in ranges.tolist():
            map_pages(self._userfaultfd, paged.block, int(target[start]), end - start)

    def _help_waiting(self, paged: IncomingBlock, target: Indices) -> None:
        """Show received pages to those who wait for them.

        Who touches such a page from now on is helped by the pager, which finds it received.  Who has
        touched it before is waiting, and gets it now: a fault is in the books before the pager looks
        whether the page is received, so either it finds it so, or we find it in the books.
        """
        assert self._userfaultfd is not None
        for name, page in list(self._blocktime.waiting):
            if name == paged.block.name and (target == page).any():
                resolve_minor_fault(self._userfaultfd, paged, page)
                self._wake_books(name, page, page + 1)

    def _map(self, paged: IncomingBlock, page: int, count: int) -> None:
        """Note that pages have come, and show them to the guest.

        In this order: what the guest may have written to is never taken for missing, whenever this
        engine dies.
        """
        assert self._userfaultfd is not None
        paged.pages.receive(slice(page, page + count))
        map_pages(self._userfaultfd, paged.block, page, count)
        if self._blocktime.waiting:
            self._wake_books(paged.block.name, page, page + count)

    def _wake_books(self, name: str, start: int, end: int) -> None:
        arrived = [key for key in list(self._blocktime.waiting) if key[0] == name]
        arrived = [key for key in arrived if start <= key[1] < end]
        if arrived:
            self._blocktime.placed(arrived, time.monotonic_ns())

    # --- huge pages: whole, or not at all

    def _gather(
        self, paged: IncomingBlock, target: int, content: npt.NDArray[np.uint8] | None
    ) -> None:
        """Take one piece of a huge page; place the page with its last piece."""
        per_page = paged.block.target_pages_per_page
        page, piece = divmod(target, per_page)
        if piece == 0 and self._partial is None:
            whole = np.zeros((per_page, TARGET_PAGE_BYTES), np.uint8)
            self._partial = (paged.block.name, page, whole, 0)
        if self._partial is None or self._partial[:2] + self._partial[3:] != (
            paged.block.name,
            page,
            piece,
        ):
            raise StreamError(
                f"pieces of a huge page out of order: block {paged.block.name}, page {page}, "
                f"piece {piece}"
            )
        _, _, whole, _ = self._partial
        if content is not None:
            whole[piece] = content
        self._partial = (paged.block.name, page, whole, piece + 1)
        if piece + 1 == per_page:
            self._partial = None
            if paged.pages.claim(np.array([page])).all():
                paged.block.pages[page * per_page : (page + 1) * per_page] = whole
                self._map(paged, page, 1)


def _has_data(paged: IncomingBlock, target: Indices) -> Mask:
    """Which pages have memory behind them: a large guest that has used little of it stays small."""
    found = np.zeros(len(target), np.bool_)
    for start, end in index_runs(target).tolist():
        first = int(target[start])
        found[start:end] = paged.block.has_data(first, first + end - start)
    return found
