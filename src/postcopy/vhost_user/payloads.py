"""The payloads of vhost-user's messages: values, and their bytes.

Each has :meth:`pack`, and :meth:`unpack` that takes exactly the bytes of one message.  Numbers are in the
byte order of the host, as the specification has it.  ``unpack`` checks what can be told from the bytes
alone, and says at which byte of the payload it is wrong.
"""

import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, Self

from postcopy.errors import VhostUserError

MOST_REGIONS: Final = 8
MOST_CONFIG_BYTES: Final = 256
HEADER: Final = struct.Struct("=III")
"""Number, flags, bytes of payload."""

_RING_MASK, _NO_DESCRIPTOR = 0xFF, 0x100
_U64: Final = struct.Struct("=Q")
_STATE: Final = struct.Struct("=II")
_ADDRESSES: Final = struct.Struct("=IIQQQQ")
_LOG: Final = struct.Struct("=QQ")
_CONFIG: Final = struct.Struct("=III")
_TABLE: Final = struct.Struct("=II")
_REGION: Final = struct.Struct("=QQQQ")
_SPACE: Final = 1 << 64


class Payload(Protocol):
    """What all payloads have."""

    MOST_BYTES: ClassVar[int]

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read it.

        :raises VhostUserError: too short, too long, or with a number that cannot be.
        """

    def pack(self) -> bytes:
        """Write it."""


def _exactly(form: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != form.size:
        raise VhostUserError(f"{len(data)} bytes of payload, and it has {form.size}", 8)
    return form.unpack(data)


@dataclass(frozen=True, slots=True)
class Number:
    """One u64: features, counts, results (0 is success)."""

    MOST_BYTES: ClassVar = _U64.size

    value: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """See :class:`Payload`."""
        return cls(*_exactly(_U64, data))

    def pack(self) -> bytes:
        """See :class:`Payload`."""
        return _U64.pack(self.value)


@dataclass(frozen=True, slots=True)
class RingState:
    """A ring's index, and its size, position or whether it is enabled."""

    MOST_BYTES: ClassVar = _STATE.size

    index: int
    value: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """See :class:`Payload`."""
        return cls(*_exactly(_STATE, data))

    def pack(self) -> bytes:
        """See :class:`Payload`."""
        return _STATE.pack(self.index, self.value)


@dataclass(frozen=True, slots=True)
class RingAddresses:
    """Where a ring is, by the front end's own addresses.

    :ivar flags: bit 0: the used ring is logged.
    :ivar log: guest-physical address of the used ring, for the log.
    """

    MOST_BYTES: ClassVar = _ADDRESSES.size
    LOGGED: ClassVar = 1

    index: int
    flags: int
    descriptors: int
    used: int
    available: int
    log: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """See :class:`Payload`."""
        return cls(*_exactly(_ADDRESSES, data))

    def pack(self) -> bytes:
        """See :class:`Payload`."""
        return _ADDRESSES.pack(
            self.index, self.flags, self.descriptors, self.used, self.available, self.log
        )


@dataclass(frozen=True, slots=True)
class RingDescriptor:
    """A ring's index, with an eventfd or without one."""

    MOST_BYTES: ClassVar = _U64.size

    index: int
    has_descriptor: bool = True

    @property
    def descriptors(self) -> int:
        """How many come with it."""
        return int(self.has_descriptor)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """See :class:`Payload`."""
        (value,) = _exactly(_U64, data)
        if value & ~(_RING_MASK | _NO_DESCRIPTOR):
            raise VhostUserError(f"{value:#x} names no ring", HEADER.size)
        return cls(value & _RING_MASK, not value & _NO_DESCRIPTOR)

    def pack(self) -> bytes:
        """See :class:`Payload`."""
        return _U64.pack(self.index | (0 if self.has_descriptor else _NO_DESCRIPTOR))


@dataclass(frozen=True, slots=True)
class Log:
    """The dirty log: bytes, and where they begin in its file."""

    MOST_BYTES: ClassVar = _LOG.size

    size: int
    offset: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """See :class:`Payload`."""
        return cls(*_exactly(_LOG, data))

    def pack(self) -> bytes:
        """See :class:`Payload`."""
        return _LOG.pack(self.size, self.offset)


@dataclass(frozen=True, slots=True)
class Region:
    """A region of guest memory.

    :ivar guest_address: guest-physical.
    :ivar size: in bytes.
    :ivar user_address: in the process that sends it.
    :ivar offset: where it begins in its file.
    """

    guest_address: int
    size: int
    user_address: int
    offset: int

    @classmethod
    def unpack_from(cls, data: bytes, at: int) -> Self:
        """Read one, and refuse what is empty or goes beyond 64 bits."""
        region = cls(*_REGION.unpack_from(data, at))
        if not region.size:
            raise VhostUserError("a region of 0 bytes", HEADER.size + at + 8)
        starts = (region.guest_address, region.user_address, region.offset)
        for place, start in zip((0, 16, 24), starts, strict=True):
            if start + region.size > _SPACE:
                what = f"a region of {region.size:#x} bytes from {start:#x} on goes beyond 64 bits"
                raise VhostUserError(what, HEADER.size + at + place)
        return region

    def pack(self) -> bytes:
        """Its bytes."""
        return _REGION.pack(self.guest_address, self.size, self.user_address, self.offset)


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """All regions of guest memory, each with a descriptor."""

    MOST_BYTES: ClassVar = _TABLE.size + MOST_REGIONS * _REGION.size

    regions: tuple[Region, ...]

    @property
    def descriptors(self) -> int:
        """How many come with it."""
        return len(self.regions)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """See :class:`Payload`; user-mode Linux sends padding behind the regions."""
        if len(data) < _TABLE.size:
            _exactly(_TABLE, data)
        count, _ = _TABLE.unpack_from(data)
        if not 0 < count <= MOST_REGIONS:
            what = f"{count} regions, and 1 to {MOST_REGIONS} are possible"
            raise VhostUserError(what, HEADER.size)
        needed = _TABLE.size + count * _REGION.size
        if len(data) < needed:
            what = f"{len(data)} bytes of payload, and {count} regions have {needed}"
            raise VhostUserError(what, 8)
        places = range(_TABLE.size, needed, _REGION.size)
        return cls(tuple(Region.unpack_from(data, at) for at in places))

    def pack(self) -> bytes:
        """See :class:`Payload`."""
        return _TABLE.pack(len(self.regions), 0) + b"".join(r.pack() for r in self.regions)


@dataclass(frozen=True, slots=True)
class SingleRegion:
    """One region."""

    MOST_BYTES: ClassVar = _U64.size + _REGION.size

    region: Region

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """See :class:`Payload`."""
        if len(data) != cls.MOST_BYTES:
            what = f"{len(data)} bytes of payload, and it has {cls.MOST_BYTES}"
            raise VhostUserError(what, 8)
        return cls(Region.unpack_from(data, _U64.size))

    def pack(self) -> bytes:
        """See :class:`Payload`."""
        return _U64.pack(0) + self.region.pack()


@dataclass(frozen=True, slots=True)
class Config:
    """A part of the device's configuration space."""

    MOST_BYTES: ClassVar = _CONFIG.size + MOST_CONFIG_BYTES

    offset: int
    flags: int
    data: bytes

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """See :class:`Payload`."""
        if len(data) < _CONFIG.size:
            _exactly(_CONFIG, data)
        offset, size, flags = _CONFIG.unpack_from(data)
        if size != len(data) - _CONFIG.size or offset + size > MOST_CONFIG_BYTES:
            what = (
                f"{size} bytes of configuration from {offset} on, with {len(data)} bytes of payload"
            )
            raise VhostUserError(what, HEADER.size)
        return cls(offset, flags, data[_CONFIG.size :])

    def pack(self) -> bytes:
        """See :class:`Payload`."""
        return _CONFIG.pack(self.offset, len(self.data), self.flags) + self.data
