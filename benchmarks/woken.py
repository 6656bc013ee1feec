"""From what a guest notes after it has woken to figures; times are host TSC cycles."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.clock import Clock
from benchmarks.timings import Figures
from benchmarks.workload import Words

_LONG_S: Final = 100e-6
_STEP_S: Final = 10e-3
_SETTLED_STEPS: Final = 50


@dataclass(frozen=True)
class Life:
    """The time line of a guest that has woken.

    :ivar began: of the process. :ivar first: the end of its first access. :ivar whole: all is there.
    :ivar offset: of the guest's TSC to the host's.
    """

    began: int
    first: int
    whole: int
    offset: int


def figures(events: Words, series: Words, life: Life, clock: Clock) -> Figures:
    """Waits of the guest until all was there, and when it worked at half the rate that it settles to."""
    ended = events[:, 0].astype(np.int64) - life.offset
    waits = events[(ended > life.first) & (ended <= life.whole), 2].astype(np.int64)
    waits_us = waits / clock.hz * 1e6
    long_us = waits_us[waits_us > _LONG_S * 1e6]
    return {
        "waits": float(waits_us.size),
        "wait_p50_us": _percentile(waits_us, 50),
        "wait_p99_us": _percentile(waits_us, 99),
        "long_waits": float(long_us.size),
        "long_wait_p99_us": _percentile(long_us, 99),
        "blocked_ms": float(waits_us.sum()) / 1e3,
        "working_ms": _working_ms(series, life, clock),
    }


def _percentile(values: np.ndarray[tuple[int], np.dtype[np.float64]], part: int) -> float | None:
    return float(np.percentile(values, part)) if values.size else None


def _working_ms(series: Words, life: Life, clock: Clock) -> float | None:
    """From the start of the process to the end of the first 10 ms at half the settled rate."""
    times = series[:, 0].astype(np.int64) - life.offset
    known = times >= life.first
    if np.count_nonzero(known) <= _SETTLED_STEPS:
        return None
    edges = np.arange(life.first, int(times[-1]), clock.cycles(_STEP_S))
    done = np.diff(np.interp(edges, times[known], series[known, 1].astype(np.float64)))
    settled = float(np.median(done[-_SETTLED_STEPS:]))
    at = np.flatnonzero(done >= settled / 2)
    return clock.ms(int(edges[at[0] + 1]) - life.began) if at.size else None
