"""Huge pages come in pieces of 4 KiB, which go to their places in memory; the whole page is mapped then.

Nothing is put together elsewhere: a page that is missing is not mapped in the guest's process, so it can be
written piece by piece (``docs/decisions``, 0028).
"""

import itertools

import numpy as np
import numpy.typing as npt

from postcopy.memory.runs import Indices, Mask
from postcopy.paging.ram import IncomingBlock

PageRows = npt.NDArray[np.uint8]


class HostPageAssembler:
    """Runs of target pages of one block go in, in any order; the numbers of whole pages come out.

    For one channel and one thread.  A page is claimed with its first piece, and is this channel's until it
    is whole: pieces that come over another channel meanwhile are dropped, as are those of a page that has
    been received.  When a piece comes twice, the later one counts.
    """

    def __init__(self, paged: IncomingBlock) -> None:
        self._paged = paged
        self._per_page = paged.block.target_pages_per_page
        self._come: dict[
            int, Mask
        ] = {}  # of the pages that are being written: which pieces have come

    def add(self, target: Indices, data: PageRows | None) -> list[int]:
        """Write pieces; return the pages that they complete, which are claimed still.

        :param target: numbers of target pages.
        :param data: their contents, shape ``(n, 4096)``; None: zeros.
        """
        host = target // self._per_page
        if (host[1:] < host[:-1]).any():
            order = np.argsort(host, kind="stable")
            target, host = target[order], host[order]
            data = None if data is None else data[order]
        cuts = [0, *(np.flatnonzero(np.diff(host)) + 1).tolist(), len(host)]
        whole = []
        for start, end in itertools.pairwise(cuts):
            page, pieces = int(host[start]), target[start:end]
            first, last = int(pieces[0]), int(pieces[-1])
            run = last - first + 1 == len(pieces) and (np.diff(pieces) == 1).all()
            where = slice(first, last + 1) if run else pieces
            if self._write(page, where, None if data is None else data[start:end]):
                whole.append(page)
        return whole

    def add_run(self, first: int, end: int, data: PageRows) -> list[int]:
        """As :meth:`add`, of neighbours: the usual case."""
        whole, at = [], first
        while at < end:
            page = at // self._per_page
            stop = min(end, (page + 1) * self._per_page)
            if self._write(page, slice(at, stop), data[at - first : stop - first]):
                whole.append(page)
            at = stop
        return whole

    def begun(self, page: int, pieces: int) -> None:
        """The first pieces of a page that is claimed have been written."""
        come = self._come[page] = np.zeros(self._per_page, np.bool_)
        come[:pieces] = True

    def clear(self) -> None:
        """Forget the pages that have not come whole: all claims have been taken back."""
        self._come.clear()

    def _write(self, page: int, where: slice | Indices, data: PageRows | None) -> bool:
        """Write pieces of one page; return whether it is whole."""
        come = self._come.get(page)
        if come is None:
            if not self._paged.pages.claim_run(page, page + 1):
                return False
            come = self._come[page] = np.zeros(self._per_page, np.bool_)
        start = page * self._per_page
        pieces = (
            slice(where.start - start, where.stop - start)
            if isinstance(where, slice)
            else where - start
        )
        if data is not None:
            self._paged.block.pages[where] = data
        elif self._paged.stale[page] or come[pieces].any():
            self._paged.block.pages[where] = 0
        else:  # it reads as zeros: that there is memory is enough
            self._paged.block.pages[where, 0] = 0
        come[pieces] = True
        if not come.all():
            return False
        del self._come[page]
        return True
