"""The decoder of a mapped-ram file: a stream that leaves out the pages.

Where the list of blocks comes to a block's bitmap and pages, :class:`MappedBlock` is given out, and the
decoder wants to be fed from behind them on.
"""

from collections.abc import Collection

from postcopy.stream.block_list import BlockList, EntryForm, read_total
from postcopy.stream.decoder import Decoder
from postcopy.stream.layout import DeviceFormats, Expected, Layout, Limits
from postcopy.stream.mapped_ram import read_mapped_header
from postcopy.stream.numbers import (
    FLAGS_MASK,
    HEADER_BYTES,
    RAM_SECTION_NAME,
    RamFlag,
)
from postcopy.stream.records import MappedBlock, RamSetup
from postcopy.stream.sections import SectionHead, read_footer


class MappedDecoder(Decoder):
    """As :class:`Decoder`, but its positions, in errors too, are those in the file.

    Behind a :class:`MappedBlock`, what is fed must be the bytes of the file from its end on.

    :param expect: names mapped-ram among the capabilities.
    :param start_offset: byte of the file at which the stream begins.
    :param file_bytes: the size of the file.
    """

    _takes_mapped_ram = True

    def __init__(
        self,
        devices: DeviceFormats,
        layout: Layout,
        *,
        expect: Expected,
        start_offset: int,
        file_bytes: int,
        limits: Limits | None = None,
        ignored_blocks: Collection[str] = (),
    ) -> None:
        super().__init__(
            devices, layout, expect=expect, limits=limits, ignored_blocks=ignored_blocks
        )
        self._reader.jump(start_offset)
        self._file_bytes = file_bytes
        self._list: tuple[SectionHead, BlockList] | None = None

    def _read_setup(self) -> None:
        head = self._read_ram_head()
        form = EntryForm(addresses="x-ignore-shared" in self._expect.capabilities)
        self._list = head, BlockList(self._receiver, form, read_total(self._reader))
        self._next(self._read_list, "the list of RAM blocks")

    def _read_list(self) -> MappedBlock | RamSetup:
        assert self._list is not None
        reader = self._reader
        head, blocks = self._list
        if blocks.complete:
            entries = blocks.end(reader)
            read_footer(reader, head.name, head.section_id)
            self._ram_section_id = head.section_id
            self._next(self._read_element, "an element")
            return RamSetup(head.section_id, entries)
        entry = blocks.read_entry(reader)
        block = read_mapped_header(reader, entry.name, entry.size_bytes, self._file_bytes)
        blocks.add(reader, entry)
        reader.jump(block.end_offset)
        return block

    def _read_ram(self) -> None:
        word = self._reader.u64()
        if word != RamFlag.EOS:
            flags = word & FLAGS_MASK
            self._reader.fail(
                f"{RAM_SECTION_NAME}: a record (flags {flags:#x}) where all pages have places",
                HEADER_BYTES,
            )
        self._next(self._end_body, "the footer of a section of ram")
