"""The pages that a snapshot has not saved yet, and their copies: each page is copied once."""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from postcopy.memory.ram_block import TARGET_PAGE_BYTES, RamBlock
from postcopy.memory.runs import Indices, Mask
from postcopy.stream.records import PageRows

PIECE_BYTES = 1 << 20
"""Memory that is copied, and then written, at a time."""

_LOCKED_BYTES = 256 << 10  # copied while the lock is held, for which a vCPU may wait
_WINDOW_BYTES = 16 << 20  # of a block, scanned for holes in one call


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Copies of those pages of ``first`` to ``end`` of a block that were unsaved, as pages of the wire.

    :ivar data: the pages with the bytes ``contents``.
    :ivar zeros: the pages that are holes.
    """

    block: RamBlock
    first: int
    end: int
    data: Indices
    contents: PageRows
    zeros: Indices


class FairLock:
    """As ``threading.Lock`` in a ``with``, but first come, first served.

    A thread that releases an ordinary lock and takes it again at once gets it, since a waiting thread
    has to be scheduled first; so a thread that copies page after page would lock out the one on which a
    vCPU waits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = threading.Lock()  # held by the thread that is next

    def __enter__(self) -> None:
        with self._next:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class SnapshotBitmap:
    """The pages of the blocks that are still to be copied.

    Invariant, under the lock: an unsaved page is protected against writes; of every other page the bytes
    have been copied.  So a page that is not unsaved may be written to.
    """

    def __init__(self, blocks: list[RamBlock]) -> None:
        self.blocks = blocks
        self.lock = FairLock()
        self._masks: dict[str, Mask] = {
            block.name: np.ones(block.page_count, np.bool_) for block in blocks
        }
        # Pages that have data; the others were holes at the last scan.
        self._has_data: dict[str, Mask] = {
            block.name: np.zeros(block.page_count, np.bool_) for block in blocks
        }
        self._staging = np.empty((_piece_rows(blocks), TARGET_PAGE_BYTES), np.uint8)

    def find(self, host_address: int) -> tuple[RamBlock, int]:
        """The block and the number of the page at an address of the guest's process.

        :raises KeyError: there is no such page.
        """
        for block in self.blocks:
            offset = host_address - block.host_address
            if 0 <= offset < block.size_bytes:
                return block, offset // block.page_size_bytes
        raise KeyError(hex(host_address))

    def is_unsaved(self, block: RamBlock, page: int) -> bool:
        """Whether a page is still to be copied; without the lock it may be copied at any time."""
        return bool(self._masks[block.name][page])

    def masks(self, block: RamBlock) -> tuple[Mask, Mask]:
        """Which pages are unsaved, and which have data; both change, and are not to be changed."""
        return self._masks[block.name], self._has_data[block.name]

    @property
    def remaining_bytes(self) -> int:
        """Memory that is still to be copied."""
        return sum(
            int(np.count_nonzero(self._masks[block.name])) * block.page_size_bytes
            for block in self.blocks
        )

    def scan_for_data(self) -> None:
        """Find the pages with data now, while no vCPU waits, so that later calls need not."""
        for block, start, end in self._windows():
            self._has_data[block.name][start:end] = block.has_data(start, end)

    def save(self, block: RamBlock, first: int, end: int) -> PageBatch:
        """Copy the unsaved pages of ``first`` to ``end``; the caller owns the copies."""
        has_data = self._has_data[block.name][first:end]
        if not has_data.all():
            has_data = block.has_data(first, end)
        room = np.empty(((end - first) * block.target_pages_per_page, TARGET_PAGE_BYTES), np.uint8)
        return self._save(block, first, has_data, room)

    def copy_rest(self) -> Iterator[PageBatch]:
        """Copy all pages that are still unsaved, in batches; a batch is valid until the next one."""
        for block, start, stop in self._windows():
            has_data = self._has_data[block.name][start:stop]
            if not has_data.all():
                has_data = block.has_data(start, stop)
            for first, end in _pieces(has_data, block.page_size_bytes):
                piece = has_data[first:end]
                copies = self._save(block, start + first, piece, self._staging)
                if len(copies.data) or len(copies.zeros):
                    yield copies

    def _windows(self) -> Iterator[tuple[RamBlock, int, int]]:
        for block in self.blocks:
            window = max(1, _WINDOW_BYTES // block.page_size_bytes)
            for start in range(0, block.page_count, window):
                yield block, start, min(start + window, block.page_count)

    def _save(self, block: RamBlock, first: int, has_data: Mask, room: PageRows) -> PageBatch:
        """Copy into ``room``, a few pages at a time, since a vCPU may wait for the lock.

        :param has_data: of the pages from ``first`` on: whether they had data when they were protected
            already.
        """
        data: list[Indices] = []
        zeros: list[Indices] = []
        end, filled = first + len(has_data), 0
        step = max(1, _LOCKED_BYTES // block.page_size_bytes)
        for start in range(first, end, step):
            stop = min(start + step, end)
            wanted = has_data[start - first : stop - first]
            with self.lock:
                unsaved = self._masks[block.name][start:stop]
                present = block.target_pages(start + np.flatnonzero(unsaved & wanted))
                absent = block.target_pages(start + np.flatnonzero(unsaved & ~wanted))
                _copy(block, present, room[filled : filled + len(present)])
                unsaved[:] = False
            filled += len(present)
            data.append(present)
            zeros.append(absent)
        return PageBatch(block, first, end, _joined(data), room[:filled], _joined(zeros))


def _joined(parts: list[Indices]) -> Indices:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _piece_rows(blocks: list[RamBlock]) -> int:
    largest = max((block.page_size_bytes for block in blocks), default=0)
    return max(PIECE_BYTES, largest) // TARGET_PAGE_BYTES


def _pieces(has_data: Mask, page_size_bytes: int) -> list[tuple[int, int]]:
    """Cut a window into parts of at most :data:`PIECE_BYTES` of data."""
    most = max(1, PIECE_BYTES // page_size_bytes)
    cuts = np.flatnonzero(has_data)[most::most].tolist()
    edges = [0, *cuts, len(has_data)]
    return list(itertools.pairwise(edges))


def _copy(block: RamBlock, target: Indices, into: PageRows) -> None:
    if not len(target):
        return
    first, last = int(target[0]), int(target[-1])
    if last - first + 1 == len(target):
        into[:] = block.pages[first : last + 1]  # neighbours: nearly always, and faster
    else:
        np.take(block.pages, target, axis=0, out=into)
