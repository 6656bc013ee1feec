"""The decoder of a precopy whose machine the reader does not have.

The list of RAM blocks stands at the beginning.  The lengths of the device sections stand in the
description, at the very end: so what is behind the memory is kept until that has come, and read then.
A source of ours asks before it sends the end whether all has arrived: its devices are known without.
"""

import struct
from collections.abc import Callable
from typing import Final

from postcopy.errors import StreamError
from postcopy.stream.block_list import read_total
from postcopy.stream.commands import FIXED_LENGTHS
from postcopy.stream.configuration import read_any_configuration
from postcopy.stream.decoder import Decoder
from postcopy.stream.description import description_at_end
from postcopy.stream.encoded_records import EncodedRamRecords
from postcopy.stream.layout import BlockLayout, DeviceFormats, Layout, Limits
from postcopy.stream.mapped_ram import CAPABILITY
from postcopy.stream.numbers import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, Command, SectionType
from postcopy.stream.reader import Incomplete
from postcopy.stream.records import (
    BlockEntry,
    Configuration,
    RamRecordsEnd,
    RamSetup,
    Record,
)

MOST_BLOCKS: Final = 4096
_TAKEN: Final = frozenset({Command.OPEN_RETURN_PATH, Command.PING, Command.SWITCHOVER_START})
_POSTCOPY: Final = "switch postcopy-ram off at the source, and migrate again"
_REFUSED: Final = {
    Command.POSTCOPY_ADVISE: _POSTCOPY,
    Command.POSTCOPY_LISTEN: _POSTCOPY,
    Command.POSTCOPY_RAM_DISCARD: _POSTCOPY,
    Command.PACKAGED: _POSTCOPY,
    Command.ENABLE_COLO: "switch x-colo off at the source, and migrate again",
}


_PING_HEAD: Final = struct.pack(
    ">BHH", SectionType.COMMAND, Command.PING, FIXED_LENGTHS[Command.PING]
)
_PING_BYTES: Final = len(_PING_HEAD) + FIXED_LENGTHS[Command.PING]


class PrecopyDecoder(Decoder):
    """As :class:`Decoder`, for any machine.  It gives out the records of :class:`EncodedRamRecords`, too.

    START of RAM is a body of its own, which may have records: :class:`RamSetup` comes where its list has
    been read, and :class:`RamRecordsEnd` and :class:`RamBodyEnd` behind it as for each other body.

    :param formats: the lengths of device sections, by the text of the description, or without one.
    :param largest_ram_bytes: more RAM is refused.
    """

    def __init__(
        self,
        formats: Callable[[str | None], DeviceFormats],
        largest_ram_bytes: int,
        limits: Limits | None = None,
    ) -> None:
        self._blocks: dict[str, BlockLayout] = {}
        super().__init__(_NoFormats(), self._blocks, limits=limits)
        self._records = EncodedRamRecords(self._receiver, self._limits)
        self._formats = formats
        self._largest = largest_ram_bytes
        self._left = 0  # of the list of blocks, in bytes
        self._section_id = 0
        self._input_ended = False

    @property
    def layout(self) -> Layout:
        """The source's blocks; complete once :class:`RamSetup` has been given out."""
        return self._blocks

    @property
    def in_devices(self) -> bool:
        """What is behind the memory has begun: the source sends it at once, and without a pause."""
        return self._step == self._wait_for_description

    def end_input(self) -> None:
        """Say that no more bytes will come: what there is, is read without a description."""
        self._input_ended = True

    def _read_configuration(self) -> Record:
        reader = self._reader
        configuration: Configuration = read_any_configuration(reader)
        bits = configuration.page_bits
        if bits is not None and bits != TARGET_PAGE_BITS:
            reader.fail(f"Received TARGET_PAGE_BITS is {bits} but only {TARGET_PAGE_BITS} is known")
        if CAPABILITY in configuration.capabilities:
            reader.fail("a file of mapped-ram, which is an image already: see 'postcopy verify'")
        if configuration.capabilities:
            names = ", ".join(configuration.capabilities)
            reader.fail(f"written with {names}: switch it off at the source, and migrate again")
        self._next(self._read_element, "an element")
        return configuration

    def _read_element(self) -> Record | None:
        kind = self._reader.peek()
        if kind == SectionType.COMMAND:
            self._check_command()
        elif kind in {SectionType.FULL, SectionType.EOF}:
            if self._ram_section_id is None:
                self._reader.fail("a device comes before the list of RAM blocks; is it virtio-mem?")
            self._next(self._wait_for_description, "the devices")
            return None
        return super()._read_element()

    def _check_command(self) -> None:
        reader = self._reader
        reader.skip(1)
        number, length = reader.u16(), reader.u16()
        if number in _REFUSED:
            name = Command(number).name
            reader.fail(
                f"CMD_{name}: no postcopy or COLO can be received; {_REFUSED[Command(number)]}", 5
            )
        if number not in _TAKEN:
            reader.fail(f"MIG_CMD {number:#x} unknown (len {length:#x})", 5)
        if length != FIXED_LENGTHS[Command(number)]:
            reader.fail(f"{Command(number).name} received with bad length {length}", 5)
        reader.rollback()

    # Section: the list of blocks

    def _read_setup(self) -> None:
        head = self._read_ram_head()
        self._left = read_total(self._reader)
        if self._left > self._largest:
            self._reader.fail(
                f"RAM of {self._left:#x} bytes; at most {self._largest:#x} are taken", 8
            )
        self._section_id = head.section_id
        self._next(self._read_list, "the list of RAM blocks")

    def _read_list(self) -> RamSetup | None:
        if self._left:
            self._read_entry()
            return None
        self._ram_section_id = self._section_id
        self._body = SectionType.START
        self._next(self._read_ram, "the list of RAM blocks")
        entries = (BlockEntry(name, block.size_bytes) for name, block in self._blocks.items())
        return RamSetup(self._section_id, tuple(entries))

    def _read_entry(self) -> None:
        reader = self._reader
        name = reader.name()
        if not name:  # the first byte of the EOS record: the list has ended too early
            reader.fail(f"RAM blocks end {self._left:#x} bytes before the total that was sent", 1)
        size = reader.u64()
        if name in self._blocks:
            reader.fail(f'RAM block "{name}" is listed twice', 8)
        if not 0 < size <= self._left or size % TARGET_PAGE_BYTES:
            reader.fail(f'RAM block "{name}" of {size:#x} bytes, where {self._left:#x} are left', 8)
        if len(self._blocks) == MOST_BLOCKS:
            reader.fail(f"more than {MOST_BLOCKS} RAM blocks")
        self._blocks[name] = BlockLayout(size)
        self._left -= size

    # Section: memory

    def _read_ram(self) -> Record:
        record = self._records.read_any(self._reader)
        if record is None:
            self._next(self._end_body, "the footer of a section of ram")
            return RamRecordsEnd(self._body)
        return record

    # Section: what is behind the memory

    def _wait_for_description(self) -> None:
        reader = self._reader
        limits = self._limits
        most = limits.package_bytes + limits.description_bytes
        if reader.available > most:
            reader.fail(f"more than {most} bytes behind the memory, and no description of them")
        rest = reader.rest()
        text = None
        if len(rest) and rest[-1] == ord("}"):  # to look for it takes a copy
            text = description_at_end(rest, reader.position + len(rest))
        if text is None and not self._input_ended and not _ends_with_ping(rest):
            raise Incomplete
        try:
            self._devices = self._formats(text)
        except StreamError as error:
            at = reader.position + len(rest) - len((text or "").encode())
            raise StreamError(error.message, at) from error
        self._next(self._read_described, "the devices")

    def _read_described(self) -> Record | None:
        kind = self._reader.peek()
        if kind == SectionType.COMMAND:
            self._check_command()
        elif kind not in {SectionType.FULL, SectionType.EOF}:
            self._reader.fail(f"Unknown savevm section type {kind} behind the memory")
        return super()._read_element()


def _ends_with_ping(data: memoryview) -> bool:
    """Whether the source waits for an answer to what it has sent."""
    return bytes(data[-_PING_BYTES:][: len(_PING_HEAD)]) == _PING_HEAD


class _NoFormats:
    """Before the devices are reached: their description has not come."""

    def payload_length(self, name: str, instance: int, version: int, data: memoryview) -> None:
        """See :class:`postcopy.stream.layout.DeviceFormats`."""
        del version, data
        raise StreamError(f"device '{name}' {instance} comes before the memory", 0)
