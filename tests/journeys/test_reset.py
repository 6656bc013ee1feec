"""A guest goes back to an earlier point of its life, again and again, and to the last word."""

import os
from pathlib import Path

import numpy as np
import pytest

from fakes.awakening import (
    FORMS,
    half_awake,
    put_to_sleep,
    wake,
    woken,
    write_manifest,
)
from fakes.pair import hammer, idle, tiny
from fakes.snapshots import Portrait
from machine.machines import MIB, iterations, wait_for_progress
from postcopy.errors import ImageError, WrongState
from postcopy.machine.run_control import RunState
from postcopy.machine.workload import load
from postcopy.parameters import Capability
from postcopy.status import Status

RESETS = 50
EVERYWHERE = [("kvm", 1), ("kvm", 2), ("unicorn", 1)]


def set_point(side):
    """Make a moment at which the guest stands still the point; return all memory as it is then."""
    side.machine.stop()
    memory = side.ram()
    side.control.resetting.set_point()
    side.machine.cont()
    return memory


def back(side):
    """Go back, and return all memory before the guest writes again."""
    side.machine.stop()
    result = side.control.resetting.reset()
    return side.ram(), result


@pytest.mark.parametrize(("accelerator", "vcpus"), EVERYWHERE)
def test_fifty_resets_of_a_guest_that_never_stops_writing(journey, accelerator, vcpus):
    trip = journey(tiny(accelerator, vcpus), (accelerator, accelerator))
    side = trip.source
    then = set_point(side)
    at_the_point = None
    for number in range(RESETS):
        wait_for_progress(side.machine, trip.workload)
        if number % 5:
            side.control.resetting.reset()  # the guest runs on at once
            continue
        side.machine.stop()
        written = np.count_nonzero((side.ram() != then).any(axis=1))
        now, result = back(side)
        assert (now == then).all()
        assert not result["whole"]
        assert written <= result["pages"] <= len(then) // 4
        at_the_point = at_the_point or iterations(side.machine, trip.workload)
        assert iterations(side.machine, trip.workload) == at_the_point
        side.machine.cont()
    trip.verify_source()


def test_thousands_of_resets_leave_nothing_behind(journey):
    trip = journey(hammer())
    side = trip.source
    then = set_point(side)
    resetting = side.control.resetting
    for _ in range(10):
        resetting.reset()
    engine = side.reset_engine.process_id
    before = held("self"), held(engine)
    for _ in range(2000):
        resetting.reset()
    assert (back(side)[0] == then).all()
    assert side.reset_engine.process_id == engine
    for (fds, memory), process in zip(before, ("self", engine), strict=True):
        fds_now, memory_now = held(process)
        assert fds_now <= fds
        assert memory_now < memory + 8 * MIB
    side.machine.cont()
    trip.verify_source()


def held(process):
    """What a process holds: how many descriptors, and how much memory of its own."""
    place = Path(f"/proc/{process}")
    _, resident, shared, *_ = map(int, (place / "statm").read_text().split())
    return len(list((place / "fd").iterdir())), (resident - shared) * 4096


def test_the_point_is_one_moment_of_a_guest_that_runs():
    with Portrait(hammer(vcpus=2)) as portrait:
        side = portrait.side
        figures = side.control.resetting.set_point()
        assert side.machine.running
        assert figures["copied-bytes"] >= 8 << 20
        assert figures["pause-us"] > 0
        for _ in range(5):
            wait_for_progress(side.machine, portrait.workload)
            now, _ = back(side)
            assert (now == side.machine.then).all()
            side.machine.cont()
        portrait.check_memory()


def test_what_it_costs_is_what_was_written(journey):
    trip = journey(idle(256))
    side = trip.source
    set_point(side)
    side.control.resetting.reset()
    side.machine.stop()
    for page in range(100):
        side.machine.write_memory((128 << 20) + 8192 * page, b"by the host")
    now, result = back(side)
    assert 100 <= result["pages"] <= 110
    assert not now[(128 << 20) >> 12 :].any()


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_back_to_the_image_that_it_woke_from(journey, tmp_path, form, lazy):
    trip = journey(hammer(vcpus=2))
    path = put_to_sleep(trip, tmp_path / "image", form)
    then = trip.source.ram()
    wake(trip.destination, path, lazy=lazy)
    side = woken(trip)
    resetting = side.control.resetting
    resetting.set_point(str(path))
    now, result = back(side)
    assert (now == then).all()
    assert result["whole"]  # nobody has watched what it wrote before the point was set
    side.machine.cont()
    for _ in range(3):
        wait_for_progress(side.machine, trip.workload)
        resetting.set_point(str(path))  # it is the point already
        now, result = back(side)
        assert (now == then).all()
        assert not result["whole"]
        side.machine.cont()
    trip.verify(side)


def test_a_guest_that_is_not_whole_yet_is_completed_first(journey, tmp_path):
    trip = journey(hammer())
    path = tmp_path / "image"
    side = half_awake(trip, path)
    then = trip.source.ram()
    side.control.resetting.set_point(str(path))
    assert side.status is Status.COMPLETED
    now, _ = back(side)
    assert (now == then).all()


def test_huge_pages(huge_pages):
    huge_pages(32)
    with Portrait(load("hammer", 32 * MIB, 1), huge_pages=True) as portrait:
        side = portrait.side
        then = set_point(side)
        for _ in range(3):
            wait_for_progress(side.machine, portrait.workload)
            now, result = back(side)
            assert (now == then).all()
            assert not result["pages"] % 512
            side.machine.cont()


def test_a_guest_that_has_crashed_goes_on(journey):
    trip = journey(tiny("kvm"))
    side = trip.source
    side.control.resetting.set_point()
    for _ in range(3):
        wait_for_progress(side.machine, trip.workload)
        side.machine.fail("a test says so")
        assert side.machine.run_state is RunState.INTERNAL_ERROR
        side.control.resetting.reset()
        assert side.machine.failure is None
    trip.verify_source()


def test_it_excludes_migrations_and_snapshots(journey, tmp_path):
    trip = journey(hammer())
    side = trip.source
    resetting = side.control.resetting
    for order in (resetting.reset, resetting.end):
        with pytest.raises(WrongState, match="no reset point"):
            order()
    resetting.set_point()
    there = trip.destination.listen()
    with pytest.raises(WrongState, match="x-reset-end"):
        side.control.migrate(there)
    side.set([Capability.BACKGROUND_SNAPSHOT])
    with pytest.raises(WrongState, match="x-reset-end"):
        side.control.migrate(f"file:{tmp_path}/picture")
    side.control.set_capabilities({Capability.BACKGROUND_SNAPSHOT: False})
    resetting.end()
    assert side.keeper._writes is None
    with pytest.raises(WrongState, match="no reset point"):
        resetting.reset()
    side.set(parameters={"max-bandwidth": 1 << 20})
    side.control.migrate(there)
    with pytest.raises(WrongState, match="migration process in progress"):
        resetting.set_point()
    side.set(parameters={"max-bandwidth": 1 << 40})
    trip.finish()
    with pytest.raises(WrongState, match="the destination runs the guest"):
        resetting.set_point()


def test_an_image_that_will_not_do(journey, tmp_path):
    trip = journey(hammer())
    side = trip.source
    then = set_point(side)
    with pytest.raises(ImageError, match="No such file"):
        side.control.resetting.set_point(str(tmp_path / "nothing"))
    wait_for_progress(side.machine, trip.workload)
    assert (back(side)[0] == then).all()  # the point before is there still
    side.machine.cont()
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(b"no image" * 1000)
    with pytest.raises(ImageError, match="rubbish"):
        side.control.resetting.set_point(str(rubbish))
    with pytest.raises(WrongState, match="no reset point"):
        side.control.resetting.reset()
    side.control.resetting.set_point()
    trip.verify_source()


def test_a_damaged_image_is_refused_before_the_guest_is_touched(journey, tmp_path):
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image")
    write_manifest(path)
    wake(trip.destination, path)
    side = woken(trip)
    with path.open("r+b") as file:
        file.seek(4 * MIB)  # in the memory that the guest has filled
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ImageError, match="digest"):
        side.control.resetting.set_point(str(path))
    assert not side.keeper.reset_point
    trip.verify(side)
