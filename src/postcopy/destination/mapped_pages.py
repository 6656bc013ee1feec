"""Pages that have places in a file (mapped-ram): read straight into guest memory, run by run."""

import numpy as np

from postcopy.channel.files import FileChannel
from postcopy.errors import StreamCut
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import runs
from postcopy.paging.ram import IncomingBlock
from postcopy.stream.mapped_ram import decode_bitmap
from postcopy.stream.records import MappedBlock


def read_pages(channel: FileChannel, paged: IncomingBlock, block: MappedBlock) -> None:
    """Bring all pages of one block in; of a guest that does not run yet.

    :raises StreamError: the bitmap is wrong.
    :raises StreamCut: the file ends too early.
    """
    raw = bytearray(block.bitmap_bytes)
    count = channel.read_at(block.bitmap_offset, memoryview(raw))
    present = decode_bitmap(block, raw[:count])
    received = np.repeat(~paged.pages.missing(), paged.block.target_pages_per_page)
    memory = paged.block.pages
    # Memory that nothing has come to is zero; only an attempt that failed has left anything.
    for first, end in runs(received & ~present).tolist():
        memory[first:end] = 0
    paged.pages.receive(slice(None))
    for first, end in runs(present).tolist():
        offset = block.pages_offset + first * TARGET_PAGE_BYTES
        into = memory[first:end].reshape(-1).data
        if (done := channel.read_at(offset, into)) < len(into):
            raise StreamCut(f"The file ends in the pages of {block.name}", offset + done)
