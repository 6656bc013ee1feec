"""How long faults made vCPUs wait: QEMU's postcopy-blocktime, in microseconds inside.

A vCPU is blocked from the moment the pager reads its fault until the page is in place.  *Overlapped*
is the time during which every vCPU was blocked at once, that is, in which the guest stood still; it is
what QEMU calls ``postcopy-blocktime``.

What a vCPU waits for is the same for all at any moment: it is what the whole migration waits for.  So the
causes cost a fault nothing: when the cause changes, what has been waited since it last did is its.

Waits are counted under the lock of :class:`postcopy.paging.fault_table.FaultTable`.  A report does not take
it, but one of its own: measuring must not make faults longer.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from postcopy.paging.latencies import LatencyHistogram
from postcopy.statistics import WaitCause


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
    """What was measured up to a moment; times in microseconds unless the name says otherwise.

    :ivar vcpu_us: with the waits that are under way, up to the moment of the report.
    :ivar causes_us: the same by cause, of the causes that there have been.
    """

    vcpu_us: tuple[int, ...]
    causes_us: Mapping[str, tuple[int, ...]]
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
    # What has been waited, and since when it waits again; -1: it does not.  Both are one value, so that
    # who reads it without a lock never counts a wait twice, or not at all.
    clock: tuple[int, int] = (0, -1)
    latencies: Latencies = field(default_factory=Latencies)

    def waited_ns(self, now_ns: int) -> int:
        total_ns, since_ns = self.clock
        return total_ns + (max(0, now_ns - since_ns) if since_ns >= 0 else 0)


@dataclass(frozen=True, slots=True)
class _Cause:
    """Why vCPUs wait now.

    :ivar since_us: what each vCPU had waited when this cause began.
    :ivar before_us: what of that each cause has had.
    """

    now: WaitCause
    since_us: tuple[int, ...]
    before_us: Mapping[str, tuple[int, ...]]

    def shares_us(self, waited_us: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        name = self.now.value
        before = self.before_us.get(name, (0,) * len(waited_us))
        now = zip(before, waited_us, self.since_us, strict=True)
        return {
            **self.before_us,
            name: tuple(had + all_of_it - then for had, all_of_it, then in now),
        }


class Blocktime:
    """Keeps the time of every fault.

    :param vcpu_of_thread: number of the vCPU that each thread runs; other threads are "others".
    :param cause: what they wait for at first.
    """

    def __init__(
        self, vcpu_of_thread: Mapping[int, int], cause: WaitCause = WaitCause.PAGE
    ) -> None:
        self._vcpu_of_thread = dict(vcpu_of_thread)
        self._vcpus = [_Vcpu() for _ in vcpu_of_thread]
        self._others = Latencies()
        self._blocked_vcpus = 0
        self._all_blocked_since_ns = 0
        self._overlapped_ns = 0
        self.latencies = LatencyHistogram()
        """Of all threads."""
        none = (0,) * len(self._vcpus)
        # Under the lock; what has been told never decreases.
        self._telling = threading.Lock()
        self._told_us = none
        self._cause = _Cause(cause, none, {})

    # --- one thread at a time

    def begin(self, thread_id: int, now_ns: int) -> None:
        """A thread begins to wait for a page."""
        number = self._vcpu_of_thread.get(thread_id)
        if number is None:
            return
        vcpu = self._vcpus[number]
        vcpu.blocked += 1
        if vcpu.blocked == 1:
            vcpu.clock = (vcpu.clock[0], now_ns)
            self._blocked_vcpus += 1
            if self._blocked_vcpus == len(self._vcpus):
                self._all_blocked_since_ns = now_ns

    def end(self, thread_id: int, since_ns: int, now_ns: int) -> None:
        """The page for which a thread has waited is in place."""
        latency_ns = max(0, now_ns - since_ns)
        self.latencies.add(latency_ns)
        number = self._vcpu_of_thread.get(thread_id)
        if number is None:
            self._others.add(latency_ns)
            return
        vcpu = self._vcpus[number]
        vcpu.latencies.add(latency_ns)
        vcpu.blocked -= 1
        if vcpu.blocked == 0:
            vcpu.clock = (vcpu.waited_ns(now_ns), -1)
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
            vcpu.clock = (vcpu.clock[0], -1)
            self._blocked_vcpus -= 1

    # --- the thread that has the migration

    def because(self, cause: WaitCause, now_ns: int) -> None:
        """From now on who waits does so for this."""
        with self._telling:
            waited_us = self._waited_us(now_ns)
            self._cause = _Cause(cause, waited_us, self._cause.shares_us(waited_us))

    # --- any thread

    def report(self, now_ns: int = 0) -> BlocktimeReport:
        """Sum up what has been measured so far; each figure for itself, for faults may end meanwhile.

        :param now_ns: waits that are under way count up to then.
        """
        # Before the vCPUs' own times, which are counted first: so it is never more than these.
        overlapped_ns = self._overlapped_ns
        latencies = self.latencies.figures()
        with self._telling:
            waited_us = self._waited_us(now_ns)
            causes_us = self._cause.shares_us(waited_us)
        return BlocktimeReport(
            vcpu_us=waited_us,
            causes_us={name: each for name, each in causes_us.items() if any(each)},
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

    def _waited_us(self, now_ns: int) -> tuple[int, ...]:
        """What each vCPU has waited; never less than it has been told before.

        A wait may end a moment before the look at it, and a withdrawn one is not counted any more.
        """
        found = zip(self._told_us, self._vcpus, strict=True)
        self._told_us = tuple(max(told, vcpu.waited_ns(now_ns) // 1000) for told, vcpu in found)
        return self._told_us
