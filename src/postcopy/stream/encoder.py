"""The encoder: everything of a stream but pages and commands, as bytes.

Pages are in :mod:`postcopy.stream.ram_encoder`, commands in :mod:`postcopy.stream.commands`.
"""

import struct
from collections.abc import Iterable
from typing import Literal

from postcopy.parameters import Capabilities, Capability
from postcopy.stream.block_list import EntryForm, encode_block_list
from postcopy.stream.commands import encode_command
from postcopy.stream.configuration import encode_configuration, encode_header, encode_name
from postcopy.stream.numbers import (
    FIRMWARE_PAGE_BYTES,
    TARGET_PAGE_BYTES,
    VALIDATED_CAPABILITIES,
    RamFlag,
    SectionType,
)
from postcopy.stream.pings import HEADER_PING, IDENTITY_PING
from postcopy.stream.records import (
    CommandRecord,
    Configuration,
    DeviceSection,
    OpenReturnPath,
    Ping,
    PostcopyAdvise,
    RamSetup,
)

__all__ = (
    "RamPart",
    "description",
    "device_section",
    "encode_command",
    "end_of_stream",
    "footer",
    "ram_setup",
    "stream_start",
)


def stream_start(configuration: Configuration) -> bytes:
    """Write the header and the configuration section."""
    return encode_header() + encode_configuration(configuration)


def footer(section_id: int) -> bytes:
    """Write the footer of a section."""
    return struct.pack(">BI", SectionType.FOOTER, section_id)


def ram_setup(setup: RamSetup, *, postcopy: bool, addresses: bool = False) -> bytes:
    """Write RAM's START section whole.

    :param postcopy: RAM postcopy has been advised, so blocks of huge pages say their page size.
    :param addresses: the capability ``x-ignore-shared`` is on.
    """
    return encode_block_list(setup, EntryForm(postcopy, addresses))


def device_section(section: DeviceSection) -> bytes:
    """Write a FULL section whole."""
    return b"".join(
        (
            struct.pack(">BI", SectionType.FULL, section.section_id),
            encode_name(section.name),
            struct.pack(">II", section.instance, section.version),
            section.payload,
            footer(section.section_id),
        )
    )


def end_of_ram() -> bytes:
    """What ends the records of RAM on a channel that has no sections."""
    return struct.pack(">Q", RamFlag.EOS)


def multifd_flush() -> bytes:
    """What of RAM's records lets a reader wait until each channel of multifd has come to its next SYNC."""
    return struct.pack(">Q", RamFlag.MULTIFD_FLUSH)


def end_of_stream() -> bytes:
    """Write the end; in precopy a description follows."""
    return bytes((SectionType.EOF,))


def description(text: str) -> bytes:
    """Write the description of the device sections, a JSON text."""
    raw = text.encode()
    return struct.pack(">BI", SectionType.DESCRIPTION, len(raw)) + raw


class RamPart:
    """What stands around the pages of a PART or END section of RAM.

    A sender writes ``head``, the records, ``tail``: in one ``sendmsg``, without joining them.
    """

    def __init__(
        self,
        section_id: int,
        kind: Literal[SectionType.PART, SectionType.END] = SectionType.PART,
    ) -> None:
        self.head = struct.pack(">BI", kind, section_id)
        self.tail = end_of_ram() + footer(section_id)

    def around(self, *records: bytes | memoryview) -> bytes:
        """Write the section whole; for few pages."""
        return b"".join((self.head, *records, self.tail))


def configuration(machine: str, capabilities: Capabilities) -> Configuration:
    """The configuration section; it names those capabilities which a reader must have on, too."""
    names = tuple(name for name in VALIDATED_CAPABILITIES if Capability(name) in capabilities.on)
    return Configuration(machine, capabilities=names)


def stream_header(
    machine: str, page_sizes: Iterable[int], capabilities: Capabilities, *, answered: bool
) -> bytes:
    """Encode everything before the list of blocks.

    :param page_sizes: of the RAM blocks, in bytes.
    :param answered: there is a return path to open.
    """
    parts = [stream_start(configuration(machine, capabilities))]
    if answered:
        greeting: list[CommandRecord] = [OpenReturnPath(), Ping(HEADER_PING), Ping(IDENTITY_PING)]
        parts += map(encode_command, greeting)
    if capabilities.enabled(Capability.POSTCOPY_RAM):
        # Sent now, so that a destination without postcopy refuses now.
        sizes = FIRMWARE_PAGE_BYTES.get(machine, 0)
        for page_size in page_sizes:
            sizes |= page_size
        parts.append(encode_command(PostcopyAdvise(sizes, TARGET_PAGE_BYTES)))
    return b"".join(parts)
