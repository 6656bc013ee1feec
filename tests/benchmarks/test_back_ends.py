"""The arithmetic of the benchmark of back ends, and what its own back end writes down."""

import numpy as np
import pytest

from benchmarks.back_ends import cases, findings, remote
from benchmarks.disk_guest import DISK_BYTES, DiskWork
from benchmarks.touching_back_end import Burst, guest_memory
from machine.machines import MIB

CASES = cases((512,))


def result(case, contender, **figures):
    return {"case": case, "contender": contender, "repeat": 0, "figures": figures}


def test_two_moves_of_each_size_and_the_faults_of_one():
    names = [case.name for case in cases((256, 1024))]
    moves = ["precopy-256", "postcopy-256", "precopy-1024", "postcopy-1024"]
    assert names == [*moves, "faults"]


def test_only_pages_that_came_from_the_source_are_faults():
    found = remote("vcpu_alone", np.array([20.0, 99.0, 150.0, 250.0, 350.0]))
    assert found["vcpu_alone_count"] == 3
    assert found["vcpu_alone_p50_us"] == pytest.approx(250)
    assert remote("vcpu_alone", np.array([20.0])) == {"vcpu_alone_count": 0}


def test_what_a_back_end_adds_is_the_difference_of_the_medians():
    results = [
        *(result("precopy-512", "drive", guest_stop_ms=ms) for ms in (10.0, 12.0, 30.0)),
        *(result("precopy-512", "postcopy", guest_stop_ms=ms) for ms in (15.0, 16.0, 17.0)),
        *(result("precopy-512", "qemu-storage-daemon", guest_stop_ms=ms) for ms in (22.0, 23.0)),
    ]
    ours, theirs = findings(CASES, results)
    assert (ours.value, ours.reached) == ("+4.0 ms", True)
    assert (theirs.value, theirs.reached) == ("+10.5 ms", False)


def test_faults_are_compared_run_by_run():
    results = [
        result("faults", "postcopy", vcpu_alone_p50_us=vcpu, back_end_alone_p50_us=back_end)
        for vcpu, back_end in ((100.0, 120.0), (200.0, 300.0), (100.0, 130.0))
    ]
    (found,) = findings(CASES, results)
    assert (found.value, found.reached) == ("1.30 [1.20 to 1.50], n=3", True)


def test_a_burst_is_read_as_it_was_written(tmp_path):
    Burst(3, 1 << 60, np.array([7, 8], np.uint64)).write(tmp_path / "0.npy")
    found = Burst.read(tmp_path / "0.npy")
    assert (found.began, found.ended, found.took.tolist()) == (3, 1 << 60, [7, 8])
    assert [path.name for path in tmp_path.iterdir()] == ["0.npy"]


def test_guest_memory_is_the_mapping_of_a_large_shared_file(tmp_path):
    maps = tmp_path / "maps"
    others = (
        "7f00-8f00 r-xp 00000000 08:01 12 /usr/bin/python3\n"
        "7f0000000000-7f0000004000 rw-s 00000000 00:01 5 /memfd:log (deleted)\n"
    )
    maps.write_text(others)
    assert guest_memory(maps) is None
    maps.write_text(others + "7f1000000000-7f1020000000 rw-s 00000000 00:01 6 /ram (deleted)\n")
    assert guest_memory(maps) == 0x7F1000000000


def test_the_guest_uses_all_of_its_memory_and_its_drive():
    made = DiskWork.of_size(64).made(1e9)
    assert made.memory_bytes == 64 * MIB
    assert made.base_address + made.slice_bytes == made.memory_bytes
    assert made.disk_blocks == DISK_BYTES // 4096
    assert made.delay_cycles == 400_000
    assert DiskWork.of_size(64).image(1e9) == made.image()
