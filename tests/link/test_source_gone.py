"""The source is gone for good: what the destination does with the pages that will never come.

The guest is a real one under KVM, and its source is held so tightly that most pages never come.
"""

import errno
import itertools

import numpy as np
import pytest

from fakes.pair import NEVER_ENDS, POSTCOPY, Journey, hammer
from fakes.waiting import wait_until
from postcopy.errors import GuestError, HostCannot, KernelError, WrongState
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.machine.run_control import RunState
from postcopy.machine.workload import PAGE_BYTES
from postcopy.status import Status

pytestmark = pytest.mark.kvm

STARVED = NEVER_ENDS | {"max-postcopy-bandwidth": 64 << 10}


@pytest.fixture
def broken():
    """A destination whose guest runs, has most pages still to come, and has lost its source."""
    with Journey(hammer(), capabilities=POSTCOPY, parameters=STARVED) as trip:
        trip.migrate()
        trip.source.control.start_postcopy()
        trip.destination.wait(Status.POSTCOPY_ACTIVE)
        trip.source.wait(Status.POSTCOPY_ACTIVE)
        # KVM walks the guest's page tables itself: without them it knows no page to name.
        trip.destination.machine.read_memory(0, 8 * PAGE_BYTES)
        trip.source.control.pause()
        trip.source.wait(Status.POSTCOPY_PAUSED)
        trip.destination.wait(Status.POSTCOPY_PAUSED)
        yield trip


def declare_lost(trip, policy):
    trip.destination.set(parameters={"x-on-loss": policy})
    trip.destination.control.lost()


def test_nobody_ever_reads_a_zero_in_place_of_a_lost_page(broken):
    machine = broken.destination.machine
    missing = np.flatnonzero(~broken.destination.received())
    truth = broken.source.ram()
    with_data = [int(page) for page in missing if truth[page].any()]
    assert with_data, "every page with data has come"
    declare_lost(broken, "poison")
    assert broken.destination.status is Status.FAILED
    for page in with_data[:: max(1, len(with_data) // 200)]:
        with pytest.raises(GuestError, match="is lost"):
            machine.read_memory(page * PAGE_BYTES, 8)
        with pytest.raises(GuestError, match="is lost"):
            machine.read_memory(page * PAGE_BYTES - 8 if page else 0, 16)
    have = np.setdiff1d(np.arange(len(truth)), missing)
    for page in have[:: max(1, len(have) // 200)].tolist():
        assert len(machine.read_memory(page * PAGE_BYTES, PAGE_BYTES)) == PAGE_BYTES


def test_the_error_says_how_much_is_lost(broken):
    missing = int((~broken.destination.received()).sum())
    declare_lost(broken, "poison")
    error = broken.destination.error
    assert error.startswith("the source is gone for good: ")
    name = broken.destination.machine.config.ram_name
    assert f" pages of block '{name}' are lost; a vCPU that touches one of them fails" in error
    lost = int(error.removeprefix("the source is gone for good: ").split()[0])
    # A page may have come between our look and the break's end.
    assert missing - 64 <= lost <= missing


def test_a_vcpu_at_a_lost_page_fails_loudly_and_names_it(broken):
    """A vCPU that hammers all of its memory waits for a page that never came, or soon touches one."""
    machine = broken.destination.machine
    missing = set(np.flatnonzero(~broken.destination.received()).tolist())
    declare_lost(broken, "poison")
    wait_until(lambda: machine.run_state is RunState.INTERNAL_ERROR, 20, "the guest's failure")
    text = str(machine.failure)
    assert "is lost (poisoned)" in text
    address = int(text.partition("the page at ")[2].split()[0], 16)
    assert address // PAGE_BYTES in missing


def test_a_guest_with_lost_pages_goes_nowhere(broken):
    declare_lost(broken, "poison")
    with pytest.raises(WrongState, match="pages of this guest are lost"):
        broken.destination.control.migrate("tcp:127.0.0.1:1")
    with pytest.raises(WrongState, match="Migrate recover can only be run"):
        broken.destination.control.recover("tcp:127.0.0.1:0")


def test_what_is_refused_leaves_it_recoverable(broken, monkeypatch):
    with pytest.raises(WrongState, match="when an incoming postcopy is paused"):
        broken.source.control.lost()
    with pytest.raises(WrongState, match=r"x-on-loss is 'hold'.*set it to 'poison' or 'quit'"):
        broken.destination.control.lost()
    with monkeypatch.context() as patched:
        patched.setattr(type(broken.destination.machine), "accelerator_name", "unicorn")
        with pytest.raises(HostCannot, match=r"software CPU.*'quit'"):
            declare_lost(broken, "poison")
    assert broken.destination.status is Status.POSTCOPY_PAUSED
    # Nothing has changed: the migration recovers.
    uri = "tcp:127.0.0.1:0"
    broken.destination.control.recover(uri)
    broken.source.set(parameters={"max-postcopy-bandwidth": 0})
    port = broken.destination.control.info().socket_address[0]["port"]
    broken.source.control.migrate(f"tcp:127.0.0.1:{port}", resume=True)
    assert broken.source.status is not Status.POSTCOPY_PAUSED
    broken.finish()


def test_quit_ends_the_process(broken):
    declare_lost(broken, "quit")
    assert broken.destination.failures == [broken.destination.error]
    assert broken.destination.status is Status.FAILED
    assert "gone for good" in broken.destination.error


def test_what_has_been_given_up_in_part_is_given_up_to_the_end(broken, monkeypatch, tmp_path):
    """A page that is poisoned cannot come any more: nothing goes on as if it had."""
    poison, calls = Userfaultfd.poison, itertools.count()

    def failing(self, address, length_bytes, **more):
        call = next(calls)
        if call == 1:
            raise KernelError("UFFDIO_POISON", errno.EIO)
        # However the missing pages lie, the first call does not do all of them.
        return poison(self, address, length_bytes if call else 4096, **more)

    missing = int((~broken.destination.received()).sum())
    monkeypatch.setattr(Userfaultfd, "poison", failing)
    with pytest.raises(KernelError, match="UFFDIO_POISON"):
        declare_lost(broken, "poison")
    assert broken.destination.status is Status.POSTCOPY_PAUSED
    with pytest.raises(WrongState, match="have been given up"):
        broken.destination.control.recover(f"unix:{tmp_path}/again")
    broken.destination.control.lost()
    assert broken.destination.status is Status.FAILED
    assert f" {missing} pages of block" in broken.destination.error
