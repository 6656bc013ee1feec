"""A destination that falls silent while it is told what to forget: the guest still runs at the source."""

import pytest

from faults.fault_channel import DISCARD
from faults.recovering import LASTS, Recovering, broken_journey
from postcopy.status import Status


@pytest.fixture
def trip(journey, tmp_path):
    made = broken_journey(journey, parameters=LASTS | {"x-link-timeout": 500})
    with Recovering(made, tmp_path) as recovering:
        yield recovering


def test_the_switch_is_given_up(trip):
    channel = trip.start()
    swallowed = channel.black_hole(DISCARD, at=0)
    trip.source.wait(Status.ACTIVE)
    trip.switch()
    swallowed.wait()
    trip.source.wait(Status.FAILED)
    assert "no sign of life from the destination for 0.5 s" in trip.source.error
    trip.verify(trip.source)
