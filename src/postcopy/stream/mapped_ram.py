"""RAM at fixed places in a file: QEMU's ``mapped-ram``.

Source: QEMU's ``docs/devel/migration/mapped-ram.rst``.  Such a file is a stream of which the list of RAM
blocks is spread out: behind each block's entry stand its header, its bitmap and its pages::

      ├ name, size, header ┤ bitmap ├ gap ┤ page 0 ... page n-1 ├ the next entry, or the end of the list
                                          ▲ a multiple of 1 MiB

Page ``i`` is at ``pages_offset + i * page_bytes`` if its bit is set.  If it is not, the page is zero, and
its place may be a hole or hold what the page once was.  The bitmap is in 64-bit words of little endian.
All offsets count from the start of the file, wherever in it the stream begins.
"""

import struct
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from postcopy.errors import StreamCut, StreamError
from postcopy.stream.configuration import encode_name
from postcopy.stream.file_records import MappedBlock, bitmap_bytes
from postcopy.stream.numbers import LONGEST_NAME, TARGET_PAGE_BYTES
from postcopy.stream.reader import BytesLike, Incomplete, StreamBuffer

__all__ = (
    "CAPABILITY",
    "HEADER_VERSION",
    "PAGES_ALIGNMENT_BYTES",
    "MappedBlock",
    "bitmap_bytes",
    "decode_bitmap",
    "encode_bitmap",
    "encode_entry",
    "lay_out",
    "read_list",
    "read_mapped_header",
)

CAPABILITY = "mapped-ram"
"""What the configuration section of such a file names."""

HEADER_VERSION = 1
PAGES_ALIGNMENT_BYTES = 1 << 20

_HEADER = struct.Struct(">IQQQ")
_LONGEST_ENTRY_BYTES = 1 + LONGEST_NAME + 8 + _HEADER.size

_Present = npt.NDArray[np.bool_]


def lay_out(blocks: Sequence[tuple[str, int]], list_offset: int) -> tuple[list[MappedBlock], int]:
    """Decide where everything goes.

    :param blocks: name and size in bytes of each, in the order of the list.
    :param list_offset: where in the file the entry of the first is to begin.
    :return: the blocks, and where the end of the list (its EOS record) belongs.
    """
    laid_out = []
    offset = list_offset
    for name, size_bytes in blocks:
        header_offset = offset + len(encode_name(name)) + 8
        bitmap_offset = header_offset + _HEADER.size
        bitmap_end = bitmap_offset + bitmap_bytes(size_bytes // TARGET_PAGE_BYTES)
        pages_offset = -(-bitmap_end // PAGES_ALIGNMENT_BYTES) * PAGES_ALIGNMENT_BYTES
        block = MappedBlock(
            name, size_bytes, TARGET_PAGE_BYTES, header_offset, bitmap_offset, pages_offset
        )
        laid_out.append(block)
        offset = block.end_offset
    return laid_out, offset


# --- writing


def encode_entry(block: MappedBlock) -> bytes:
    """Write a block's entry in the list: name, size and header; the bitmap's place is right behind."""
    header = _HEADER.pack(HEADER_VERSION, block.page_bytes, block.bitmap_offset, block.pages_offset)
    return encode_name(block.name) + struct.pack(">Q", block.size_bytes) + header


def encode_bitmap(present: _Present) -> bytes:
    """Write a bitmap.

    :param present: for each page whether it is in the file, shape ``(page_count,)``.
    """
    packed = np.packbits(present, bitorder="little").tobytes()
    return packed.ljust(bitmap_bytes(len(present)), b"\0")


# --- reading


def decode_bitmap(block: MappedBlock, raw: BytesLike) -> _Present:
    """Read a bitmap: which pages are in the file, shape ``(page_count,)``.

    :param raw: the ``block.bitmap_bytes`` bytes at ``block.bitmap_offset``.
    :raises StreamError: they are fewer, or tell of pages that the block does not have.
    """
    if len(raw) != block.bitmap_bytes:
        raise StreamCut(f"The file ends in the bitmap of {block.name}", block.bitmap_offset)
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little").view(np.bool_)
    if bits[block.page_count :].any():
        raise StreamError(
            f"the bitmap of {block.name} has bits behind the last page", block.bitmap_offset
        )
    return bits[: block.page_count]


def read_mapped_header(
    reader: StreamBuffer, name: str, size_bytes: int, file_bytes: int
) -> MappedBlock:
    """Read the header that follows a block's name and size.

    :param reader: its positions are those in the file.
    :param file_bytes: the size of the file; nothing may lie beyond.
    :raises StreamError: what it says cannot be.
    """
    at = reader.position
    reader.need(_HEADER.size)
    version = reader.u32()
    if version != HEADER_VERSION:
        reader.fail(f"{name}: mapped-ram header of version {version}; only 1 is known", 4)
    page_bytes = reader.u64()
    if page_bytes != TARGET_PAGE_BYTES:
        reader.fail(f"{name}: pages of {page_bytes} bytes; only {TARGET_PAGE_BYTES} are known", 8)
    bitmap_offset, pages_offset = reader.u64(), reader.u64()
    block = MappedBlock(name, size_bytes, page_bytes, at, bitmap_offset, pages_offset)
    complaint = _complaint(block, reader.position, file_bytes)
    if complaint is not None:
        raise StreamError(f"{name}: {complaint}", at)
    return block


def _complaint(block: MappedBlock, header_end: int, file_bytes: int) -> str | None:
    bitmap_end = block.bitmap_offset + block.bitmap_bytes
    if not block.size_bytes or block.size_bytes % block.page_bytes:
        return f"{block.size_bytes:#x} bytes are no whole number of pages"
    if block.bitmap_offset < header_end:
        return f"its bitmap at {block.bitmap_offset:#x} would overlap its header"
    if block.pages_offset < bitmap_end:
        return f"its pages at {block.pages_offset:#x} would overlap its bitmap"
    if block.pages_offset % block.page_bytes:
        return f"its pages at {block.pages_offset:#x} are not aligned"
    if block.end_offset > file_bytes:
        return (
            f"its pages at {block.pages_offset:#x} would end at {block.end_offset:#x}, beyond the "
            f"file of {file_bytes:#x} bytes"
        )
    return None


def read_list(
    read: Callable[[int, int], BytesLike], list_offset: int, total_bytes: int, file_bytes: int
) -> tuple[list[MappedBlock], int]:
    """Read the list of blocks of a file in which one can go to any place.

    Whether the blocks are those of some machine is for the caller to say.

    :param read: gives so many bytes from an offset in the file on, or as many as there are.
    :param list_offset: where the entry of the first block begins.
    :param total_bytes: what the sizes have to add up to.
    :return: the blocks, and where the end of the list (its EOS record) must be.
    :raises StreamError: the list is wrong, with the offset in the file.
    """
    blocks: dict[str, MappedBlock] = {}
    left, offset = total_bytes, list_offset
    while left > 0:
        block = _read_entry(read, offset, file_bytes)
        if block.name in blocks:
            raise StreamError(f'RAM block "{block.name}" is listed twice', offset)
        blocks[block.name] = block
        left -= block.size_bytes
        if left < 0:
            raise StreamError(
                f"RAM blocks add up to {total_bytes - left:#x} bytes, not {total_bytes:#x}", offset
            )
        offset = block.end_offset
    return list(blocks.values()), offset


def _read_entry(read: Callable[[int, int], BytesLike], offset: int, file_bytes: int) -> MappedBlock:
    reader = StreamBuffer(2 * _LONGEST_ENTRY_BYTES, offset)
    reader.feed(read(offset, _LONGEST_ENTRY_BYTES))
    try:
        name = reader.name()
        if not name:  # the first byte of the EOS record: the list has ended too early
            reader.fail("RAM blocks add up to less than was promised", 1)
        return read_mapped_header(reader, name, reader.u64(), file_bytes)
    except Incomplete:
        raise StreamCut("The file ends in the list of RAM blocks", offset) from None
