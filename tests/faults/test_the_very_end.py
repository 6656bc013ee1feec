"""A link that breaks when every page has come, and before both sides have said so."""

import pytest

from fakes.pair import POSTCOPY
from faults.fault_channel import AFTER_PACKAGE, ALL_SENT, END_OF_RAM, NOTHING_MISSING, SHUT
from faults.recovering import Recovering, broken_journey
from postcopy.errors import WrongState
from postcopy.parameters import Capability
from postcopy.status import Status

PREEMPT = (*POSTCOPY, Capability.POSTCOPY_PREEMPT)


@pytest.fixture(params=[POSTCOPY, PREEMPT], ids=["plain", "preempt"])
def trip(request, journey, tmp_path):
    with Recovering(broken_journey(journey, capabilities=request.param), tmp_path) as recovering:
        yield recovering


def begin(trip, fault):
    """Migrate with a fault: ``fault`` gets the channel and arms it."""
    channel = trip.channel(trip.destination.listen())
    armed = fault(channel)
    trip.source.control.migrate(channel.uri)
    trip.until_postcopy()
    trip.hurry()
    armed.wait()


@pytest.mark.parametrize(("record", "at"), [(END_OF_RAM, 0), (END_OF_RAM, None), (SHUT, 0)])
def test_a_source_that_knows_that_nothing_is_missing_is_done(trip, record, at):
    begin(trip, lambda channel: channel.cut(record, at=at))
    trip.trip.finish()


@pytest.mark.parametrize("record", [END_OF_RAM, SHUT], ids=str)
def test_nor_does_it_wait_for_ever_for_a_last_word(trip, record):
    """Every connection stays open, and nothing passes."""
    for side in (trip.source, trip.destination):
        side.set(parameters={"x-link-timeout": 500})
    begin(trip, lambda channel: channel.black_hole(record, at=0))
    trip.trip.finish()


def test_before_that_it_is_an_ordinary_break(trip):
    begin(trip, lambda channel: channel.cut(ALL_SENT, at=0))
    trip.until_settled()
    assert {trip.source.status, trip.destination.status} == {Status.POSTCOPY_PAUSED}
    trip.resume()
    trip.trip.finish()


def test_where_the_source_cannot_know_it_is_told(trip):
    with pytest.raises(WrongState, match="when an outgoing postcopy is paused"):
        trip.source.control.arrived()
    begin(trip, lambda channel: channel.cut(NOTHING_MISSING, at=0))
    trip.destination.wait(Status.COMPLETED)
    trip.source.until(Status.POSTCOPY_PAUSED)
    with pytest.raises(WrongState, match="when an outgoing postcopy is paused"):
        trip.destination.control.arrived()
    trip.source.control.arrived()
    assert trip.source.error is None
    trip.trip.finish()


def test_an_end_that_leaves_pages_out_is_no_end(trip):
    """A page that never came would become zeros."""
    channel = trip.channel(trip.destination.listen())
    injected = channel.inject(AFTER_PACKAGE, ALL_SENT.begin)
    trip.source.control.migrate(channel.uri)
    trip.switch()
    injected.wait()
    trip.until_settled()
    assert trip.destination.status is Status.POSTCOPY_PAUSED
    assert "pages have not come" in trip.destination.error
    trip.hurry()
    trip.resume()
    trip.trip.finish()
