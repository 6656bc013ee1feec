"""Each journey with each kind of memory, and the oracle over all of it."""

import contextlib

import numpy as np
import pytest

from fakes.awakening import FORMS, measured, put_to_sleep, wake, woken
from fakes.huge_pages import mounted, reserved
from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK, TRICKLE
from fakes.snapshots import Portrait
from fakes.waiting import wait_until
from machine.drives import disk_workload, make_disk
from machine.machines import MIB, need, wait_for_progress
from postcopy.channel.address import TcpAddress
from postcopy.machine.memory_blocks import MemoryBlock
from postcopy.machine.workload import BASE_ADDRESS, load
from postcopy.parameters import Capability
from postcopy.status import Status

MEMORY_BYTES = 24 * MIB
FAST_BYTES = 8 * MIB
HUGE = 2 * MIB
SHARED_MEMORY = "/dev/shm"
SLOW = NEVER_ENDS | {"max-postcopy-bandwidth": 0}

KINDS = {
    "memfd": {},
    "tmpfs": {"blocks": (MemoryBlock("microvm.ram", MEMORY_BYTES, directory=SHARED_MEMORY),)},
    "hugetlb": {"huge_pages": True},
    "mixed": {
        "blocks": (
            MemoryBlock("fast", FAST_BYTES, HUGE),
            MemoryBlock("big", MEMORY_BYTES - FAST_BYTES),
        )
    },
}
HUGE_PAGES = {"hugetlb": MEMORY_BYTES // HUGE, "mixed": FAST_BYTES // HUGE}


def writer(vcpus=2):
    """Writes to all of the memory that it has filled, which is all that there is."""
    fill = MEMORY_BYTES - BASE_ADDRESS
    return load("hammer", MEMORY_BYTES, vcpus, fill_bytes=fill, hot_bytes=fill)


@pytest.fixture(params=KINDS)
def kind(request):
    """The settings of a machine with such memory; there are huge pages for two of them."""
    need("kvm")
    with contextlib.ExitStack() as stack:
        if pages := HUGE_PAGES.get(request.param):
            stack.enter_context(reserved(2 * pages))
        yield KINDS[request.param]


@pytest.mark.parametrize("tracking", ["pagemap", "kvm"])
def test_precopy(journey, kind, tracking):
    trip = journey(writer(), parameters={**QUICK, "x-dirty-tracking": tracking}, **kind)
    trip.migrate()
    trip.finish()


@pytest.mark.parametrize("tracking", ["pagemap", "kvm"])
def test_postcopy(journey, kind, tracking):
    parameters = SLOW | {"x-dirty-tracking": tracking}
    trip = journey(writer(), capabilities=POSTCOPY, parameters=parameters, **kind)
    trip.migrate()
    trip.source.wait_rounds(1)
    trip.source.control.start_postcopy()
    trip.finish()
    assert "postcopy-active" in trip.destination.story()


@pytest.mark.parametrize(
    ("kind", "tracking"),
    [("memfd", "kvm"), ("tmpfs", "pagemap"), ("hugetlb", "kvm"), ("mixed", "pagemap")],
    indirect=["kind"],
)
def test_a_guest_with_a_drive(journey, kind, tracking, tmp_path):
    workload = disk_workload(vcpus=2, memory_bytes=MEMORY_BYTES, delay_cycles=0)
    trip = journey(
        workload,
        capabilities=POSTCOPY,
        parameters=SLOW | {"x-dirty-tracking": tracking},
        drive=make_disk(tmp_path / "disk"),
        **kind,
    )
    trip.migrate()
    trip.source.wait_rounds(1)
    trip.source.control.start_postcopy()
    trip.finish()
    trip.turn()
    trip.source.set(parameters=QUICK)
    trip.migrate()
    trip.finish()


@pytest.mark.kvm
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_files_in_a_hugetlbfs(huge_pages, journey, tmp_path, postcopy):
    huge_pages(2 * MEMORY_BYTES // HUGE)
    with mounted(tmp_path / "huge") as directory:
        block = MemoryBlock.of("microvm.ram", MEMORY_BYTES, None, directory)
        assert block.page_size_bytes == HUGE
        parameters = SLOW if postcopy else QUICK
        trip = journey(writer(), capabilities=POSTCOPY, parameters=parameters, blocks=(block,))
        try:
            trip.migrate()
            if postcopy:
                trip.source.wait_rounds(1)
                trip.source.control.start_postcopy()
            trip.finish()
            assert ("postcopy-active" in trip.destination.story()) is postcopy
        finally:
            trip.close()  # a file system in use stays mounted


def test_preempt(journey, kind):
    capabilities = (*POSTCOPY, Capability.POSTCOPY_PREEMPT)
    trip = journey(writer(), capabilities=capabilities, parameters=TRICKLE, **kind)
    trip.migrate()
    trip.source.control.start_postcopy()
    wait_until(lambda: trip.source.control.info().ram.postcopy_requests, 20, "a request")
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    trip.finish()


@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
def test_recovery(journey, kind, preempt):
    capabilities = (*POSTCOPY, *([Capability.POSTCOPY_PREEMPT] if preempt else []))
    trip = journey(writer(), capabilities=capabilities, parameters=TRICKLE, **kind)
    trip.migrate()
    trip.source.control.start_postcopy()
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    pause_and_recover(trip)
    trip.finish()


def pause_and_recover(trip, meanwhile=lambda: None):
    """Once a page has been asked for; the rest comes at once then."""
    wait_until(lambda: trip.source.control.info().ram.postcopy_requests, 20, "a request")
    trip.source.control.pause()
    for side in (trip.source, trip.destination):
        side.until(Status.POSTCOPY_PAUSED)
    meanwhile()
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    trip.destination.control.recover("tcp:127.0.0.1:0")
    (found,) = trip.destination.control.info().socket_address
    where = str(TcpAddress(found["host"], int(found["port"])))
    trip.source.control.migrate(where, resume=True)


def test_background_snapshot(kind, tmp_path):
    with Portrait(writer(), **kind) as portrait:
        portrait.take(f"file:{tmp_path}/image")
        portrait.check_goes_on()
        portrait.check_image(f"file:{tmp_path}/image")


@pytest.mark.parametrize("form", FORMS)
def test_lazy_restore_with_its_working_set(journey, kind, tmp_path, form):
    trip = journey(writer(), **kind)
    path = put_to_sleep(trip, tmp_path / "image", form)
    trip.source.close()
    for record in (True, False):
        wake(trip.destination, path, record=record)
        side = woken(trip)
        assert record or measured(side).working_set_pages
        side.close()
        trip.new_destination()


def test_reset(kind):
    with Portrait(writer(), **kind) as portrait:
        side = portrait.side
        side.control.resetting.set_point()
        for _ in range(3):
            wait_for_progress(side.machine, portrait.workload)
            side.machine.stop()
            side.control.resetting.reset()
            assert np.array_equal(side.ram(), side.machine.then)
            side.machine.cont()
        portrait.check_memory()


def test_blocks_in_another_order_are_refused(journey):
    """As QEMU does not: its guest would find its memory at other addresses."""
    blocks = (MemoryBlock("a", 16 * MIB), MemoryBlock("b", 8 * MIB))
    trip = journey(writer(), blocks=blocks)
    trip.new_destination(blocks=blocks[::-1])
    trip.migrate()
    trip.destination.wait(Status.FAILED)
    assert "the source has its RAM blocks in the order a, b, and this side b, a" in (
        trip.destination.error
    )
    trip.source.wait(Status.FAILED)
    trip.new_destination()
    trip.migrate()
    trip.finish()
