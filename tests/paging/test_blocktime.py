"""Blocktime: a timeline done by hand, and any timeline against the slow and obvious way."""

import threading
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from postcopy.paging.blocktime import Blocktime
from postcopy.paging.fault_table import FaultTable
from postcopy.statistics import LATENCY_BUCKETS, WAIT_CAUSES, WaitCause

US = 1000
THREADS = {100: 0, 101: 1}


def table():
    return FaultTable(Blocktime(THREADS))


def test_by_hand():
    """Two vCPUs and another thread; microseconds.

    ::

        vCPU 0   |10----------40|        |60--70|
        vCPU 1          |20---------50|
        both            |20---40|                        20
        other  |0------------------------------100|
    """
    time = table()
    time.begin("ram", 9, 999, 0)
    time.begin("ram", 1, 100, 10 * US)
    time.begin("ram", 2, 101, 20 * US)
    time.end("ram", [1], 40 * US)
    time.end("ram", [2, 3], 50 * US)
    time.begin("ram", 4, 100, 60 * US)
    time.end("ram", [4], 70 * US)
    time.end("ram", [9], 100 * US)
    report = time.blocktime.report()
    assert report.vcpu_us == (40, 30)
    assert report.overlapped_us == 20
    assert report.vcpu_mean_ns == (20 * US, 30 * US)
    assert report.others_mean_ns == 100 * US
    assert report.mean_ns == (30 + 30 + 10 + 100) * US // 4
    assert report.faults == 4
    assert (report.p50_us, report.max_us) == (30, 100)
    # [8, 16) us, [16, 32) us twice, [64, 128) us
    assert [n for n, count in enumerate(report.distribution) if count] == [3, 4, 6]
    assert report.distribution[4] == 2


def test_before_any_fault():
    report = table().blocktime.report()
    assert report.vcpu_us == (0, 0)
    assert report.overlapped_us == report.faults == report.mean_ns == 0
    assert report.distribution == (0,) * LATENCY_BUCKETS
    assert (report.p50_us, report.p99_us, report.max_us) == (0, 0, 0)


def test_two_threads_on_one_page_are_both_let_go():
    time = table()
    time.begin("ram", 1, 100, 0)
    time.begin("ram", 1, 101, 5 * US)
    time.end("ram", [1], 9 * US)
    time.end("ram", [1], 90 * US)
    report = time.blocktime.report()
    assert report.vcpu_us == (9, 4)
    assert report.overlapped_us == 4
    assert not time.waiting("ram")


def test_a_fault_noted_too_late_is_no_sample():
    """Its page was in place before the fault was read: 0 would be an invention."""
    time = table()
    time.begin("ram", 1, 100, 5 * US)
    time.withdraw("ram", 1, 100, 5 * US)
    time.withdraw("ram", 1, 100, 5 * US)
    report = time.blocktime.report()
    assert (report.faults, report.vcpu_us, report.p50_us) == (0, (0, 0), 0)
    assert not time.waiting("ram")
    time.begin("ram", 2, 100, 10 * US)
    time.begin("ram", 2, 101, 20 * US)
    time.withdraw("ram", 2, 101, 20 * US)
    time.end("ram", [2], 30 * US)
    report = time.blocktime.report()
    assert (report.faults, report.vcpu_us, report.overlapped_us) == (1, (20, 0), 0)


def test_a_report_waits_for_nothing_that_the_fault_path_holds():
    """While pages are being noted as placed a report is made: so neither waits for the other."""
    time = table()
    for number in range(3):
        time.begin("ram", number, 100, 0)
    reports = []

    def pages():
        for number in range(3):
            reporting = threading.Thread(
                target=lambda: reports.append(time.blocktime.report()), daemon=True
            )
            reporting.start()
            reporting.join(10)
            assert not reporting.is_alive(), "the report waits for a lock of the fault path"
            yield number

    time.end("ram", pages(), 5 * US)
    assert [report.faults for report in reports] == [0, 1, 2]


def test_the_causes_by_hand():
    """One vCPU, whose wait outlives a broken connection; microseconds.

    ::

        vCPU 1  |10---------------------60|    |80---90|
                |page   |30 paused |50 page
    """
    time = table()
    blocktime = time.blocktime
    time.begin("ram", 1, 101, 10 * US)
    assert blocktime.report(25 * US).causes_us == {"page": (0, 15)}
    blocktime.because(WaitCause.PAUSED, 30 * US)
    assert blocktime.report(45 * US).vcpu_us == (0, 35)
    assert blocktime.report(45 * US).causes_us == {"page": (0, 20), "paused": (0, 15)}
    blocktime.because(WaitCause.PAGE, 50 * US)
    time.end("ram", [1], 60 * US)
    assert blocktime.report(70 * US).causes_us == {"page": (0, 30), "paused": (0, 20)}
    blocktime.because(WaitCause.RECOVERY, 70 * US)
    time.begin("ram", 2, 101, 80 * US)
    time.end("ram", [2], 90 * US)
    report = blocktime.report()
    assert report.causes_us == {"page": (0, 30), "paused": (0, 20), "recovery": (0, 10)}
    assert report.vcpu_us == (0, 60)


def test_each_cause_has_a_meaning():
    assert set(WAIT_CAUSES) == set(WaitCause)


def test_the_room_does_not_grow_with_the_faults():
    time = table()
    time.begin("ram", 0, 100, 0)
    time.end("ram", [0], 1)
    tracemalloc.start()
    try:
        before_bytes, _ = tracemalloc.get_traced_memory()
        for number in range(10_000):
            time.begin("ram", number, 100 + number % 3, number * 7919)
            time.end("ram", [number], number * 7919 + number * 1_000_003)
        after_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.blocktime.report().faults == 10_001
    assert after_bytes - before_bytes < 8192


steps = st.lists(
    st.tuples(
        st.sampled_from(["fault", "placed"]),
        st.integers(0, 4),  # page
        st.sampled_from([100, 101, 999]),
        st.integers(0, 50),  # microseconds since the step before
    ),
    max_size=60,
)


@given(steps)
def test_any_timeline(timeline):
    time = table()
    slow = Slow()
    now = 0
    for what, number, thread, later in timeline:
        now += later
        if what == "fault":
            time.begin("ram", number, thread, now * US)
            slow.fault(number, thread, now)
        else:
            time.end("ram", [number], now * US)
            slow.placed(number, now)
    for number in range(5):
        time.end("ram", [number], (now + 1) * US)
        slow.placed(number, now + 1)
    report = time.blocktime.report()
    assert report.vcpu_us == (slow.blocked({100}), slow.blocked({101}))
    assert report.overlapped_us == slow.blocked({100, 101})
    assert report.faults == sum(report.distribution) == len(slow.waits)
    assert report.overlapped_us <= min(report.vcpu_us)


@given(steps, st.lists(st.sampled_from(WaitCause), min_size=61, max_size=61))
def test_the_causes_of_any_timeline_are_all_of_it_and_nothing_decreases(timeline, causes):
    time = table()
    now = 0
    before = time.blocktime.report(0)
    for (what, number, thread, later), cause in zip(timeline, causes, strict=False):
        now += later
        if what == "fault":
            time.begin("ram", number, thread, now * US)
        else:
            time.end("ram", [number], now * US)
        if number == 4:
            time.blocktime.because(cause, now * US)
        report = time.blocktime.report((now + number) * US)
        for vcpu, waited_us in enumerate(report.vcpu_us):
            assert sum(each[vcpu] for each in report.causes_us.values()) == waited_us
            assert waited_us >= before.vcpu_us[vcpu]
        before = report


class Slow:
    """Keeps every wait, and looks at each microsecond."""

    def __init__(self):
        self.waits = []  # thread, begin, end
        self._open = []

    def fault(self, number, thread, now):
        self._open.append((number, thread, now))

    def placed(self, number, now):
        self.waits += [(thread, begin, now) for n, thread, begin in self._open if n == number]
        self._open = [wait for wait in self._open if wait[0] != number]

    def blocked(self, threads):
        end = max((wait[2] for wait in self.waits), default=0)
        return sum(
            threads <= {thread for thread, begin, stop in self.waits if begin <= now < stop}
            for now in range(end)
        )
