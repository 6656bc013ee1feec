"""One RAM block that is being filled from an image: how a page of it gets into place."""

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from postcopy.abi import linux
from postcopy.errors import ImageError, KernelError
from postcopy.kernel import calls, patience
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.lazy_restore.image_source import ImagePageSource
from postcopy.memory.page_map import EARLY, LATE, MISSING, RECEIVED, REMOVED
from postcopy.memory.runs import Indices, Mask, runs
from postcopy.paging.placer import BlockPlacer
from postcopy.paging.ram import IncomingBlock, mapped_pages

_WINDOW_PAGES: Final = 1 << 14
_PIECE_BYTES: Final = 4 << 20
_AHEAD_BYTES: Final = 8 << 20
_EARLY_FAULTS: Final = 256
_NEIGHBOURS_APART: Final = 2  # sums of two numbers of which both go up by one

Run = tuple[int, int]
"""The first page of some that follow one another, and the end."""
Runs = deque[Run]


@dataclass(frozen=True, slots=True)
class Lost:
    """Pages that cannot be had, and why."""

    block_name: str
    pages: int
    reason: str


class BlockRestorer:
    """One block under userfaultfd and where its pages come from.  For one thread, the pager.

    Invariant: a page that is ``RECEIVED`` in the page map is in place, or lost; one that is ``REMOVED``
    has been removed by the guest's process; every other is missing.

    :param on_lost: told when pages are lost.  A touch of one fails.
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        paged: IncomingBlock,
        source: ImagePageSource,
        on_lost: Callable[[Lost], None],
    ) -> None:
        block = paged.block
        self.paged = paged
        self.source = source
        self.block = block
        self.shift = block.page_size_bytes.bit_length() - 1
        self.touched = paged.pages.touched
        self.placer = BlockPlacer(userfaultfd, block)
        self._on_lost = on_lost
        self._states = paged.pages.states
        # Of the first so many pages: how many with data are missing.
        self._counted = self._left = 0
        self._brought = 0
        self._any_removed = False
        self.skipped = False
        """Whether pages could not be placed, since the address space was changing: to be tried again."""
        self._fixed = source.base
        self._reads_ahead = bool(self._fixed)
        self._ahead = 0

    def adopt(self, process_id: int) -> None:
        """Take over from an engine that is gone: what is in memory is in place, whole.

        :param process_id: the guest's process, which has each page mapped that was placed.
        """
        block = self.block
        if block.target_pages_per_page == 1:
            present = block.has_data(0, block.page_count)
        else:
            # The kernel does not tell which huge pages a file has; but it never takes one from a mapping.
            with PagemapScanner(process_id) as scanner:
                present = mapped_pages(scanner, block)
        kept = self._states != REMOVED
        self._states[kept & present] = RECEIVED
        self._states[kept & ~present] = MISSING

    def remove(self, first: int, end: int) -> None:
        """The guest's process has removed pages: the image's are not theirs any more."""
        counted = min(end, self._counted)
        if counted > first:
            self._left -= self._count_missing(first, counted)
        self.paged.remove(first, end)
        self._any_removed = True

    def bring(self, page: int) -> None:
        """Place a page that a thread waits for."""
        if self._states[page] == REMOVED:
            self.placer.resolve(page)
            return
        data = self.source.has(page)
        self.touched[page] = EARLY if self._brought < _EARLY_FAULTS else LATE
        self._brought += 1
        if data:
            self._place_one(page)
        else:
            self.placer.zero(page)
            self._states[page] = RECEIVED

    def _place_one(self, page: int) -> None:
        """Place a page with data: the shortest way for one."""
        if not (self._fixed and self.source.is_good(page)):
            self._place(page, 1)
            return
        try:
            placed = self.placer.copy_page(page, self._fixed + (page << self.shift))
        except KernelError as error:
            self._failed(page, error)
            return
        if placed:
            if page < self._counted and self._states[page] < RECEIVED:
                self._left -= 1
            self._states[page] = RECEIVED

    def prefetch(self, step: Iterable[Run]) -> None:
        """Place pages that no thread waits for, unless they are there."""
        for first, end in step:
            self._read_ahead(first)
            if end - first == 1:
                if self._states[first] < RECEIVED:
                    self._place_one(first)
                    self.skipped |= bool(self._states[first] < RECEIVED)
                continue
            for start, stop in self._not_removed(first, end):
                page = start
                while page < stop and (placed := self._place(page, stop - page)):
                    page += placed
                self.skipped |= page < stop

    def _not_removed(self, first: int, end: int) -> list[list[int]]:
        if not self._any_removed:
            return [[first, end]]
        found: list[list[int]] = (first + runs(self._states[first:end] != REMOVED)).tolist()
        return found

    def place_copies(self, pages: Indices, source: int) -> None:
        """Place copies of pages, unless the pages are there; what cannot be read is left to the image.

        :param source: where the copies lie in this process, one behind the other.
        """
        which = np.flatnonzero(self._states[pages] < RECEIVED)
        todo = pages[which]
        # Runs of pages that are neighbours here, and among the copies.
        starts = np.flatnonzero(np.diff(todo + which, prepend=-3) != _NEIGHBOURS_APART)
        firsts = todo[starts].tolist()
        addresses = (source + (which[starts] << self.shift)).tolist()
        counts = np.diff(starts, append=len(todo)).tolist()
        done = 0
        try:
            for page, address, count in zip(firsts, addresses, counts, strict=True):
                placed = self._place_copy(page, address, count)
                done += placed
                if placed < count:
                    self.skipped = True
                    break
        except KernelError as error:
            if error.errno != errno.EFAULT:
                raise
        self._left -= int(np.count_nonzero(todo[:done] < self._counted))
        self._states[todo[:done]] = RECEIVED

    def _place_copy(self, page: int, source: int, count: int) -> int:
        """Place copies of neighbouring pages; return how many, from the first one on, are in place."""
        done = 0
        while done < count:
            placed = self.placer.copy(page + done, count - done, source + (done << self.shift))
            if not placed:
                break
            done += placed
        return done

    def _read_ahead(self, page: int) -> None:
        """Have the kernel read the file before the prefetch gets there: it would wait, and faults too."""
        start = page << self.shift
        if not self._reads_ahead or self._ahead - _AHEAD_BYTES <= start < self._ahead:
            return
        length = min(_AHEAD_BYTES, self.block.size_bytes - start)
        self._ahead = start + length // 2
        try:
            advice = linux.MADV_WILLNEED
            calls.madvise(self._fixed + start, length, advice, passes=patience.NONE)
        except KernelError:
            self._reads_ahead = False  # it was only advice

    def missing(self, wanted: Mask | None = None) -> Iterator[Runs]:
        """Find the runs of pages with data that are not in place, a window at a time; ascending.

        There may be none in a window.  A caller looks after others before it asks for the next one.

        :param wanted: only these.
        """
        pages = len(self._states)
        for start in range(0, pages, _WINDOW_PAGES):
            end = min(start + _WINDOW_PAGES, pages)
            todo = self._todo(start, end)
            if wanted is not None:
                todo &= wanted[start:end]
            yield deque((start + first, start + last) for first, last in runs(todo).tolist())

    def count(self) -> Iterator[None]:
        """Count what is missing, once and a window at a time: a query costs the pager nothing then.

        The caller looks after others between two windows.
        """
        while self._counted < len(self._states):
            end = min(self._counted + _WINDOW_PAGES, len(self._states))
            self._left += self._count_missing(self._counted, end)
            self._counted = end
            yield None

    @property
    def missing_pages(self) -> int:
        """How many pages with data are not in place."""
        pages = len(self._states)
        if self._counted == pages:
            return self._left
        starts = range(0, pages, _WINDOW_PAGES)  # no call is so long that the pager waits for it
        return sum(self._count_missing(at, min(at + _WINDOW_PAGES, pages)) for at in starts)

    def _count_missing(self, first: int, end: int) -> int:
        return int(np.count_nonzero(self._todo(first, end)))

    def _todo(self, first: int, end: int) -> Mask:
        todo: Mask = self.source.has_data(first, end) & (self._states[first:end] < RECEIVED)
        return todo

    def _note_run(self, first: int, end: int) -> None:
        """These pages are in place, or lost."""
        counted = min(end, self._counted)
        if counted > first:
            self._left -= self._count_missing(first, counted)
        self._states[first:end] = RECEIVED

    # --- steps that return how many pages are done with

    def _place(self, page: int, count: int) -> int:
        good = self.source.good(page, count)
        if not good:
            return self._lose(page)
        try:
            return self._copy(page, good)
        except ImageError:
            return self._lose(page)
        except KernelError as error:
            return self._failed(page, error)

    def _copy(self, page: int, count: int) -> int:
        source, count = self.source.address(page, count)
        done = self.placer.copy(page, count, source)
        self._note_run(page, page + done)
        return done

    def _failed(self, page: int, error: KernelError) -> int:
        """Tell an image that cannot be read from a guest's process that is gone."""
        if error.errno != errno.EFAULT:
            raise error
        return self._lose(page)

    def _lose(self, page: int) -> int:
        """Never serve what is wrong: these pages are lost."""
        first, end = self.source.bad(page)
        lost = np.flatnonzero(self._states[first:end] < RECEIVED) + first
        if len(lost):
            self._on_lost(Lost(self.block.name, len(lost), self.source.reason(page)))
        for number in lost.tolist():
            self.placer.poison(number)
        removed = self._states[first:end] == REMOVED
        self._note_run(first, end)
        self._states[first:end][removed] = REMOVED
        return max(1, end - page)


def fill_block(paged: IncomingBlock, source: ImagePageSource) -> Lost | None:
    """Copy all pages with data that have not been copied before, by this engine or another.

    For a guest that does not run yet: no thread can wait for a page, so no userfaultfd is needed.

    :return: the first pages that cannot be had; the others are left alone then.
    """
    states = paged.pages.states
    for start in range(0, len(states), _WINDOW_PAGES):
        end = min(start + _WINDOW_PAGES, len(states))
        todo = source.has_data(start, end) & (states[start:end] < RECEIVED)
        for first, last in runs(todo).tolist():
            lost = _fill_run(paged, source, start + first, start + last)
            if lost is not None:
                return lost
    return None


def _fill_run(paged: IncomingBlock, source: ImagePageSource, first: int, end: int) -> Lost | None:
    block, page = paged.block, first
    piece, rows = max(1, _PIECE_BYTES // block.page_size_bytes), block.target_pages_per_page
    while page < end:
        count = source.good(page, min(piece, end - page))
        try:
            contents = source.read(page, count) if count else None
        except ImageError:
            contents = None
        if contents is None:
            bad, after = source.bad(page)
            return Lost(block.name, after - bad, source.reason(page))
        block.pages[page * rows : (page + count) * rows] = np.asarray(contents)
        paged.pages.states[page : page + count] = RECEIVED  # not before it is whole
        page += count
    return None
