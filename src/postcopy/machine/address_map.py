"""Where the one RAM block stands among the guest's physical addresses.

QEMU's ``none`` has it in one piece from 0 on.  Its ``microvm`` leaves the GiB below 4 GiB to devices:
what does not fit under 3 GiB stands from 4 GiB on.  On the wire there is one block in either case, and
our guests' page tables map it in one piece, so only what speaks of physical addresses has to know.
"""

from dataclasses import dataclass
from typing import Final

from postcopy.errors import Refused

HOLE_ADDRESS: Final = 3 << 30
"""On ``microvm`` no RAM reaches beyond this address..."""

HIGH_ADDRESS: Final = 4 << 30
"""...and here the rest of it stands."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the block, ``[offset, offset + size_bytes)``, and the physical address it has."""

    guest_address: int
    offset: int
    size_bytes: int

    @property
    def end_address(self) -> int:
        """The first physical address behind it."""
        return self.guest_address + self.size_bytes


@dataclass(frozen=True, slots=True)
class AddressMap:
    """The parts of one block, in order of their offsets and of their addresses."""

    parts: tuple[Part, ...]

    @classmethod
    def flat(cls, memory_bytes: int) -> "AddressMap":
        """All of it from 0 on."""
        return cls((Part(0, 0, memory_bytes),))

    @classmethod
    def with_hole(cls, memory_bytes: int) -> "AddressMap":
        """As on ``microvm``."""
        if memory_bytes <= HOLE_ADDRESS:
            return cls.flat(memory_bytes)
        rest = Part(HIGH_ADDRESS, HOLE_ADDRESS, memory_bytes - HOLE_ADDRESS)
        return cls((Part(0, 0, HOLE_ADDRESS), rest))

    @property
    def end_address(self) -> int:
        """The first physical address behind all of it."""
        return self.parts[-1].end_address

    def offset_of(self, address: int, length_bytes: int) -> int:
        """Where in the block a range of physical addresses is.

        :raises Refused: not all of it is RAM.
        """
        for part in self.parts:
            if part.guest_address <= address <= address + length_bytes <= part.end_address:
                return part.offset + address - part.guest_address
        ranges = " and ".join(f"[{p.guest_address:#x}, {p.end_address:#x})" for p in self.parts)
        raise Refused(f"no RAM at [{address:#x}, {address + length_bytes:#x}); it is at {ranges}")
