"""What stands around a section's body: head and footer; and device sections whole."""

from dataclasses import dataclass

from postcopy.errors import StreamError
from postcopy.stream.file_records import DeviceSection
from postcopy.stream.layout import DeviceFormats
from postcopy.stream.numbers import RAM_SECTION_NAME, RAM_SECTION_VERSION, SectionType
from postcopy.stream.reader import Incomplete, StreamBuffer


@dataclass(frozen=True, slots=True)
class SectionHead:
    """The head of a START or FULL section, behind its type byte."""

    section_id: int
    name: str
    instance: int
    version: int


def unknown_section(name: str, instance: int) -> str:
    """Say in QEMU's words that there is no such device."""
    return (
        f"Unknown savevm section or instance '{name}' {instance}. Make sure that your current VM "
        "setup matches your saved VM setup, including any hotplugged devices"
    )


def read_head(reader: StreamBuffer) -> SectionHead:
    """Read the head of a section."""
    return SectionHead(reader.u32(), reader.name(), reader.u32(), reader.u32())


def read_footer(reader: StreamBuffer, name: str, section_id: int) -> None:
    """Read a footer.

    :raises StreamError: it is missing, or another section's.
    """
    if reader.u8() != SectionType.FOOTER:
        reader.fail(f"Missing section footer for {name}", 1)
    if (found := reader.u32()) != section_id:
        reader.fail(
            f"Mismatched section id in footer for {name} - read {found:#x} "
            f"expected {section_id:#x}",
            4,
        )


def check_ram_head(reader: StreamBuffer, head: SectionHead) -> None:
    """Refuse START sections that are not RAM's in the one version that there is.

    :raises StreamError: it is another live section, or another version.
    """
    if head.name != RAM_SECTION_NAME or head.instance:
        reader.fail(unknown_section(head.name, head.instance), 8)
    if head.version > RAM_SECTION_VERSION:
        reader.fail(
            f"savevm: unsupported version {head.version} for 'ram' v{RAM_SECTION_VERSION}", 4
        )
    if head.version < RAM_SECTION_VERSION:
        reader.fail(
            f"ram: incoming version_id {head.version} is too old for local minimum version_id  "
            f"{RAM_SECTION_VERSION}",
            4,
        )


def read_device(
    reader: StreamBuffer, head: SectionHead, devices: DeviceFormats, limit_bytes: int
) -> DeviceSection:
    """Read a FULL section behind its head.

    :raises StreamError: the device is unknown, its state malformed, or longer than the limit.
    """
    rest = reader.rest()
    length = _ask_length(reader, head, devices, rest)
    if (len(rest) if length is None else length) > limit_bytes:
        reader.fail(
            f"state of device '{head.name}' is longer than the {limit_bytes} bytes that are taken"
        )
    if length is None:
        raise Incomplete
    payload = reader.take(length)
    read_footer(reader, head.name, head.section_id)
    return DeviceSection(head.section_id, head.name, head.instance, head.version, payload)


def _ask_length(
    reader: StreamBuffer, head: SectionHead, devices: DeviceFormats, data: memoryview
) -> int | None:
    try:
        return devices.payload_length(head.name, head.instance, head.version, data)
    except StreamError as error:
        # A format counts from the start of its payload, the stream from its own.
        offset = reader.position + (error.offset or 0)
        raise StreamError(error.message, offset) from error
