"""From what the guest noted to figures: the same arithmetic for every engine.

All times are TSC cycles.  The guest's own become the host's first: where the guest's TSC stands
still while it is stopped (VMX, TCG), the hidden part is added to the gap that spans the stop.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.clock import Clock
from benchmarks.workload import Words

Cycles = npt.NDArray[np.int64]
Figures = dict[str, float | None]

_OFFSET_NOISE_S: Final = 200e-6
"""Offsets below this are the delay of reading them: guest and host see the same TSC."""
_STOP_SLACK_S: Final = 2e-3
_FAULT_S: Final = 100e-6
"""A remote page costs a round trip; what is shorter is the hypervisor's own faults, preemption.
Under nested KVM the former have been seen to take 3 us on one day, and 25 to 80 us on another."""
_NOTED_S: Final = 10e-6
_STEP_S: Final = 50e-3
_SETTLED_STEPS: Final = 15


@dataclass(frozen=True)
class Moments:
    """Host TSC of what the harness saw.

    :param command: ``migrate``. :param stopped: the source's STOP. :param completed: its end.
    :param lifted: when the cap of the push was lifted, and with it what is measured ended.
    """

    command: int
    stopped: int
    completed: int
    lifted: int | None = None

    @property
    def measured_until(self) -> int:
        """The end of the postcopy that figures are of."""
        return self.completed if self.lifted is None else min(self.lifted, self.completed)


@dataclass(frozen=True)
class Offsets:
    """Guest TSC minus host TSC on either side, as measured."""

    source: int
    destination: int


class Observation:
    """The guest's records on the host's time line."""

    def __init__(
        self, events: Words, series: Words, offsets: Offsets, moments: Moments, clock: Clock
    ) -> None:
        noise = clock.cycles(_OFFSET_NOISE_S)
        self._source_offset = _unless_noise(offsets.source, noise)
        # Cycles that passed unseen by the guest while it was stopped.
        self._hidden = _unless_noise(offsets.source - offsets.destination, noise)
        self._moments, self._clock = moments, clock
        self._ended = self._host(events[:, 0])
        self._gaps = events[:, 1].astype(np.int64)
        self._latencies = events[:, 2].astype(np.int64)
        self._row_times = self._host(series[:, 0])
        self._iterations = series[:, 1].astype(np.int64)
        self._stop_row = self._find_stop()
        if self._stop_row is not None:
            self._gaps[self._stop_row] += self._hidden

    def _host(self, guest_tsc: Words) -> Cycles:
        tsc = guest_tsc.astype(np.int64)
        on_destination = tsc > self._moments.stopped + self._source_offset
        return tsc - self._source_offset + np.where(on_destination, self._hidden, 0)

    def _find_stop(self) -> int | None:
        """The event whose gap spans the source's STOP."""
        began = self._ended - self._gaps - self._hidden
        slack = self._clock.cycles(_STOP_SLACK_S)
        stopped = self._moments.stopped
        spans = np.flatnonzero((self._ended >= stopped) & (began <= stopped + slack))
        return int(spans[np.argmax(self._gaps[spans])]) if spans.size else None

    @property
    def resumed(self) -> int:
        """Host TSC when the guest had done its first access on the destination."""
        if self._stop_row is None:
            return self._moments.stopped
        return int(self._ended[self._stop_row])

    def downtime_ms(self) -> float | None:
        """How long the guest did nothing around the STOP; None if it noticed nothing."""
        return None if self._stop_row is None else self._ms(self._gaps[self._stop_row])

    def _first_access_ms(self) -> float | None:
        """How much of the downtime was the first access itself, rather than the stop before it."""
        return None if self._stop_row is None else self._ms(self._latencies[self._stop_row])

    def longest_gap_ms(self) -> float:
        """The longest time without an access, from ``migrate`` on."""
        gaps = self._gaps[self._ended >= self._moments.command]
        return self._ms(gaps.max(initial=0))

    def rate(self, begin: int, end: int) -> float | None:
        """Million iterations a second between two host TSC; None without two rows in between."""
        rows = np.flatnonzero((self._row_times >= begin) & (self._row_times <= end))
        if rows.size < 2 or self._row_times[rows[-1]] == self._row_times[rows[0]]:
            return None
        first, last = rows[0], rows[-1]
        passed = self._row_times[last] - self._row_times[first]
        done = self._iterations[last] - self._iterations[first]
        return float(done / passed) * self._clock.hz / 1e6

    def common_figures(self) -> Figures:
        """Downtime, gaps and the rates before and until the stop."""
        command, stopped = self._moments.command, self._moments.stopped
        before = self.rate(command - self._clock.cycles(1), command)
        during = self.rate(command, stopped)
        return {
            "guest_downtime_ms": self.downtime_ms(),
            "longest_gap_ms": self.longest_gap_ms(),
            "rate_before": before,
            "rate_source": during,
            "rate_kept": during / before if during is not None and before else None,
        }

    def postcopy_figures(self, requests: int = 0) -> Figures:
        """What the guest saw from its first access on the destination to the end of the measuring.

        :param requests: how many pages were asked for, where that is known of just this time: so
            many accesses waited for one, even if some of them took less than 100 µs.
        """
        until = self._moments.measured_until
        last = until if self._moments.lifted else until + self._clock.cycles(0.01)
        within = (self._ended > self.resumed) & (self._ended <= last)
        slow = self._slowest(self._latencies[within], requests)
        steps = self.steps()
        settled = float(np.median([rate for _, rate in steps[-_SETTLED_STEPS:]]))
        return {
            **_percentiles_us(slow, self._clock),
            "faults": float(slow.size),
            "blocked_ms": self._ms(self._gaps[within].sum()),
            "rate_postcopy": self.rate(self.resumed, until) or 0.0,
            "rate_settled": settled,
            "recovery_ms": self._recovery_ms(steps, settled / 2),
        }

    def _slowest(self, latencies: Cycles, at_least: int) -> Cycles:
        """Those that are surely remote, or the slowest so many if that is more."""
        surely = int(np.count_nonzero(latencies > self._clock.cycles(_FAULT_S)))
        return np.sort(latencies)[max(0, latencies.size - max(surely, at_least)) :]

    def snapshot_figures(self) -> Figures:
        """What the guest saw of an image of itself; its stop is not among the stalls.

        A stall is an access that took longer than the guest notes (10 µs), the hypervisor's own
        faults among them: they are there because pages were protected.
        """
        within = (self._ended > self.resumed) & (self._ended <= self._moments.completed)
        stalls = self._latencies[within & (self._latencies > self._clock.cycles(_NOTED_S))]
        long = stalls[stalls > self._clock.cycles(_FAULT_S)]
        all_stalls = _percentiles_us(stalls, self._clock)
        before = self.rate(self._moments.command - self._clock.cycles(1), self._moments.command)
        during = self.rate(self.resumed, self._moments.completed)
        return {
            "guest_downtime_ms": self.downtime_ms(),
            "first_access_ms": self._first_access_ms(),
            "stall_p50_us": all_stalls.get("fault_p50_us"),
            "stall_p99_us": all_stalls.get("fault_p99_us"),
            "stall_max_us": all_stalls.get("fault_max_us"),
            "longest_after_ms": self._ms(self._gaps[within].max(initial=0)),
            "stalls": float(stalls.size),
            "long_stalls": float(long.size),
            "long_stall_p99_us": _percentiles_us(long, self._clock).get("fault_p99_us"),
            "blocked_ms": self._ms(self._gaps[within].sum()),
            "rate_kept": during / before if during is not None and before else None,
        }

    def _recovery_ms(self, steps: list[tuple[float, float]], rate: float) -> float | None:
        stop_ms = self._ms(self._moments.stopped - self._moments.command)
        return next((at - stop_ms for at, now in steps if at >= stop_ms and now >= rate), None)

    def steps(self, before_s: float = 0.5, after_s: float = 2.0) -> list[tuple[float, float]]:
        """(ms since ``migrate``, million iterations a second) in steps of 50 ms.

        Only as far as the guest's records go.
        """
        if self._row_times.size < 2:
            return []
        clock, command = self._clock, self._moments.command
        end = min(self._moments.completed + clock.cycles(after_s), int(self._row_times[-1]))
        edges = np.arange(command - clock.cycles(before_s), end, clock.cycles(_STEP_S))
        counted = np.interp(edges, self._row_times, self._iterations)
        rates = np.diff(counted) / _STEP_S / 1e6
        return [
            (round(self._ms(edge - command), 1), round(float(rate), 3))
            for edge, rate in zip(edges[:-1], rates, strict=True)
        ]

    def _ms(self, cycles: float | np.int64) -> float:
        return self._clock.ms(float(cycles))


def _unless_noise(offset: int, noise: int) -> int:
    return 0 if abs(offset) < noise else offset


def _percentiles_us(latencies: Cycles, clock: Clock) -> Figures:
    if not latencies.size:
        return {}
    at_us = latencies / clock.hz * 1e6
    p50, p90, p99 = (float(value) for value in np.percentile(at_us, (50, 90, 99)))
    highest = float(at_us.max())
    return {"fault_p50_us": p50, "fault_p90_us": p90, "fault_p99_us": p99, "fault_max_us": highest}
