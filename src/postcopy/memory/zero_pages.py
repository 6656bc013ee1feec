"""Which pages hold nothing but zeros."""

import numpy as np
import numpy.typing as npt

from postcopy.memory.runs import Indices, Mask

_SAMPLES = (0, 257, 511)
"""Words looked at first: a page that has a bit set in one of them needs no further look."""

_TOGETHER = 256
"""Pages looked at together: a mebibyte, which stays in the processor's cache."""


def zero_pages(memory: npt.NDArray[np.uint8], pages: Indices) -> Mask:
    """Tell for each of ``pages`` whether it is all zero.

    :param memory: a whole block, shape ``(n, 4096)``.
    :param pages: rows of it to look at.
    """
    words = memory.view(np.uint64)
    maybe: Mask = words[pages, _SAMPLES[0]] == 0
    for sample in _SAMPLES[1:]:
        if not maybe.any():
            return maybe
        maybe &= words[pages, sample] == 0
    candidates = np.flatnonzero(maybe)
    for first in range(0, len(candidates), _TOGETHER):
        some = candidates[first : first + _TOGETHER]
        maybe[some] = np.bitwise_or.reduce(words[pages[some]], axis=1) == 0
    return maybe
