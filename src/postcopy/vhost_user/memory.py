"""Guest memory as a back end has it mapped: regions of the front end's files."""

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from postcopy.errors import KernelError, RingError, VhostUserError
from postcopy.kernel.mapping import Mapping
from postcopy.vhost_user.payloads import Region

MOST_SLOTS: Final = 32
"""Regions that are added one by one; QEMU's machines have one for each DIMM and some more."""

_PAGE_BYTES: Final = 4096


class MappedRegion:
    """One region, mapped.

    :param fd: its file; the caller's, and not needed afterwards.
    :raises VhostUserError: it leaves the file, or the file cannot be mapped.
    """

    def __init__(self, region: Region, fd: int) -> None:
        self.region = region
        self.start = region.guest_address
        self.end = region.guest_address + region.size
        found = os.fstat(fd)
        if region.offset + region.size > found.st_size:
            raise VhostUserError(
                f"a region of {region.size:#x} bytes from {region.offset:#x} on leaves its file of "
                f"{found.st_size:#x} bytes"
            )
        # Of huge pages only whole ones can be mapped: st_blksize is their size there.
        unit = max(found.st_blksize, _PAGE_BYTES)
        before = region.offset % unit
        length = -(-(before + region.size) // unit) * unit
        try:
            self.mapping = Mapping.shared(fd, length, region.offset - before)
        except KernelError as error:
            raise VhostUserError(f"its file cannot be mapped: {error}") from error
        self.address = self.mapping.address + before
        self.is_watched = False
        """Whether a missing page of it is waited for."""
        self.bytes = self.mapping.buffer()[before : before + region.size]

    def ours(self) -> Region:
        """The region with our address in place of the front end's."""
        return replace(self.region, user_address=self.address)

    def is_at(self, other: Region) -> bool:
        """Whether a front end means this one."""
        ours = self.region
        return (ours.guest_address, ours.size, ours.user_address) == (
            other.guest_address,
            other.size,
            other.user_address,
        )

    def overlaps(self, other: "MappedRegion") -> bool:
        """Whether they share guest addresses, or addresses of the front end."""
        ours, theirs = self.region, other.region
        return _overlap(
            ours.guest_address, ours.size, theirs.guest_address, theirs.size
        ) or _overlap(ours.user_address, ours.size, theirs.user_address, theirs.size)

    def close(self) -> None:
        """Unmap it, now or when the last view of it is gone."""
        self.bytes = memoryview(b"")
        self.mapping.close()


class RingArea:
    """:class:`postcopy.virtio.ring.Area`: a part of a ring.

    :param view: its bytes; an even number of them.
    """

    __slots__ = ("_bytes", "_numbers")

    def __init__(self, view: memoryview) -> None:
        self._bytes = view
        self._numbers = view.cast("H")

    def read(self, offset: int, length_bytes: int) -> bytes:
        """Copy bytes out."""
        return self._bytes[offset : offset + length_bytes].tobytes()

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in."""
        self._bytes[offset : offset + len(data)] = data

    # An item of a view is one access of the processor; a copy of two bytes may be one of each byte.

    def load(self, offset: int) -> int:
        """Read the ``u16`` at an even offset in one access."""
        return self._numbers[offset >> 1]

    def store(self, offset: int, value: int) -> None:
        """Write the ``u16`` at an even offset in one access."""
        self._numbers[offset >> 1] = value


class GuestMemory:
    """All regions, ordered by guest address.

    A view that was handed out stays valid: its region is unmapped when the last view is gone.
    """

    def __init__(self) -> None:
        self.regions: list[MappedRegion] = []
        self._starts: list[int] = []
        self._forget()

    @property
    def end(self) -> int:
        """The guest address behind the last region."""
        return self.regions[-1].end if self.regions else 0

    def replace(self, regions: Iterable[MappedRegion]) -> None:
        """Have these in place of those that there are.

        :raises VhostUserError: two of them overlap; then nothing has changed.
        """
        ordered = sorted(regions, key=lambda region: region.start)
        for number, region in enumerate(ordered):
            for other in ordered[:number]:
                if region.overlaps(other):
                    raise VhostUserError(
                        f"the regions at guest addresses {other.start:#x} and {region.start:#x} overlap"
                    )
        gone = [region for region in self.regions if region not in ordered]
        self.regions, self._starts = ordered, [region.start for region in ordered]
        self._forget()
        for region in gone:
            region.close()

    def views(self, address: int, length: int, into: list[memoryview]) -> None:
        """Append a range of guest addresses, one piece for each region that it crosses.

        :raises RingError: a part of it is in no region.
        """
        start = address - self._last_start
        if start >= 0 and start + length <= self._last_size:  # nearly all is in one region
            into.append(self._last_bytes[start : start + length])
            return
        while True:
            number = bisect_right(self._starts, address) - 1
            if number < 0 or address >= self.regions[number].end:
                raise RingError(f"guest address {address:#x} is in no region of memory")
            region = self.regions[number]
            self._remember(region)
            start = address - region.start
            piece = region.bytes[start : start + length]
            into.append(piece)
            length -= len(piece)
            if not length:
                return
            address = region.end

    def read(self, address: int, length: int) -> bytes:
        """Copy a range of guest addresses out.

        :raises RingError: a part of it is in no region.
        """
        pieces: list[memoryview] = []
        self.views(address, length, pieces)
        return b"".join(pieces)

    def part_of_ring(self, user_address: int, length: int, alignment: int) -> RingArea:
        """A range of the front end's addresses, which must lie in one region.

        :raises VhostUserError: it does not, or is not aligned.
        """
        if user_address % alignment:
            raise VhostUserError(f"{user_address:#x} is no multiple of {alignment}")
        for region in self.regions:
            start = user_address - region.region.user_address
            if start >= 0 and start + length <= region.region.size:
                return RingArea(region.bytes[start : start + length])
        raise VhostUserError(f"{length} bytes at {user_address:#x} are in no region of memory")

    def close(self) -> None:
        """Unmap all."""
        self.replace([])

    def _remember(self, region: MappedRegion) -> None:
        self._last_start, self._last_size = region.start, len(region.bytes)
        self._last_bytes = region.bytes

    def _forget(self) -> None:
        self._last_start, self._last_size = 0, -1
        self._last_bytes = memoryview(b"")


def _overlap(start: int, length: int, other_start: int, other_length: int) -> bool:
    return start < other_start + other_length and other_start < start + length
