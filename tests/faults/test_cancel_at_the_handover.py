"""A cancel while the source has given the guest up: it comes too late, and says so."""

import pytest

from fakes.pair import QUICK
from fakes.waiting import wait_until
from faults.fault_channel import LAST_PONG
from faults.recovering import DEADLINE_S, Recovering, broken_journey
from postcopy.errors import WrongState
from postcopy.ownership import Owner
from postcopy.status import Status


def too_late(broken):
    """Cancel when the guest is given up, and the answer is held back; return what holds it."""
    channel = broken.channel(broken.destination.listen())
    fault = channel.stall(LAST_PONG)
    broken.source.control.migrate(channel.uri)
    fault.wait()
    ownership = broken.source.machine.ownership
    wait_until(lambda: ownership.owner is Owner.GIVEN_UP, DEADLINE_S, "the hand-over")
    with pytest.raises(WrongState, match=r"cannot be cancelled: .* has not answered yet; wait for"):
        broken.source.control.cancel()
    with pytest.raises(WrongState, match="must not run here"):
        broken.source.machine.cont()
    return channel


@pytest.fixture
def broken(journey, tmp_path):
    with Recovering(broken_journey(journey, parameters=QUICK, capabilities=()), tmp_path) as made:
        yield made


def test_the_end_of_the_stream_is_lost(broken):
    channel = too_late(broken)
    channel.break_all()  # with what it holds back
    broken.until_settled()
    assert (broken.source.status, broken.destination.status) == (Status.FAILED, Status.FAILED)
    assert "'cont' takes it back" in broken.source.error
    broken.source.machine.cont()
    broken.verify(broken.source)


def test_the_end_of_the_stream_arrives(broken):
    too_late(broken).flow()
    broken.source.wait(Status.COMPLETED)
    assert broken.source.machine.ownership.owner is Owner.MOVED
    broken.verify(broken.destination)
