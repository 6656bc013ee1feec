"""What a restore tells about itself: its three times, its faults, what is still to come."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from postcopy.lazy_restore.block_restorer import BlockRestorer
from postcopy.lazy_restore.restore_pager import RestorePager
from postcopy.memory.ram_block import TARGET_PAGE_BYTES
from postcopy.memory.runs import Mask
from postcopy.paging.blocktime import BlocktimeReport
from postcopy.paging.ram import IncomingBlock
from postcopy.statistics import Measured, MigrationInfo, RamStatistics
from postcopy.status import Status


class RestoreStatistics:
    """The figures of one restore; any thread may ask.

    :param began_ns: when the restore began, on the monotonic clock.
    """

    def __init__(self, began_ns: int, *, lazy: bool) -> None:
        self._began_ns = began_ns
        self._lazy = lazy
        self._restorers: Sequence[BlockRestorer] = ()
        self._pager: RestorePager | None = None
        self._working_set_pages: int | None = None
        self._running_ns: int | None = None
        self._complete_ns: int | None = None

    def watch(
        self,
        restorers: Sequence[BlockRestorer],
        pager: RestorePager,
        working_set: Mapping[str, Mask],
    ) -> None:
        """Take the figures from these, from now on."""
        self._restorers, self._pager = restorers, pager
        if working_set:
            self._working_set_pages = sum(int(mask.sum()) for mask in working_set.values())

    def running(self) -> None:
        """The guest runs now."""
        self._running_ns = time.monotonic_ns()

    def complete(self) -> None:
        """Every page is in place now."""
        self._complete_ns = time.monotonic_ns()

    def touched(self) -> list[tuple[IncomingBlock, npt.NDArray[np.uint8]]]:
        """Which pages threads have waited for: see :attr:`postcopy.memory.page_map.PageMap.touched`."""
        return [(restorer.paged, restorer.touched) for restorer in self._restorers]

    def info(self, status: Status, error: str | None) -> MigrationInfo:
        """What ``query-migrate`` says."""
        end_ns = self._complete_ns or time.monotonic_ns()
        faults = self._faults()
        return MigrationInfo(
            status=status,
            incoming=True,
            ram=self._ram() if self._restorers else None,
            total_time_ms=(end_ns - self._began_ns) // 1_000_000,
            error_desc=error,
            postcopy_latency_ns=faults.mean_ns if faults is not None else None,
            measured=self._measured(faults),
        )

    def _ram(self) -> RamStatistics:
        placed = sum(restorer.placer.placed_pages << restorer.shift for restorer in self._restorers)
        remaining = sum(restorer.missing_pages << restorer.shift for restorer in self._restorers)
        return RamStatistics(
            transferred=placed,
            remaining=0 if self._complete_ns else remaining,
            total=sum(restorer.block.size_bytes for restorer in self._restorers),
            normal=placed // TARGET_PAGE_BYTES,
            normal_bytes=placed,
            postcopy_requests=self._pager.faults if self._pager is not None else 0,
            page_size=TARGET_PAGE_BYTES,
        )

    def _faults(self) -> BlocktimeReport | None:
        if self._pager is None:
            return None
        report = self._pager.blocktime.report(time.monotonic_ns())
        return report if report.faults else None

    def _measured(self, faults: BlocktimeReport | None) -> Measured:
        pager = self._pager
        return Measured(
            blocktime_us=faults.vcpu_us if faults is not None else (),
            blocktime_causes_us=faults.causes_us if faults is not None else None,
            fault_latency_p50_us=faults.p50_us if faults is not None else None,
            fault_latency_p99_us=faults.p99_us if faults is not None else None,
            fault_latency_max_us=faults.max_us if faults is not None else None,
            fault_latency_dist=faults.distribution if faults is not None else (),
            restore_running_us=self._since(self._running_ns),
            restore_ready_us=self._since(self._ready_ns()),
            restore_complete_us=self._since(self._complete_ns),
            demand_faults=pager.faults if pager is not None else None,
            working_set_pages=self._working_set_pages,
        )

    def _ready_ns(self) -> int | None:
        """When the guest had what it wants first; without a working set, when it had all."""
        if not self._lazy:
            return self._running_ns
        known = self._working_set_pages is not None and self._pager is not None
        ready_ns = self._pager.ready_ns if known and self._pager is not None else None
        if ready_ns is None or self._running_ns is None:
            return self._complete_ns
        return max(ready_ns, self._running_ns)

    def _since(self, moment_ns: int | None) -> int | None:
        return None if moment_ns is None else (moment_ns - self._began_ns) // 1000
