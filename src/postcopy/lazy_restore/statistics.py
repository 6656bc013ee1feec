"""What a restore tells about itself: its three times, its faults, what is still to come."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from postcopy.lazy_restore.block import Filling
from postcopy.lazy_restore.pager import Filler
from postcopy.memory.runs import Mask
from postcopy.paging.ram import Paged
from postcopy.statistics import Measured, MigrationInfo, RamStatistics
from postcopy.status import Status


class Figures:
    """The figures of one restore; any thread may ask.

    :param began_ns: when the restore began, on the monotonic clock.
    """

    def __init__(self, began_ns: int, *, lazy: bool) -> None:
        self._began_ns = began_ns
        self._lazy = lazy
        self._fillings: Sequence[Filling] = ()
        self._filler: Filler | None = None
        self._working_set_pages: int | None = None
        self._running_ns: int | None = None
        self._complete_ns: int | None = None

    def watch(
        self, fillings: Sequence[Filling], filler: Filler, working_set: Mapping[str, Mask]
    ) -> None:
        """Take the figures from these, from now on."""
        self._fillings, self._filler = fillings, filler
        if working_set:
            self._working_set_pages = sum(int(mask.sum()) for mask in working_set.values())

    def running(self) -> None:
        """The guest runs now."""
        self._running_ns = time.monotonic_ns()

    def complete(self) -> None:
        """Every page is in place now."""
        self._complete_ns = time.monotonic_ns()

    def touched(self) -> list[tuple[Paged, npt.NDArray[np.uint8]]]:
        """Which pages somebody has waited for: see :attr:`postcopy.memory.page_map.PageMap.touched`."""
        return [(filling.paged, filling.touched) for filling in self._fillings]

    def info(self, status: Status, error: str | None) -> MigrationInfo:
        """What ``query-migrate`` says."""
        end_ns = self._complete_ns or time.monotonic_ns()
        return MigrationInfo(
            status=status,
            incoming=True,
            ram=self._ram() if self._fillings else None,
            total_time_ms=(end_ns - self._began_ns) // 1_000_000,
            error_desc=error,
            measured=self._measured(),
        )

    def _ram(self) -> RamStatistics:
        placed = sum(filling.placed_pages << filling.shift for filling in self._fillings)
        remaining = sum(filling.missing_pages << filling.shift for filling in self._fillings)
        return RamStatistics(
            transferred=placed,
            remaining=0 if self._complete_ns else remaining,
            total=sum(filling.end - filling.base for filling in self._fillings),
            normal=placed >> 12,
            normal_bytes=placed,
            postcopy_requests=self._filler.faults if self._filler is not None else 0,
            page_size=self._fillings[0].page_bytes,
        )

    def _measured(self) -> Measured:
        filler = self._filler
        latencies = filler.latencies.figures() if filler is not None else None
        if latencies is not None and not latencies.count:
            latencies = None
        return Measured(
            fault_latency_p50_us=latencies.p50_us if latencies is not None else None,
            fault_latency_p99_us=latencies.p99_us if latencies is not None else None,
            fault_latency_max_us=latencies.max_us if latencies is not None else None,
            restore_running_us=self._since(self._running_ns),
            restore_ready_us=self._since(self._ready_ns()),
            restore_complete_us=self._since(self._complete_ns),
            demand_faults=filler.faults if filler is not None else None,
            working_set_pages=self._working_set_pages,
        )

    def _ready_ns(self) -> int | None:
        """When the guest had what it wants first; without a working set, when it had all."""
        if not self._lazy:
            return self._running_ns
        known = self._working_set_pages is not None and self._filler is not None
        ready_ns = self._filler.ready_ns if known and self._filler is not None else None
        if ready_ns is None or self._running_ns is None:
            return self._complete_ns
        return max(ready_ns, self._running_ns)

    def _since(self, moment_ns: int | None) -> int | None:
        return None if moment_ns is None else (moment_ns - self._began_ns) // 1000
