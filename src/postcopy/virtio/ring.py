"""The split virtqueue (virtio 1.2, section 2.7): its layout, and the device's side of it.

Three areas of guest memory::

    descriptor table   16 bytes an entry: address u64, length u32, flags u16, next u16
    available ring     flags u16, index u16, heads u16 * size, used event u16
    used ring          flags u16, index u16, (head u32, written u32) * size, available event u16

The driver writes the first two, the device the third.  Both indices count up without end, modulo 65536.
Nothing the driver writes is trusted: what cannot be is a :class:`~postcopy.errors.RingError`.
"""

import struct
import threading
from collections.abc import Callable
from enum import IntFlag
from typing import Final, NamedTuple, Protocol

from postcopy.errors import RingError

MOST_ENTRIES: Final = 32768
"""Of a ring; its size is a power of 2."""

MOST_DESCRIPTORS: Final = 1024
"""Of one chain, those of an indirect table included; ``IOV_MAX``, so that one call can take them all."""

DESCRIPTOR: Final = struct.Struct("<QIHH")
USED_ELEMENT: Final = struct.Struct("<II")
_WRAP: Final = 0xFFFF
_FLAGS_AT, _INDEX_AT, _ENTRIES_AT = 0, 2, 4


class Feature(IntFlag):
    """Feature bits that belong to no kind of device (virtio 1.2, section 6)."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    RING_RESET = 1 << 40


class DescriptorFlag(IntFlag):
    """What a descriptor says of itself (2.7.5)."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


# Plain numbers: an enumeration's own operators take longer than all else of a descriptor.
_NEXT, _WRITE, _INDIRECT = (int(flag) for flag in DescriptorFlag)
_unpack = DESCRIPTOR.unpack
_tuple = tuple.__new__  # a named tuple's own constructor takes twice as long


class AvailableFlag(IntFlag):
    """What the driver says of the ring (2.7.6)."""

    NO_INTERRUPT = 1


class UsedFlag(IntFlag):
    """What the device says of the ring (2.7.8)."""

    NO_NOTIFY = 1


class RingLayout(NamedTuple):
    """Sizes in bytes of the areas of a ring with so many entries; alignments are 16, 2 and 4."""

    size: int

    @property
    def descriptors_bytes(self) -> int:
        """Of the descriptor table."""
        return DESCRIPTOR.size * self.size

    @property
    def available_bytes(self) -> int:
        """Of the available ring, its used event included."""
        return 6 + 2 * self.size

    @property
    def used_bytes(self) -> int:
        """Of the used ring, its available event included."""
        return 6 + USED_ELEMENT.size * self.size


def check_size(size: int) -> None:
    """Refuse a number of entries that no ring can have.

    :raises RingError: it is 0, too large or no power of 2.
    """
    if not 0 < size <= MOST_ENTRIES or size & (size - 1):
        raise RingError(f"a ring of {size} entries; a power of 2 up to {MOST_ENTRIES} is possible")


class Area(Protocol):
    """A range of guest memory; offsets count from its beginning."""

    def read(self, offset: int, length_bytes: int) -> bytes:
        """Copy bytes out."""

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in."""

    def load(self, offset: int) -> int:
        """Read the ``u16`` at an even offset in one access, since the driver may write it meanwhile."""

    def store(self, offset: int, value: int) -> None:
        """Write such a number in one access."""


class Buffer(NamedTuple):
    """A range of guest-physical addresses."""

    address: int
    length: int


class Chain(NamedTuple):
    """One request: what the device may read, then what it may write.

    :ivar head: the number of its first descriptor, by which it is completed.
    """

    head: int
    readable: list[Buffer]
    writable: list[Buffer]


class SplitQueue:
    """The device's side of one ring; one thread at a time.

    :param size: entries; see :func:`check_size`.
    :param next_available: index of the first entry of the available ring that has not been taken.
    :param read_memory: copies guest memory out, by guest-physical address and length, for indirect
        tables; None: the feature is not offered.
    """

    def __init__(
        self,
        size: int,
        descriptors: Area,
        available: Area,
        used: Area,
        *,
        next_available: int = 0,
        read_memory: Callable[[int, int], bytes] | None = None,
    ) -> None:
        check_size(size)
        self._size = size
        self._table = _Table("descriptor", descriptors.read, size)
        self._available = available
        self._used = used
        self._read_memory = read_memory
        self._fence = threading.Lock()
        self.next_available = next_available
        self.used_index = used.load(_INDEX_AT)

    def waiting(self) -> int:
        """How many chains the driver has made available that have not been taken.

        :raises RingError: more than the ring has entries.
        """
        index = self._available.load(_INDEX_AT)
        count = (index - self.next_available) & _WRAP
        if count > self._size:
            raise RingError(
                f"available ring: index {index} is {count} after {self.next_available}, "
                f"and the ring has {self._size} entries",
                _INDEX_AT,
            )
        return count

    def take(self) -> Chain:
        """The next chain; only while one is waiting.

        :raises RingError: what the driver wrote is no chain.
        """
        at = _ENTRIES_AT + 2 * (self.next_available & (self._size - 1))
        head = self._available.load(at)
        if head >= self._size:
            raise RingError(
                f"available ring: head {head} of a ring with {self._size} descriptors", at
            )
        chain = self._chain(head)
        self.next_available = (self.next_available + 1) & _WRAP
        return chain

    def complete(self, head: int, written_bytes: int) -> None:
        """Give a chain back to the driver.

        :param written_bytes: how many bytes of its writable buffers the device has written.
        """
        at = _ENTRIES_AT + USED_ELEMENT.size * (self.used_index & (self._size - 1))
        self._used.write(at, USED_ELEMENT.pack(head, written_bytes))
        self.used_index = (self.used_index + 1) & _WRAP
        self._used.store(_INDEX_AT, self.used_index)

    def set_notified(self, *, notified: bool) -> None:
        """Tell the driver whether to kick; it may kick all the same.

        After setting it to True look at :meth:`waiting` again: a kick may have been left out.
        """
        self._used.store(_FLAGS_AT, 0 if notified else int(UsedFlag.NO_NOTIFY))
        self._barrier()

    def wants_interrupt(self) -> bool:
        """Whether the driver is to be told of chains that have been completed."""
        self._barrier()
        return not self._available.load(_FLAGS_AT) & AvailableFlag.NO_INTERRUPT

    def _barrier(self) -> None:
        # What was written must be seen before what is read next was: taking a free lock is a locked
        # instruction, which is a full barrier on x86.
        with self._fence:
            pass

    def _chain(self, head: int) -> Chain:
        readable: list[Buffer] = []
        writable: list[Buffer] = []
        table, read, number = self._table, self._table.read, head
        for _ in range(MOST_DESCRIPTORS):
            address, length, flags, following = _unpack(read(16 * number, 16))
            if flags & _INDIRECT:
                table, number = self._indirect(table, number, address, length, flags), 0
                read = table.read
                continue
            if flags & _WRITE:
                writable.append(_tuple(Buffer, (address, length)))
            elif writable:
                raise table.wrong(number, "it is to be read, and follows one to be written")
            else:
                readable.append(_tuple(Buffer, (address, length)))
            if not flags & _NEXT:
                return _tuple(Chain, (head, readable, writable))
            if following >= table.entries:
                raise table.wrong(number, f"next is {following} of {table.entries}")
            number = following
        raise table.wrong(number, f"a circle, or a chain of more than {MOST_DESCRIPTORS}")

    def _indirect(
        self, table: "_Table", number: int, address: int, length: int, flags: int
    ) -> "_Table":
        """The indirect table that a descriptor names (2.7.5.3)."""
        if self._read_memory is None:
            raise table.wrong(number, "it is indirect, which was not agreed on")
        if table.name != "descriptor":
            raise table.wrong(number, "an indirect table in an indirect table")
        if flags & _NEXT:
            raise table.wrong(number, "it is indirect, and has a next one")
        entries = length // DESCRIPTOR.size
        if not entries or length % DESCRIPTOR.size or entries > MOST_DESCRIPTORS:
            raise table.wrong(number, f"an indirect table of {length} bytes")
        data = self._read_memory(address, length)
        return _Table("indirect descriptor", lambda at, size: data[at : at + size], entries)


class _Table(NamedTuple):
    """Descriptors: the ring's own, or an indirect table."""

    name: str
    read: Callable[[int, int], bytes]
    entries: int

    def wrong(self, number: int, what: str) -> RingError:
        return RingError(f"{self.name} {number}: {what}", DESCRIPTOR.size * number)
