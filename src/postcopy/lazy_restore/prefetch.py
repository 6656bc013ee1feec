"""What the pager of a restore brings unasked, in steps: runs of an image, or copies of a working set."""

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from postcopy.image.page_copies import CopiedPages, PageCopies
from postcopy.lazy_restore.block_restorer import BlockRestorer, Run, Runs
from postcopy.memory.runs import Mask

_LEAST_A_RUN_BYTES: Final = 16 << 10


class PrefetchWork(Protocol):
    """Something to bring, step by step."""

    @property
    def done(self) -> bool:
        """Whether all of it has been brought."""

    def step(self, most_bytes: int) -> int:
        """Bring so much at most, but at least a page; return how many bytes it was."""


class _FromImage:
    """Runs of one block."""

    def __init__(self, restorer: BlockRestorer, found: Runs) -> None:
        self._restorer = restorer
        self._found = found

    @property
    def done(self) -> bool:
        """See :class:`PrefetchWork`."""
        return not self._found

    def step(self, most_bytes: int) -> int:
        """See :class:`PrefetchWork`."""
        shift = self._restorer.shift
        step = _take(self._found, most_bytes >> shift, _LEAST_A_RUN_BYTES >> shift)
        self._restorer.prefetch(step)
        return sum(end - first for first, end in step) << shift


class _FromCopies:
    """Pages of one block of which there are copies; those whose copies are bad are left to the image.

    :param first: which of the copies is the first of these.
    """

    def __init__(
        self, restorer: BlockRestorer, copies: PageCopies, part: CopiedPages, first: int
    ) -> None:
        self._restorer = restorer
        self._copies = copies
        self._pages = part.pages
        self._first = first
        self._at = 0

    @property
    def done(self) -> bool:
        """See :class:`PrefetchWork`."""
        return self._at >= len(self._pages)

    def step(self, most_bytes: int) -> int:
        """See :class:`PrefetchWork`."""
        shift = self._restorer.shift
        copy = self._first + self._at
        count = min(max(1, most_bytes >> shift), len(self._pages) - self._at)
        good = self._copies.good(copy, count)
        if good:
            pages = self._pages[self._at : self._at + good]
            self._restorer.place_copies(pages, self._copies.address + (copy << shift))
            self._at += good
        else:
            self._at = self._copies.after(copy) - self._first
        return good << shift


def from_image(
    restorer: BlockRestorer, wanted: Mask | None = None
) -> Iterator[PrefetchWork | None]:
    """What is missing of a block, or of these of its pages; None: nothing of a part of it."""
    for found in restorer.missing(wanted):
        yield _FromImage(restorer, found) if found else None


def from_copies(restorers: Sequence[BlockRestorer], copies: PageCopies) -> Iterator[PrefetchWork]:
    """All copies of pages of 4 KiB, in their order; larger ones are put together from the image."""
    small = [each for each in restorers if each.block.target_pages_per_page == 1]
    first = 0
    for part in copies.parts:
        for restorer in small:
            if restorer.paged.block.name == part.block:
                yield _FromCopies(restorer, copies, part, first)
        first += len(part.pages)


def _take(runs: Runs, most: int, least_a_run: int) -> list[Run]:
    """Take off the front of ``runs`` what makes one step.

    :param most: pages, but at least one.
    :param least_a_run: as how many pages a shorter run counts: each costs a call, and often a digest.
    """
    step: list[Run] = []
    used = 0
    while runs and (used < most or not step):
        first, end = runs[0]
        taken = max(1, min(end - first, most - used))
        step.append((first, first + taken))
        used += max(taken, least_a_run)
        if first + taken == end:
            runs.popleft()
        else:
            runs[0] = (first + taken, end)
    return step
