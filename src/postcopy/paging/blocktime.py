"""How long faults made vCPUs wait: QEMU's postcopy-blocktime, in microseconds inside.

A vCPU is blocked from the moment the pager reads its fault until the page is in place.  *Overlapped*
is the time during which every vCPU was blocked at once, that is, in which the guest stood still; it is
what QEMU calls ``postcopy-blocktime``.

Waits are counted under the lock of :class:`postcopy.paging.fault_table.FaultTable`.  A report takes no
lock: measuring must not make faults longer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from postcopy.paging.latencies import LatencyHistogram


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
class _Vcpu:
    blocked: int = 0  # waits: more than one only if the kernel repeats a fault
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
        self._blocked_vcpus = 0
        self._all_blocked_since_ns = 0
        self._overlapped_ns = 0
        self._latencies = LatencyHistogram()

    # --- one thread at a time

    def begin(self, thread_id: int, now_ns: int) -> None:
        """A thread begins to wait for a page."""
        number = self._vcpu_of_thread.get(thread_id)
        if number is None:
            return
        vcpu = self._vcpus[number]
        vcpu.blocked += 1
        if vcpu.blocked == 1:
            vcpu.since_ns = now_ns
            self._blocked_vcpus += 1
            if self._blocked_vcpus == len(self._vcpus):
                self._all_blocked_since_ns = now_ns

    def end(self, thread_id: int, since_ns: int, now_ns: int) -> None:
        """The page for which a thread has waited is in place."""
        latency_ns = max(0, now_ns - since_ns)
        self._latencies.add(latency_ns)
        number = self._vcpu_of_thread.get(thread_id)
        if number is None:
            self._others.add(latency_ns)
            return
        vcpu = self._vcpus[number]
        vcpu.latencies.add(latency_ns)
        vcpu.blocked -= 1
        if vcpu.blocked == 0:
            vcpu.total_ns += max(0, now_ns - vcpu.since_ns)
            if self._blocked_vcpus == len(self._vcpus):
                self._overlapped_ns += max(0, now_ns - self._all_blocked_since_ns)
            self._blocked_vcpus -= 1

    def withdraw(self, thread_id: int) -> None:
        """A thread waits no more, and for how long it has is not known: count nothing."""
        number = self._vcpu_of_thread.get(thread_id)
        if number is None:
            return
        vcpu = self._vcpus[number]
        vcpu.blocked -= 1
        if vcpu.blocked == 0:
            self._blocked_vcpus -= 1

    # --- any thread

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
