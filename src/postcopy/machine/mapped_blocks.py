"""The memory of one machine: its RAM blocks, mapped one behind the other."""

from collections.abc import Sequence

from postcopy.errors import Refused
from postcopy.guest import MappedRange, Region
from postcopy.kernel.calls import close_all, open_all
from postcopy.kernel.mapping import Mapping
from postcopy.machine import memory_blocks
from postcopy.machine.address_map import AddressMap
from postcopy.machine.memory_blocks import HUGE_PAGE_BYTES, MemoryBlock
from postcopy.vhost_user.front_end import MemoryPart


class Ram:
    """All RAM of a machine.  An offset in it is the guest's own address: see ``boot``.

    :param addresses: where it stands among the physical addresses.
    :param transparent: blocks of 4 KiB pages get 2 MiB ones where the kernel has them free.
    :raises HostCannot: the host lacks huge pages, or room.
    :ivar mapping: all blocks, in their order.
    :ivar regions: what an engine is told of each, in the order of their addresses.
    """

    def __init__(
        self, blocks: Sequence[MemoryBlock], addresses: AddressMap, *, transparent: bool
    ) -> None:
        memory_blocks.check_host(blocks)
        self._fds = open_all(lambda block: block.create(transparent=transparent), blocks)
        alignment = max(HUGE_PAGE_BYTES, *(block.page_size_bytes for block in blocks))
        try:
            files = [(fd, block.size_bytes) for fd, block in zip(self._fds, blocks, strict=True)]
            self.mapping = Mapping.joined(files, alignment)
        except BaseException:
            close_all(self._fds)
            raise
        self.regions = tuple(self._regions(blocks, addresses))

    def _regions(self, blocks: Sequence[MemoryBlock], addresses: AddressMap) -> list[Region]:
        regions, offset = [], 0
        for fd, block in zip(self._fds, blocks, strict=True):
            regions.append(
                Region(
                    name=block.name,
                    size_bytes=block.size_bytes,
                    page_size_bytes=block.page_size_bytes,
                    guest_address=addresses.address_of(offset),
                    host_address=self.mapping.address + offset,
                    fd=fd,
                    parts=_parts(addresses, block, offset),
                )
            )
            offset += block.size_bytes
        return regions

    @property
    def parts(self) -> list[MemoryPart]:
        """All of it for a process that is to map it, in order of the guest's addresses."""
        return [
            MemoryPart(
                region.name,
                part.offset,
                part.length_bytes,
                part.address,
                region.fd,
                region.fd_offset + part.offset,
            )
            for region in self.regions
            for part in region.physical_ranges
        ]

    def name_at(self, offset: int) -> str:
        """The name of the block that has this offset in all RAM."""
        address = self.mapping.address + offset
        return next(
            each.name
            for each in self.regions
            if each.host_address <= address < each.host_address + each.size_bytes
        )

    def range_of(self, name: str) -> tuple[int, int]:
        """First offset and end of a block.

        :raises Refused: there is none of this name.
        """
        for region in self.regions:
            if region.name == name:
                start = region.host_address - self.mapping.address
                return start, start + region.size_bytes
        names = ", ".join(f"'{region.name}'" for region in self.regions)
        raise Refused(f"there is no RAM block '{name}'; there is {names}")

    def close(self) -> None:
        """Unmap and close; what an engine holds of it lives on."""
        self.mapping.close()
        close_all(self._fds)


def _parts(addresses: AddressMap, block: MemoryBlock, start: int) -> tuple[MappedRange, ...]:
    """Where a block that begins at an offset in RAM stands, unless it is in one piece."""
    parts = [
        MappedRange(block.name, part.offset - start, part.size_bytes, part.guest_address)
        for part in addresses.parts
        if start <= part.offset < start + block.size_bytes
    ]
    return tuple(parts) if len(parts) > 1 else ()
