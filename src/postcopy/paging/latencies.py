"""Latencies, counted by their size in a room that does not grow."""

from array import array
from dataclasses import dataclass
from math import ceil
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.statistics import LATENCY_BUCKETS

_PARTS: Final = 64  # of each octave, so that a figure is at most a 64th too high
_LONGEST_EXPONENT: Final = 36  # 2**36 us are 19 hours: what is longer is counted with them


def _bucket(latency_us: int) -> int:
    """Whole microseconds up to 128, from there on 64ths of an octave."""
    octave = max(0, latency_us.bit_length() - _PARTS.bit_length())
    return octave * _PARTS + (latency_us >> octave)


def _end_us(bucket: int) -> int:
    """The longest latency of a bucket, in whole microseconds."""
    octave = max(0, bucket // _PARTS - 1)
    return ((bucket - octave * _PARTS + 1) << octave) - 1


_LAST_BUCKET: Final = _bucket(1 << _LONGEST_EXPONENT)
# Where QEMU's buckets begin; the first one takes what is shorter than 1 us, too.
_POWERS: Final = np.array([0, *(_bucket(1 << power) for power in range(1, LATENCY_BUCKETS))])


@dataclass(frozen=True, slots=True)
class LatencyFigures:
    """What was measured up to a moment.

    :ivar p50_us: what half of all latencies did not exceed; like ``p99_us`` and ``max_us`` in whole
        microseconds.  The quantiles are never too low, exact up to 128 us, and at most a 64th too high.
    :ivar distribution: QEMU's ``postcopy-latency-dist``: how many were in [1, 2) us, [2, 4) us, ...
    """

    count: int
    mean_ns: int
    p50_us: int
    p99_us: int
    max_us: int
    distribution: tuple[int, ...]


class LatencyHistogram:
    """One thread at a time adds; any other may ask at any time, and neither waits for the other.

    Invariant, which needs no lock: the bucket is the last that :meth:`add` changes.  So the sum and the
    maximum that are read after the buckets hold at least what the buckets hold.
    """

    def __init__(self) -> None:
        self._buckets = array("Q", bytes(8 * (_LAST_BUCKET + 1)))
        self._total_ns = 0
        self._max_us = 0
        self.count = 0

    def add(self, latency_ns: int) -> None:
        """Count one latency."""
        latency_us = latency_ns // 1000
        self._total_ns += latency_ns
        self._max_us = max(self._max_us, latency_us)
        self._buckets[min(_bucket(latency_us), _LAST_BUCKET)] += 1
        self.count += 1

    def figures(self) -> LatencyFigures:
        """The figures of all that was added before; they are all of one moment, but for the mean.

        A latency that is added meanwhile may be in the mean's sum already, and not yet in its count.
        """
        buckets = np.frombuffer(self._buckets[:], np.uint64)
        totals = np.cumsum(buckets)
        count = int(totals[-1])
        max_us = self._max_us
        return LatencyFigures(
            count=count,
            mean_ns=self._total_ns // count if count else 0,
            p50_us=_quantile_us(totals, 0.5, max_us),
            p99_us=_quantile_us(totals, 0.99, max_us),
            max_us=max_us if count else 0,
            distribution=tuple(np.add.reduceat(buckets, _POWERS).tolist()),
        )


def _quantile_us(totals: npt.NDArray[np.uint64], fraction: float, max_us: int) -> int:
    count = int(totals[-1])
    if not count:
        return 0
    bucket = int(np.searchsorted(totals, max(1, ceil(count * fraction))))
    return max_us if bucket == _LAST_BUCKET else min(_end_us(bucket), max_us)
