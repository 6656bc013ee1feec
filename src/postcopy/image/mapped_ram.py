"""A mapped-ram file as an image: pages lie at fixed offsets, so the file need not be searched.

Opening reads the head, the list of blocks and the devices behind the memory: the same work for 8 GiB as
for 256 MiB.  The bitmap of a block is read at its first use.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from postcopy.errors import StreamError
from postcopy.image.base import Image, ImageBlock, PageRows
from postcopy.image.file import ImageFile
from postcopy.image.parser import read_elements, read_start
from postcopy.memory.runs import Mask, runs
from postcopy.stream.mapped_ram import MappedBlock, decode_bitmap, read_list
from postcopy.stream.numbers import TARGET_PAGE_BYTES, RamFlag, refuse_flags
from postcopy.stream.reader import FileBuffer


class MappedRam:
    """Reads the memory's sections: see :class:`postcopy.image.parser.RamReader`."""

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self.blocks: dict[str, MappedBlock] = {}

    def read_blocks(
        self, reader: FileBuffer, total_bytes: int, page_sizes: int
    ) -> list[ImageBlock]:
        """See :meth:`postcopy.image.parser.RamReader.read_blocks`."""
        if page_sizes:
            reader.fail("postcopy is advised in a mapped-ram file")
        mapped, end = read_list(self._bytes, reader.position, total_bytes, self._file.size_bytes)
        self.blocks = {block.name: block for block in mapped}
        reader.seek(end)
        return [ImageBlock(block.name, block.size_bytes) for block in mapped]

    def _bytes(self, offset: int, count: int) -> memoryview:
        return self._file.read(offset, count).data

    def read_body(self, reader: FileBuffer) -> None:
        """See :meth:`postcopy.image.parser.RamReader.read_body`."""
        # A live guest leaves long chains of such sections, all of them empty.
        if (word := reader.u64()) != RamFlag.EOS:
            refuse_flags(reader, word & (TARGET_PAGE_BYTES - 1))


class MappedImage(Image):
    """A mapped-ram file.

    :raises StreamError: the file is not valid.
    :raises Incomplete: the file is truncated.
    """

    def __init__(self, path: Path, file: ImageFile, reader: FileBuffer) -> None:
        ram = MappedRam(file)
        contents = read_elements(reader, read_start(reader), ram)
        if not contents.ram_ended:
            # QEMU 10 writes the bitmaps with the last section, and a background snapshot has none.
            reader.fail(
                "the bitmaps were never written, as when QEMU takes a background snapshot with "
                "mapped-ram: this image has lost the memory; take a stream"
            )
        super().__init__(path, "mapped-ram", contents)
        self._file = file
        self._places = ram.blocks
        self._bitmaps: dict[str, npt.NDArray[np.uint8]] = {}

    @property
    def file(self) -> ImageFile:
        """The file."""
        return self._file

    def place(self, block_name: str) -> MappedBlock:
        """Return where in the file a block lies.

        :raises KeyError: there is no such block.
        """
        return self._places[block_name]

    def has_data(self, block_name: str) -> Mask:
        """See :meth:`Image.has_data`.

        :raises ImageError: the bitmap has bits for pages that there are not, or cannot be read.
        """
        try:
            return decode_bitmap(self._places[block_name], self.bits(block_name).data)
        except StreamError as error:
            raise self.fail(error.message, error.offset) from error

    def bits(self, block_name: str) -> npt.NDArray[np.uint8]:
        """See :meth:`Image.bits`; they are read once, and stay valid when the file has gone."""
        bitmap = self._bitmaps.get(block_name)
        if bitmap is None:
            block = self._places[block_name]
            bitmap = self._file.read(block.bitmap_offset, block.bitmap_bytes)
            self._bitmaps[block_name] = bitmap
        return bitmap

    def address(self, block_name: str) -> int:
        """See :meth:`Image.address`."""
        return self._file.address + self._places[block_name].pages_offset

    def whole_pages(self, block_name: str) -> int:
        """Return how many pages of a block the file still has, if it has been truncated since."""
        block = self._places[block_name]
        there = (self._file.current_bytes - block.pages_offset) // TARGET_PAGE_BYTES
        return max(0, min(there, block.page_count))

    def read_into(self, block_name: str, first: int, rows: PageRows) -> None:
        """Read pages as they lie in the file, whether they have data or not.

        :param rows: the destination, contiguous, shape ``(pages, 4096)``.
        :raises ImageError: one of them cannot be read.
        """
        start = self._places[block_name].pages_offset + first * TARGET_PAGE_BYTES
        self._file.read_into(start, rows)

    def locate(self, start: int, end: int) -> tuple[str, int] | None:
        """See :meth:`Image.locate`."""
        for block in self._places.values():
            if start < block.end_offset and block.pages_offset < end:
                return block.name, max(start - block.pages_offset, 0)
        return None

    def fixed_pages(self) -> list[tuple[int, int]]:
        """See :meth:`Image.fixed_pages`."""
        return [(block.pages_offset, block.end_offset) for block in self._places.values()]

    def _copy(self, block: ImageBlock, first: int, rows: PageRows) -> None:
        bits = self.bits(block.name)[first // 8 : -(-(first + len(rows)) // 8)]
        every = np.unpackbits(bits, bitorder="little").view(np.bool_)
        mask = every[first % 8 : first % 8 + len(rows)]
        for start, stop in runs(mask).tolist():
            self.read_into(block.name, first + start, rows[start:stop])

    def close(self) -> None:
        """See :meth:`Image.close`."""
        self._file.close()
