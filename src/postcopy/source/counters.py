"""The figures of one outgoing migration, and how they become QEMU's.

The sending threads count; each counter has one writer at a time, or a lock.  A reader may see some
counters before and some after a batch.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from postcopy.statistics import Measured, MigrationInfo, RamStatistics, XbzrleStatistics
from postcopy.status import Status

_WINDOW_S = 0.1
_SAMPLE_S = 0.5
_SAMPLE_SHARE = 50


@dataclass
class Counters:
    """What has happened so far."""

    total_bytes: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    syncs: int = 0
    requests: int = 0
    multifd_bytes: int = 0
    """What has gone over the channels of multifd; part of the phases' figures, too."""
    missed_zero_copy: int = 0
    """See :attr:`postcopy.multifd.sender.MultifdSender.missed_zero_copy`."""
    dirty_pages_per_second: int = 0
    preempt_bytes: int = 0
    """What has gone over the preempt channel; part of no phase's figure."""
    page_bytes: int = 4096
    xbzrle: XbzrleStatistics | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add_pages(self, normal: int, zero: int) -> None:
        """Count pages sent; two threads may do so at once."""
        with self._lock:
            self.normal_pages += normal
            self.zero_pages += zero


class Rate:
    """Bytes a second over the last tenth of a second or more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._bytes = 0
        self.bytes_per_second = 0.0

    def add(self, sent_bytes: int) -> None:
        """Count bytes that went out."""
        self._bytes += sent_bytes
        elapsed = self._clock() - self._since
        if elapsed >= _WINDOW_S or not self.bytes_per_second:
            self.bytes_per_second = self._bytes / max(elapsed, 1e-6)
        if elapsed >= _WINDOW_S:
            self._since = self._clock()
            self._bytes = 0


class RedirtyEstimate:
    """What the guest has written again of the memory that was sent in the present round.

    The tracker is asked between rounds.  With nothing but what is known in between, the figure of bytes
    left would shrink to nothing in each round, and jump at its end.  So it stays at what the last round
    left until a sample is taken.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause_s = _SAMPLE_S
        self.next_round(0)

    def next_round(self, left_bytes: int) -> None:
        """Begin a round, with so much left."""
        self._sampled = self._clock()
        self._left_bytes = left_bytes
        self._written_bytes = 0

    @property
    def is_due(self) -> bool:
        """Whether this round is so long that a sample is worth its cost."""
        return self._clock() - self._sampled >= self._pause_s

    def sample(self, count_bytes: Callable[[], int]) -> None:
        """Count what has been written, so rarely that it takes a fiftieth of the time at most."""
        begin = self._clock()
        self._written_bytes = count_bytes()
        self._left_bytes = 0
        self._sampled = self._clock()
        self._pause_s = max(_SAMPLE_S, _SAMPLE_SHARE * (self._sampled - begin))

    def left_bytes(self, known_bytes: int) -> int:
        """Return the bytes left, if so many are known to be."""
        return max(self._left_bytes, known_bytes + self._written_bytes)


class StageTimes:
    """When the stages of the migration began, in monotonic seconds; 0 = not yet."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.set_up = 0.0
        self.stopped = 0.0
        self.handed_over = 0.0
        self.confirmed = 0.0
        self.ended = 0.0

    def milliseconds(self, begin: float, end: float) -> int | None:
        """The time between two stages, once both have been reached."""
        return round((end - begin) * 1000) if begin and end else None

    @property
    def total_ms(self) -> int:
        """The time since the start, or until the end."""
        return round(((self.ended or time.monotonic()) - self.started) * 1000)


def describe(
    counters: Counters,
    rate: Rate,
    clock: StageTimes,
    status: Status,
    remaining_bytes: int,
    held_percent: int = 0,
) -> MigrationInfo:
    """Put the figures together as ``query-migrate`` wants them."""
    postcopy_bytes = counters.postcopy_bytes + counters.preempt_bytes
    transferred = counters.precopy_bytes + counters.downtime_bytes + postcopy_bytes
    per_second = rate.bytes_per_second
    if clock.ended:
        per_second = transferred / max(clock.ended - clock.started, 1e-6)
    ram = RamStatistics(
        transferred=transferred,
        remaining=remaining_bytes,
        total=counters.total_bytes,
        duplicate=counters.zero_pages,
        normal=counters.normal_pages,
        normal_bytes=counters.normal_pages * counters.page_bytes,
        dirty_pages_rate=counters.dirty_pages_per_second,
        mbps=per_second * 8 / 1e6,
        dirty_sync_count=counters.syncs,
        postcopy_requests=counters.requests,
        page_size=counters.page_bytes,
        multifd_bytes=counters.multifd_bytes,
        pages_per_second=round(per_second / counters.page_bytes),
        precopy_bytes=counters.precopy_bytes,
        downtime_bytes=counters.downtime_bytes,
        postcopy_bytes=postcopy_bytes,
        dirty_sync_missed_zero_copy=counters.missed_zero_copy,
    )
    silence_us = None
    if clock.stopped and clock.confirmed:
        silence_us = round((clock.confirmed - clock.stopped) * 1e6)
    expected = round(remaining_bytes / per_second * 1000) if per_second else 300
    return MigrationInfo(
        status=status,
        ram=ram,
        total_time_ms=clock.total_ms,
        setup_time_ms=clock.milliseconds(clock.started, clock.set_up) or 0,
        downtime_ms=clock.milliseconds(clock.stopped, clock.handed_over),
        expected_downtime_ms=expected,
        cpu_throttle_percentage=held_percent or None,
        xbzrle_cache=counters.xbzrle,
        measured=Measured(guest_downtime_us=silence_us),
    )
