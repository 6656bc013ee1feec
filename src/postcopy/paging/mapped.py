"""Which pages the guest's process has mapped."""

import numpy as np

from postcopy.abi.pagemap import PageCategory
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.memory.ram_block import RamBlock
from postcopy.memory.runs import Mask


def mapped_pages(scanner: PagemapScanner, block: RamBlock) -> Mask:
    """Tell which pages of a block, of its own size, the process of the scanner has mapped."""
    base, end = block.host_address, block.host_address + block.size_bytes
    mapped = np.zeros(block.page_count, np.bool_)
    size = block.page_size_bytes
    for first, last in scanner.scan(base, end, protect=False, categories=PageCategory.PRESENT):
        mapped[(int(first) - base) // size : (int(last) - base) // size] = True
    return mapped
