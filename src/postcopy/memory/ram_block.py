"""RAM blocks: as a sender reads them, and as an engine has those of a guest mapped."""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.channel.writev import PendingPieces
from postcopy.errors import GuestError, HostCannot, KernelError
from postcopy.guest import MappedRange, Region
from postcopy.kernel import calls, memfd
from postcopy.kernel.mapping import Mapping
from postcopy.memory.file_pages import FilePages
from postcopy.memory.runs import Indices, runs

TARGET_PAGE_BYTES = 4096
"""The page of the wire, whatever the block's own page is."""


class PageBlock(ABC):
    """A RAM block as a sender reads it, wherever its pages are.

    :param page_size_bytes: of the block's own pages.
    """

    physical_ranges: Sequence[MappedRange] = ()
    """Where it stands among the guest-physical addresses, if that is known."""

    def __init__(self, name: str, size_bytes: int, page_size_bytes: int) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.page_size_bytes = page_size_bytes

    @property
    def page_count(self) -> int:
        """Pages of the block's own size."""
        return self.size_bytes // self.page_size_bytes

    @property
    def target_pages_per_page(self) -> int:
        """How many pages of the wire make one page of this block."""
        return self.page_size_bytes // TARGET_PAGE_BYTES

    def target_pages(self, pages: Indices) -> Indices:
        """The pages of the wire that make these pages of the block's own size, in the same order."""
        per_page = self.target_pages_per_page
        if per_page == 1:
            return pages
        pieces: Indices = (pages[:, None] * per_page + np.arange(per_page)).reshape(-1)
        return pieces

    @abstractmethod
    def has_data(self, start: int, end: int) -> npt.NDArray[np.bool_]:
        """Tell which pages ``start`` to ``end`` may hold anything; the others are zero."""

    @abstractmethod
    def is_zero(self, page: int) -> bool:
        """Tell whether a page that may hold anything is zero nevertheless, as far as is known."""

    @abstractmethod
    def page(self, page: int) -> npt.NDArray[np.uint8]:
        """Give one page of the wire, shape ``(4096,)``, contiguous.

        :raises PostcopyError: it cannot be had.
        """

    @abstractmethod
    def gather(self, target: Indices) -> tuple[npt.NDArray[np.uint8], Indices]:
        """Give pages of the wire.

        :param target: pages that may hold anything.
        :return: rows of 4096 bytes, contiguous, and which row is which of ``target``.
        :raises PostcopyError: one of them cannot be had.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


_LEAST_WRITTEN_PAGES: Final = 16
"""Fewer are written through the mapping, wherever they are: to find out costs more."""


class RamBlock(PageBlock):
    """The memory of one block, mapped into the engine.

    No userfaultfd watches the engine's mapping: an access to :attr:`pages` never waits for a page that the
    engine itself would have to bring.

    :param region: what the guest's process says of it; ``region.fd`` becomes ours.
    """

    def __init__(self, region: Region) -> None:
        super().__init__(region.name, region.size_bytes, region.page_size_bytes)
        self.host_address = region.host_address
        self.physical_ranges = region.physical_ranges
        self._fd = region.fd
        self._fd_offset = region.fd_offset
        self._mapping = Mapping.shared(region.fd, region.size_bytes, region.fd_offset)
        # Of a tmpfs that gives out huge pages, and of hugetlbfs, that is the size of these.
        self._has_small_pages = os.fstat(region.fd).st_blksize == TARGET_PAGE_BYTES
        # The kernel lets one thread write to a file at a time: others would wait for it on a CPU.
        self._writing = threading.Lock()
        self.pages: npt.NDArray[np.uint8] = self._mapping.view().reshape(-1, TARGET_PAGE_BYTES)
        self._looking = threading.Lock()
        # Under the lock until it is made, with the first look at huge pages; None: not to be had here.
        self._file_pages: FilePages | None = None
        self._has_looked = False

    def within(self, start: int, end: int) -> tuple[int, int]:
        """Which pages lie within addresses of the guest's process: first and end, equal if none do."""
        size = self.page_size_bytes
        first = max(0, -((self.host_address - start) // size))
        return first, max(first, min(self.page_count, (end - self.host_address) // size))

    def move(self, source: int, destination: int, length_bytes: int) -> None:
        """The guest's process has moved what it had at ``source``, which may be this block.

        :raises GuestError: it was a part of the block.
        """
        end = self.host_address + self.size_bytes
        if end <= source or source + length_bytes <= self.host_address:
            return
        if source > self.host_address or source + length_bytes < end:
            raise GuestError(
                f"the guest's process has moved a part of RAM block '{self.name}' (mremap): only whole "
                "blocks can be served; move all of it"
            )
        self.host_address += destination - source

    def has_data(self, start: int, end: int) -> npt.NDArray[np.bool_]:
        """Tell which pages ``start`` to ``end`` have memory behind them; the others are zero.

        To read one of the others would allocate it: costly in a guest whose memory is mostly unused.
        The kernel tells at once which pages are in memory.  The others may be swapped out, or a hole, and
        are looked up run by run.

        Of huge pages :class:`postcopy.memory.file_pages.FilePages` tells; where that cannot be had, all
        count as if they were there.
        """
        size = self.page_size_bytes
        if self.target_pages_per_page > 1 and (files := self._pages_of_file()) is not None:
            return files.found(start, end)
        per_page = self.target_pages_per_page
        resident = self._mapping.resident(start * size, (end - start) * size)
        found: npt.NDArray[np.bool_] = resident
        if per_page > 1:
            found = np.logical_or.reduceat(resident, np.arange(0, len(resident), per_page))
        for first, last in runs(~found).tolist():
            base = self._fd_offset + start * size
            for begin, stop in memfd.data_ranges(self._fd, base + first * size, base + last * size):
                found[(begin - base) // size : -(-(stop - base) // size)] = True
        return found

    def is_zero(self, page: int) -> bool:
        """Tell whether a page is zero; its first words settle it for most that are not."""
        first = page * self.target_pages_per_page
        words = self.pages[first : first + self.target_pages_per_page].view(np.uint64)
        return not (words[:, 0].any() or words.any())

    def page(self, page: int) -> npt.NDArray[np.uint8]:
        """Give one page of the wire, as it is now."""
        contents: npt.NDArray[np.uint8] = self.pages[page]
        return contents

    def gather(self, target: Indices) -> tuple[npt.NDArray[np.uint8], Indices]:
        """Give all of the block: nothing is copied."""
        return self.pages, target

    def is_quick_to_touch(self, first: int, end: int) -> bool:
        """Tell whether no access to these pages of the wire makes the kernel allocate 4 KiB at a time.

        See :meth:`write_run`.
        """
        if not self._has_small_pages or end - first < _LEAST_WRITTEN_PAGES:
            return True
        where, length = first * TARGET_PAGE_BYTES, (end - first) * TARGET_PAGE_BYTES
        return bool(self._mapping.resident(where, length).all())

    def write_run(self, first: int, rows: npt.NDArray[np.uint8]) -> None:
        """Write neighbouring pages of the wire, from ``first`` on.

        Many that are not in memory are written to the file: the kernel then neither clears each nor maps it
        here, which takes longer than the copy (``docs/decisions``, 0041).

        :param rows: their contents, shape ``(n, 4096)``, each contiguous.
        :raises KernelError: the host has not so much memory.
        """
        if self.is_quick_to_touch(first, first + len(rows)):
            self.pages[first : first + len(rows)] = rows
            return
        pieces = np.empty((len(rows), 2), np.uint64)
        pieces[:, 0] = np.arange(len(rows)) * rows.strides[0]
        pieces[:, 0] += np.uint64(rows.__array_interface__["data"][0])
        pieces[:, 1] = TARGET_PAGE_BYTES
        if rows.strides[0] == TARGET_PAGE_BYTES:
            pieces = np.array([[pieces[0, 0], rows.nbytes]], np.uint64)
        left, position = PendingPieces(pieces), self._fd_offset + first * TARGET_PAGE_BYTES
        where = f"{len(rows)} pages of RAM block '{self.name}'"
        with self._writing:
            while left:
                position += calls.of_python("pwritev", where, left.write_at, self._fd, position)

    def discard(self, start: int, end: int) -> None:
        """Free the pages ``start`` to ``end`` (not included), so that a touch finds them missing."""
        memfd.punch_hole(
            self._fd,
            self._fd_offset + start * self.page_size_bytes,
            (end - start) * self.page_size_bytes,
        )

    def empty(self) -> None:
        """Free all pages; costs nothing if there are none."""
        memfd.empty(self._fd, self._fd_offset, self.size_bytes)

    def populate(self, offset_bytes: int, length_bytes: int) -> None:
        """Allocate memory now, so that the first touch of a page costs nothing later."""
        self._mapping.populate(offset_bytes, length_bytes)

    def _pages_of_file(self) -> FilePages | None:
        with self._looking:
            if not self._has_looked:
                self._has_looked = True
                with suppress(HostCannot, KernelError):
                    self._file_pages = FilePages(
                        self._fd, self.size_bytes, self.page_size_bytes, self._fd_offset
                    )
        return self._file_pages

    def close(self) -> None:
        """Unmap and close; the guest keeps its memory."""
        if self._file_pages is not None:
            self._file_pages.close()
        self.pages = np.empty((0, TARGET_PAGE_BYTES), np.uint8)
        self._mapping.close()
        os.close(self._fd)
