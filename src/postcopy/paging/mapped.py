"""Which pages the guest's process has mapped."""

from postcopy.kernel.pagemap import PagemapScanner
from postcopy.memory.ram_block import RamBlock
from postcopy.memory.runs import Mask


def mapped_pages(scanner: PagemapScanner, block: RamBlock) -> Mask:
    """Tell which pages of a block, of its own size, the guest's process has mapped."""
    return scanner.mapped(block.host_address, block.page_count, block.page_size_bytes)
