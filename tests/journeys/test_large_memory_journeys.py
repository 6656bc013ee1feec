"""Guests of 5 GiB, mostly empty, whose work lies on either side of the hole in their address space."""

import os

import pytest

from fakes.awakening import FORMS, put_to_sleep, wake, woken
from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK
from fakes.snapshots import Portrait
from machine.machines import MIB
from postcopy.machine import oracle
from postcopy.machine.workload import load
from postcopy.parameters import Capability

GIB = 1 << 30
SLOW = NEVER_ENDS | {"max-postcopy-bandwidth": 0}


def around(seam, fill_bytes=16 * MIB):
    """A hammer of two vCPUs, one on each side of an address."""
    base = seam - fill_bytes // 2
    return load("hammer", 5 * GIB, 2, fill_bytes=fill_bytes, base_address=base)


def postcopy(trip):
    """After a round: what is said to be zero once the guest runs there takes memory, page by page."""
    trip.migrate()
    trip.source.wait_rounds(1)
    trip.source.control.start_postcopy()
    trip.finish()
    assert "postcopy-active" in trip.destination.story()
    assert trip.source.control.info().ram.total == 5 * GIB


def check_sparse(machine):
    assert os.fstat(machine.regions()[0].fd).st_blocks * 512 < 512 * MIB


@pytest.mark.parametrize("seam", [3 * GIB, 4 * GIB])
@pytest.mark.parametrize("tracking", ["kvm", "pagemap"])
def test_there_by_precopy_and_on_by_postcopy(journey, seam, tracking):
    parameters = QUICK | {"x-dirty-tracking": tracking}
    trip = journey(around(seam), capabilities=POSTCOPY, parameters=parameters)
    trip.migrate()
    trip.finish()
    assert "postcopy-active" not in trip.source.story()
    trip.turn()
    trip.source.set((), SLOW)
    postcopy(trip)


@pytest.mark.parametrize("accelerators", [("kvm", "unicorn"), ("unicorn", "kvm")], ids="-".join)
def test_between_accelerators(journey, accelerators):
    work = around(3 * GIB, fill_bytes=MIB)
    postcopy(journey(work, accelerators, capabilities=POSTCOPY, parameters=SLOW))


@pytest.mark.parametrize("form", FORMS)
def test_it_wakes_from_its_image(journey, tmp_path, form):
    trip = journey(around(3 * GIB))
    wake(trip.destination, put_to_sleep(trip, tmp_path / "image", form))
    check_sparse(woken(trip).machine)


def test_its_picture_is_taken_while_it_works(tmp_path):
    work = around(3 * GIB)
    with Portrait(work, capabilities=[Capability.MAPPED_RAM]) as portrait:
        portrait.take(f"file:{tmp_path / 'image'}")
        portrait.check_memory()
        other = portrait.load(f"file:{tmp_path / 'image'}").machine
        found = oracle.verify(other.read_memory, work)
        assert found.ok, found
        check_sparse(other)
