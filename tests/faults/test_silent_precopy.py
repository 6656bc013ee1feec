"""A destination that falls silent while the guest of a precopy stands still."""

import os
import signal

import pytest

from fakes.pair import QUICK
from faults.fault_channel import LAST_PING, LAST_PONG
from faults.recovering import Recovering, small
from postcopy.parameters import Capability
from postcopy.status import Status

SILENCE = QUICK | {"x-link-timeout": 500}


@pytest.fixture
def trip(journey, tmp_path):
    made = journey(small(), parameters=SILENCE, capabilities=[Capability.PAUSE_BEFORE_SWITCHOVER])
    with Recovering(made, tmp_path) as recovering:
        yield recovering


def stays(trip):
    """The source has not sent its last byte: the guest is its own for certain."""
    trip.source.wait(Status.FAILED)
    assert "no sign of life from the destination for 0.5 s" in trip.source.error
    trip.verify(trip.source)


@pytest.mark.parametrize("record", [LAST_PING, LAST_PONG], ids=str)
def test_a_link_that_swallows_all(trip, record):
    channel = trip.start()
    swallowed = channel.black_hole(record, at=0)
    trip.source.wait(Status.PRE_SWITCHOVER)
    trip.source.control.continue_(Status.PRE_SWITCHOVER)
    swallowed.wait()
    stays(trip)


def test_an_engine_that_does_nothing(trip):
    """Its kernel takes what there is room for, and answers nothing."""
    trip.start()
    trip.source.wait(Status.PRE_SWITCHOVER)
    engine = trip.destination.stop_engine()
    try:
        trip.source.control.continue_(Status.PRE_SWITCHOVER)
        stays(trip)
    finally:
        os.kill(engine, signal.SIGCONT)
    trip.destination.wait(Status.FAILED)
