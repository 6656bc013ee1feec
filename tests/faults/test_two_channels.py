"""The main channel and the preempt channel: either may be late, wrong or cut."""

import pytest

from fakes.pair import POSTCOPY
from fakes.waiting import holds_within, wait_until
from faults.fault_channel import ALL_SENT, END_OF_RAM, PACKAGE, RECOVERY, RESUME
from faults.recovering import DEADLINE_S, Recovering, broken_journey
from postcopy.parameters import Capability
from postcopy.status import Status

PREEMPT = (*POSTCOPY, Capability.POSTCOPY_PREEMPT)
MAIN, URGENT = 0, 1


@pytest.fixture
def trip(journey, tmp_path):
    with Recovering(broken_journey(journey, capabilities=PREEMPT), tmp_path) as recovering:
        yield recovering


def all_but_requested_sent(trip):
    """Everything is pushed, and the requested pages are held on their way."""
    channel = trip.start()
    channel.hold(URGENT)
    trip.until_postcopy()
    # What has been asked for is not pushed as well: it is missing while it is held.
    asked = trip.source.control.info
    wait_until(lambda: asked().ram.postcopy_requests > 0, DEADLINE_S, "a vCPU that waits")
    trip.hurry()
    wait_until(lambda: ALL_SENT.begin in channel.recorded(), DEADLINE_S, "the end of the push")
    return channel


def test_requested_pages_that_come_after_the_end_of_all_others(trip):
    channel = all_but_requested_sent(trip)
    assert END_OF_RAM.begin not in channel.recorded()
    assert trip.destination.status is Status.POSTCOPY_ACTIVE
    channel.release(URGENT)
    trip.trip.finish()


def test_requested_pages_lost_behind_the_end_of_all_others(trip):
    """The source has nothing left to send, and learns in the recovery that it has."""
    channel = all_but_requested_sent(trip)
    channel.break_all()
    trip.until_settled()
    assert {trip.source.status, trip.destination.status} == {Status.POSTCOPY_PAUSED}
    channel.release(URGENT)
    trip.resume()
    trip.trip.finish()


def test_requested_pages_that_overtake_all_others(trip):
    channel = trip.start()
    trip.until_postcopy()
    channel.hold(MAIN)
    urgent = len(channel.recorded(connection=URGENT))
    # The guest itself may come to wait for a page that is held back.
    holds_within(1, lambda: len(channel.recorded(connection=URGENT)) > urgent + 100_000)
    channel.release(MAIN)
    trip.hurry()
    trip.trip.finish()


@pytest.mark.parametrize("record", [*RECOVERY], ids=str)
def test_a_wrong_byte_in_a_recovery_only_pauses(trip, record):
    channel = trip.start()
    trip.until_postcopy()
    channel.break_all()
    trip.until_settled()
    again = trip.channel(trip.listen_again())
    fault = again.corrupt(record, at=0)
    trip.source.control.migrate(again.uri, resume=True)
    fault.wait()
    trip.until_settled()
    assert {trip.source.status, trip.destination.status} == {Status.POSTCOPY_PAUSED}
    trip.resume()
    trip.hurry()
    trip.trip.finish()


def test_a_wrong_byte_in_the_package_leaves_the_guest_with_one_owner(trip):
    channel = trip.channel(trip.destination.listen())
    fault = channel.corrupt(PACKAGE, at=len(PACKAGE.begin) + 8)
    trip.source.control.migrate(channel.uri)
    trip.switch()
    fault.wait()
    trip.until_settled()
    assert trip.destination.status is Status.FAILED, trip.story()
    if trip.source.status is Status.POSTCOPY_PAUSED:
        trip.source.machine.cont()  # the destination's word was lost with the connection
    trip.verify(trip.source)


@pytest.mark.parametrize("at", [0, None])
def test_a_recovery_of_both_connections_that_is_cut(trip, at):
    channel = trip.start()
    trip.until_postcopy()
    channel.break_all()
    trip.until_settled()
    again = trip.channel(trip.listen_again())
    fault = again.cut(RESUME, at=at)
    trip.source.control.migrate(again.uri, resume=True)
    fault.wait()
    trip.until_settled()
    trip.resume()
    trip.hurry()
    trip.trip.finish()
