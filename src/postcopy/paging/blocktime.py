"""How long faults made vCPUs wait: QEMU's postcopy-blocktime, in microseconds inside.

A vCPU is blocked from the moment the pager reads its fault until the page is in place.  *Overlapped*
is the time during which every vCPU was blocked at once, that is, in which the guest stood still; it is
what QEMU calls ``postcopy-blocktime``.

Called by the pager (``fault``) and by the threads that place pages (``placed``), under one lock.  A report
takes no lock: measuring must not make faults longer.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from postcopy.paging.latencies import LatencyHistogram

PageKey = tuple[str, int]
"""A page: the name of its block and its number there."""


@dataclass(slots=True)
class Latencies:
    """The latencies of one kind of thread: count and sum, in nanoseconds."""

    count: int = 0
    total_ns: int = 0

    def add(self, latency_ns: int) -> None:
        """Count one fault."""
        self.count += 1
        self.total_ns += latency_ns

    @property
    def mean_ns(self) -> int:
        """The mean, or 0 before the first fault."""
        return self.total_ns // self.count if self.count else 0


@dataclass(frozen=True, slots=True)
class BlocktimeReport:
    """What was measured up to a moment; times in microseconds unless the name says otherwise."""

    vcpu_us: tuple[int, ...]
    overlapped_us: int
    vcpu_mean_ns: tuple[int, ...]
    others_mean_ns: int
    mean_ns: int
    faults: int
    distribution: tuple[int, ...]
    p50_us: int
    p99_us: int
    max_us: int


@dataclass(slots=True)
class _Waiter:
    vcpu: int | None
    since_ns: int


@dataclass(slots=True)
class _Vcpu:
    blocked: int = 0  # pages it waits for: more than one only if the kernel repeats a fault
    since_ns: int = 0
    total_ns: int = 0
    latencies: Latencies = field(default_factory=Latencies)


class Blocktime:
    """Keeps the time of every fault.

    :param vcpu_of_thread: number of the vCPU that each thread runs; other threads are "others".
    """

    def __init__(self, vcpu_of_thread: Mapping[int, int]) -> None:
        self._vcpu_of_thread = dict(vcpu_of_thread)
        self._vcpus = [_Vcpu() for _ in vcpu_of_thread]
        self._others = Latencies()
        self._lock = threading.Lock()
        self.waiting: dict[PageKey, list[_Waiter]] = defaultdict(list)
        self._blocked_vcpus = 0
        self._all_blocked_since_ns = 0
        self._overlapped_ns = 0
        self._latencies = LatencyHistogram()

    def fault(self, page: PageKey, thread_id: int, now_ns: int) -> None:
        """Note that a thread waits for a page."""
        vcpu = self._vcpu_of_thread.get(thread_id)
        with self._lock:
            self.waiting[page].append(_Waiter(vcpu, now_ns))
            if vcpu is not None:
                self._block(self._vcpus[vcpu], now_ns)

    def placed(self, pages: Iterable[PageKey], now_ns: int) -> None:
        """Note that these pages are in place: nobody waits for them any more."""
        with self._lock:
            for page in pages:
                for waiter in self.waiting.pop(page, ()):
                    self._end(waiter, now_ns)

    def withdraw(self, page: PageKey, thread_id: int, since_ns: int) -> None:
        """Take a fault back that was noted when its page was in place: nobody knows how long it took."""
        vcpu = self._vcpu_of_thread.get(thread_id)
        waiter = _Waiter(vcpu, since_ns)
        with self._lock:
            waiting = self.waiting.get(page, [])
            if waiter not in waiting:
                return  # whoever placed the page has just measured it
            waiting.remove(waiter)
            if not waiting:
                del self.waiting[page]
            if vcpu is not None:
                self._unblock(self._vcpus[vcpu])

    def report(self) -> BlocktimeReport:
        """Sum up what has been measured so far; each figure for itself, for faults may end meanwhile."""
        # Before the vCPUs' own times, which are counted first: so it is never more than these.
        overlapped_ns = self._overlapped_ns
        latencies = self._latencies.figures()
        return BlocktimeReport(
            vcpu_us=tuple(vcpu.total_ns // 1000 for vcpu in self._vcpus),
            overlapped_us=overlapped_ns // 1000,
            vcpu_mean_ns=tuple(vcpu.latencies.mean_ns for vcpu in self._vcpus),
            others_mean_ns=self._others.mean_ns,
            mean_ns=latencies.mean_ns,
            faults=latencies.count,
            distribution=latencies.distribution,
            p50_us=latencies.p50_us,
            p99_us=latencies.p99_us,
            max_us=latencies.max_us,
        )

    # --- under the lock

    def _block(self, vcpu: _Vcpu, now_ns: int) -> None:
        vcpu.blocked += 1
        if vcpu.blocked == 1:
            vcpu.since_ns = now_ns
            self._blocked_vcpus += 1
            if self._blocked_vcpus == len(self._vcpus):
                self._all_blocked_since_ns = now_ns

    def _unblock(self, vcpu: _Vcpu) -> None:
        """Let a vCPU go without counting for how long it was blocked."""
        vcpu.blocked -= 1
        if vcpu.blocked == 0:
            self._blocked_vcpus -= 1

    def _end(self, waiter: _Waiter, now_ns: int) -> None:
        latency_ns = max(0, now_ns - waiter.since_ns)
        self._latencies.add(latency_ns)
        if waiter.vcpu is None:
            self._others.add(latency_ns)
            return
        vcpu = self._vcpus[waiter.vcpu]
        vcpu.latencies.add(latency_ns)
        vcpu.blocked -= 1
        if vcpu.blocked == 0:
            vcpu.total_ns += max(0, now_ns - vcpu.since_ns)
            if self._blocked_vcpus == len(self._vcpus):
                self._overlapped_ns += max(0, now_ns - self._all_blocked_since_ns)
            self._blocked_vcpus -= 1
