"""The host's time stamp counter, and what a second is in it.

The guest notes TSC cycles; events come with wall-clock times.  Both become host TSC here.
"""

import ctypes
import functools
import mmap
import time
from collections.abc import Callable
from typing import Final

_RDTSC = bytes.fromhex("0f31 0faee8 48c1e220 4809d0 c3")  # rdtsc; lfence; shl rdx, 32; or; ret
_CALIBRATION_S: Final = 0.25
_ATTEMPTS: Final = 20


@functools.cache
def _rdtsc_function() -> tuple[mmap.mmap, Callable[[], int]]:
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_RDTSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return code, ctypes.CFUNCTYPE(ctypes.c_uint64)(address)


def rdtsc() -> int:
    """The host's TSC, cycles."""
    return _rdtsc_function()[1]()


def _together(clock_ns: Callable[[], int]) -> tuple[int, int]:
    """TSC and a clock, read as close together as some attempts make possible."""
    best = None
    for _ in range(_ATTEMPTS):
        before = rdtsc()
        now = clock_ns()
        after = rdtsc()
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, now)
    assert best is not None
    return best[1], best[2]


class Clock:
    """Cycles to seconds and back; good to a microsecond or so over a minute.

    :param hz: TSC cycles a second.
    :param anchor: a host TSC and the CLOCK_REALTIME nanoseconds at that moment.
    """

    def __init__(self, hz: float, anchor: tuple[int, int]) -> None:
        self.hz = hz
        self._anchor = anchor

    @classmethod
    def measured(cls) -> "Clock":
        """A clock calibrated for a quarter of a second, anchored now."""
        tsc, monotonic_ns = _together(time.monotonic_ns)
        time.sleep(_CALIBRATION_S)
        later_tsc, later_ns = _together(time.monotonic_ns)
        hz = (later_tsc - tsc) / (later_ns - monotonic_ns) * 1e9
        return cls(hz, _together(time.time_ns))

    def cycles(self, seconds: float) -> int:
        """So many seconds in cycles."""
        return int(seconds * self.hz)

    def ms(self, cycles: float) -> float:
        """So many cycles in milliseconds."""
        return cycles / self.hz * 1e3

    def from_wall_clock(self, seconds: int, microseconds: int) -> int:
        """The host TSC at a CLOCK_REALTIME instant: the timestamp of a QMP event."""
        tsc, realtime_ns = self._anchor
        passed_ns = seconds * 10**9 + microseconds * 1000 - realtime_ns
        return tsc + int(passed_ns / 1e9 * self.hz)

    def anchored(self) -> "Clock":
        """The same rate, anchored anew: wall clocks are slewed."""
        return Clock(self.hz, _together(time.time_ns))
