"""A guest wakes from its image: it runs first, and each page comes when it is touched, or behind."""

import pytest

from fakes.awakening import (
    AT_ONCE,
    FORMS,
    TRICKLE,
    half_awake,
    measured,
    put_to_sleep,
    wait_for_faults,
    wake,
    woken,
)
from fakes.pair import hammer, idle, tiny
from machine.machines import wait_for_progress
from postcopy.errors import WrongState
from postcopy.status import Status

LAZY = ["setup", "active", "RESUME", "postcopy-active", "completed"]
EAGER = ["setup", "active", "RESUME", "completed"]


@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_a_guest_goes_on_where_it_was(journey, tmp_path, form, lazy, vcpus):
    trip = journey(hammer(vcpus=vcpus))
    wake(trip.destination, put_to_sleep(trip, tmp_path / "image", form), lazy=lazy)
    side = woken(trip)
    assert side.story()[: len(LAZY if lazy else EAGER)] == (LAZY if lazy else EAGER)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("accelerators", [("unicorn", "unicorn"), ("kvm", "unicorn")], ids="-".join)
def test_on_a_software_cpu(journey, tmp_path, accelerators, form):
    trip = journey(tiny("unicorn"), accelerators)
    wake(trip.destination, put_to_sleep(trip, tmp_path / "image", form))
    woken(trip)


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_guest_to_the_last_byte(journey, tmp_path, form):
    trip = journey(hammer(), paused=True)
    wake(trip.destination, put_to_sleep(trip, tmp_path / "image", form))
    side = woken(trip)
    assert (side.ram() == trip.source.ram()).all()
    assert not side.machine.running
    assert measured(side).demand_faults == 0


def test_an_idle_guest_has_little_to_bring(journey, tmp_path):
    trip = journey(idle(256))
    wake(trip.destination, put_to_sleep(trip, tmp_path / "image"))
    side = woken(trip)
    ram = side.control.info().ram
    assert ram.total == 256 << 20
    assert ram.normal_bytes < 8 << 20
    assert ram.remaining == 0


def test_it_runs_while_nearly_all_is_missing(journey, tmp_path):
    trip = journey(hammer(vcpus=2))
    trip.destination.set(parameters=TRICKLE)
    wake(trip.destination, put_to_sleep(trip, tmp_path / "image"))
    side = trip.destination
    side.wait(Status.POSTCOPY_ACTIVE)
    wait_for_faults(side, 10)
    wait_for_progress(side.machine, trip.workload)
    assert side.status is Status.POSTCOPY_ACTIVE
    info = side.control.info()
    assert info.ram.remaining > 0
    assert info.measured.restore_complete_us is None
    side.set(parameters=AT_ONCE)
    woken(trip)
    times = measured(side)
    assert 0 < times.restore_running_us <= times.restore_ready_us <= times.restore_complete_us


def test_stop_and_cont_while_pages_are_missing(journey, tmp_path):
    trip = journey(hammer(vcpus=2))
    side = half_awake(trip, tmp_path / "image")
    for _ in range(3):
        side.machine.stop()
        assert not side.machine.running
        side.machine.cont()
    wait_for_progress(side.machine, trip.workload)
    side.set(parameters=AT_ONCE)
    woken(trip)


def test_an_image_can_be_woken_many_times(journey, tmp_path):
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image")
    for _ in range(3):
        wake(trip.destination, path)
        woken(trip)
        trip.destination.close()
        trip.new_destination()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_into_huge_pages(huge_pages, journey, tmp_path, form, lazy):
    huge_pages(32)
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image", form)
    trip.destination.close()
    trip.new_destination(huge_pages=True)
    wake(trip.destination, path, lazy=lazy)
    woken(trip)


def test_nothing_comes_before_cont_if_told_so(journey, tmp_path):
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image")
    side = trip.destination
    side.machine.stop()  # as --paused does
    wake(side, path)
    side.wait(Status.POSTCOPY_ACTIVE, Status.COMPLETED)
    side.wait(Status.COMPLETED)
    assert not side.machine.running
    assert measured(side).demand_faults == 0
    side.machine.cont()
    trip.verify(side)


def test_what_makes_no_sense_is_refused(journey, tmp_path):
    trip = journey(hammer())
    path = tmp_path / "image"
    side = half_awake(trip, path)
    with pytest.raises(WrongState, match="already been started"):
        wake(side, path)
    with pytest.raises(WrongState, match="already been started"):
        side.listen()
    with pytest.raises(WrongState, match="no connection that could be broken"):
        side.control.pause()
    side.set(parameters=AT_ONCE)
    woken(trip)
    with pytest.raises(WrongState, match="only supported during postcopy-active"):
        side.control.pause()
    with pytest.raises(WrongState, match="not specified"):
        wake(side, path)
    with pytest.raises(WrongState, match="not specified"):
        wake(trip.source, path)


def test_an_eager_guest_is_not_whole_before_it_runs(journey, tmp_path, monkeypatch):
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image")
    side, seen = trip.destination, []
    load = side.machine.load_devices

    def watched(states):
        seen.append(measured(side).restore_complete_us)
        load(states)

    monkeypatch.setattr(side.machine, "load_devices", watched)
    wake(side, path, lazy=False)
    woken(trip)
    assert seen == [None]
