"""What a guest touches first is recorded once, and is there the next time before it is touched."""

import json
import shutil

import numpy as np
import pytest

from fakes.awakening import (
    AT_ONCE,
    FORMS,
    TRICKLE,
    measured,
    put_to_sleep,
    wake,
    woken,
    write_manifest,
)
from fakes.pair import DEADLINE_S, hammer
from fakes.waiting import wait_until
from machine.machines import wait_for_progress
from postcopy.errors import PostcopyError
from postcopy.image import working_set
from postcopy.status import ENDED, Status

HOT_PAGES = 256
"""What :func:`worker` writes to all the time."""
NEARLY_ALL = HOT_PAGES * 8 // 10
"""A trickle of pages comes unasked all the same."""


def worker():
    return hammer(fill_kib=HOT_PAGES * 2 * 4)


def recorded(trip, path):
    """Wake it once, and note what it touches."""
    wake(trip.destination, path, record=True, prefetch="off")
    woken(trip)
    found = json.loads(working_set.beside(path).read_text())
    trip.new_destination()
    return found


def faults_until_all_hot_is_touched(trip, path, **wishes):
    """Wake it with next to nothing pushed, until the guest has all it works on; count the faults."""
    side = trip.destination
    side.set(parameters=TRICKLE)
    wake(side, path, **wishes)
    side.wait(Status.POSTCOPY_ACTIVE)
    first, count = hot_pages(trip)

    def all_here():
        return side.received()[first : first + count].all()

    wait_until(all_here, DEADLINE_S, "the pages that the guest works on")
    wait_for_progress(side.machine, trip.workload)
    faults = measured(side).demand_faults
    side.set(parameters=AT_ONCE)
    woken(trip)
    trip.new_destination()
    return faults


def hot_pages(trip):
    first = trip.workload.slice_address(0) // 4096
    return first, HOT_PAGES


@pytest.mark.parametrize("form", FORMS)
def test_ten_times_fewer_faults(journey, tmp_path, form):
    trip = journey(worker())
    path = put_to_sleep(trip, tmp_path / "image", form)
    without = faults_until_all_hot_is_touched(trip, path)
    found = recorded(trip, path)
    assert found["restores"] == 1
    replayed = faults_until_all_hot_is_touched(trip, path)
    assert without >= NEARLY_ALL
    assert replayed * 10 <= without
    left_aside = faults_until_all_hot_is_touched(trip, path, prefetch="off")
    assert left_aside >= NEARLY_ALL


def test_what_is_recorded_is_what_was_touched(journey, tmp_path):
    trip = journey(worker())
    path = put_to_sleep(trip, tmp_path / "image")
    recorded(trip, path)
    blocks = {"microvm.ram": trip.workload.memory_bytes // 4096}
    found = working_set.load(working_set.beside(path), working_set.identity_of(path), blocks)
    first, count = hot_pages(trip)
    assert found.pages["microvm.ram"][first : first + count].all()
    assert found.count < count + 64
    assert recorded(trip, path)["restores"] == 2
    again = working_set.load(working_set.beside(path), working_set.identity_of(path), blocks)
    assert (again.pages["microvm.ram"] >= found.pages["microvm.ram"]).all()


@pytest.mark.parametrize("form", FORMS)
def test_what_an_engine_has_seen_outlives_it(journey, tmp_path, form):
    trip = journey(worker())
    path = put_to_sleep(trip, tmp_path / "image", form)
    side = trip.destination
    side.set(parameters=TRICKLE)
    wake(side, path, record=True, prefetch="off")
    side.wait(Status.POSTCOPY_ACTIVE)
    first, count = hot_pages(trip)
    hot = slice(first, first + count)

    def all_here():
        return side.received()[hot].all()

    wait_until(all_here, DEADLINE_S, "the pages that the guest works on")
    old = side.engine
    old.kill()
    wait_until(lambda: side.engine not in {None, old}, DEADLINE_S, "a successor")
    side.set(parameters=AT_ONCE)
    woken(trip)
    blocks = {"microvm.ram": trip.workload.memory_bytes // 4096}
    found = working_set.load(working_set.beside(path), working_set.identity_of(path), blocks)
    assert np.count_nonzero(found.pages["microvm.ram"][hot]) >= NEARLY_ALL


def test_with_a_manifest_it_is_bound_to_the_digests(journey, tmp_path):
    trip = journey(worker())
    path = put_to_sleep(trip, tmp_path / "image")
    write_manifest(path)
    recorded(trip, path)
    wake(trip.destination, path)
    side = woken(trip)
    assert measured(side).working_set_pages >= HOT_PAGES


@pytest.mark.parametrize("what", ["another image's", "garbage"])
def test_a_set_that_does_not_fit_is_left_aside(journey, tmp_path, what):
    trip = journey(worker())
    path = put_to_sleep(trip, tmp_path / "image")
    if what == "garbage":
        working_set.beside(path).write_bytes(b"\x00\xff" * 100)
    else:
        masks = {"microvm.ram": np.ones(trip.workload.memory_bytes // 4096, np.bool_)}
        working_set.WorkingSet("ab" * 32, masks).save(working_set.beside(path))
    wake(trip.destination, path)
    side = woken(trip)
    assert measured(side).working_set_pages is None


def test_a_copy_of_an_image_has_the_same_set(journey, tmp_path):
    trip = journey(worker())
    path = put_to_sleep(trip, tmp_path / "image")
    recorded(trip, path)
    copy = tmp_path / "copy"
    shutil.copyfile(path, copy)
    shutil.copyfile(working_set.beside(path), working_set.beside(copy))
    wake(trip.destination, copy)
    side = woken(trip)
    times = measured(side)
    assert times.working_set_pages >= HOT_PAGES
    assert times.restore_running_us <= times.restore_ready_us <= times.restore_complete_us


def test_a_set_that_cannot_be_written_is_told_of_and_harms_nobody(journey, tmp_path):
    trip = journey(worker())
    path = put_to_sleep(trip, tmp_path / "image")
    working_set.beside(path).mkdir()
    side = trip.destination
    wake(side, path, record=True)
    assert side.control.progress.wait(*ENDED, timeout=DEADLINE_S) is Status.COMPLETED
    assert "cannot be written" in side.error
    trip.verify(side)


def test_recording_needs_faults(journey, tmp_path):
    trip = journey(worker())
    path = put_to_sleep(trip, tmp_path / "image")
    with pytest.raises(PostcopyError, match="restore lazily to record it"):
        wake(trip.destination, path, lazy=False, record=True)
    with pytest.raises(PostcopyError, match="give 'auto' or 'off'"):
        wake(trip.destination, path, prefetch="some")
