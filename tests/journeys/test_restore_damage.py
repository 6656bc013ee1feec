"""Images that are not what they were, or none at all: nothing wrong is ever served."""

import os
import shutil

import numpy as np
import pytest

from fakes.awakening import (
    AT_ONCE,
    TRICKLE,
    measured,
    put_to_sleep,
    wait_for_faults,
    wake,
    woken,
    write_manifest,
)
from fakes.pair import DEADLINE_S, Side, hammer, idle, tiny
from fakes.waiting import wait_until
from machine.machines import wait_for_progress
from postcopy.errors import GuestError, ImageError, PostcopyError, WrongState
from postcopy.image.digests import CHUNK_BYTES
from postcopy.image.formats import open_image
from postcopy.machine.config import MachineConfig
from postcopy.machine.run_control import RunState
from postcopy.machine.workload import PAGE_BYTES
from postcopy.status import ENDED, Status

CHUNK_PAGES = CHUNK_BYTES // PAGE_BYTES


def flip(path, offset):
    """Turn one bit over."""
    fd = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte ^ 0x10]), offset)
    finally:
        os.close(fd)


def place(path):
    """Where the RAM's pages begin in the file, and which of them have data."""
    with open_image(path) as image:
        return image.place("microvm.ram").pages_offset, image.has_data("microvm.ram").copy()


@pytest.fixture
def damaged(journey, tmp_path):
    """A lazy journey whose image has one bad chunk that the guest does not touch by itself."""
    trip = journey(idle())
    path = put_to_sleep(trip, tmp_path / "image")
    write_manifest(path)
    start, data = place(path)
    page = int(np.flatnonzero(data)[-40])
    flip(path, start + page * PAGE_BYTES + 123)
    trip.page, trip.path = page, path
    trip.bad = [start + page * PAGE_BYTES, page // CHUNK_PAGES * CHUNK_PAGES]
    return trip


def test_a_whole_image_with_a_manifest_is_served(journey, tmp_path):
    trip = journey(hammer(vcpus=2))
    path = put_to_sleep(trip, tmp_path / "image")
    write_manifest(path)
    wake(trip.destination, path)
    woken(trip)


def test_demand_faults_are_checked_too(journey, tmp_path):
    trip = journey(hammer(vcpus=2))
    path = put_to_sleep(trip, tmp_path / "image")
    write_manifest(path)
    side = trip.destination
    side.set(parameters=TRICKLE)
    wake(side, path)
    side.wait(Status.POSTCOPY_ACTIVE)
    wait_for_faults(side, 20)
    side.set(parameters=AT_ONCE)
    woken(trip)


def test_a_wrong_chunk_is_lost_and_the_guest_runs_on(damaged):
    side, page = damaged.destination, damaged.page
    wake(side, damaged.path)
    assert side.control.progress.wait(*ENDED, timeout=DEADLINE_S) is Status.FAILED
    offset, first = damaged.bad
    assert str(damaged.path) in side.error
    assert "block microvm.ram" in side.error
    assert f"(at byte {offset // CHUNK_BYTES * CHUNK_BYTES:#x})" in side.error
    assert f"{CHUNK_PAGES} pages are lost" in side.error
    machine = side.machine
    assert machine.owned
    assert machine.running
    wait_for_progress(machine, damaged.workload)
    truth = damaged.source.ram()
    for lost in range(first, first + CHUNK_PAGES):
        with pytest.raises(GuestError, match="is lost"):
            machine.read_memory(lost * PAGE_BYTES + 64, 8)
    for good in (first - 1, first + CHUNK_PAGES):
        assert machine.read_memory(good * PAGE_BYTES, PAGE_BYTES) == truth[good].tobytes()
    assert page in range(first, first + CHUNK_PAGES)
    assert not side.failures
    with pytest.raises(WrongState, match="pages of this guest are lost"):
        side.control.migrate("tcp:127.0.0.1:1")
    with pytest.raises(WrongState, match="not specified"):
        wake(side, damaged.path)


def test_a_successor_does_not_serve_it_either(damaged):
    side = damaged.destination
    side.set(parameters={"max-postcopy-bandwidth": 4 << 20})
    wake(side, damaged.path)
    wait_until(lambda: side.error or side.status in ENDED, DEADLINE_S, "the loss")
    if side.status not in ENDED:
        side.engine.kill()
    side.set(parameters=AT_ONCE)
    assert side.control.progress.wait(*ENDED, timeout=DEADLINE_S) is Status.FAILED
    with pytest.raises(GuestError, match="is lost"):
        side.machine.read_memory(damaged.page * PAGE_BYTES, 8)
    assert f"{CHUNK_PAGES} pages are lost" in side.error
    assert side.keeper.lost == {"microvm.ram": CHUNK_PAGES}


def test_who_touches_it_fails_loudly(journey, tmp_path):
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image")
    write_manifest(path)
    start, data = place(path)
    page = int(np.flatnonzero(data)[len(data[data]) // 3])
    flip(path, start + page * PAGE_BYTES)
    side = trip.destination
    side.set(parameters=TRICKLE)
    wake(side, path)
    machine = side.machine
    wait_until(lambda: machine.run_state is RunState.INTERNAL_ERROR, 20, "the guest's failure")
    assert "is lost (poisoned)" in str(machine.failure)
    wait_until(lambda: side.error, DEADLINE_S, "the engine's word for it")
    assert str(path) in side.error


@pytest.mark.parametrize("accelerator", ["kvm", "unicorn"])
def test_nothing_runs_where_it_cannot_be_kept_from_the_guest(journey, tmp_path, accelerator):
    """Eager, or on a software CPU: no guest is started from an image with one wrong bit."""
    trip = journey(tiny(accelerator), (accelerator, accelerator))
    path = put_to_sleep(trip, tmp_path / "image")
    write_manifest(path)
    start, data = place(path)
    flip(path, start + int(np.flatnonzero(data)[-3]) * PAGE_BYTES)
    side = trip.destination
    try:
        wake(side, path, lazy=accelerator == "unicorn")
    except ImageError as error:
        text = str(error)
    else:
        assert side.control.progress.wait(*ENDED, timeout=DEADLINE_S) is Status.FAILED
        text = side.error
    assert str(path) in text
    assert "do not agree with their digest: block microvm.ram" in text
    assert not side.machine.owned
    assert not side.machine.running


@pytest.mark.parametrize("where", ["head", "bitmap", "devices", "manifest"])
def test_all_but_memory_is_checked_before_anything_runs(journey, tmp_path, where):
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image")
    write_manifest(path)
    with open_image(path) as image:
        mapped = image.place("microvm.ram")
    offset = {"head": 20, "bitmap": mapped.bitmap_offset + 3, "devices": mapped.end_offset + 90}
    victim = path.with_name("image.manifest.json") if where == "manifest" else path
    flip(victim, offset.get(where, 500))
    with pytest.raises(ImageError) as refused:
        wake(trip.destination, path)
    assert str(victim) in str(refused.value)
    assert_untouched(trip.destination)


@pytest.mark.parametrize("form", ["mapped-ram", "stream"])
def test_what_is_cut_off_is_refused(journey, tmp_path, form):
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image", form)
    size = path.stat().st_size
    for cut in (0, 7, 100, size // 2, size - 1):
        shutil.copyfile(path, tmp_path / "cut")
        os.truncate(tmp_path / "cut", cut)
        if form == "mapped-ram" and cut == size - 1:
            continue  # without its manifest, the last byte of a description is not missed
        with pytest.raises(ImageError, match=str(tmp_path / "cut")):
            wake(trip.destination, tmp_path / "cut")
        assert_untouched(trip.destination)
    # And it was in vain that we were asked: the right one still wakes here.
    wake(trip.destination, path)
    woken(trip)


def test_an_image_of_another_machine_is_refused(journey, tmp_path):
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image")
    for changes, why in (
        (
            {"memory_bytes": 128 << 20},
            r"its block 'microvm.ram' has 67108864 bytes, ours 134217728",
        ),
        ({"machine_type": "none"}, "it is of a machine 'microvm', ours is 'none'"),
    ):
        side = trip.new_destination(**changes)
        with pytest.raises(ImageError, match=why):
            wake(side, path)
        assert_untouched(side)
    side = trip.new_destination(vcpus=3)
    wake(side, path)
    assert side.control.progress.wait(*ENDED, timeout=DEADLINE_S) is Status.FAILED
    assert "the stream has 1 vCPUs, this machine 3" in side.error
    assert not side.machine.owned


def test_an_image_that_loses_its_end_under_a_running_guest(journey, tmp_path):
    """Its pages are lost, by name; see also test_unreadable_images.py."""
    trip = journey(idle(fill_kib=16 << 10))
    path = put_to_sleep(trip, tmp_path / "image")
    start, data = place(path)
    side = trip.destination
    side.set(parameters={"max-postcopy-bandwidth": 1 << 20})
    wake(side, path)
    side.wait(Status.POSTCOPY_ACTIVE)
    last = int(np.flatnonzero(data)[-1])
    assert not side.received()[last]
    os.truncate(path, start + last * PAGE_BYTES)
    side.set(parameters=AT_ONCE)
    assert side.control.progress.wait(*ENDED, Status.POSTCOPY_PAUSED, timeout=DEADLINE_S) is (
        Status.FAILED
    )
    assert str(path) in side.error
    assert "pages are lost" in side.error
    assert side.machine.running
    with pytest.raises(GuestError, match="is lost"):
        side.machine.read_memory(last * PAGE_BYTES, 8)


def test_nothing_but_a_file_is_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    side = Side(MachineConfig(64 << 20), incoming=True)
    try:
        for name, why in (("fifo", "not a regular file"), ("none", "No such file")):
            with pytest.raises(PostcopyError, match=why):
                wake(side, tmp_path / name)
        assert_untouched(side)
    finally:
        side.close()


def assert_untouched(side):
    assert side.status is Status.NONE
    assert not side.machine.owned
    assert not side.machine.running
    assert measured(side) is None
