"""Guests of 5 GiB, mostly empty, whose work lies on either side of the hole in their address space."""

import os

import pytest

from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK
from machine.machines import MIB
from postcopy.machine.workload import load

GIB = 1 << 30
SLOW = NEVER_ENDS | {"max-postcopy-bandwidth": 0}


def around(seam, fill_bytes=16 * MIB):
    """A hammer of two vCPUs, one on each side of an address."""
    base = seam - fill_bytes // 2
    return load("hammer", 5 * GIB, 2, fill_bytes=fill_bytes, base_address=base)


def postcopy(trip):
    """After a round: a page that is said to be zero before that takes no memory."""
    trip.migrate()
    trip.source.wait_rounds(1)
    trip.source.control.start_postcopy()
    trip.finish()
    assert "postcopy-active" in trip.destination.story()
    check_sparse(trip)


def check_sparse(trip):
    assert trip.source.control.info().ram.total == 5 * GIB
    fd = trip.destination.machine.regions()[0].fd
    assert os.fstat(fd).st_blocks * 512 < 512 * MIB


@pytest.mark.parametrize("seam", [3 * GIB, 4 * GIB])
@pytest.mark.parametrize("tracking", ["kvm", "pagemap"])
def test_there_by_precopy_and_on_by_postcopy(journey, seam, tracking):
    parameters = QUICK | {"x-dirty-tracking": tracking}
    trip = journey(around(seam), capabilities=POSTCOPY, parameters=parameters)
    trip.migrate()
    trip.finish()
    assert "postcopy-active" not in trip.source.story()
    check_sparse(trip)
    trip.turn()
    trip.source.set((), SLOW)
    postcopy(trip)


@pytest.mark.parametrize("accelerators", [("kvm", "unicorn"), ("unicorn", "kvm")], ids="-".join)
def test_between_accelerators(journey, accelerators):
    work = around(3 * GIB, fill_bytes=MIB)
    postcopy(journey(work, accelerators, capabilities=POSTCOPY, parameters=SLOW))
