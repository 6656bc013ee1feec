"""Huge pages are put together from pages of the wire: a page of 2 MiB comes in 512 pieces."""

import itertools
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.errors import StreamError
from postcopy.memory.ram_block import TARGET_PAGE_BYTES, RamBlock
from postcopy.memory.runs import Indices, Mask

PageRows = npt.NDArray[np.uint8]

MOST_PARTIAL: Final = 16
"""How many pages may be incomplete at once: a source takes no more memory than that for them."""


class _Partial:
    """A page of which some pieces have come."""

    def __init__(self, pieces: int) -> None:
        self.rows: PageRows = np.empty((pieces, TARGET_PAGE_BYTES), np.uint8)
        self.come: Mask = np.zeros(pieces, np.bool_)


class HostPageAssembler:
    """Runs of target pages go in, in any order; whole pages of one block come out.

    For one channel and one thread.  When a piece comes twice, the later one counts.
    """

    def __init__(self, block: RamBlock) -> None:
        self._block = block
        self._per_page = block.target_pages_per_page
        self._partial: dict[int, _Partial] = {}
        self._spare: list[_Partial] = []

    def add(self, target: Indices, data: PageRows | None) -> Iterator[tuple[int, PageRows]]:
        """Take pieces; yield each page that they complete.

        :param target: numbers of target pages.
        :param data: their contents, shape ``(n, 4096)``; None: zeros.
        :return: the number of a page, in the block's own size, and what is in it, shape
            ``(target pages a page, 4096)``, which holds until the next one is asked for.
        :raises StreamError: too many pages are incomplete.
        """
        host = target // self._per_page
        if (host[1:] < host[:-1]).any():
            order = np.argsort(host, kind="stable")
            target, host = target[order], host[order]
            data = None if data is None else data[order]
        cuts = [0, *(np.flatnonzero(np.diff(host)) + 1).tolist(), len(host)]
        for start, end in itertools.pairwise(cuts):
            page = int(host[start])
            pieces = target[start:end] - page * self._per_page
            partial = self._take(page, pieces, None if data is None else data[start:end])
            if partial is not None:
                yield page, partial.rows
                self._spare.append(partial)

    def clear(self) -> None:
        """Drop the pages that have not come whole."""
        self._partial.clear()

    def _take(self, page: int, pieces: Indices, data: PageRows | None) -> _Partial | None:
        partial = self._partial.get(page) or self._begin(page)
        first, end = int(pieces[0]), int(pieces[-1]) + 1
        run = end - first == len(pieces) and (len(pieces) == 1 or (np.diff(pieces) == 1).all())
        where = slice(first, end) if run else pieces
        partial.rows[where] = 0 if data is None else data
        partial.come[where] = True
        return self._partial.pop(page) if partial.come.all() else None

    def _begin(self, page: int) -> _Partial:
        if len(self._partial) == MOST_PARTIAL:
            raise StreamError(
                f"block {self._block.name}: pieces of more than {MOST_PARTIAL} huge pages at once, "
                f"before any of them is whole; the last one is of page {page}"
            )
        self._partial[page] = partial = (
            self._spare.pop() if self._spare else _Partial(self._per_page)
        )
        partial.come[:] = False
        return partial
