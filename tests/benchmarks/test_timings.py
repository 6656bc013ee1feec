"""The arithmetic of the benchmarks, on records made by hand: no process, no clock."""

import numpy as np
import pytest

from benchmarks.clock import Clock
from benchmarks.timings import Moments, Observation, Offsets

HZ = 1_000_000_000  # a cycle is a nanosecond
MS = HZ // 1000
CLOCK = Clock(HZ, (0, 0))
COMMAND, STOPPED, COMPLETED = 2000 * MS, 3000 * MS, 3500 * MS
MOMENTS = Moments(COMMAND, STOPPED, COMPLETED)
SAME_CLOCK = Offsets(0, 0)


def rows(*lines):
    return np.array(lines, dtype=np.uint64).reshape(-1, 4)


def series(offset_source=0, offset_destination=0, resumed=3040 * MS):
    """A row each 10 ms: 20 iterations a ms until the command, 10 until the stop, 5 afterwards."""
    lines, iterations = [], 0
    for at in range(0, 6000 * MS, 10 * MS):
        if STOPPED < at < resumed:
            continue
        iterations += 10 * (20 if at <= COMMAND else 10 if at <= STOPPED else 5)
        offset = offset_source if at <= STOPPED else offset_destination
        lines.append((at + offset, iterations, 0, 0))
    return rows(*lines)


def observe(events, all_series=None, offsets=SAME_CLOCK, moments=MOMENTS):
    return Observation(
        events, series() if all_series is None else all_series, offsets, moments, CLOCK
    )


def test_downtime_is_the_gap_that_spans_the_stop():
    longer_before = (2500 * MS, 90 * MS, 90 * MS, 0)
    stop = (3040 * MS, 41 * MS, 20 * MS, 0)
    longer_after = (3300 * MS, 95 * MS, 95 * MS, 0)
    seen = observe(rows(longer_before, stop, longer_after))
    assert seen.downtime_ms() == 41
    assert seen.longest_gap_ms() == 95
    assert seen.resumed == 3040 * MS


def test_a_gap_before_the_command_does_not_count():
    seen = observe(rows((1500 * MS, 70 * MS, 0, 0), (2500 * MS, 7 * MS, 0, 0)))
    assert seen.longest_gap_ms() == 7


def test_a_stop_that_the_guest_did_not_notice_has_no_downtime():
    assert observe(rows((2500 * MS, MS, MS, 0))).downtime_ms() is None


def test_time_that_stood_still_for_the_guest_is_added():
    # The guest's TSC stood still for 38 ms: it saw a gap of 3 ms only.
    hidden = 38 * MS
    event = (3040 * MS - hidden, 3 * MS, MS, 0)
    seen = observe(rows(event), series(0, -hidden), Offsets(0, -hidden))
    assert seen.downtime_ms() == pytest.approx(41)
    assert seen.resumed == 3040 * MS


def test_small_offsets_are_the_delay_of_reading_them():
    event = (3040 * MS, 41 * MS, MS, 0)
    assert observe(rows(event), offsets=Offsets(-900, -1_000)).downtime_ms() == 41


def test_an_offset_on_both_sides_moves_the_records():
    offset = -10_000 * MS
    begin = series()
    begin[:, 0] += np.uint64(20_000 * MS)
    far = Moments(*(moment + 30_000 * MS for moment in (COMMAND, STOPPED, COMPLETED)))
    event = (23_040 * MS, 41 * MS, MS, 0)
    seen = observe(rows(event), begin, Offsets(offset, offset), far)
    assert seen.downtime_ms() == 41
    assert seen.common_figures()["rate_before"] == pytest.approx(0.02)


def test_rates_are_million_iterations_a_second():
    seen = observe(rows((3040 * MS, 41 * MS, MS, 0)))
    figures = seen.common_figures()
    assert figures["rate_before"] == pytest.approx(0.02)
    assert figures["rate_source"] == pytest.approx(0.01)
    assert figures["rate_kept"] == pytest.approx(0.5)
    assert seen.rate(3040 * MS, 5000 * MS) == pytest.approx(0.005)
    assert seen.rate(3005 * MS, 3020 * MS) is None


def test_faults_are_slow_accesses_between_resumption_and_end():
    stop = (3040 * MS, 41 * MS, 30 * MS, 0)
    quick = (3050 * MS, 90_000, 90_000, 0)  # 90 us: the hypervisor's own
    slow = [(3060 * MS + i * MS, 110_000 * i, 110_000 * i, 0) for i in range(1, 102)]
    late = (3600 * MS, 90 * MS, 90 * MS, 0)
    figures = observe(rows(stop, quick, *slow, late)).postcopy_figures()
    assert figures["faults"] == 101
    assert figures["fault_p50_us"] == pytest.approx(5610)
    assert figures["fault_p99_us"] == pytest.approx(11_000)
    assert figures["fault_max_us"] == pytest.approx(11_110)
    assert figures["blocked_ms"] == pytest.approx(0.09 + sum(range(1, 102)) * 0.11)


def test_under_a_cap_faults_count_until_it_is_lifted():
    stop = (3040 * MS, 41 * MS, 30 * MS, 0)
    capped = [(3060 * MS + i * MS, MS, MS, 0) for i in range(10)]
    afterwards = [(3200 * MS + i * MS, 9 * MS, 9 * MS, 0) for i in range(20)]
    lifted = Moments(COMMAND, STOPPED, COMPLETED, lifted=3199 * MS)
    figures = observe(rows(stop, *capped, *afterwards), moments=lifted).postcopy_figures()
    assert figures["faults"] == 10
    assert figures["fault_max_us"] == pytest.approx(1000)
    assert figures["blocked_ms"] == pytest.approx(10)
    assert observe(rows(stop, *capped, *afterwards)).postcopy_figures()["faults"] == 30


def test_where_requests_are_counted_quick_faults_are_faults():
    stop = (3040 * MS, 41 * MS, 30 * MS, 0)
    own = [(3050 * MS + i * MS // 10, 30_000, 30_000, 0) for i in range(100)]
    quick = [(3070 * MS + i * MS // 10, 80_000, 80_000, 0) for i in range(100)]
    slow = [(3090 * MS + i * MS, MS, MS, 0) for i in range(10)]
    seen = observe(rows(stop, *own, *quick, *slow))
    figures = seen.postcopy_figures(requests=110)
    assert (figures["faults"], figures["fault_p50_us"]) == (110, pytest.approx(80))
    assert seen.postcopy_figures(requests=5)["faults"] == 10
    assert seen.postcopy_figures(requests=5000)["faults"] == 210


def test_a_cap_lifted_after_the_end_measures_nothing_after_the_end():
    assert Moments(COMMAND, STOPPED, COMPLETED, COMPLETED + MS).measured_until == COMPLETED


def test_recovery_is_when_half_the_settled_rate_is_seen():
    figures = observe(rows((3040 * MS, 41 * MS, MS, 0))).postcopy_figures()
    assert figures["rate_settled"] == pytest.approx(0.005)
    assert figures["recovery_ms"] == pytest.approx(50)


def test_without_faults_there_are_no_percentiles():
    figures = observe(rows((3040 * MS, 41 * MS, MS, 0))).postcopy_figures()
    assert figures["faults"] == 0
    assert "fault_p50_us" not in figures


def test_wall_clock_instants_become_tsc():
    clock = Clock(2e9, (1_000_000, 5 * 10**9))
    assert clock.from_wall_clock(5, 500_000) == 1_000_000 + 10**9
    assert clock.from_wall_clock(4, 999_999) == 1_000_000 - 2000
    assert clock.ms(4_000_000) == 2
