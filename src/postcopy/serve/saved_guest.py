"""An image as a guest that a source migrates: it stands still, and its memory is in a file.

The source is the same as of a guest that runs.  Nothing of the image is changed: it may be served any
number of times, and by several servers at once.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.errors import ImageError, Refused
from postcopy.guest import DeviceState, Saving
from postcopy.image.base import ImageBlock, PageRows
from postcopy.image.mapped_ram import MappedImage
from postcopy.lazy_restore.restore_image import RestoreImage
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, PageBlock
from postcopy.memory.runs import Indices, Mask, index_runs
from postcopy.ownership import Move
from postcopy.source.switchover import OURS_ONLY
from postcopy.stream.numbers import FIRMWARE_PAGE_BYTES, IGNORED_BLOCKS


class SavedBlock(PageBlock):
    """One RAM block of an image; any thread may read it.

    A page is compared with the manifest, where there is one, before it is given to anything.

    :param page_size_bytes: of the same block at the destination; an image does not have it.
    """

    def __init__(self, opened: RestoreImage, block: ImageBlock, page_size_bytes: int) -> None:
        super().__init__(block.name, block.size_bytes, page_size_bytes)
        self._image = opened.image
        self._source = opened.source(self)

    def has_data(self, start: int, end: int) -> Mask:
        """Tell which pages the image has; the others are zero."""
        return self._source.has_data(start, end)

    def is_zero(self, page: int) -> bool:
        """Not known: what the image has is taken to hold something."""
        del page
        return False

    def page(self, page: int) -> PageRows:
        """Read one page.

        :raises ImageError: it does not agree with its digest, or cannot be read.
        """
        contents: PageRows = self.gather(np.array([page]))[0][0]
        return contents

    def gather(self, target: Indices) -> tuple[PageRows, Indices]:
        """Read pages: those that lie near to each other at once, together with what is between.

        :raises ImageError: one does not agree with its digest, or cannot be read.
        """
        ends = [*(np.flatnonzero(np.diff(target) > _NEAR_PAGES) + 1).tolist(), len(target)]
        rows, places, count = [_NO_ROWS], np.empty(len(target), np.int64), 0
        for start, end in zip([0, *ends], ends, strict=False):
            found, within = self._read_near(target[start:end])
            rows.append(found)
            places[start:end] = count + within
            count += len(found)
        return rows[1] if len(rows) == 2 else np.concatenate(rows), places

    def close(self) -> None:
        """The image is its server's to close."""

    def _read_near(self, target: Indices) -> tuple[PageRows, Indices]:
        """Read pages that lie near to each other; return rows, and which of them those pages are."""
        with contextlib.suppress(ImageError):  # perhaps of bytes between the pages
            if (read := self._source.read_good(target)) is not None:
                rows, good = read
                if good.all():
                    return rows, target - target[0]
        ranges = index_runs(target).tolist()
        runs = [self._read(int(target[start]), int(target[end - 1]) + 1) for start, end in ranges]
        return runs[0] if len(runs) == 1 else np.concatenate(runs), np.arange(len(target))

    def _read(self, first: int, end: int) -> PageRows:
        """Read pages of the wire that the image has, one after the other, and check them."""
        per_page = self.target_pages_per_page
        own, own_end = first // per_page, -(-end // per_page)
        good = self._source.good(own, own_end - own)
        if good < own_end - own:
            raise self._bad(own + good)
        if per_page == 1 and isinstance(self._image, MappedImage):
            rows = np.empty((end - first, TARGET_PAGE_BYTES), np.uint8)
            self._image.read_into(self.name, first, rows)
            return rows
        return self._image.read(self.name, first, end - first)

    def _bad(self, page: int) -> ImageError:
        reason = self._source.reason(page).removeprefix(f"{self._image.path}: ")
        return ImageError(self._image.path, f"{reason}; take the image from a copy")


_STATE: Final = slice(4, 36)
"""Of the section ``globalstate``: the run state by its QAPI name, padded with zeros."""

_NEAR_PAGES: Final = 16
"""So many pages are read and thrown away in less time than a further call takes."""

_NO_ROWS: PageRows = np.empty((0, TARGET_PAGE_BYTES), np.uint8)


class Unwritten:
    """The tracker of memory that is never written: see :class:`postcopy.dirty.tracker.DirtyTracker`."""

    is_quick = True

    def start(self) -> None:
        """Nothing to begin."""

    def collect(
        self, block: PageBlock, start: int, end: int, *, protect: bool
    ) -> npt.NDArray[np.bool_]:
        """Tell that none of the pages was written."""
        del block, protect
        return np.zeros(end - start, np.bool_)

    def stop(self) -> None:
        """Nothing to stop."""


class _Saved:
    """Devices that were saved long ago: see :class:`postcopy.guest.Saving`."""

    def __init__(self, states: Sequence[DeviceState]) -> None:
        self._states = states
        self.began_ns = time.monotonic_ns()

    def states(self) -> Sequence[DeviceState]:
        """Give them."""
        return self._states

    def settle(self) -> None:
        """Nothing is under way."""


class SavedGuest:
    """An image, as the guest of a source and as its memory.

    See :class:`postcopy.guest.LeavingGuest` and :class:`postcopy.source.dirty_pages.SourceMemory`.

    :param page_sizes: of blocks that have pages of another size than 4096 bytes at the destination.
    :raises Refused: the image has no such block, or the block is not made of such pages.
    """

    leaves_zeros_out = (
        True  # they are most of many images, and QEMU takes each in a call of its own
    )

    def __init__(self, opened: RestoreImage, page_sizes: Mapping[str, int]) -> None:
        self._opened = opened
        self._page_sizes = page_sizes
        found = {block.name: block.size_bytes for block in opened.image.blocks}
        for name, size in page_sizes.items():
            if name not in found:
                known = ", ".join(found)
                raise Refused(f"{opened.path} has no RAM block '{name}'; its blocks are {known}")
            if size < TARGET_PAGE_BYTES or size & (size - 1) or found[name] % size:
                raise Refused(
                    f"RAM block '{name}' of {found[name]} bytes is not made of pages of {size}; give "
                    "the destination's page size"
                )

    @property
    def machine_name(self) -> str:
        """What the configuration section says."""
        return self._opened.image.machine_name

    @property
    def ran(self) -> bool:
        """Whether it ran when it was saved; that is assumed if the image does not tell."""
        if self._opened.was_running is not None:
            return self._opened.was_running
        for device in self._opened.image.devices:
            if device.name == "globalstate":
                return device.payload[_STATE].split(b"\0")[0] == b"running"
        return True

    @property
    def ours_only(self) -> frozenset[str]:
        """The device sections that a real QEMU would refuse, if the image is of a machine of ours.

        Ours has no firmware; a real QEMU's machine of the same name has.
        """
        names = {block.name for block in self._opened.image.blocks}
        is_ours = self.machine_name in FIRMWARE_PAGE_BYTES and not names & IGNORED_BLOCKS
        return OURS_ONLY if is_ours else frozenset()

    def blocks(self) -> Sequence[PageBlock]:
        """All blocks, those of firmware as well: a destination has emptied its own."""
        return [
            SavedBlock(self._opened, block, self._page_sizes.get(block.name, TARGET_PAGE_BYTES))
            for block in self._opened.image.blocks
        ]

    def tracker(self, wish: str) -> Unwritten:
        """The image stands still."""
        del wish
        return Unwritten()

    def pause_to_save(self) -> Saving:
        """Give the devices as they are in the image."""
        return _Saved(self._opened.image.devices)

    def resume(self) -> None:
        """An image does not run: after a failure it is as it was."""

    def throttle(self, percent: int) -> None:
        """An image writes nothing: it is not slowed down."""

    def limit_dirty_rate(self, mebibytes: int, period_ms: int) -> None:
        """See :meth:`throttle`."""

    def move(self, move: Move) -> None:
        """An image has no owner: each destination gets a guest of its own."""
        del move
