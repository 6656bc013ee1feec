"""When a waiting guest went on, and what is said of many such waits: records made by hand."""

import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import recoveries
from benchmarks.standstill import Gap, Gaps, judged

MS = 1_000_000
OFFSET = -7_000 * MS
"""The guest's clock began later than the host's."""
ROWS = (
    (1_010 * MS, 10 * MS),
    (1_600 * MS, 580 * MS),  # spans 1020 to 1600
    (1_700 * MS, 40 * MS),
    (1_900 * MS, 120 * MS),
)


@pytest.fixture
def gaps():
    rows = [(8_000 * MS + ended + OFFSET, length, 0, 0) for ended, length in ROWS]
    return Gaps(np.array(rows, dtype=np.uint64), 8_000 * MS + OFFSET)


def test_the_first_page_served_ends_the_gap_in_which_the_command_lies(gaps):
    assert gaps.end_of_gap_at(1_400 * MS) == 1_600 * MS
    assert gaps.end_of_gap_at(1_020 * MS) == 1_600 * MS


@pytest.mark.parametrize("moment", [1_015 * MS, 1_600 * MS, 1_650 * MS, 5_000 * MS])
def test_a_guest_that_was_not_waiting_has_nothing_served(gaps, moment):
    assert gaps.end_of_gap_at(moment) is None


def test_the_stall_after_a_kill_is_the_longest_gap_that_ends_until_it_is_over(gaps):
    assert gaps.longest(1_610 * MS, 2_000 * MS) == Gap(1_900 * MS, 120 * MS)
    assert gaps.longest(1_610 * MS, 1_899 * MS) == Gap(1_700 * MS, 40 * MS)
    assert gaps.longest(1_590 * MS, 2_000 * MS) == Gap(1_600 * MS, 580 * MS)
    assert gaps.longest(1_900 * MS, 2_000 * MS) is None


def test_it_is_the_longest_waits_that_count():
    times_ms = [100.0] * 99 + [500.0] * 2
    assert judged("wait", times_ms, 400).reached is False
    assert judged("wait", [*times_ms[:99], 100.0, 100.0, 100.0, 100.0, 500.0], 400).reached is True
    assert "n=101" in judged("wait", times_ms, 400).value


def test_with_few_waits_it_is_about_the_longest():
    assert judged("wait", [100.0] * 19 + [600.0], 400).reached is False
    assert judged("wait", [100.0] * 19 + [399.0], 400).reached is True
    assert judged("wait", [400.0], 400).reached is False


def test_without_runs_there_is_no_verdict():
    assert judged("wait", [], 400).reached is None


def test_each_case_is_judged_by_its_own_limit():
    wanted = recoveries.cases(tuple(recoveries.LIMITS_MS), 2048)
    results = [
        {
            "case": case.name,
            "contender": "postcopy",
            "repeat": repeat,
            "figures": {"served_ms": 300.0},
        }
        for case in wanted
        for repeat in range(3)
    ]
    results.append({"case": "respawn", "contender": "postcopy", "repeat": 3, "error": "no"})
    found = recoveries.findings(wanted, results)
    assert [finding.reached for finding in found] == [False, True]
    assert [finding.target for finding in found] == ["p99 < 250 ms", "p99 < 400 ms"]


def test_the_guest_fits_its_memory():
    for size in (256, 2048):
        for case in recoveries.cases(("recover",), size):
            work = case.workload
            assert work.fill_at + work.fill_bytes < size << 20
    assert recoveries.cases(("recover",), 2048)[0].workload.hot_bytes == 256 << 20


MAPS = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("mapped", flush=True)
sys.stdin.read()
"""


def test_the_engine_at_work_is_the_child_that_has_the_image_mapped(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    command = [sys.executable, "-c", MAPS, str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"mapped\n"
        assert recoveries.engine_at_work(os.getpid(), image) == child.pid
        assert recoveries.engine_at_work(os.getpid(), tmp_path / "other") is None
    assert recoveries.engine_at_work(os.getpid(), image) is None
