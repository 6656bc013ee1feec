"""A guest moves, is saved and wakes with its drive; every byte of both is right afterwards."""

import shutil

import pytest

from fakes.awakening import FORMS, half_awake, wake, woken
from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK
from fakes.snapshots import Portrait, Remembering
from faults.recovering import LASTS, Recovering
from machine.drives import disk_workload, make_disk
from machine.machines import wait_for_progress
from postcopy.errors import WrongState
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.kvm

SLOW = NEVER_ENDS | {"max-postcopy-bandwidth": 0}


@pytest.fixture
def with_drive(journey, tmp_path):
    """As ``journey``, of a guest that works with a drive."""
    path = make_disk(tmp_path / "disk")
    return lambda workload=None, *rest, **more: journey(
        workload or disk_workload(), *rest, drive=path, **more
    )


TRACKING = pytest.mark.parametrize("tracking", ["kvm", "pagemap"])


@TRACKING
def test_precopy(with_drive, tracking):
    trip = with_drive(parameters=QUICK | {"x-dirty-tracking": tracking})
    trip.migrate()
    trip.finish()


@TRACKING
def test_precopy_over_many_rounds(with_drive, tracking):
    parameters = NEVER_ENDS | {"x-dirty-tracking": tracking}
    trip = with_drive(disk_workload(vcpus=3, delay_cycles=0), parameters=parameters)
    trip.migrate()
    trip.source.wait_rounds(3)
    trip.source.set(parameters=QUICK)
    trip.finish()


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("preempt", [False, True], ids=["one_channel", "preempt"])
def test_postcopy(with_drive, rounds, preempt):
    capabilities = [*POSTCOPY, Capability.POSTCOPY_PREEMPT] if preempt else POSTCOPY
    workload = disk_workload(vcpus=2, delay_cycles=0)
    trip = with_drive(workload, capabilities=capabilities, parameters=SLOW)
    trip.migrate()
    if rounds:
        trip.source.wait_rounds(rounds)
    trip.source.control.start_postcopy()
    trip.finish()
    assert "postcopy-active" in trip.destination.story()


@pytest.mark.parametrize(
    "accelerators", [("unicorn", "unicorn"), ("kvm", "unicorn"), ("unicorn", "kvm")], ids="-".join
)
def test_between_accelerators(with_drive, accelerators):
    trip = with_drive(disk_workload("unicorn"), accelerators)
    trip.migrate()
    trip.finish()


def test_there_and_back_again(with_drive):
    trip = with_drive(capabilities=POSTCOPY, parameters=QUICK)
    for postcopy in (False, True, False):
        trip.migrate()
        if postcopy:
            trip.source.control.start_postcopy()
        trip.finish()
        trip.turn()


def test_a_stopped_guest_to_the_last_byte(with_drive):
    trip = with_drive(paused=True)
    trip.migrate()
    trip.finish()
    assert (trip.destination.ram() == trip.source.ram()).all()


def test_a_postcopy_that_breaks_is_recovered(with_drive, tmp_path):
    trip = with_drive(capabilities=POSTCOPY, parameters=LASTS)
    with Recovering(trip, tmp_path) as broken:
        channel = broken.start()
        broken.until_postcopy()
        channel.break_all()
        broken.source.wait(Status.POSTCOPY_PAUSED)
        broken.destination.wait(Status.POSTCOPY_PAUSED)
        broken.resume()
        broken.hurry()
        broken.source.wait(Status.COMPLETED)
        broken.destination.wait(Status.COMPLETED)
        trip.verify(broken.destination)


def test_an_engine_that_dies_in_the_midst_of_a_postcopy(with_drive, tmp_path):
    trip = with_drive(capabilities=POSTCOPY, parameters=LASTS)
    with Recovering(trip, tmp_path) as broken:
        broken.start()
        broken.until_postcopy()
        broken.destination.control._engine.kill()
        broken.recover()
        trip.verify(broken.destination)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"drive": None}, "the guest has a drive, this machine none"),
        ({"drive": "larger"}, "give both sides the same disk"),
    ],
)
@pytest.mark.parametrize("capabilities", [(), POSTCOPY], ids=["precopy", "postcopy"])
def test_a_destination_without_the_drive_refuses_and_the_guest_runs_on(
    with_drive, tmp_path, change, why, capabilities
):
    trip = with_drive(capabilities=capabilities)
    if change["drive"]:
        change = {"drive": make_disk(tmp_path / "larger", 4 << 20)}
    trip.new_destination(**change)
    trip.migrate()
    trip.destination.wait(Status.FAILED)
    assert why in trip.destination.error
    trip.source.wait(Status.FAILED)
    trip.verify_source()


class WithDisk(Remembering):
    """Keeps a copy of its disk, too, of the moment at which its devices are saved."""

    def save_devices(self):
        states = super().save_devices()
        shutil.copyfile(self.config.drive, f"{self.config.drive}.then")
        return states


def test_a_snapshot_and_a_copy_of_the_disk_are_the_guest(with_drive, tmp_path):
    """The image has the drive's registers; its bytes are copied by who takes the image."""
    workload = disk_workload(vcpus=2)
    path, image = make_disk(tmp_path / "snapped"), tmp_path / "image"
    with Portrait(workload, kind=WithDisk, drive=path) as portrait:
        portrait.take(f"file:{image}")
        portrait.check_goes_on()
        portrait.check_memory()
    trip = with_drive(workload)
    side = trip.new_destination(drive=f"{path}.then")
    wake(side, image)
    woken(trip)


@pytest.mark.parametrize("form", FORMS)
def test_it_wakes_while_nearly_all_is_missing(with_drive, tmp_path, form):
    trip = with_drive()
    side = half_awake(trip, tmp_path / "image", form)
    wait_for_progress(side.machine, trip.workload)
    side.set(parameters={"max-postcopy-bandwidth": 0})
    woken(trip)


def test_a_reset_point_is_refused(with_drive):
    trip = with_drive()
    with pytest.raises(
        WrongState,
        match="the guest has a drive or a network device, which a reset does not take back",
    ):
        trip.source.control.resetting.set_point()
    trip.verify_source()
