"""All RAM of the arriving guest: which block and page an address or a record means."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from postcopy.guest import Region
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.memory.page_map import PageMap
from postcopy.memory.ram_block import RamBlock
from postcopy.memory.runs import Indices, Mask, index_runs, runs


@dataclass(slots=True)
class IncomingBlock:
    """One RAM block with the map of its pages."""

    block: RamBlock
    pages: PageMap
    stale: Mask = field(init=False)
    """Which pages may hold what is not to be seen there any more.  Of the others, those that have not been
    received read as zeros."""

    def __post_init__(self) -> None:
        self.stale = np.zeros(self.block.page_count, np.bool_)

    def remove(self, first: int, end: int) -> None:
        """The guest's process has removed pages: they are zero from now on, whatever was to come."""
        unwritten = self.pages.remove(first, end)
        for start, stop in runs(unwritten & self.stale[first:end]).tolist():
            self.block.discard(first + start, first + stop)

    def finish_removal(self, pages: Indices) -> None:
        """Throw away what was written to pages that had been removed by then."""
        for start, stop in index_runs(pages).tolist():
            first = int(pages[start])
            self.block.discard(first, first + stop - start)
        self.pages.removal_done(pages)

    def adopt(self, mapped: Mask) -> None:
        """Take over from an engine that is gone: see :meth:`postcopy.memory.page_map.PageMap.adopt`."""
        self.pages.adopt(mapped)
        self.finish_removal(self.pages.removing())
        self.stale[:] = True  # a page may have been half written


class IncomingRam:
    """The blocks of a guest that is arriving; takes over the descriptors it is given."""

    def __init__(self, regions: Sequence[Region], page_maps: Sequence[int]) -> None:
        blocks = [RamBlock(region) for region in regions]
        self._by_name = {
            block.name: IncomingBlock(block, PageMap(fd, block.page_count))
            for block, fd in zip(blocks, page_maps, strict=True)
        }

    def __iter__(self) -> Iterator[IncomingBlock]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> IncomingBlock:
        return self._by_name[name]

    def find(self, host_address: int) -> tuple[IncomingBlock, int] | None:
        """Return the block and the number of the page at an address of the guest's process."""
        for paged in self:
            offset = host_address - paged.block.host_address
            if 0 <= offset < paged.block.size_bytes:
                return paged, offset // paged.block.page_size_bytes
        return None

    @property
    def missing_pages(self) -> int:
        """Pages that are not in place, over all blocks."""
        return sum(int(paged.pages.missing().sum()) for paged in self)

    def any_expected(self) -> bool:
        """Whether a page that was asked for is not in place yet."""
        return any(paged.pages.any_expected() for paged in self)

    def forget_claims(self) -> None:
        """No channel is being read: what was to be placed and has failed to be is still missing."""
        for paged in self:
            paged.stale |= paged.pages.unclaim()  # they may have been written in part
            paged.finish_removal(paged.pages.removing())

    def close(self) -> None:
        """Let go of all memory."""
        for paged in self:
            paged.pages.close()
            paged.block.close()


def mapped_pages(scanner: PagemapScanner, block: RamBlock) -> Mask:
    """Tell which pages of a block, of its own size, the guest's process has mapped."""
    return scanner.mapped(block.host_address, block.page_count, block.page_size_bytes)
