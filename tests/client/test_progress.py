"""Progress is told so that it never runs backwards; results are put together from two answers."""

import pytest

from postcopy.client.progress import PHASES, Phase, ProgressTracker
from postcopy.client.result import FaultLatency, Result
from postcopy.status import Status

MIB = 1 << 20


def answer(status, ms, *, sent=0, remaining=0, passes=1, requests=0):
    ram = {"transferred": sent, "remaining": remaining, "total": 100 * MIB,
           "dirty-sync-count": passes, "dirty-pages-rate": 256, "page-size": 4096,
           "postcopy-requests": requests}  # fmt: skip
    return {"status": status, "total-time": ms, "ram": ram}


def test_each_status_has_a_phase():
    assert set(PHASES) == set(Status)


@pytest.mark.parametrize("postcopy", [False, True])
def test_nothing_runs_backwards_while_remaining_does(postcopy):
    tracker = ProgressTracker(postcopy_planned=postcopy)
    answers = [
        {"status": "setup"},
        answer("active", 100, sent=10 * MIB, remaining=90 * MIB),
        answer("active", 90, sent=5 * MIB, remaining=95 * MIB),
        answer("active", 800, sent=99 * MIB, remaining=1 * MIB),
        answer("active", 900, sent=100 * MIB, remaining=60 * MIB, passes=2),
        {"status": "device"},
        answer("postcopy-active", 1000, sent=101 * MIB, remaining=50 * MIB, passes=3),
        answer("postcopy-active", 1500, sent=140 * MIB, remaining=5 * MIB, passes=3, requests=40),
        answer("completed", 1600, sent=145 * MIB, passes=3, requests=40),
    ]
    looks = [tracker.take(each) for each in answers]
    for name in ("fraction", "transferred_bytes", "round", "elapsed_ms"):
        values = [getattr(look, name) for look in looks]
        assert values == sorted(values)
    assert all(look.fraction < 1 for look in looks[:-1])
    assert looks[-1].fraction == 1
    assert looks[4].remaining_bytes > looks[3].remaining_bytes


def test_rates_are_of_the_last_second():
    tracker = ProgressTracker()
    tracker.take(answer("active", 0))
    tracker.take(answer("active", 1000, sent=50 * MIB))
    tracker.take(answer("active", 2000, sent=60 * MIB))
    look = tracker.take(answer("active", 2500, sent=70 * MIB, requests=5))
    assert (look.rate_bytes, look.faults_per_s) == (20 * MIB, 10)
    assert look.dirty_rate_bytes == MIB
    assert look.phase is Phase.PRECOPY


SOURCE = {"status": "completed", "total-time": 900, "setup-time": 3, "downtime": 12,
          "ram": {"transferred": 5000, "normal": 7, "duplicate": 8, "dirty-sync-count": 3,
                  "postcopy-requests": 2, "precopy-bytes": 4000, "postcopy-bytes": 900}}  # fmt: skip


def test_a_result_of_the_source_alone():
    result = Result.of(SOURCE, {})
    assert (result.total_ms, result.downtime_ms, result.rounds) == (900, 12, 3)
    assert (result.normal_pages, result.zero_pages, result.requested_pages) == (7, 8, 2)
    assert (result.blocktime_ms, result.fault_latency) == ((), None)


def test_a_result_with_qemu_as_destination():
    theirs = {"status": "completed", "postcopy-blocktime": 4, "postcopy-vcpu-blocktime": [5, 6]}
    result = Result.of(SOURCE, theirs)
    assert (result.blocktime_ms, result.overlapped_blocktime_ms) == ((5.0, 6.0), 4)


def test_a_result_with_our_finer_figures():
    fine = {"blocktime-us": [5250, 0], "overlapped-blocktime-us": 1500,
            "fault-latency-p50-us": 100, "fault-latency-p99-us": 900,
            "fault-latency-max-us": 950}  # fmt: skip
    theirs = {"status": "completed", "postcopy-vcpu-blocktime": [5, 0], "x-postcopy": fine}
    ours = SOURCE | {"x-postcopy": {"guest-downtime-us": 11800}}
    result = Result.of(ours, theirs)
    assert (result.blocktime_ms, result.overlapped_blocktime_ms) == ((5.25, 0.0), 1.5)
    assert result.fault_latency == FaultLatency(100, 900, 950)
    assert result.downtime_ms == 11.8
    assert "source" not in result.to_json()
