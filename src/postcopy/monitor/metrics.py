"""Figures of a machine for Prometheus, from one table: :data:`METRICS`.

The machine is asked when a scrape comes, and at no other time.  ``docs/metrics.md`` and
``docs/grafana.json`` are made from the table.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from postcopy.client.progress import PHASES, Phase
from postcopy.errors import PostcopyError
from postcopy.monitor.controls import Backend
from postcopy.statistics import (
    MAP_STATES,
    Measured,
    MigrationInfo,
    RamStatistics,
    XbzrleStatistics,
)
from postcopy.status import Status

Values = float | Mapping[str, float] | None
"""Of one metric: the value, or with a label one for each of its values; None: not known now."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """What a histogram shows: counts of [1, 2) us, [2, 4) us, ..., the last of all that is longer.

    :ivar sum_s: the sum of all; None: not known.
    """

    counts: tuple[int, ...]
    sum_s: float | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What the machine has answered to one scrape.

    :ivar pages: pages of 4 KiB by state; empty: where the memory is, is not known now.
    """

    info: MigrationInfo
    ram: RamStatistics | None
    measured: Measured
    xbzrle: XbzrleStatistics | None
    pages: Mapping[str, int]
    phase: Phase | None
    running: bool
    memory_bytes: int
    engine_restarts: int

    @classmethod
    def take(cls, backend: Backend) -> "Reading":
        """Ask the machine; waits for its engine, for some seconds at most."""
        info = backend.migration.info()
        order = backend.machine.ownership.last_order
        phase = None if info.status is Status.NONE else PHASES[info.status]
        if phase is Phase.PRECOPY and order is not None and order.name == "snapshot":
            phase = Phase.SAVING
        pages: Mapping[str, int] = {}
        with contextlib.suppress(PostcopyError):  # its engine has ended, or does not answer
            pages = backend.migration.memory_map().pages
        return cls(
            info=info,
            ram=info.ram,
            measured=info.measured or Measured(),
            xbzrle=info.xbzrle_cache,
            pages=pages,
            phase=phase,
            running=backend.machine.running,
            memory_bytes=backend.machine.memory_bytes,
            engine_restarts=backend.migration.engine_restarts,
        )


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric.

    :ivar kind: Prometheus' type: counter, gauge or histogram.
    :ivar label: the name of its label; empty: it has none.
    """

    name: str
    kind: str
    meaning: str
    read: Callable[[Reading], Any]
    label: str = ""

    def family(self, reading: Reading) -> Metric | None:
        """The samples; None when nothing is known."""
        found = self.read(reading)
        if found is None or found == {}:
            return None
        if isinstance(found, Latencies):
            return HistogramMetricFamily(self.name, self.meaning, _buckets(found), found.sum_s)
        make = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        if not self.label:
            return make(self.name, self.meaning, value=found)
        family = make(self.name, self.meaning, labels=[self.label])
        for value, number in found.items():
            family.add_metric([value], number)
        return family


def _buckets(latencies: Latencies) -> list[tuple[str, float]]:
    totals = list(itertools.accumulate(latencies.counts))
    ends = [str((2 << power) / 1e6) for power in range(len(totals) - 1)]
    return list(zip([*ends, "+Inf"], totals, strict=True))


# --- how a metric is read

_S_OF_MS: Final = 1e-3
_S_OF_US: Final = 1e-6


def _ram(name: str) -> Callable[[Reading], Values]:
    return lambda reading: None if reading.ram is None else float(getattr(reading.ram, name))


def _ram_by(**names: str) -> Callable[[Reading], Values]:
    """By the value of the label, the member of the figures."""
    return lambda reading: {
        value: float(getattr(reading.ram, name))
        for value, name in names.items()
        if reading.ram is not None
    }


def _measured(name: str, unit: float = 1.0) -> Callable[[Reading], Values]:
    return lambda reading: _times(getattr(reading.measured, name), unit)


def _measured_by(names: Mapping[str, str]) -> Callable[[Reading], Values]:
    """In seconds, by the value of the label; without those that are not known."""

    def read(reading: Reading) -> Values:
        found = {label: getattr(reading.measured, name) for label, name in names.items()}
        return {label: us * _S_OF_US for label, us in found.items() if us is not None}

    return read


def _quantiles(what: str) -> Mapping[str, str]:
    return {"0.5": f"{what}_p50_us", "0.99": f"{what}_p99_us", "1": f"{what}_max_us"}


def _info(name: str, unit: float = 1.0) -> Callable[[Reading], Values]:
    return lambda reading: _times(getattr(reading.info, name), unit)


def _times(value: int | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _xbzrle(name: str) -> Callable[[Reading], Values]:
    return lambda reading: None if reading.xbzrle is None else float(getattr(reading.xbzrle, name))


def _pages(state: str) -> Callable[[Reading], Values]:
    return lambda reading: float(reading.pages.get(state, 0)) if reading.pages else None


def _latencies(reading: Reading) -> Latencies | None:
    counts, mean_ns = reading.measured.fault_latency_dist, reading.info.postcopy_latency_ns
    if not counts:
        return None
    return Latencies(counts, None if mean_ns is None else mean_ns * sum(counts) / 1e9)


def _blocktime(reading: Reading) -> Values:
    return {str(vcpu): us / 1e6 for vcpu, us in enumerate(reading.measured.blocktime_us)}


METRICS: Final = (
    MetricRow(
        "postcopy_status", "gauge", "1 for QEMU's status of the last order, 0 for each other one",
        lambda reading: {each.value: each is reading.info.status for each in Status}, "status",
    ),
    MetricRow(
        "postcopy_phase", "gauge", "1 for the phase of the last order, if there was one, 0 for each other",
        lambda reading: {each.value: each is reading.phase for each in Phase}, "phase",
    ),
    MetricRow(
        "postcopy_incoming", "gauge", "1: this machine is the destination, or was restored",
        lambda reading: float(reading.info.incoming),
    ),
    MetricRow(
        "postcopy_guest_running", "gauge", "1: the vCPUs run", lambda reading: float(reading.running)
    ),
    MetricRow(
        "postcopy_guest_memory_bytes", "gauge", "RAM of the guest",
        lambda reading: float(reading.memory_bytes),
    ),
    MetricRow(
        "postcopy_transferred_bytes_total", "counter", "all that was sent: `ram.transferred`",
        _ram("transferred"),
    ),
    MetricRow(
        "postcopy_phase_bytes_total", "counter",
        "bytes sent in precopy, while no vCPU ran (downtime), and in postcopy",
        _ram_by(precopy="precopy_bytes", downtime="downtime_bytes", postcopy="postcopy_bytes"),
        "phase",
    ),
    MetricRow(
        "postcopy_pages_total", "counter", "pages sent: whole (normal), or as zero pages",
        _ram_by(normal="normal", zero="duplicate"), "kind",
    ),
    MetricRow(
        "postcopy_normal_bytes_total", "counter", "memory of the pages that were sent whole",
        _ram("normal_bytes"),
    ),
    MetricRow(
        "postcopy_multifd_bytes_total", "counter",
        "of all that was sent, what went over the channels of multifd", _ram("multifd_bytes"),
    ),
    MetricRow(
        "postcopy_xbzrle_bytes_total", "counter", "bytes of the deltas that xbzrle has sent",
        _xbzrle("bytes"),
    ),
    MetricRow(
        "postcopy_xbzrle_pages_total", "counter", "pages that xbzrle has sent as deltas",
        _xbzrle("pages"),
    ),
    MetricRow("postcopy_remaining_bytes", "gauge", "still to be sent: `ram.remaining`", _ram("remaining")),
    MetricRow("postcopy_total_bytes", "gauge", "memory to be sent in all: `ram.total`", _ram("total")),
    MetricRow(
        "postcopy_rate_bytes", "gauge", "bytes sent per second; after the end the mean of the whole",
        lambda reading: None if reading.ram is None else reading.ram.mbps * 1e6 / 8,
    ),
    MetricRow(
        "postcopy_dirty_rate_bytes", "gauge", "bytes per second that the guest wrote in the last round",
        lambda reading: None
        if reading.ram is None
        else float(reading.ram.dirty_pages_rate * reading.ram.page_size),
    ),
    MetricRow(
        "postcopy_dirty_syncs_total", "counter", "rounds of precopy: `ram.dirty-sync-count`",
        _ram("dirty_sync_count"),
    ),
    MetricRow(
        "postcopy_throttle_ratio", "gauge", "share of their time that auto-converge takes from the vCPUs",
        _info("cpu_throttle_percentage", 0.01),
    ),
    MetricRow(
        "postcopy_total_time_seconds", "gauge", "since the order, until its end",
        _info("total_time_ms", _S_OF_MS),
    ),
    MetricRow(
        "postcopy_setup_time_seconds", "gauge", "of that, until the first page",
        _info("setup_time_ms", _S_OF_MS),
    ),
    MetricRow(
        "postcopy_expected_downtime_seconds", "gauge", "the downtime if the vCPUs were stopped now",
        _info("expected_downtime_ms", _S_OF_MS),
    ),
    MetricRow(
        "postcopy_downtime_seconds", "gauge", "QEMU's `downtime`, once that is known",
        _info("downtime_ms", _S_OF_MS),
    ),
    MetricRow(
        "postcopy_guest_downtime_seconds", "gauge", "how long no vCPU ran, by the guest's own clock",
        _measured("guest_downtime_us", _S_OF_US),
    ),
    MetricRow(
        "postcopy_requests_total", "counter", "pages that were asked for: `ram.postcopy-requests`",
        _ram("postcopy_requests"),
    ),
    MetricRow(
        "postcopy_fault_latency_seconds", "histogram", "page faults by how long the thread waited",
        _latencies,
    ),
    MetricRow(
        "postcopy_fault_latency_quantile_seconds", "gauge",
        "latency that a share of the page faults did not exceed; 1: the longest",
        _measured_by(_quantiles("fault_latency")), "quantile",
    ),
    MetricRow(
        "postcopy_blocktime_seconds_total", "counter", "how long each vCPU waited for pages",
        _blocktime, "vcpu",
    ),
    MetricRow(
        "postcopy_overlapped_blocktime_seconds_total", "counter",
        "how long all vCPUs waited at the same time",
        _measured("overlapped_blocktime_us", _S_OF_US),
    ),
    MetricRow(
        "postcopy_queue_depth", "gauge", "pages that a thread waits for, asked for and not there yet",
        _pages("asked-for"),
    ),
    MetricRow(
        "postcopy_lost_pages", "gauge", "pages whose source is gone for good", _pages("lost")
    ),
    MetricRow(
        "postcopy_memory_pages", "gauge",
        "pages of 4 KiB in each state of the memory's map",
        lambda reading: {
            state: float(reading.pages.get(state, 0)) for state in MAP_STATES.values() if reading.pages
        }, "state",
    ),
    MetricRow(
        "postcopy_engine_restarts_total", "counter",
        "engines that were put in place of one that had died, since the machine began",
        lambda reading: float(reading.engine_restarts),
    ),
    MetricRow(
        "postcopy_demand_faults_total", "counter", "page faults of a restored guest that were served",
        _measured("demand_faults"),
    ),
    MetricRow(
        "postcopy_restore_seconds", "gauge",
        "from the order until the guest ran, had its working set (ready), had all memory (complete)",
        _measured_by({each: f"restore_{each}_us" for each in ("running", "ready", "complete")}), "until",
    ),
    MetricRow(
        "postcopy_snapshot_pause_seconds", "gauge", "how long a background snapshot stopped the vCPUs",
        _measured("pause_us", _S_OF_US),
    ),
    MetricRow(
        "postcopy_write_faults_total", "counter", "writes of the guest that had to wait for the snapshot",
        _measured("write_faults"),
    ),
    MetricRow(
        "postcopy_write_stall_quantile_seconds", "gauge",
        "wait that a share of these writes did not exceed; 1: the longest",
        _measured_by(_quantiles("write_stall")), "quantile",
    ),
    MetricRow(
        "postcopy_aside_bytes_total", "counter", "bytes that a snapshot copied aside for these writes",
        _measured("aside_bytes"),
    ),
)  # fmt: skip
"""All that a scrape may answer; what is not known at the time is left out."""
