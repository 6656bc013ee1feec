"""Where the pages of one RAM block come from: an image, page by page or in runs."""

from collections.abc import Callable

import numpy as np

from postcopy.errors import ImageError
from postcopy.image.base import Image, PageRows
from postcopy.image.chunk_verifier import ChunkVerifier
from postcopy.image.digests import CHUNK_BYTES
from postcopy.image.mapped_ram import MappedImage
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, PageBlock
from postcopy.memory.runs import Indices, Mask


class ImagePageSource:
    """One block of an image, in pages of the size of the guest's.

    :param check: what every page is checked by before it is used; None: pages are taken as they are,
        or check themselves when they are read.
    """

    def __init__(self, image: Image, block: PageBlock, check: ChunkVerifier | None = None) -> None:
        self._image = image
        self._name = block.name
        self._per_page = block.target_pages_per_page
        self._check = check
        self._data: Mask | None = None
        self._rows: PageRows | None = None
        self._why = ""
        self._mapped = image if isinstance(image, MappedImage) else None
        bits = image.bits(block.name)
        # Pages of 2 MiB are put together: the file may hold old bytes where a page is zero now.
        self._bits = bits if self._per_page == 1 else None
        self.base = image.address(block.name) if self._per_page == 1 else 0
        """Where page 0 lies in this process, for the kernel to copy from; 0: nowhere."""

    @property
    def data(self) -> Mask:
        """Which pages have anything in them; the others are zero.

        Found out when it is first asked for: opening an image costs the same whatever its size.
        """
        if self._data is None:
            found = self._image.has_data(self._name)
            if self._per_page > 1:
                starts = np.arange(0, len(found), self._per_page)
                found = np.logical_or.reduceat(found, starts)
            self._data = found
        return self._data

    def has(self, page: int) -> bool:
        """Whether a page has anything in it: the short way for one that a thread waits for."""
        if self._bits is not None:
            return bool(self._bits[page >> 3] >> (page & 7) & 1)
        return bool(self.data[page])

    def has_data(self, first: int, end: int) -> Mask:
        """Which of these pages have anything in them, at a cost that does not depend on the others."""
        if self._bits is None:
            return self.data[first:end]
        bits = np.unpackbits(self._bits[first >> 3 : -(-end >> 3)], bitorder="little")
        return bits.view(np.bool_)[first & 7 : (first & 7) + end - first]

    def is_good(self, page: int) -> bool:
        """Tell whether a page at a fixed place may be used: the short way for a fault."""
        if self._check is not None and not self._check.is_good(self._name, page):
            return False
        return self._mapped is None or page < self._mapped.whole_pages(self._name)

    def good(self, page: int, count: int) -> int:
        """Check pages that are to be used; return how many from ``page`` on are good."""
        if self.base and self._mapped is not None:
            # What is left of a page in which the file has been cut off reads as if zeros followed.
            count = max(0, min(count, self._mapped.whole_pages(self._name) - page))
        if self._check is None:
            return count
        first, pages = page * self._per_page, count * self._per_page
        good = self._check.good(self._name, first, pages)
        return count if good.all() else int(good.argmin()) // self._per_page

    def read_good(self, wanted: Indices) -> tuple[PageRows, Mask] | None:
        """Read pages at fixed places that lie near to each other, and check them.

        :param wanted: ascending, at least one.
        :return: all pages from the first to the last of ``wanted``, as rows of 4096 bytes; and which of
            ``wanted`` are good.  None: the pages of this image have no fixed places, or are of another
            size.
        :raises ImageError: they cannot be read all at once.
        """
        if self._mapped is None or self._per_page > 1:
            return None
        if self._check is not None:
            return self._check.read(self._name, wanted)
        rows = np.empty((int(wanted[-1] - wanted[0]) + 1, TARGET_PAGE_BYTES), np.uint8)
        self._mapped.read_into(self._name, int(wanted[0]), rows)
        return rows, np.ones(len(wanted), np.bool_)

    def look_ahead(self, wanted: Mask, ended: Callable[[], bool]) -> None:
        """Check pages that will be used, on a thread beside the one that uses them.

        :param wanted: these.
        :param ended: whether to leave the rest to that thread.
        """
        if self._check is not None:
            pages = np.repeat(wanted & self.data, self._per_page)
            self._check.look_ahead(self._name, pages, ended)

    def address(self, page: int, count: int) -> tuple[int, int]:
        """Give pages in this process's memory; they are there up to the next call.

        :return: their address, and how many they are: at least one.
        :raises ImageError: the first of them cannot be had.
        """
        if self.base:
            return self.base + page * TARGET_PAGE_BYTES, count
        try:
            self._rows = self.read(page, count)
        except ImageError as error:
            if count == 1:
                self._why = str(error)
                raise
            count = 1
            return self.address(page, count)
        return int(self._rows.ctypes.data), count

    def read(self, page: int, count: int) -> PageRows:
        """Read pages, as rows of 4096 bytes; they hold up to the next call.

        :raises ImageError: they cannot be had.
        """
        return self._image.read(self._name, page * self._per_page, count * self._per_page)

    def bad(self, page: int) -> tuple[int, int]:
        """Give the pages that are lost together with ``page``: the first, and the end.

        Into whichever of them a bad chunk reaches; one of 2 MiB lies on many chunks.
        """
        if self._check is None or self._mapped is None:
            return page, page + 1
        at, count = page * self._per_page, self._per_page
        wrong = np.flatnonzero(~self._check.good(self._name, at, count))
        if not len(wrong):
            wrong = np.zeros(1, np.int64)  # it cannot be read: nor, most likely, what is around it
        start, page_bytes = self._mapped.place(self._name).pages_offset, count * TARGET_PAGE_BYTES
        chunk, last = ((start + (at + wrong[[0, -1]]) * TARGET_PAGE_BYTES) // CHUNK_BYTES).tolist()
        first = max(0, chunk * CHUNK_BYTES - start) // page_bytes
        end = -(-((last + 1) * CHUNK_BYTES - start) // page_bytes)
        return first, min(end, len(self.data))

    def reason(self, page: int) -> str:
        """Say why a page cannot be had: file, block and offset."""
        if self._check is not None and self._mapped is not None:
            offset = self._mapped.place(self._name).pages_offset
            offset += page * self._per_page * TARGET_PAGE_BYTES
            for damage in self._check.damages():
                if damage.offset < offset + self._per_page * TARGET_PAGE_BYTES and (
                    offset < damage.offset + damage.length_bytes
                ):
                    return str(damage.error())
        why = self._why
        try:
            self.read(page, 1)
        except ImageError as error:
            why = str(error)
        where = f"block {self._name} from offset {page * self._per_page * TARGET_PAGE_BYTES:#x} on"
        return f"{why or f'{self._image.path}: cannot be read'}: {where}"
