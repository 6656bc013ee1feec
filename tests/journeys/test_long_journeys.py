"""More than one migration: to and fro, and two at once; and what both sides tell of one."""

from pathlib import Path

from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK, hammer
from fakes.waiting import wait_until
from postcopy.parameters import Capability
from postcopy.status import Status

SLOW = NEVER_ENDS


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_ten_times_to_and_fro(journey):
    trip = journey(hammer(vcpus=2), capabilities=POSTCOPY)
    counts = []
    for turn in range(10):
        postcopy = turn % 2
        trip.source.set(parameters=SLOW if postcopy else QUICK)
        trip.migrate()
        if postcopy:
            trip.source.control.start_postcopy()
        trip.finish()
        assert bool(trip.source.control.info().ram.postcopy_bytes) == bool(postcopy)
        trip.turn()
        counts.append(descriptors())
    trip.verify_source()
    # After the first ones, what a migration opens it also closes.
    wait_until(lambda: descriptors() <= counts[2], 10, f"descriptors grow: {counts}")


def test_two_at_once(journey):
    trips = [
        journey(hammer(), capabilities=POSTCOPY, parameters=SLOW),
        journey(hammer(vcpus=2), parameters=QUICK),
    ]
    for trip in trips:
        trip.migrate()
    trips[0].source.control.start_postcopy()
    for trip in trips:
        trip.finish()


def test_what_a_precopy_tells(journey):
    trip = journey(hammer())
    trip.migrate()
    trip.finish()
    told = trip.source.story()
    syncs = trip.source.control.info().ram.dirty_sync_count
    passes = [f"PASS {number}" for number in range(2, syncs)]
    assert told == [
        "RESUME",  # the guest's first start
        "setup",
        "PASS 1",
        "active",
        *passes,
        "STOP",
        "device",
        f"PASS {syncs}",
        "completed",
    ]
    assert _arrival(trip) == ["setup", "active", "RESUME", "completed"]


def test_what_a_postcopy_tells(journey):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=SLOW)
    trip.migrate()
    trip.source.control.start_postcopy()
    trip.finish()
    assert trip.source.story() == [
        "RESUME",
        "setup",
        "PASS 1",
        "active",
        "STOP",
        "device",
        "PASS 2",
        "postcopy-device",
        "postcopy-active",
        "completed",
    ]
    assert _arrival(trip) == [
        "setup",
        "active",
        "postcopy-device",
        "postcopy-active",
        "RESUME",
        "completed",
    ]


def test_what_a_pause_before_switchover_tells(journey):
    trip = journey(hammer(), capabilities=[Capability.PAUSE_BEFORE_SWITCHOVER])
    trip.migrate()
    trip.source.wait(Status.PRE_SWITCHOVER)
    trip.source.control.continue_(Status.PRE_SWITCHOVER)
    trip.finish()
    told = trip.source.story()
    assert told[told.index("STOP") :][:3] == ["STOP", "pre-switchover", "device"]


def test_without_the_capability_events_are_not_told(journey):
    trip = journey(hammer())
    for side in trip.sides:
        side.control.set_capabilities({Capability.EVENTS: False})
    trip.migrate()
    trip.finish()
    assert trip.source.story() == ["RESUME", "STOP"]
    assert _arrival(trip) == ["RESUME"]


def _arrival(trip):
    """What the destination told, without the stop and start of the verification."""
    told = trip.destination.story()
    assert told[-2:] == ["STOP", "RESUME"]
    return told[:-2]
