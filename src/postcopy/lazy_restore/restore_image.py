"""An image opened for a guest: everything that can be refused is refused before the guest is touched."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from postcopy.errors import ImageError, KernelError, Refused
from postcopy.image import page_copies, working_set
from postcopy.image.chunk_verifier import ChunkVerifier
from postcopy.image.formats import Image
from postcopy.image.mapped_ram import MappedImage
from postcopy.image.page_copies import CopiedPages, PageCopies
from postcopy.image.verify import open_for_restore
from postcopy.image.working_set import BadWorkingSet, WorkingSet
from postcopy.lazy_restore.image_source import ImagePageSource
from postcopy.memory.page_map import EARLY, UNTOUCHED
from postcopy.memory.ram_block import PageBlock
from postcopy.memory.runs import Mask, runs
from postcopy.paging.ram import IncomingBlock, IncomingRam
from postcopy.stream.numbers import IGNORED_BLOCKS


class RestoreImage:
    """An image that fits a guest, with what checks its pages.

    :param path: the image.
    :raises ImageError: it is no image, or not what it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.image, manifest = open_for_restore(path)
        if manifest is not None:
            self.identity = manifest.identity
        else:
            self.identity = working_set.identity_of(path)
        self._has_digests = manifest is not None
        self.was_running = None if manifest is None else manifest.was_running
        """Whether the guest is to run, whatever its state in the image; ``None``: that state says."""
        self._copies: PageCopies | None = None
        self._check: ChunkVerifier | None = None
        if manifest is not None and isinstance(self.image, MappedImage):
            self._check = ChunkVerifier(self.image, manifest)

    def check_fits(self, machine_name: str, blocks: Mapping[str, int]) -> None:
        """Refuse an image of another machine.

        :param blocks: names and sizes in bytes of the guest's RAM blocks.
        :raises ImageError: what is different.
        """
        image = self.image
        if image.machine_name != machine_name:
            raise self._unfit(
                f"it is of a machine '{image.machine_name}', ours is '{machine_name}'"
            )
        found = {b.name: b.size_bytes for b in image.blocks if b.name not in IGNORED_BLOCKS}
        for name, size in blocks.items():
            if name not in found:
                raise self._unfit(f"it has no block '{name}'")
            if found[name] != size:
                raise self._unfit(f"its block '{name}' has {found[name]} bytes, ours {size}")
        for name in found.keys() - blocks.keys():
            raise self._unfit(f"it has a block '{name}' that our machine lacks")
        if list(found) != list(blocks):
            raise self._unfit(
                f"its blocks are in the order {', '.join(found)}, ours {', '.join(blocks)}; give "
                "--memory-block in the image's order"
            )

    def check_same(self, identity: str) -> None:
        """Refuse an image that another has taken the place of.

        :raises ImageError: it is not the one that ``identity`` was taken from.
        """
        if identity and identity != self.identity:
            raise self._unfit(
                "it is not the image that the guest was restored from; put that one back"
            )

    def check_all(self, block_names: Iterable[str]) -> None:
        """Check every page of these blocks that could turn out to be wrong later.

        :raises ImageError: one of them is wrong.
        """
        for damage in self.image.damages():
            raise damage.error()
        if self._check is None:
            return
        for name in block_names:
            for first, end in runs(self.image.has_data(name)).tolist():
                self._check.good(name, first, end - first)
        for damage in self._check.damages():
            raise damage.error()

    def source(self, block: PageBlock) -> ImagePageSource:
        """Where the pages of a block of the guest come from."""
        return ImagePageSource(self.image, block, self._check)

    def working_set(self, ram: IncomingRam) -> dict[str, Mask]:
        """Read what earlier restores have touched, in pages of the guest's size; empty without."""
        with contextlib.suppress(BadWorkingSet):
            path = working_set.beside(self.path)
            found = working_set.load(path, self.identity, _page_counts(self.image))
            if found is not None:
                return {paged.block.name: _coarser(found, paged) for paged in ram}
        return {}

    def copies(self, ram: IncomingRam) -> PageCopies | None:
        """Give the copies of pages of the working set, if a recording has kept some."""
        if all(paged.block.target_pages_per_page > 1 for paged in ram):
            return None  # pages of 2 MiB are put together from the image
        if self._copies is None and self._has_digests:
            path = page_copies.beside(working_set.beside(self.path))
            with contextlib.suppress(ImageError, KernelError):  # the image has these pages, too
                self._copies = PageCopies(path, self.identity, _page_counts(self.image))
        return self._copies

    def record(self, touched: Iterable[tuple[IncomingBlock, npt.NDArray[np.uint8]]]) -> None:
        """Add what this restore has touched, and copy these pages.

        :param touched: pages of each block: see :attr:`postcopy.memory.page_map.PageMap.touched`.
        :raises Refused: it cannot be written.
        """
        touches = {
            paged.block.name: np.repeat(touches, paged.block.target_pages_per_page)
            for paged, touches in touched
        }
        path = working_set.beside(self.path)
        seen = {name: each != UNTOUCHED for name, each in touches.items()}
        whole = working_set.record(path, WorkingSet(self.identity, seen))
        if self._has_digests:  # else a page of this image could not be told from one of another
            early = {name: each == EARLY for name, each in touches.items()}
            self._copy(page_copies.beside(path), whole, early)

    def _copy(self, path: Path, whole: WorkingSet, early: Mapping[str, Mask]) -> None:
        wanted = {name: mask & self._can_be_had(name, mask) for name, mask in whole.pages.items()}
        first = [
            CopiedPages(name, np.flatnonzero(mask & early[name])) for name, mask in wanted.items()
        ]
        later = [
            CopiedPages(name, np.flatnonzero(mask & ~early[name])) for name, mask in wanted.items()
        ]
        try:
            page_copies.save(path, self.identity, first + later, self.image.read)
        except OSError as error:
            raise Refused(f"working set {path} cannot be written: {error.strerror}") from error
        except Refused as error:
            raise Refused(f"working set {path} cannot be written: {error}") from error

    def _can_be_had(self, name: str, wanted: Mask) -> Mask:
        """Tell which pages have anything in them, and are what they were."""
        found = self.image.has_data(name).copy()
        if self._check is not None:
            for first, end in runs(wanted & found).tolist():
                found[first:end] &= self._check.good(name, first, end - first)
        return found

    def close(self) -> None:
        """Let go of the files."""
        if self._copies is not None:
            self._copies.close()
        self.image.close()

    def _unfit(self, what: str) -> ImageError:
        return ImageError(self.path, what)


def _page_counts(image: Image) -> dict[str, int]:
    return {block.name: block.pages for block in image.blocks if block.name not in IGNORED_BLOCKS}


def _coarser(found: WorkingSet, paged: IncomingBlock) -> Mask:
    mask = found.pages[paged.block.name]
    per_page = paged.block.target_pages_per_page
    if per_page == 1:
        return mask
    coarse: Mask = np.logical_or.reduceat(mask, np.arange(0, len(mask), per_page))
    return coarse
