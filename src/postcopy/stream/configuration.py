"""The header and the configuration section: bytes from and to :class:`Configuration`.

The section is a machine's name and up to three subsections; no footer follows, so it ends where the
next byte is not a subsection's.
"""

import struct
import uuid as uuids
from collections.abc import Callable

from postcopy.stream.file_records import Configuration
from postcopy.stream.layout import Expected
from postcopy.stream.numbers import (
    LONGEST_NAME,
    MAGIC,
    RETIRED_VERSION,
    TLS_HANDSHAKE,
    VALIDATED_CAPABILITIES,
    VERSION,
    SectionType,
)
from postcopy.stream.reader import StreamBuffer

PAGE_BITS = "configuration/target-page-bits"
CAPABILITIES = "configuration/capabilities"
UUID = "configuration/uuid"
SUBSECTION_VERSION = 1


def encode_name(name: str) -> bytes:
    """Write a name: one byte with its length, then its bytes.

    :raises ValueError: it is longer than 255 bytes.
    """
    raw = name.encode()
    if len(raw) > LONGEST_NAME:
        raise ValueError(f"a name of {len(raw)} bytes; at most {LONGEST_NAME} can be sent")
    return bytes((len(raw),)) + raw


def encode_header() -> bytes:
    """Write the eight bytes that start a stream."""
    return struct.pack(">II", MAGIC, VERSION)


def encode_configuration(configuration: Configuration) -> bytes:
    """Write the configuration section with its type byte."""
    machine = configuration.machine.encode()
    parts = [struct.pack(">BI", SectionType.CONFIGURATION, len(machine)), machine]
    if configuration.page_bits is not None:
        parts += [_subsection(PAGE_BITS), struct.pack(">I", configuration.page_bits)]
    if configuration.capabilities:
        names = configuration.capabilities
        parts += [_subsection(CAPABILITIES), struct.pack(">I", len(names))]
        parts += map(encode_name, names)
    if configuration.uuid is not None:
        parts += [_subsection(UUID), configuration.uuid]
    return b"".join(parts)


def _subsection(name: str) -> bytes:
    return (
        bytes((SectionType.SUBSECTION,)) + encode_name(name) + struct.pack(">I", SUBSECTION_VERSION)
    )


def read_header(reader: StreamBuffer) -> None:
    """Read magic and version.

    :raises StreamError: it is something else, or another version.
    """
    magic = reader.u32()
    if magic >> 16 == TLS_HANDSHAKE:
        reader.fail(
            "Not a migration stream: the source speaks TLS; set tls-creds here too, or clear it there",
            4,
        )
    if magic != MAGIC:
        reader.fail("Not a migration stream", 4)
    version = reader.u32()
    if version == RETIRED_VERSION:
        reader.fail("SaveVM v2 format is obsolete and don't work anymore", 4)
    if version != VERSION:
        reader.fail("Unsupported migration stream version", 4)


def read_configuration(reader: StreamBuffer, expected: Expected) -> Configuration:
    """Read the configuration section with its type byte, and compare it.

    Stricter than QEMU, which takes any prefix of the right machine's name.

    :raises StreamError: it is malformed, or not what was expected.
    """
    configuration = read_any_configuration(reader, expected.machine)
    if (complaint := _complaint(configuration, expected)) is not None:
        reader.fail(complaint)
    return configuration


def read_any_configuration(reader: StreamBuffer, machine: str | None = None) -> Configuration:
    """Read the configuration section with its type byte, whatever it says.

    :param machine: the only machine that will do; ``None``: any.
    :raises StreamError: it is malformed.
    """
    if reader.u8() != SectionType.CONFIGURATION:
        reader.fail("Configuration section missing", 1)
    name_of_machine = _read_machine(reader, machine)
    found: dict[str, object] = {}
    while reader.peek() == SectionType.SUBSECTION:
        reader.skip(1)
        name = reader.name()
        if name not in _READERS:
            reader.fail(f"unknown subsection '{name}' of the configuration", len(name.encode()))
        if name in found:
            reader.fail(f"subsection '{name}' comes twice")
        if (version := reader.u32()) != SUBSECTION_VERSION:
            reader.fail(f"{name}: unsupported version {version}", 4)
        found[name] = _READERS[name](reader)
    return Configuration(
        name_of_machine,
        found.get(PAGE_BITS),  # type: ignore[arg-type]  # the table below ties name and type
        found.get(CAPABILITIES, ()),  # type: ignore[arg-type]
        found.get(UUID),  # type: ignore[arg-type]
    )


def _read_machine(reader: StreamBuffer, expected: str | None) -> str:
    length = reader.u32()
    if length > LONGEST_NAME:
        reader.fail(f"machine type of {length} bytes; at most {LONGEST_NAME} are taken", 4)
    machine = reader.text(length)
    if expected not in {None, machine}:
        reader.fail(f"Machine type received is '{machine}' and local is '{expected}'", length)
    return machine


def _read_capabilities(reader: StreamBuffer) -> tuple[str, ...]:
    count = reader.u32()
    if count > len(VALIDATED_CAPABILITIES):
        reader.fail(f"{count} capabilities; at most {len(VALIDATED_CAPABILITIES)} are known", 4)
    names: list[str] = []
    for _ in range(count):
        name = reader.name()
        if name not in VALIDATED_CAPABILITIES:
            reader.fail(f"Received unknown capability {name}", len(name.encode()))
        names.append(name)
    return tuple(names)


_READERS: dict[str, Callable[[StreamBuffer], object]] = {
    PAGE_BITS: StreamBuffer.u32,
    CAPABILITIES: _read_capabilities,
    UUID: lambda reader: reader.take(16),
}


def _complaint(received: Configuration, expected: Expected) -> str | None:
    bits = received.page_bits
    if bits is not None and bits != expected.page_bits:
        return f"Received TARGET_PAGE_BITS is {bits} but local is {expected.page_bits}"
    for name in VALIDATED_CAPABILITIES:
        here, there = name in expected.capabilities, name in received.capabilities
        if here != there:
            words = ("off", "on")
            return f"Capability {name} is {words[here]}, but received capability is {words[there]}"
    if received.uuid and expected.uuid and received.uuid != expected.uuid:
        local = uuids.UUID(bytes=expected.uuid)
        return f"UUID received is {uuids.UUID(bytes=received.uuid)} and local is {local}"
    return None
