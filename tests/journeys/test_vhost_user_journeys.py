"""A guest moves with a disk that another process serves; every byte of both is right afterwards."""

import contextlib
import sys

import pytest

import fakes.without_userfaultfd
from fakes.awakening import half_awake, woken
from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK
from fakes.vhost_back_end import BackEnd, DiskOfJourney
from fakes.waiting import wait_until
from faults.recovering import LASTS, Recovering
from machine.drives import disk_workload, writes_and_reads
from machine.machines import wait_for_progress
from postcopy.status import Status

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

SLOW = NEVER_ENDS | {"max-postcopy-bandwidth": 0}
BACK_ENDS = pytest.mark.parametrize("kind", ["ours", "qemu"])


@pytest.fixture
def with_disk(journey, tmp_path):
    """As ``journey``, of a guest that works with a disk of such back ends."""
    with contextlib.ExitStack() as stack:

        def begin(kind, **more):
            disk = DiskOfJourney(stack, tmp_path, kind)
            workload = more.pop("workload", None) or disk_workload(vcpus=2, delay_cycles=0)
            sockets = [each.path for each in disk.back_ends]
            return journey(workload, drive=disk.path, back_ends=sockets, **more), disk

        yield begin


@pytest.mark.parametrize(("kind", "tracking"), [("ours", "pagemap"), ("qemu", "kvm")])
def test_precopy_over_many_rounds(with_disk, kind, tracking):
    trip, disk = with_disk(kind, parameters=NEVER_ENDS | {"x-dirty-tracking": tracking})
    trip.migrate()
    trip.source.wait_rounds(3)
    trip.source.set(parameters=QUICK)
    trip.finish()
    assert disk.said == ""


@BACK_ENDS
def test_postcopy_and_back_again(with_disk, kind):
    trip, disk = with_disk(kind, capabilities=POSTCOPY, parameters=SLOW)
    for _ in range(2):
        trip.migrate()
        trip.source.wait_rounds(1)
        trip.source.control.start_postcopy()
        trip.finish()
        assert "postcopy-active" in trip.destination.story()
        trip.turn()
    assert disk.said == ""


def test_memory_above_the_hole(with_disk):
    """It has two parts, and an old libvhost-user maps the file twice: up to the end of each part."""
    workload = disk_workload(vcpus=2, delay_cycles=0, fill_bytes=4 << 20, memory_bytes=5 << 30)
    trip, disk = with_disk("oldest_qemu", workload=workload, capabilities=POSTCOPY, parameters=SLOW)
    trip.migrate()
    trip.source.control.start_postcopy()
    trip.finish()
    assert disk.said == ""


def test_precopy_after_all(with_disk):
    """Postcopy was possible, and there was no need for it."""
    trip, disk = with_disk("ours", capabilities=POSTCOPY)
    trip.migrate()
    trip.finish()
    assert disk.said == ""


@BACK_ENDS
def test_a_postcopy_that_breaks_is_recovered_and_a_back_end_dies_meanwhile(
    with_disk, tmp_path, kind
):
    trip, disk = with_disk(kind, capabilities=POSTCOPY, parameters=LASTS)
    with Recovering(trip, tmp_path) as broken:
        channel = broken.start()
        broken.until_postcopy()
        channel.break_all()
        broken.source.wait(Status.POSTCOPY_PAUSED)
        broken.destination.wait(Status.POSTCOPY_PAUSED)
        disk.kill(1)
        broken.resume()
        disk.kill(1)
        broken.hurry()
        broken.source.wait(Status.COMPLETED)
        broken.destination.wait(Status.COMPLETED)
        trip.verify(broken.destination)


def test_an_engine_that_dies_in_the_midst_of_a_postcopy(with_disk, tmp_path):
    trip, _ = with_disk("ours", capabilities=POSTCOPY, parameters=LASTS)
    with Recovering(trip, tmp_path) as broken:
        broken.start()
        broken.until_postcopy()
        broken.destination.control._engine.kill()
        broken.recover()
        trip.verify(broken.destination)


def test_a_back_end_dies_in_the_midst_of_a_precopy(with_disk):
    trip, disk = with_disk("ours", parameters=NEVER_ENDS)
    trip.migrate()
    trip.source.wait_rounds(1)
    before = writes_and_reads(trip.source.machine.read_memory, trip.workload)
    disk.kill(0)
    read = trip.source.machine.read_memory
    wait_until(lambda: writes_and_reads(read, trip.workload) > before, 20, "it goes on")
    trip.source.wait_rounds(3)
    trip.source.set(parameters=QUICK)
    trip.finish()


def test_a_back_end_without_a_userfaultfd_is_refused_in_postcopy(with_disk, tmp_path):
    trip, disk = with_disk("ours", capabilities=POSTCOPY)
    disk.back_ends[1].end()
    trip.destination.close()
    within = [sys.executable, fakes.without_userfaultfd.__file__]
    with BackEnd(tmp_path / "without", disk.path, within=within) as back_end:
        side = trip.new_destination(vhost_user_blk=str(back_end.path))
        trip.migrate()
        side.wait(Status.FAILED)
        assert side.error.startswith(f"vhost-user back end {back_end.path} (process ")
        assert "cannot wait for missing pages: it does not offer PAGEFAULT" in side.error
        trip.source.wait(Status.FAILED)
        trip.verify_source()


def test_another_attempt_with_the_same_back_end(with_disk):
    """It has mapped the memory for the first, and must have forgotten that for the second."""
    trip, disk = with_disk("qemu", capabilities=POSTCOPY, parameters=LASTS)
    trip.migrate()
    trip.source.wait(Status.ACTIVE)
    trip.source.control.cancel()
    trip.source.wait(Status.CANCELLED)
    trip.destination.wait(Status.FAILED)
    trip.source.set(parameters=SLOW)
    trip.migrate()
    trip.source.control.start_postcopy()
    trip.finish()
    assert disk.said == ""


def test_it_wakes_while_nearly_all_is_missing_and_its_back_end_dies(with_disk, tmp_path):
    trip, disk = with_disk("qemu")
    side = half_awake(trip, tmp_path / "image")
    for _ in range(2):
        wait_for_progress(side.machine, trip.workload)
        disk.kill(1)
    wait_for_progress(side.machine, trip.workload)
    side.set(parameters={"max-postcopy-bandwidth": 0})
    woken(trip)
