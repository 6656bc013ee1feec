"""Which pages hold nothing but zeros."""

import numpy as np
import numpy.typing as npt

from postcopy.stream.records import PageRows


def are_zero(rows: PageRows, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Tell which of these pages are all zero; a bit in the first word settles it for most.

    :param rows: pages, shape ``(n, 4096)``, each contiguous.
    :param numbers: of the rows to look at.
    """
    words = rows.view(np.uint64)
    zero: npt.NDArray[np.bool_] = words[numbers, 0] == 0
    if zero.any():
        candidates = np.flatnonzero(zero)
        zero[candidates] = np.bitwise_or.reduce(words[numbers[candidates]], axis=1) == 0
    return zero
