"""What a migration tells about itself: figures frozen at the moment of asking.

The figures are those of QEMU 11.1's ``query-migrate`` (``MigrationInfo`` in ``qapi/migration.json``).
What QEMU does not measure is apart, in :class:`Measured`.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from postcopy.status import GIVEN_UP, Status

LATENCY_BUCKETS = 24
"""Fault latencies are counted by power of two: [1, 2) us up to [2**23, 2**24) us."""


class WaitCause(enum.StrEnum):
    """What vCPUs wait for when a page is missing."""

    PAGE = "page"
    PREEMPT = "preempt"
    PAUSED = "paused"
    RECOVERY = "recovery"
    ENGINE = "engine"
    IMAGE = "image"


WAIT_CAUSES: Mapping[str, str] = {
    WaitCause.PAGE: "a page asked of the source, which comes on the main channel",
    WaitCause.PREEMPT: "a page asked of the source, which comes on the channel for such pages",
    WaitCause.PAUSED: "the connection is broken",
    WaitCause.RECOVERY: "the connection is there again, and the sides compare what has come",
    WaitCause.ENGINE: "an engine has died, and its successor waits for the source",
    WaitCause.IMAGE: "a page read from an image",
}
"""What each means; ``docs/watch.md`` lists them."""

_WITH_FIGURES = GIVEN_UP | {
    Status.ACTIVE,
    Status.CANCELLING,
    Status.PRE_SWITCHOVER,
    Status.DEVICE,
    Status.COMPLETED,
}


@dataclass(frozen=True, slots=True)
class RamStatistics:
    """How much memory went over; the ``ram`` member of ``query-migrate``.

    ``transferred``, ``remaining`` and ``total`` are bytes, as are the ``*_bytes``; ``duplicate``
    (zero pages) and ``normal`` are pages; ``dirty_pages_rate`` and ``pages_per_second`` are pages
    per second; ``mbps`` is 10**6 bits per second.
    """

    transferred: int = 0
    remaining: int = 0
    total: int = 0
    duplicate: int = 0
    normal: int = 0
    normal_bytes: int = 0
    dirty_pages_rate: int = 0
    mbps: float = 0.0
    dirty_sync_count: int = 0
    postcopy_requests: int = 0
    page_size: int = 4096
    multifd_bytes: int = 0
    pages_per_second: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    dirty_sync_missed_zero_copy: int = 0

    def to_qapi(self) -> dict[str, Any]:
        """The ``ram`` member by QEMU's names."""
        return {f.name.replace("_", "-"): getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class XbzrleStatistics:
    """What the capability ``xbzrle`` has spared; the ``xbzrle-cache`` member of ``query-migrate``.

    ``cache_size`` and ``bytes`` (of deltas) are bytes; ``pages`` (sent as deltas), ``cache_miss`` and
    ``overflow`` (deltas that were longer than a page) are pages.  The two rates are of the whole migration.
    """

    cache_size: int
    bytes: int = 0
    pages: int = 0
    cache_miss: int = 0
    cache_miss_rate: float = 0.0
    encoding_rate: float = 0.0
    overflow: int = 0

    def to_qapi(self) -> dict[str, Any]:
        """The ``xbzrle-cache`` member by QEMU's names."""
        return {f.name.replace("_", "-"): getattr(self, f.name) for f in fields(self)}


def _measured(meaning: str, default: object = None) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, slots=True)
class Measured:
    """What we measure beyond QEMU; ``None`` or empty when not measured.

    The metadata of each field say what it is; ``docs/monitor.md`` lists them.
    """

    guest_downtime_us: int | None = _measured(
        "how long no vCPU ran, as the guest's own clock would say"
    )
    blocktime_us: tuple[int, ...] = _measured("how long each vCPU waited for pages", ())
    blocktime_causes_us: Mapping[str, tuple[int, ...]] | None = _measured(
        "of that, how long each vCPU waited for what: see [watch.md](watch.md)"
    )
    overlapped_blocktime_us: int | None = _measured("how long all vCPUs waited at the same time")
    fault_latency_p50_us: int | None = _measured("half of the page faults took no longer")
    fault_latency_p99_us: int | None = _measured("99 of 100 page faults took no longer")
    fault_latency_max_us: int | None = _measured("the longest page fault")
    fault_latency_dist: tuple[int, ...] = _measured(
        "page faults by latency: how many took [1, 2) us, [2, 4) us, and so on", ()
    )
    pause_us: int | None = _measured("how long a background snapshot stopped the vCPUs")
    write_faults: int | None = _measured("writes of the guest that had to wait for the snapshot")
    write_stall_p50_us: int | None = _measured("half of these waited no longer")
    write_stall_p99_us: int | None = _measured("99 of 100 of these waited no longer")
    write_stall_max_us: int | None = _measured("the longest of these waits")
    aside_bytes: int | None = _measured("bytes copied aside for these writes")
    aside_most_bytes: int | None = _measured("the most of them that had to be kept at once")
    device_bytes: int | None = _measured("bytes of device state in the image")
    restore_running_us: int | None = _measured("from the order until the guest ran")
    restore_ready_us: int | None = _measured(
        "from the order until its working set (or, without one, all memory) was there"
    )
    restore_complete_us: int | None = _measured("from the order until all memory was there")
    demand_faults: int | None = _measured("page faults of a restored guest that had to be served")
    working_set_pages: int | None = _measured("pages of the working set that were brought first")

    def to_qapi(self) -> dict[str, Any]:
        """The ``x-postcopy`` member: only what was measured."""
        members = {f.name.replace("_", "-"): getattr(self, f.name) for f in fields(self)}
        return {
            name: _as_json(value)
            for name, value in members.items()
            if value is not None and value not in ((), {})
        }


@dataclass(frozen=True, slots=True)
class MigrationInfo:
    """One side of a migration as its user sees it.

    ``incoming`` says which side; a side that is not migrating has the status ``none``.
    ``socket_address`` are QAPI ``SocketAddress`` objects.  Latencies are averages in nanoseconds;
    a vCPU that never waited has 0.
    """

    status: Status = Status.NONE
    incoming: bool = False
    ram: RamStatistics | None = None
    total_time_ms: int | None = None
    downtime_ms: int | None = None
    expected_downtime_ms: int | None = None
    setup_time_ms: int | None = None
    error_desc: str | None = None
    blocked_reasons: tuple[str, ...] = ()
    cpu_throttle_percentage: int | None = None
    xbzrle_cache: XbzrleStatistics | None = None
    postcopy_blocktime_ms: int | None = None
    postcopy_vcpu_blocktime_ms: tuple[int, ...] = ()
    postcopy_latency_ns: int | None = None
    postcopy_non_vcpu_latency_ns: int | None = None
    postcopy_vcpu_latency_ns: tuple[int, ...] = ()
    postcopy_latency_dist: tuple[int, ...] = ()
    socket_address: tuple[Mapping[str, Any], ...] = ()
    measured: Measured | None = None

    def to_qapi(self) -> dict[str, Any]:
        """The answer to ``query-migrate``: only what QEMU tells on this side in this status."""
        answer: dict[str, Any] = {}
        if self.blocked_reasons and not self.incoming:
            answer["blocked-reasons"] = list(self.blocked_reasons)
        if self.status is Status.NONE:
            return answer
        answer["status"] = self.status.value
        answer |= self._destination() if self.incoming else self._source()
        if self.error_desc is not None:
            answer["error-desc"] = self.error_desc
        measured = self.measured.to_qapi() if self.measured else {}
        if measured:
            answer["x-postcopy"] = measured
        return answer

    def _source(self) -> dict[str, Any]:
        if self.status not in _WITH_FIGURES:
            return {}
        times = {"total-time": self.total_time_ms, "setup-time": self.setup_time_ms}
        # What it will be, until it is known what it was.
        if self.downtime_ms is not None:
            times["downtime"] = self.downtime_ms
        else:
            times["expected-downtime"] = self.expected_downtime_ms
        answer: dict[str, Any] = _present(times)
        answer |= _present({"cpu-throttle-percentage": self.cpu_throttle_percentage})
        if self.xbzrle_cache is not None:
            answer["xbzrle-cache"] = self.xbzrle_cache.to_qapi()
        if self.ram is not None:
            answer["ram"] = self.ram.to_qapi()
            if self.status is not Status.COMPLETED:
                answer["remaining"] = self.ram.remaining
        return answer

    def _destination(self) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        if self.socket_address:
            answer["socket-address"] = [dict(address) for address in self.socket_address]
        restored = self.measured is not None and self.measured.demand_faults is not None
        if self.ram is not None and restored:  # QEMU's destinations tell nothing of it
            answer |= _present({"total-time": self.total_time_ms})
            answer["ram"] = self.ram.to_qapi()
        if self.status is not Status.COMPLETED or self.postcopy_blocktime_ms is None:
            return answer
        answer["postcopy-blocktime"] = self.postcopy_blocktime_ms
        answer["postcopy-vcpu-blocktime"] = list(self.postcopy_vcpu_blocktime_ms)
        if self.postcopy_latency_ns is not None:
            answer["postcopy-latency"] = self.postcopy_latency_ns
            answer["postcopy-latency-dist"] = list(self.postcopy_latency_dist)
            answer["postcopy-vcpu-latency"] = list(self.postcopy_vcpu_latency_ns)
        return answer | _present({"postcopy-non-vcpu-latency": self.postcopy_non_vcpu_latency_ns})


def _present(values: Mapping[str, int | None]) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_json(each) for name, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


MAP_CELLS = 2048
"""Most cells of a :class:`MemoryMap`."""

MAP_STATES = {
    "s": "at-source",
    "w": "on-its-way",
    "i": "in-place",
    "d": "dirty-again",
    "a": "asked-for",
    "z": "zero",
    "l": "lost",
}
"""The letter of each state that a page may have in a :class:`MemoryMap`, and its name."""


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """Where the guest's memory is, as one letter for each run of pages; never what is in it.

    :ivar incoming: the side that says so.
    :ivar cells: a letter of :data:`MAP_STATES` for each cell, of all RAM blocks one after the other.
        A cell with a page that is lost, or asked for, says so; else it has the state of most of its pages.
    :ivar pages: pages of 4 KiB in each state, by the state's name; exact.
    :ivar blocks: RAM blocks: name, how many cells it has, its pages of 4 KiB.
    :ivar cost_us: how long it took to make it.
    """

    incoming: bool
    cells: str
    pages: Mapping[str, int]
    blocks: tuple[tuple[str, int, int], ...]
    cost_us: int = 0

    def to_qapi(self) -> dict[str, Any]:
        """The answer to ``x-query-memory-map``."""
        return {
            "side": "destination" if self.incoming else "source",
            "cells": self.cells,
            "pages": dict(self.pages),
            "blocks": [
                {"name": name, "cells": cells, "pages": pages} for name, cells, pages in self.blocks
            ],
        }


def cells_of(blocks: Sequence[tuple[str, int]], most: int = MAP_CELLS) -> tuple[int, list[int]]:
    """How a map divides RAM blocks.

    :param blocks: name and pages of 4 KiB of each.
    :return: pages of 4 KiB of one cell, and how many cells each block has.
    """
    room = max(1, most - len(blocks))  # each block's last cell may be short
    run = max(1, -(-sum(pages for _, pages in blocks) // room))
    return run, [-(-pages // run) for _, pages in blocks]
