"""The arithmetic of the benchmarks of images, on records made by hand: no process, no clock."""

import argparse
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import campaign, linux, receives, restores, snapshots, waking, woken, working_sets
from benchmarks.clock import Clock
from benchmarks.images import Image, first_access, times, verify_image
from benchmarks.report import Finding, median
from benchmarks.timings import Moments, Observation, Offsets
from benchmarks.workload import _STATE, _STATE_AT, HOT_SET_AT, MIB, Workload, _pattern, of_size
from image.images import write_image

HZ = 1_000_000_000  # a cycle is a nanosecond
MS = HZ // 1000
US = HZ // 1_000_000
CLOCK = Clock(HZ, (0, 0))
COMMAND, STOPPED, COMPLETED = 2000 * MS, 2010 * MS, 2500 * MS


def rows(*lines):
    return np.array(lines, dtype=np.uint64).reshape(-1, 4)


def steady(until=6000 * MS, rate=20):
    """A row each 10 ms, so many iterations a ms."""
    return rows(*((at, at // MS * rate, 0, 0) for at in range(0, until, 10 * MS)))


def snapshot_seen(*events, series=None):
    moments = Moments(COMMAND, STOPPED, COMPLETED)
    series = steady() if series is None else series
    return Observation(rows(*events), series, Offsets(0, 0), moments, CLOCK).snapshot_figures()


STOP = (2014 * MS, 5 * MS, MS, 0)


def test_the_stop_of_a_snapshot_is_not_one_of_its_stalls():
    figures = snapshot_seen(STOP, (2100 * MS, 60 * US, 50 * US, 0))
    assert figures["guest_downtime_ms"] == 5
    assert figures["first_access_ms"] == 1
    assert figures["stalls"] == 1
    assert figures["stall_max_us"] == pytest.approx(50)
    assert figures["longest_after_ms"] == pytest.approx(0.06)


def test_stalls_are_those_until_the_image_is_complete():
    before = (1500 * MS, 9 * MS, 9 * MS, 0)
    late = (2600 * MS, 8 * MS, 8 * MS, 0)
    during = [(2100 * MS + i * MS, 20 * US * i, 20 * US * i, 0) for i in range(1, 102)]
    figures = snapshot_seen(before, STOP, *during, late)
    assert figures["stalls"] == 101
    assert figures["stall_p50_us"] == pytest.approx(20 * 51)
    assert figures["stall_p99_us"] == pytest.approx(20 * 100)
    assert figures["long_stalls"] == 96
    assert figures["blocked_ms"] == pytest.approx(0.02 * sum(range(1, 102)))


def test_a_gap_without_a_slow_access_is_no_stall_but_a_gap():
    figures = snapshot_seen(STOP, (2100 * MS, 3 * MS, 1 * US, 0))
    assert figures["stalls"] == 0
    assert figures["stall_p99_us"] is None
    assert figures["longest_after_ms"] == 3


def test_the_rate_that_was_kept_is_of_the_time_after_the_stop():
    lines = [(at, at // MS * 20, 0, 0) for at in range(0, 2000 * MS, 10 * MS)]
    done = 2000 * 20
    lines += [
        (at, done + (at - 2000 * MS) // MS * 5, 0, 0) for at in range(2000 * MS, 3000 * MS, 10 * MS)
    ]
    assert snapshot_seen(STOP, series=rows(*lines))["rate_kept"] == pytest.approx(0.25)


def run(case, contender, **figures):
    return {"case": case.name, "contender": contender, "repeat": 0, "figures": figures}


def test_growth_of_the_stop_is_judged_by_that_of_the_ioctl():
    small, large = cases = snapshots.cases([256, 1024])
    results = [
        run(small, "postcopy", guest_downtime_ms=3.0),
        run(large, "postcopy", guest_downtime_ms=5.0),
    ]
    (found,) = snapshots.growth(cases, results, {256: 1.0, 1024: 3.5})
    assert found.reached is True
    (found,) = snapshots.growth(cases, results, {256: 1.0, 1024: 2.5})
    assert found.reached is False
    assert snapshots.growth(cases, results[:1], {256: 1.0, 1024: 2.5}) == []
    assert snapshots.growth(cases[:1], results, {256: 1.0}) == []


def test_flat_is_within_a_fifth_over_all_sizes():
    cases = restores.cases([256, 1024, 8192])
    for middle, reached in ((360.0, True), (370.0, False)):
        results = [
            run(case, "postcopy", first_ms=value)
            for case, value in zip(cases, (300.0, middle, 310.0), strict=True)
        ]
        (found,) = restores.flatness(cases, results)
        assert found.reached is reached
    assert restores.flatness(cases, results[:2]) == []


def test_what_a_restore_is_to_reach_is_about_the_largest_guest():
    cases = restores.cases([256, 8192])
    assert [set(case.targets) for case in cases] == [set(), {"first_ms"}]


@pytest.mark.parametrize("made", [snapshots.cases, restores.cases, working_sets.cases])
def test_targets_and_ratios_are_of_figures_and_contenders_of_the_case(made):
    for case in made([256, 1024, 4096]):
        assert set(case.targets) <= {figure.key for figure in case.figures}
        assert set(case.compared) <= {one.name for one in case.contenders}


@pytest.mark.parametrize("made", [snapshots.cases, restores.cases, working_sets.cases])
def test_all_data_lies_in_the_guest_and_below_the_hole_of_a_pc(made):
    for case in made([128, 1024, 4096]):
        work = case.workload
        end = HOT_SET_AT + work.hot_bytes + work.fill_bytes
        assert end <= min(case.memory_mib * MIB, 3072 * MIB)
        assert max(work.hot_at + work.hot_bytes, work.fill_at + work.fill_bytes) == end
        assert work.hot_bytes % MIB == work.fill_bytes % MIB == 0


def test_a_guest_of_1_gib_has_576_mib_of_data():
    work = of_size(1024, random=False)
    assert (work.hot_bytes, work.fill_bytes) == (64 * MIB, 512 * MIB)
    assert of_size(8192, random=True, most_mib=2048).fill_bytes == 1984 * MIB


def test_a_working_set_of_1_gib_is_64_mib_however_it_lies():
    for case in working_sets.cases([1024]):
        work = case.workload
        assert work.hot_bytes // work.stride_bytes * 4096 == 64 * MIB
        assert work.hot_bytes + work.fill_bytes == 576 * MIB


def test_the_image_says_where_the_hot_set_lies():
    image = Workload(64 * MIB, 8 * MIB, random=True, stride_bytes=32768, fill_first=True).image(1e9)
    fields = struct.unpack_from("<15Q", image, 0x48)
    assert fields[1:4] == (24 * MIB, 64 * MIB, 32768)
    assert fields[9:11] == (HOT_SET_AT, 8 * MIB)


def test_the_first_access_is_the_first_that_is_noted_after_the_image():
    noted = {7: 900, 8: 1500}
    records = SimpleNamespace(
        state=lambda: SimpleNamespace(events=9), event=lambda number: [noted[number], 0, 0, 0]
    )
    assert first_access(records, Image(None, 8), offset=100) == 1400
    with pytest.raises(RuntimeError, match="noted nothing"):
        first_access(records, Image(None, 9), offset=100)


def test_times_of_a_restore_are_milliseconds_and_may_be_missing():
    said = times({"x-postcopy": {"restore-running-us": 300_500, "demand-faults": 12}})
    assert (said["running_ms"], said["demand_faults"], said["ready_ms"]) == (300.5, 12, None)
    assert set(times({}).values()) == {None}


def test_waits_are_those_from_the_first_access_to_the_last_page():
    life = woken.Life(began=1000 * MS, first=1300 * MS, whole=1800 * MS, offset=5000 * MS)
    events = rows(
        *(
            (at * MS + life.offset, 0, us * US, 0)
            for at, us in (
                (1200, 999),
                (1300, 888),
                (1400, 50),
                (1500, 150),
                (1800, 250),
                (1801, 777),
            )
        )
    )
    found = woken.figures(events, rows(), life, CLOCK)
    assert (found["waits"], found["long_waits"]) == (3, 2)
    assert found["wait_p50_us"] == pytest.approx(150)
    assert found["blocked_ms"] == pytest.approx(0.45)
    assert found["working_ms"] is None


def test_the_guest_works_when_it_does_half_of_what_it_settles_to():
    lines, done = [], 0
    for at in range(1300 * MS, 3000 * MS, 10 * MS):
        done += 10 if at <= 1500 * MS else 1000
        lines.append((at, done, 0, 0))
    life = woken.Life(1000 * MS, 1300 * MS, 1800 * MS, 0)
    assert woken.figures(rows(), rows(*lines), life, CLOCK)["working_ms"] == pytest.approx(510)


def test_contenders_take_turns_and_cases_can_be_ended_one_by_one():
    small, large = cases = restores.cases([256, 1024])

    def told(plan):
        return [(repeat, case.name, one.name) for repeat, case, one in plan]

    turns = told(campaign.alternating(cases, 2))
    assert turns[:4] == [
        (0, small.name, "qemu"), (0, small.name, "postcopy"),
        (0, large.name, "qemu"), (0, large.name, "postcopy"),
    ]  # fmt: skip
    ended = told(campaign.alternating(cases, 2, by_case=True, wanted=["qemu"]))
    assert [(repeat, name) for repeat, name, _ in ended] == [
        (0, small.name), (1, small.name), (0, large.name), (1, large.name),
    ]  # fmt: skip


def test_sizes_are_in_order():
    assert campaign.sizes_mib("1024,256,256") == (256, 1024)
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        campaign.sizes_mib("1G")


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, capsys):
    (case,) = restores.cases([256])
    answers = iter([RuntimeError("no"), {"figures": {"first_ms": 10.0}}])

    def measure(*_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    path = tmp_path / "found.json"
    done = campaign.Campaign(
        "title", {}, [case], path, lambda _: [Finding("a", "1", "≤ 2", reached=True)], quiet_s=0
    ).run(campaign.alternating([case], 1), measure)
    assert done == 1
    assert "RuntimeError: no" in path.read_text()
    page = path.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out
    assert "| a | 1 | ≤ 2 | yes |" in page


def test_the_median_of_one_figure():
    (case,) = restores.cases([256])
    results = [run(case, "qemu", first_ms=value) for value in (1.0, 5.0, 2.0)]
    assert median(case, "qemu", "first_ms", results) == 2.0
    assert median(case, "postcopy", "first_ms", results) is None


@pytest.mark.parametrize("form", ["stream", "mapped-ram"])
@pytest.mark.parametrize("fault", ["none", "stale page", "lost write", "wrong word", "wrong fill"])
def test_an_image_is_one_moment_of_its_guests_life(tmp_path, form, fault):
    work = Workload(MIB, MIB, random=False)
    ram = np.zeros(20 * MIB, np.uint8)
    for start in (work.hot_at, work.fill_at):
        ram[start : start + MIB] = _pattern(start).view(np.uint8)
    counters = ram[work.hot_at : work.hot_at + MIB].view(np.uint64).reshape(-1, 512)
    counters[:, 0] = 7
    _STATE.pack_into(ram.data, _STATE_AT, b"PCYBSTA1", 2, 0, 7 * len(counters), *[0] * 10)
    match fault:
        case "stale page":
            counters[9, 0] = 6
        case "lost write":
            counters[9, 0] = 9
        case "wrong word":
            counters[200, 511] ^= 1
        case "wrong fill":
            ram[work.fill_at + 12345] ^= 1
    path = write_image(tmp_path / "image", form, {"microvm.ram": ram.reshape(-1, 4096)})
    assert verify_image(path, work)["ok"] is (fault == "none")


def test_cases_of_receiving():
    cases = receives.cases([64, 1536])
    assert [receives.channels_of(case) for case in cases] == [0, 1, 4] * 2
    last = cases[-1]
    assert (last.workload.hot_bytes + last.workload.fill_bytes) // MIB == 1536
    assert "4 channels of multifd" in last.title


def test_the_time_to_running_is_compared_over_sizes_for_each_version_and_cache():
    cases = waking.cases(["10.0", "11.1"], [1024, 4096])
    assert len({case.name for case in cases}) == 8
    results = [
        {"case": f"10.0-{size}-warm", "contender": "postcopy", "figures": {"running_s": seconds}}
        for size, seconds in ((1024, 0.5), (4096, 0.7))
    ]
    (found,) = waking.flatness(cases, results)
    assert (found.title.split(":")[0], found.value) == ("QEMU 10.0, warm", "1.40")
    assert not found.reached


def test_each_case_of_the_linux_guest_compares_contenders_that_it_has():
    for case in linux.cases(1024):
        assert set(case.compared) <= {contender.name for contender in case.contenders}
        assert set(case.targets) <= {figure.key for figure in case.figures}
