"""When a guest that waited for a page went on: from its own records, as the other figures are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.report import Finding, number
from benchmarks.timings import Cycles
from benchmarks.workload import Words


class Gaps:
    """The times in which the guest did not get on, on the host's time line.

    A gap is from the end of one access to the end of the next, so it holds whatever the guest waited
    for: the page that it touched, its code, or the page on which it notes things.

    :param events: the guest's slow iterations.
    :param offset: guest TSC minus host TSC, where the guest is now.
    """

    def __init__(self, events: Words, offset: int) -> None:
        self._ended: Cycles = events[:, 0].astype(np.int64) - offset
        self._lengths: Cycles = events[:, 1].astype(np.int64)

    def end_of_gap_at(self, moment: int) -> int | None:
        """Host TSC when the gap ended in which ``moment`` lies; None: the guest was not waiting."""
        began = self._ended - self._lengths
        spanning = np.flatnonzero((began <= moment) & (self._ended > moment))
        return int(self._ended[spanning[-1]]) if spanning.size else None

    def longest(self, begin: int, end: int) -> "Gap | None":
        """The longest that ended between two host TSC; None: there was none."""
        within = np.flatnonzero((self._ended > begin) & (self._ended <= end))
        if not within.size:
            return None
        row = within[np.argmax(self._lengths[within])]
        return Gap(int(self._ended[row]), int(self._lengths[row]))


@dataclass(frozen=True)
class Gap:
    """One, in TSC cycles; ``ended`` is host TSC."""

    ended: int
    length: int


def judged(title: str, times_ms: Sequence[float], limit_ms: float) -> Finding:
    """Whether 99 of 100 such times are below a limit.

    With fewer than a hundred of them that is between the two longest, next to the longest.
    """
    target = f"p99 < {limit_ms:g} ms"
    if not times_ms:
        return Finding(title, "-", target, None)
    p50, p99 = (float(value) for value in np.percentile(times_ms, (50, 99)))
    longest = number(max(times_ms))
    told = f"p50 {number(p50)} ms, p99 {number(p99)} ms, longest {longest} ms, n={len(times_ms)}"
    return Finding(title, told, target, p99 < limit_ms)
