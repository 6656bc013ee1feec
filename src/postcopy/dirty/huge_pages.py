"""Which transparent huge pages are protected in small pieces.

The kernel protects such a page as one, and reports all of it as written at the first write.  That spares
the guest 511 faults where it writes to all of it, and makes 512 times too much to send where it writes here
and there.  See docs/decisions, 0042.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Mask, mask_of

HUGE_BYTES: Final = 2 << 20
_PAGES: Final = HUGE_BYTES // TARGET_PAGE_BYTES
_ONE_IN: Final = 8
_ENOUGH: Final = 4
_DENSE: Final = 0.5


class HugePages:
    """The huge pages of a range of addresses.

    Of those that are found to be written again, one in eight is split.  When four of these have been
    written to, it is known how much of a huge page this guest writes to between two looks.  If that is less
    than half, all that are written again are split from then on.

    :param address: of the range, in bytes, as is its length.
    """

    def __init__(self, address: int, length_bytes: int) -> None:
        self._first = -(-address // HUGE_BYTES) * HUGE_BYTES
        count = max(0, address + length_bytes - self._first) // HUGE_BYTES
        self._protected: Mask = np.zeros(count, np.bool_)
        self._considered: Mask = np.zeros(count, np.bool_)
        self._split: Mask = np.zeros(count, np.bool_)
        self._samples = 0
        self._sampled_pages = 0

    @property
    def splits_all(self) -> bool:
        """Whether this guest writes to small parts of them."""
        return self._samples >= _ENOUGH and self._sampled_pages < _DENSE * _PAGES * self._samples

    def may_split(self, start: int, end: int) -> bool:
        """Whether some of these addresses have been protected before."""
        first, last = self._within(start, end)
        return bool(self._protected[first:last].any())

    def to_split(self, written: npt.NDArray[np.uint64], start: int, end: int) -> list[int]:
        """Choose huge pages to be protected in pieces now, by address.

        :param written: addresses between ``start`` and ``end``, shape ``(n, 2)``.
        """
        first, last = self._within(start, end)
        ranges = written.astype(np.int64) - (self._first + first * HUGE_BYTES)
        ranges[:, 0] += HUGE_BYTES - 1
        again = _mask(ranges // HUGE_BYTES, last - first)
        again &= self._protected[first:last] & ~self._split[first:last]
        if self.splits_all:
            chosen = again.nonzero()[0]
        else:
            new = (again & ~self._considered[first:last]).nonzero()[0]
            self._considered[first + new] = True
            chosen = new[::_ONE_IN]
        self._split[first + chosen] = True
        return ((chosen + first) * HUGE_BYTES + self._first).tolist()

    def note(self, written: npt.NDArray[np.uint64], start: int, end: int) -> None:
        """These addresses have been protected; ``written`` was found, as in :meth:`to_split`."""
        first, last = self._within(start, end)
        split = self._split[first:last] & self._protected[first:last]
        if split.any() and not self.splits_all:
            ranges = written.astype(np.int64) - (self._first + first * HUGE_BYTES)
            pages = _mask(ranges // TARGET_PAGE_BYTES, (last - first) * _PAGES)
            counts = pages.reshape(-1, _PAGES).sum(1)[split]
            self._samples += int(np.count_nonzero(counts))
            self._sampled_pages += int(counts.sum())
        self._protected[first:last] = True

    def _within(self, start: int, end: int) -> tuple[int, int]:
        """Which of them lie between these addresses, as a range of numbers."""
        first = max(0, -(-(start - self._first) // HUGE_BYTES))
        last = min(len(self._protected), max(0, end - self._first) // HUGE_BYTES)
        return first, max(first, last)


def _mask(ranges: npt.NDArray[np.int64], count: int) -> Mask:
    """As :func:`mask_of`; ranges may be empty, or reach beyond either end."""
    ranges = ranges.clip(0, count)
    return mask_of(ranges[ranges[:, 0] < ranges[:, 1]], count)
