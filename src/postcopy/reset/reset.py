"""A guest goes back to an earlier point of its life, at the price of what it has written since.

This is the memory's side of it, in an engine; the guest's process
(:mod:`postcopy.link.guest.resetting`) stops the guest meanwhile, keeps the devices' states, and decides.
All that must outlive an engine is there too: the copy of the memory, and the tracking of writes, which the
kernel does in that process's page tables.

A copy of the memory is made while the guest runs: what it writes meanwhile is copied again, round after
round, and the little that is left when it stands still.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from postcopy.destination.incoming_ram import memory_to_spare_bytes
from postcopy.dirty.pagemap import PagemapTracker
from postcopy.dirty.shared import SharedWrites
from postcopy.errors import HostCannot
from postcopy.guest import DeviceState, Guest
from postcopy.image.mapped_ram import MappedImage
from postcopy.lazy_restore.restore_image import RestoreImage
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, RamBlock
from postcopy.memory.runs import Mask, mask_of, runs
from postcopy.reset.baseline import KeptMemory, MappedMemory, PointMemory
from postcopy.trace import trace

Runs: TypeAlias = npt.NDArray[np.int64]
"""First page and end page (not included) of each run, shape ``(n, 2)``."""

_FEW_PAGES: Final = 256  # that are copied in less than a millisecond
_ROUNDS: Final = 5
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class _Watched:
    """One block of the guest, and what it was; counted in pages of 4 KiB."""

    block: RamBlock
    kept: KeptMemory
    then: PointMemory

    def has_data(self) -> Mask:
        """Which pages the guest has memory for now."""
        found = self.block.has_data(0, self.block.page_count)
        per_page = self.block.target_pages_per_page
        return found if per_page == 1 else np.repeat(found, per_page)

    def written(self, own: PagemapTracker, others: SharedWrites) -> Runs:
        """Which pages have been written since this was last asked, by the guest and by other processes."""
        block = self.block
        found = own.collect_runs(block, 0, block.page_count, protect=True)
        shared = others.collect(block, 0, block.page_count, protect=True)
        if shared is not None:
            shared |= mask_of(found, block.page_count)
            found = runs(shared)
        return found * block.target_pages_per_page

    def keep(self, pages: Runs) -> int:
        """Copy pages; return how many those were."""
        for first, end in pages.tolist():
            self.kept.keep(self.block.pages, first, end)
        return _count(pages)

    def put_back(self, pages: Runs) -> int:
        """Put pages back; return how many those were."""
        for first, end in pages.tolist():
            self.then.put_back(self.block.pages, first, end)
        return _count(pages)


def _count(pages: Runs) -> int:
    return int((pages[:, 1] - pages[:, 0]).sum())


class Reset:
    """Keeps one reset point, or takes over one whose engine has died.

    :param copies: memfds for copies of the blocks, in their order; ours from now on.
    :param path: the image that is the point; None: the guest is, as it is now.
    :param identity: of that image, if it has been opened before.
    :raises ImageError: the image is damaged, is none, or does not fit the guest.
    """

    def __init__(
        self,
        guest: Guest,
        copies: Sequence[int],
        path: str | None = None,
        identity: str = "",
    ) -> None:
        self._guest = guest
        self._tracker = PagemapTracker(guest)
        self._others = SharedWrites(guest)
        self._opened: RestoreImage | None = None
        self._blocks = [RamBlock(region) for region in guest.regions()]
        kept = [KeptMemory(block, fd) for block, fd in zip(self._blocks, copies, strict=True)]
        if path is not None:
            self._open(RestoreImage(Path(path)), identity)
        self._watched = [
            _Watched(block, copy, self._memory(block, copy))
            for block, copy in zip(self._blocks, kept, strict=True)
        ]

    def _open(self, opened: RestoreImage, identity: str) -> None:
        self._opened = opened
        opened.check_same(identity)
        sizes = {block.name: block.size_bytes for block in self._blocks}
        opened.check_fits(self._guest.machine_name, sizes)
        opened.check_all(sizes)  # now, and not when the guest stands still

    def _memory(self, block: RamBlock, kept: KeptMemory) -> PointMemory:
        if self._opened is None:
            return kept
        image = self._opened.image
        if isinstance(image, MappedImage):
            return MappedMemory(image, block.name)
        self._check_room(int(np.count_nonzero(image.has_data(block.name))))
        kept.fill(image)
        return kept

    @property
    def identity(self) -> str:
        """Of the image, if there is one."""
        return "" if self._opened is None else self._opened.identity

    @property
    def devices(self) -> Sequence[DeviceState]:
        """What the image has of the devices."""
        return [] if self._opened is None else self._opened.image.devices

    @property
    def needs_file(self) -> bool:
        """Whether pages are read from the image still: else all of it is in the copies."""
        return any(isinstance(watched.then, MappedMemory) for watched in self._watched)

    def watch(self) -> None:
        """Begin to track writes, or go on if an engine that has died had begun it."""
        self._others.start()
        self._tracker.start()
        trace("reset.watching")

    # --- the guest as it is now

    def keep(self) -> int:
        """Copy the memory of a running guest, up to what it writes meanwhile; return bytes.

        :raises HostCannot: there is not enough memory for a copy.
        """
        self._check_room(sum(int(np.count_nonzero(each.has_data())) for each in self._watched))
        self.watch()
        # All counts as written now, and most of it may never have been touched.
        for watched in self._watched:
            watched.written(self._tracker, self._others)
        pages = sum(watched.keep(runs(watched.has_data())) for watched in self._watched)
        for _ in range(_ROUNDS):
            more = self._keep_written()
            pages += more
            if more <= _FEW_PAGES:
                break
        trace("reset.kept")
        return pages * TARGET_PAGE_BYTES

    def keep_rest(self) -> int:
        """The guest stands still: copy what it has written since; return bytes."""
        return self._keep_written() * TARGET_PAGE_BYTES

    def _keep_written(self) -> int:
        return sum(
            watched.keep(watched.written(self._tracker, self._others)) for watched in self._watched
        )

    # --- back

    def put_back(self, *, everything: bool) -> int:
        """Put the pages of a guest that stands still back; return how many, of 4 KiB.

        :param everything: what was written is not known: compare all memory.
        """
        count = 0
        for watched in self._watched:
            pages = watched.written(self._tracker, self._others)
            if everything:
                pages = runs(watched.has_data() | watched.then.data())
            trace("reset.scanned")
            count += watched.put_back(pages)
            trace("reset.put-back", pages=count)
        return count

    def _check_room(self, pages: int) -> None:
        needed, spare = pages * TARGET_PAGE_BYTES, memory_to_spare_bytes()
        if needed > spare:
            raise HostCannot(
                f"a copy of the guest's memory takes {needed // _MIB} MiB, and this host has "
                f"{spare // _MIB} MiB to spare",
                "give a mapped-ram image as the reset point: its pages stay in the file",
            )
