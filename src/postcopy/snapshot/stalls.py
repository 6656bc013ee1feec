"""How long writes of the guest had to wait for the picture."""

from itertools import accumulate

_PARTS = 8  # of each octave, so that a figure is at most an eighth too high
_OCTAVES = 40


class Stalls:
    """A histogram of waiting times; one thread adds, any may ask.

    Its room does not grow with the number of stalls.
    """

    def __init__(self) -> None:
        self._buckets = [0] * (_OCTAVES * _PARTS)
        self.count = 0
        self.max_us = 0

    def add(self, stall_ns: int) -> None:
        """Count one."""
        stall_us = stall_ns // 1000
        self._buckets[min(_bucket(stall_us), len(self._buckets) - 1)] += 1
        self.count += 1
        self.max_us = max(self.max_us, stall_us)

    def quantile_us(self, fraction: float) -> int:
        """The time that this part of all stalls did not exceed, rounded up; 0 without any."""
        wanted = self.count * fraction
        for bucket, total in enumerate(accumulate(self._buckets)):
            if total >= wanted and total:
                return min(_end_us(bucket), self.max_us)
        return 0


def _bucket(stall_us: int) -> int:
    """Whole microseconds up to 8, from there on eighths of an octave."""
    if stall_us < _PARTS:
        return stall_us
    octave = stall_us.bit_length() - _PARTS.bit_length()
    return octave * _PARTS + (stall_us >> octave)


def _end_us(bucket: int) -> int:
    """The longest time that falls into a bucket."""
    if bucket < 2 * _PARTS:
        return bucket
    octave = bucket // _PARTS - 1
    return ((bucket - octave * _PARTS + 1) << octave) - 1
