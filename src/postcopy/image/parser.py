"""Reads the elements of an image from start to end; formats differ only in the place of the pages.

FULL sections have no length.  The description at the end of the file has it, so it is read first, from the
end; sections that it does not name are those of our own machine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeAlias

from postcopy.errors import StreamError
from postcopy.image.base import LARGEST_RAM_BYTES, Contents, ImageBlock
from postcopy.stream.configuration import read_any_configuration, read_header
from postcopy.stream.description import (
    DESCRIPTION_HEAD_BYTES,
    DescribedFormats,
    description_at_end,
    parse_description,
)
from postcopy.stream.file_records import Configuration, DeviceSection
from postcopy.stream.layout import Limits
from postcopy.stream.numbers import (
    FLAGS_MASK,
    HEADER_BYTES,
    RAM_SECTION_NAME,
    TARGET_PAGE_BYTES,
    Command,
    RamFlag,
    SectionType,
    refuse_flags,
)
from postcopy.stream.reader import FileBuffer
from postcopy.stream.sections import check_ram_head, read_device, read_footer, read_head

_LIMITS = Limits()
_ADVISE_BYTES = 16
_LARGEST_PAGE_BYTES = 1 << 30
# The commands that an image may have, and their lengths.  All others need a module that takes long to
# import.
_HARMLESS: dict[int, int] = {
    Command.OPEN_RETURN_PATH: 0,
    Command.PING: 4,
    Command.SWITCHOVER_START: 0,
}
_WITH_BODIES = frozenset(
    {SectionType.START, SectionType.PART, SectionType.END, SectionType.COMMAND}
)
_TAILS = (64 << 10, 1 << 20, _LIMITS.description_bytes + DESCRIPTION_HEAD_BYTES)


Note: TypeAlias = Callable[[int, SectionType, DeviceSection | None], None]


class RamReader(Protocol):
    """The part of a format that reads the sections of the memory."""

    def read_blocks(
        self, reader: FileBuffer, total_bytes: int, page_sizes: int
    ) -> list[ImageBlock]:
        """Read the list of blocks behind the total, up to its EOS.

        :param page_sizes: the bitwise or of the sizes of huge pages that blocks may have; 0: none.
        :raises StreamError: the list is not valid.
        """

    def read_body(self, reader: FileBuffer) -> None:
        """Read the body of a PART or END section with its EOS.

        :raises StreamError: the body is not valid.
        """


@dataclass(slots=True)
class _Found:
    blocks: tuple[ImageBlock, ...] | None = None
    section_id: int = 0
    ended: bool = False
    early: int = 0
    page_sizes: int = 0  # of huge pages, as postcopy was advised
    sections: list[DeviceSection] = field(default_factory=list)


class ImageFormats:
    """Lengths of sections: from the description, or else as our own machine writes them."""

    def __init__(self, description: Mapping[str, Any] | None) -> None:
        self._described = None if description is None else DescribedFormats(description)

    def payload_length(
        self, name: str, instance: int, version: int, data: memoryview
    ) -> int | None:
        """See :class:`postcopy.stream.layout.DeviceFormats`."""
        if self._described is not None and self._described.has(name, instance):
            return self._described.payload_length(name, instance, version, data)
        from postcopy.machine.device_formats import FORMATS  # few images need them

        return FORMATS.payload_length(name, instance, version, data)


def read_start(reader: FileBuffer) -> Configuration:
    """Read header and configuration.

    :raises StreamError: the file is no stream, or its memory is not in the file.
    """
    read_header(reader)
    configuration = read_any_configuration(reader)
    if "x-ignore-shared" in configuration.capabilities:
        reader.fail("written with x-ignore-shared: shared memory is not in the file")
    return configuration


def ignore(offset: int, element: SectionType, section: DeviceSection | None) -> None:
    """Stand in for what :func:`read_elements` tells of each element."""


def read_elements(
    reader: FileBuffer, configuration: Configuration, ram: RamReader, note: Note = ignore
) -> Contents:
    """Read everything behind the configuration, to the end of the file.

    :param note: called for each element with its offset: for a FULL section with that, for any other
        element before its body is read.
    :raises StreamError: the file is not valid.
    :raises Incomplete: the file is truncated.
    """
    text, end = find_description(reader)
    try:
        formats = formats_of(text)
    except StreamError as error:
        raise StreamError(error.message, end + DESCRIPTION_HEAD_BYTES) from error
    found = _Found()
    while (kind := _next_type(reader)) != SectionType.EOF:
        offset = reader.position - 1
        if kind in _WITH_BODIES:
            note(offset, SectionType(kind), None)
        match kind:
            case SectionType.START:
                _read_setup(reader, ram, found)
            case SectionType.PART | SectionType.END:
                _read_part(reader, ram, found)
                found.ended |= kind == SectionType.END
            case SectionType.FULL:
                head = read_head(reader)
                reader.need(min(_LIMITS.device_bytes + 1, reader.available))
                section = read_device(reader, head, formats, _LIMITS.device_bytes)
                found.sections.append(section)
                note(offset, SectionType.FULL, section)
            case SectionType.COMMAND:
                _read_command(reader, found)
            case _:
                reader.fail(f"Unknown savevm section type {kind}", 1)
    note(reader.position - 1, SectionType.EOF, None)
    if reader.position != end:
        reader.fail(f"{reader.available} bytes behind the end of the stream")
    if found.blocks is None:
        reader.fail("the stream has no RAM")
    return Contents(
        configuration=configuration,
        blocks=found.blocks,
        sections=tuple(found.sections),
        early_sections=found.early,
        ram_section_id=found.section_id,
        description=text,
        ram_ended=found.ended,
    )


def _next_type(reader: FileBuffer) -> int:
    reader.commit()  # bytes before this need not be kept
    return reader.u8()


def find_description(reader: FileBuffer) -> tuple[str | None, int]:
    """Find the description from the end of the file.

    :return: its text, and the offset of its start; ``None`` and the file's end without one.
    :raises StreamError: it is not UTF-8.
    """
    for tail_bytes in _TAILS:
        tail = reader.tail(tail_bytes)
        if (text := description_at_end(tail, reader.position + reader.available)) is not None:
            return text, reader.position + reader.available - len(
                text.encode()
            ) - DESCRIPTION_HEAD_BYTES
        if len(tail) < tail_bytes:
            break
    return None, reader.position + reader.available


def formats_of(text: str | None) -> ImageFormats:
    """Make the lengths of sections of a description, or of none.

    :raises StreamError: it is not valid.
    """
    return ImageFormats(parsed_description(text))


def parsed_description(text: str | None) -> Mapping[str, Any] | None:
    """Parse the description of a stream; ``None`` if nothing is described.

    :raises StreamError: it is not valid.
    """
    if text is None or text.strip() == "{}":  # of writers that describe nothing
        return None
    return parse_description(text)


def _read_setup(reader: FileBuffer, ram: RamReader, found: _Found) -> None:
    head = read_head(reader)
    check_ram_head(reader, head)
    if found.blocks is not None:
        reader.fail("ram is set up twice")
    word = reader.u64()
    if word & FLAGS_MASK != RamFlag.MEM_SIZE:
        refuse_flags(reader, word & FLAGS_MASK)
    total = word & ~FLAGS_MASK
    if total > LARGEST_RAM_BYTES:
        reader.fail(f"RAM of {total:#x} bytes; at most {LARGEST_RAM_BYTES:#x} are taken", 8)
    blocks = tuple(ram.read_blocks(reader, total, found.page_sizes))
    if (word := reader.u64()) != RamFlag.EOS:
        refuse_flags(reader, word & FLAGS_MASK)
    read_footer(reader, RAM_SECTION_NAME, head.section_id)
    found.blocks, found.section_id, found.early = blocks, head.section_id, len(found.sections)


def read_plain_blocks(
    reader: FileBuffer, total_bytes: int, page_sizes: int = 0
) -> list[ImageBlock]:
    """Read a list of blocks whose entries are name and size, and the page size of a block of huge pages.

    :param page_sizes: see :meth:`RamReader.read_blocks`.
    :raises StreamError: the sizes do not add up, or an entry is not valid.
    """
    blocks: dict[str, ImageBlock] = {}
    left = total_bytes
    while left:
        name = reader.name()
        if not name:  # the first byte of the EOS record: the list has ended too early
            reader.fail(f"RAM blocks add up to less than the {total_bytes:#x} bytes promised", 1)
        size = reader.u64()
        if name in blocks:
            reader.fail(f'RAM block "{name}" is listed twice', 8)
        if not 0 < size <= left or size % TARGET_PAGE_BYTES:
            reader.fail(f'RAM block "{name}" of {size:#x} bytes, where {left:#x} are left', 8)
        page_size = _read_page_size(reader, page_sizes) if page_sizes else TARGET_PAGE_BYTES
        blocks[name] = ImageBlock(name, size, page_size)
        left -= size
    return list(blocks.values())


def _read_page_size(reader: FileBuffer, page_sizes: int) -> int:
    """Read the page size that an entry may end with.

    What else may follow is the length of a name, which is not 0, or the word of EOS, which is no size.
    """
    reader.need(HEADER_BYTES)
    size = int.from_bytes(reader.rest()[:HEADER_BYTES], "big")
    if not size & page_sizes or size & (size - 1):
        return TARGET_PAGE_BYTES
    reader.skip(HEADER_BYTES)
    return size


def _read_part(reader: FileBuffer, ram: RamReader, found: _Found) -> None:
    section_id = reader.u32()
    if found.blocks is None or section_id != found.section_id:
        reader.fail(f"Unknown savevm section {section_id}", 4)
    ram.read_body(reader)
    read_footer(reader, RAM_SECTION_NAME, section_id)


def _read_command(reader: FileBuffer, found: _Found) -> None:
    at = reader.position
    number, length = reader.u16(), reader.u16()
    if _HARMLESS.get(number) == length:
        reader.skip(length)
    elif number == Command.POSTCOPY_ADVISE and length in {0, _ADVISE_BYTES}:
        # Postcopy was allowed, but has not begun: all pages are here.
        if length:
            found.page_sizes = _read_advise(reader)
    else:
        reader.seek(at)
        _refuse_command(reader)


def _read_advise(reader: FileBuffer) -> int:
    """Read the page sizes that a source of postcopy has; return the bitwise or of those of huge pages."""
    sizes, target_page = reader.u64(), reader.u64()
    if target_page != TARGET_PAGE_BYTES:
        reader.fail(f"pages of {target_page} bytes; only {TARGET_PAGE_BYTES} are known", 8)
    huge = sizes & ~TARGET_PAGE_BYTES
    if huge % (2 * TARGET_PAGE_BYTES) or huge >= 2 * _LARGEST_PAGE_BYTES:
        reader.fail(f"page sizes {sizes:#x}", 16)
    return huge


def _refuse_command(reader: FileBuffer) -> NoReturn:
    from postcopy.stream.commands import CommandContext, read_command
    from postcopy.stream.layout import Receiver

    record = read_command(reader, CommandContext(Receiver({}), 0))
    reader.fail(f"{type(record).__name__}: a migration with postcopy is no image")
