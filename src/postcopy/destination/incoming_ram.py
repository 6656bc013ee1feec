"""The destination's memory before and at switchover: allocated early, read from a file, discarded."""

import threading
from contextlib import closing

import numpy as np
import numpy.typing as npt

from postcopy.channel.files import FileChannel
from postcopy.errors import PostcopyError, StreamCut
from postcopy.guest import Guest
from postcopy.kernel import threads
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import numbers_in, runs
from postcopy.multifd.threads import ALONE, FileAccess, FileThreads, FileWork
from postcopy.paging.ram import IncomingBlock, IncomingRam
from postcopy.stream.mapped_ram import decode_bitmap
from postcopy.stream.records import MappedBlock

_STEP_BYTES = 32 << 20
_PIECE_PAGES = 4096
"""Read in one piece: 16 MiB."""


class Populating:
    """Allocates memory in the background until the source connects.

    The first touch of a page costs more than its transfer (``docs/decisions``), so it is done while the
    destination waits.  Nothing depends on it: it stops as soon as it is told to, and does nothing when
    memory is short.

    The pages are mapped in the guest's process, too, unless postcopy may follow: that begins with nothing
    mapped there, and to unmap a page takes as long as to map it.
    """

    def __init__(self, guest: Guest, ram: IncomingRam, budget_bytes: int) -> None:
        self._guest = guest
        self._ram = ram
        self._budget_bytes = budget_bytes
        self._changed = threading.Condition()
        # Under `_changed`: which calls have been made.
        self._stopped = False
        self._hidden = False
        self._thread = threading.Thread(target=self._run, name="populate", daemon=True)

    def start(self) -> None:
        """Begin, unless there can be no more threads."""
        threads.start_if_possible(self._thread)

    def stop(self) -> None:
        """End after the step at hand, and wait for that."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def hide(self) -> None:
        """Postcopy may follow: map nothing in the guest's process, and unmap what was."""
        with self._changed:
            self._hidden = True
            self._changed.notify_all()

    def _run(self) -> None:
        self._populate()
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._hidden)
            if self._stopped:
                return
        try:
            self._guest.unmap_missing()
        except PostcopyError:
            return  # it is done again when postcopy is advised

    def _populate(self) -> None:
        left = self._budget_bytes
        for paged in self._ram:
            for offset in range(0, paged.block.size_bytes, _STEP_BYTES):
                length = min(_STEP_BYTES, paged.block.size_bytes - offset)
                left -= length
                if self._stopped or left < 0:
                    return
                try:
                    paged.block.populate(offset, length)
                    if not self._hidden:
                        self._guest.populate(paged.block.name, offset, length)
                except PostcopyError:
                    return  # no memory to spare: pages are allocated when they are received


def memory_to_spare_bytes() -> int:
    """How much memory may be allocated early: half of what the host has available."""
    with open("/proc/meminfo") as lines:  # noqa: PTH123 - a file of the kernel
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 2
    return 0


def discard(ram: IncomingRam, name: str, ranges: npt.NDArray[np.uint64]) -> None:
    """Discard ranges of a block: the source will send these pages again.

    :param ranges: start and length, in bytes, of whole pages of the block, shape ``(n, 2)``.
    """
    paged = ram[name]
    pages = ranges.astype(np.int64) // paged.block.page_size_bytes
    forgotten = paged.pages.forget(numbers_in(pages, paged.block.page_count))
    paged.stale[forgotten] = True  # what they held is still in memory


def empty_missing(ram: IncomingRam) -> None:
    """Empty every page that was never sent: it was zero at the source, and reads as zeros from now on."""
    for paged in ram:
        for first, end in runs(paged.pages.missing()).tolist():
            paged.block.discard(first, end)


def read_pages(
    channel: FileChannel, paged: IncomingBlock, block: MappedBlock, access: FileAccess = ALONE
) -> None:
    """Read all pages of one block from a mapped-ram file; of a guest that does not run yet.

    :param access: how the file is read.
    :raises StreamError: the bitmap is wrong.
    :raises StreamCut: the file ends too early.
    :raises HostCannot: it cannot be read so.
    """
    raw = bytearray(block.bitmap_bytes)
    count = channel.read_at(block.bitmap_offset, memoryview(raw))
    present = decode_bitmap(block, raw[:count])
    received = np.repeat(~paged.pages.missing(), paged.block.target_pages_per_page)
    memory = paged.block.pages
    # Memory without received pages is zero, unless an earlier attempt has failed.
    for first, end in runs(received & ~present).tolist():
        memory[first:end] = 0
    paged.pages.receive(slice(None))
    pieces = (
        (start, min(start + _PIECE_PAGES, end))
        for first, end in runs(present).tolist()
        for start in range(first, end, _PIECE_PAGES)
    )

    def reading(first: int, end: int) -> FileWork:
        offset = block.pages_offset + first * TARGET_PAGE_BYTES
        into = memory[first:end].reshape(-1).data

        def read(file: FileChannel) -> None:
            if (done := file.read_at(offset, into)) < len(into):
                raise StreamCut(f"The file ends in the pages of {block.name}", offset + done)

        return read

    if not access.threads:
        for piece in pieces:
            reading(*piece)(channel)
        return
    with closing(FileThreads(channel, access)) as several:
        for piece in pieces:
            several.do(reading(*piece))
        several.flush()
