"""RAM's START section: the list of the blocks that the source has.

The list has no count.  It begins with the sum of all sizes, and ends where they add up to it.  QEMU
reads on when they do not, and takes pages for names; here that is an error.

What an entry consists of depends on what both sides have agreed on: :class:`EntryForm`.
"""

import struct
from dataclasses import dataclass

from postcopy.stream.configuration import encode_name
from postcopy.stream.layout import Receiver
from postcopy.stream.numbers import (
    FLAGS_MASK,
    RAM_SECTION_NAME,
    RAM_SECTION_VERSION,
    TARGET_PAGE_BYTES,
    RamFlag,
    SectionType,
    refuse_flags,
)
from postcopy.stream.reader import StreamBuffer
from postcopy.stream.records import BlockEntry, RamSetup


@dataclass(frozen=True, slots=True)
class EntryForm:
    """Which of the optional fields an entry has.

    ``page_sizes``: RAM postcopy was advised, so blocks of huge pages say so.  ``addresses``: the
    capability ``x-ignore-shared`` is on.  In a mapped-ram file each entry goes on with a header
    (:mod:`postcopy.stream.mapped_ram`), and the next stands behind the block's pages.
    """

    page_sizes: bool = False
    addresses: bool = False


def encode_block_list(setup: RamSetup, form: EntryForm) -> bytes:
    """Write RAM's START section whole, from type byte to footer."""
    parts = [
        encode_list_start(setup.section_id, sum(block.size_bytes for block in setup.blocks)),
        *(_encode_entry(block, form) for block in setup.blocks),
        struct.pack(">Q", RamFlag.MULTIFD_FLUSH) if setup.multifd_flush else b"",
        encode_list_end(setup.section_id),
    ]
    return b"".join(parts)


def encode_list_start(section_id: int, total_bytes: int) -> bytes:
    """Write RAM's START section up to the entry of the first block.

    :param total_bytes: the sum of the blocks' sizes.
    """
    return (
        struct.pack(">BI", SectionType.START, section_id)
        + encode_name(RAM_SECTION_NAME)
        + struct.pack(">IIQ", 0, RAM_SECTION_VERSION, total_bytes | RamFlag.MEM_SIZE)
    )


def encode_list_end(section_id: int) -> bytes:
    """Write what of RAM's START section follows the last entry."""
    return struct.pack(">QBI", RamFlag.EOS, SectionType.FOOTER, section_id)


def _encode_entry(block: BlockEntry, form: EntryForm) -> bytes:
    entry = encode_name(block.name) + struct.pack(">Q", block.size_bytes)
    if form.page_sizes and block.page_size_bytes not in {None, TARGET_PAGE_BYTES}:
        entry += struct.pack(">Q", block.page_size_bytes)
    if form.addresses:
        entry += struct.pack(">Q", block.guest_address or 0)
    return entry


def read_block_list(
    reader: StreamBuffer, receiver: Receiver, form: EntryForm, *, multifd: bool = False
) -> tuple[tuple[BlockEntry, ...], bool]:
    """Read the body of the section from the total to its EOS.

    :param multifd: a flush of multifd's channels may stand behind the blocks.
    :return: the blocks, and whether there is such a flush.
    :raises StreamError: the blocks are not the receiver's, or do not add up.
    """
    blocks = BlockList(receiver, form, read_total(reader))
    while not blocks.complete:
        blocks.add(reader, blocks.read_entry(reader))
    return blocks.end(reader, multifd=multifd), blocks.multifd_flush


def read_total(reader: StreamBuffer) -> int:
    """Read what the sizes of the blocks must add up to, in bytes."""
    word = reader.u64()
    if word & FLAGS_MASK != RamFlag.MEM_SIZE:
        refuse_flags(reader, word & FLAGS_MASK)
    return word & ~FLAGS_MASK


class BlockList:
    """A list that is being read, entry by entry."""

    def __init__(self, receiver: Receiver, form: EntryForm, total_bytes: int) -> None:
        self._receiver = receiver
        self._form = form
        self._total = self._left = total_bytes
        self._blocks: dict[str, BlockEntry] = {}
        self.multifd_flush = False

    @property
    def complete(self) -> bool:
        """The sizes add up; what follows is the end of the list."""
        return not self._left

    def read_entry(self, reader: StreamBuffer) -> BlockEntry:
        """Read the next entry, without adding it yet."""
        return _read_entry(reader, self._receiver, self._form, self._total)

    def add(self, reader: StreamBuffer, block: BlockEntry) -> None:
        """Add what has been read, whole."""
        if block.name in self._blocks:
            reader.fail(f'RAM block "{block.name}" is listed twice')
        self._blocks[block.name] = block
        self._left -= block.size_bytes
        if self._left < 0:
            added = self._total - self._left
            reader.fail(f"RAM blocks add up to {added:#x} bytes, not {self._total:#x}")

    def end(self, reader: StreamBuffer, *, multifd: bool = False) -> tuple[BlockEntry, ...]:
        """Read the end of the list, and with multifd the flush before it, which may be missing."""
        if missing := self._receiver.layout.keys() - self._blocks.keys():
            reader.fail(f'RAM block "{min(missing)}" of this side is not in the list')
        word = reader.u64()
        self.multifd_flush = multifd and word == RamFlag.MULTIFD_FLUSH
        if self.multifd_flush:
            word = reader.u64()
        if word != RamFlag.EOS:
            refuse_flags(reader, word & FLAGS_MASK)
        return tuple(self._blocks.values())


def _read_entry(
    reader: StreamBuffer, receiver: Receiver, form: EntryForm, total: int
) -> BlockEntry:
    name = reader.name()
    if not name:  # the first byte of the EOS record: the list has ended too early
        reader.fail(f"RAM blocks add up to less than the {total:#x} bytes promised", 1)
    local = receiver.layout.get(name)
    if local is None and name not in receiver.ignored_blocks:
        reader.fail(f'Unknown ramblock "{name}", cannot accept migration', len(name.encode()))
    size = reader.u64()
    if local is not None and size != local.size_bytes:
        reader.fail(
            f"Size mismatch: {name}: {size:#x} != {local.size_bytes:#x}: Invalid argument", 8
        )
    page_size = None
    if form.page_sizes and local is not None and local.page_size_bytes != TARGET_PAGE_BYTES:
        page_size = reader.u64()
        if page_size != local.page_size_bytes:
            reader.fail(
                f"Mismatched RAM page size {name} (local) {local.page_size_bytes} != {page_size}", 8
            )
    address = reader.u64() if form.addresses else None
    return BlockEntry(name, size, page_size, address)
