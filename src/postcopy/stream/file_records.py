"""The records that every image has, apart from those of a live stream: a restore waits for no others."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Configuration:
    """The section behind the header.

    ``page_bits`` is sent only for targets with a variable page size, ``capabilities`` holds
    validated ones only, ``uuid`` is 16 bytes or absent.
    """

    machine: str
    page_bits: int | None = None
    capabilities: tuple[str, ...] = ()
    uuid: bytes | None = None


def bitmap_bytes(page_count: int) -> int:
    """Bytes of a mapped-ram file's bitmap, in whole words of 64 bits."""
    return -(-page_count // 64) * 8


@dataclass(frozen=True, slots=True)
class MappedBlock:
    """Where one RAM block lies in the file; offsets and sizes in bytes.

    Comes for each block, before :class:`RamSetup`; the next bytes that the decoder wants are those at
    :attr:`end_offset` of the file.
    """

    name: str
    size_bytes: int
    page_bytes: int
    header_offset: int
    bitmap_offset: int
    pages_offset: int

    @property
    def page_count(self) -> int:
        """How many pages the block has, present or not."""
        return self.size_bytes // self.page_bytes

    @property
    def bitmap_bytes(self) -> int:
        """The length of its bitmap, in whole words."""
        return bitmap_bytes(self.page_count)

    @property
    def end_offset(self) -> int:
        """Where what follows the block begins."""
        return self.pages_offset + self.size_bytes


@dataclass(frozen=True, slots=True)
class DeviceSection:
    """A FULL section: one device's state; ``payload`` is opaque here."""

    section_id: int
    name: str
    instance: int
    version: int
    payload: bytes
