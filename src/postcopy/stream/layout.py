"""What a reader of a stream must know beforehand: its own RAM, its own devices, its bounds."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from postcopy.stream.numbers import TARGET_PAGE_BITS, TARGET_PAGE_BYTES


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A RAM block of the reader: the size of it and of its host pages, in bytes."""

    size_bytes: int
    page_size_bytes: int = TARGET_PAGE_BYTES


Layout: TypeAlias = Mapping[str, BlockLayout]


class DeviceFormats(Protocol):
    """Knows how long the state of a device is: FULL sections do not say it themselves."""

    def payload_length(
        self, name: str, instance: int, version: int, data: memoryview
    ) -> int | None:
        """Say how many bytes at the start of ``data`` are the device's payload.

        :param data: what has arrived behind the section's head, valid during the call only.
        :return: the length in bytes, which may lie beyond ``data``; ``None``: more bytes are needed
            to tell.
        :raises StreamError: the section is unknown, or its version unsupported.
        """


@dataclass(frozen=True, slots=True)
class Expected:
    """What the configuration section must agree with; ``None`` = anything will do."""

    machine: str | None = None
    page_bits: int = TARGET_PAGE_BITS
    capabilities: frozenset[str] = frozenset()
    uuid: bytes | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what a peer can make us keep in memory."""

    package_bytes: int = 64 << 20
    description_bytes: int = 16 << 20
    device_bytes: int = 16 << 20
    pages_per_record: int = 256
    zero_pages_per_record: int = 4096


@dataclass(frozen=True, slots=True)
class Receiver:
    """The reader's side of the agreement on RAM.

    ``ignored_blocks`` are blocks, such as ``pc.bios``, that the peer may have and we have no use
    for: their pages are dropped.
    """

    layout: Layout
    ignored_blocks: Collection[str] = field(default_factory=frozenset)
