"""What a guest's memory was at its reset point, block by block: a copy, or an image's file.

The copy is in a memfd that the guest's process keeps, so that it outlives engines.  An image whose pages
lie at fixed places needs none: they are read from its file.
"""

from typing import Protocol

from postcopy.guest import Region
from postcopy.image.base import Image, PageRows
from postcopy.image.mapped_ram import MappedImage
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, RamBlock
from postcopy.memory.runs import Mask, runs


class PointMemory(Protocol):
    """The pages of one block as they were; counted in pages of 4 KiB."""

    def data(self) -> Mask:
        """Which pages have anything in them; the others are zero."""

    def put_back(self, pages: PageRows, first: int, end: int) -> None:
        """Write what ``first`` to ``end`` (not included) held into the block's ``pages``.

        :raises ImageError: it cannot be read.
        """

    def close(self) -> None:
        """Unmap."""


class KeptMemory:
    """A copy of one block.

    :param fd: a memfd of the block's size; ours from now on.
    """

    def __init__(self, block: RamBlock, fd: int) -> None:
        self._copy = RamBlock(Region(block.name, block.size_bytes, TARGET_PAGE_BYTES, 0, 0, fd))

    def keep(self, pages: PageRows, first: int, end: int) -> None:
        """Copy pages of the block."""
        self._copy.pages[first:end] = pages[first:end]

    def fill(self, image: Image) -> None:
        """Copy what an image has of the block."""
        step = (4 << 20) // TARGET_PAGE_BYTES
        for start, stop in runs(image.has_data(self._copy.name)).tolist():
            for first in range(start, stop, step):
                rows = image.read(self._copy.name, first, min(step, stop - first))
                self._copy.pages[first : first + len(rows)] = rows

    def data(self) -> Mask:
        """See :class:`PointMemory`."""
        return self._copy.has_data(0, self._copy.page_count)

    def put_back(self, pages: PageRows, first: int, end: int) -> None:
        """See :class:`PointMemory`.  What was never there is a hole of the memfd, and reads as zeros."""
        pages[first:end] = self._copy.pages[first:end]

    def close(self) -> None:
        """See :class:`PointMemory`."""
        self._copy.close()


class MappedMemory:
    """One block of an image whose pages lie at fixed places.

    :param block: its name.
    """

    def __init__(self, image: MappedImage, block: str) -> None:
        self._image = image
        self._block = block
        self._data = image.has_data(block)

    def data(self) -> Mask:
        """See :class:`PointMemory`."""
        return self._data

    def put_back(self, pages: PageRows, first: int, end: int) -> None:
        """See :class:`PointMemory`."""
        data = self._data[first:end]
        if data.all():
            self._image.read_into(self._block, first, pages[first:end])
            return
        for start, stop in (first + runs(data)).tolist():
            self._image.read_into(self._block, start, pages[start:stop])
        for start, stop in (first + runs(~data)).tolist():
            pages[start:stop] = 0

    def close(self) -> None:
        """See :class:`PointMemory`; the file is the image's to close."""
