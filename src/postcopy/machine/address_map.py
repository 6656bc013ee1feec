"""Where the RAM blocks stand among the guest's physical addresses.

All blocks follow one another, in the order in which they are given: an offset counts through all of them.
QEMU's ``none`` has them so from 0 on.  Its ``microvm`` leaves the GiB below 4 GiB to devices: what does not
fit under 3 GiB stands from 4 GiB on.  Our guests' page tables map all RAM in one piece, so only what speaks
of physical addresses has to know.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from postcopy.errors import Refused

HOLE_ADDRESS: Final = 3 << 30
"""On ``microvm`` no RAM reaches beyond this address..."""

HIGH_ADDRESS: Final = 4 << 30
"""...and here the rest of it stands."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one block, ``[offset, offset + size_bytes)``, and the physical address it has."""

    guest_address: int
    offset: int
    size_bytes: int

    @property
    def end_address(self) -> int:
        """The first physical address behind it."""
        return self.guest_address + self.size_bytes

    @property
    def end_offset(self) -> int:
        """The first offset behind it."""
        return self.offset + self.size_bytes


@dataclass(frozen=True, slots=True)
class AddressMap:
    """The parts of all blocks, in order of their offsets and of their addresses."""

    parts: tuple[Part, ...]

    @classmethod
    def flat(cls, *sizes_bytes: int) -> "AddressMap":
        """Blocks of these sizes, all of them from 0 on."""
        return cls(tuple(_cut(sizes_bytes, sum(sizes_bytes))))

    @classmethod
    def with_hole(cls, *sizes_bytes: int) -> "AddressMap":
        """Blocks of these sizes as on ``microvm``."""
        return cls(tuple(_cut(sizes_bytes, HOLE_ADDRESS)))

    @property
    def end_address(self) -> int:
        """The first physical address behind all of it."""
        return self.parts[-1].end_address

    def address_of(self, offset: int) -> int:
        """The physical address of an offset in RAM."""
        part = next(part for part in self.parts if offset < part.end_offset)
        return part.guest_address + offset - part.offset

    def offset_of(self, address: int, length_bytes: int) -> int:
        """Where in RAM a range of physical addresses is; it may reach through several blocks.

        :raises Refused: not all of it is RAM.
        """
        for start, end, offset in self._ranges():
            if start <= address <= address + length_bytes <= end:
                return offset + address - start
        ranges = " and ".join(f"[{start:#x}, {end:#x})" for start, end, _ in self._ranges())
        raise Refused(f"no RAM at [{address:#x}, {address + length_bytes:#x}); it is at {ranges}")

    def _ranges(self) -> list[tuple[int, int, int]]:
        """Start and end address of what has no gap, and the offset of its start."""
        found: list[tuple[int, int, int]] = []
        for part in self.parts:
            if found and found[-1][1] == part.guest_address:
                start, _, offset = found.pop()
            else:
                start, offset = part.guest_address, part.offset
            found.append((start, part.end_address, offset))
        return found


def _cut(sizes_bytes: tuple[int, ...], seam: int) -> Iterator[Part]:
    """Cut blocks at their ends, and at the offset ``seam``, from which on RAM stands higher."""
    offset = 0
    for size in sizes_bytes:
        end = offset + size
        low_end = min(end, seam)
        if offset < low_end:
            yield Part(offset, offset, low_end - offset)
        if low_end < end:
            start = max(offset, seam)
            yield Part(start - seam + HIGH_ADDRESS, start, end - start)
        offset = end
