"""Postcopy with a channel of its own for requested pages (``postcopy-preempt``)."""

import pytest

from fakes.pair import NEVER_ENDS, POSTCOPY, TRICKLE, hammer, idle
from fakes.waiting import wait_until
from faults.relay import Relay
from postcopy.channel.address import TcpAddress
from postcopy.channel.listen import Listener
from postcopy.errors import Refused
from postcopy.parameters import Capability
from postcopy.status import Status

PREEMPT = (*POSTCOPY, Capability.POSTCOPY_PREEMPT)
NO_LIMIT = NEVER_ENDS | {"max-postcopy-bandwidth": 0}


def begin(trip, relay=None):
    """Migrate, and switch over."""
    where = trip.destination.listen()
    if relay is not None:
        relay.target = where
        where = relay.uri
    trip.source.control.migrate(where)
    trip.source.control.start_postcopy()


def recover(trip, relay=None):
    """Go on with both sides."""
    trip.destination.control.recover("tcp:127.0.0.1:0")
    (found,) = trip.destination.control.info().socket_address
    where = str(TcpAddress(found["host"], int(found["port"])))
    if relay is not None:
        relay.target = where
        where = relay.uri
    trip.source.control.migrate(where, resume=True)


def wait_paused(trip, timeout_s=10):
    for side in (trip.source, trip.destination):
        side.control.progress.wait(Status.POSTCOPY_PAUSED, timeout=timeout_s)


@pytest.fixture
def relay():
    with Relay("tcp:127.0.0.1:0", "tcp:127.0.0.1:1") as relay:
        yield relay


@pytest.mark.parametrize("vcpus", [1, 4])
def test_moves(journey, vcpus):
    trip = journey(hammer(vcpus=vcpus), capabilities=PREEMPT, parameters=NO_LIMIT)
    begin(trip)
    trip.finish()


def test_what_is_asked_for_and_nothing_else_goes_over_the_second_connection(journey, relay):
    parameters = NEVER_ENDS | {"max-postcopy-bandwidth": 8 << 20}
    trip = journey(hammer(vcpus=2), capabilities=PREEMPT, parameters=parameters)
    begin(trip, relay)
    trip.finish()
    urgent = relay.recorded(connection=1)
    ram = trip.source.control.info().ram
    assert 0 < len(urgent) <= ram.postcopy_requests * (4096 + 64)
    assert len(relay.connections) == 2
    assert ram.postcopy_bytes >= len(urgent)


def test_requested_pages_do_not_wait_for_the_bandwidth_limit(journey):
    """At 64 KiB/s the push alone would take minutes; the guest touches all it needs in seconds."""
    trip = journey(hammer(vcpus=2), capabilities=PREEMPT, parameters=TRICKLE)
    begin(trip)
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    wait_until(lambda: trip.source.control.info().ram.postcopy_requests > 100, 60, "requests")
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    trip.finish()


def test_precopy_alone_opens_no_second_connection(journey, relay):
    trip = journey(hammer(), capabilities=PREEMPT)
    relay.target = trip.destination.listen()
    trip.source.control.migrate(relay.uri)
    trip.finish()
    assert len(relay.connections) == 1


def test_over_a_unix_socket(journey, tmp_path):
    trip = journey(hammer(), capabilities=PREEMPT, parameters=NO_LIMIT)
    trip.migrate(f"unix:{tmp_path}/socket")
    trip.source.control.start_postcopy()
    trip.finish()


@pytest.mark.parametrize("connection", [0, 1], ids=["main", "preempt"])
def test_either_channel_breaks_and_both_recover(journey, relay, connection):
    trip = journey(hammer(vcpus=2), capabilities=PREEMPT, parameters=TRICKLE)
    begin(trip, relay)
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    wait_until(lambda: len(relay.recorded(connection=1)) > 40_000, 20, "requested pages")
    relay.connections[connection].close()
    wait_paused(trip)
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    recover(trip, relay)
    trip.finish()
    assert len(relay.connections) == 4


@pytest.mark.parametrize("capabilities", [POSTCOPY, PREEMPT], ids=["plain", "preempt"])
def test_a_break_wakes_a_push_that_sleeps_for_its_limit(journey, relay, capabilities):
    parameters = TRICKLE | {
        "max-postcopy-bandwidth": 1 << 10
    }  # the first batch is owed for minutes
    trip = journey(hammer(vcpus=2), capabilities=capabilities, parameters=parameters)
    begin(trip, relay)
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    wait_until(lambda: trip.source.control.info().ram.postcopy_requests > 20, 20, "requests")
    relay.connections[0].close()
    wait_paused(trip)
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    recover(trip, relay)
    trip.finish()


def test_paused_twice_by_the_user(journey):
    trip = journey(hammer(vcpus=2), capabilities=PREEMPT, parameters=TRICKLE)
    begin(trip)
    for _ in range(2):
        trip.source.wait(Status.POSTCOPY_ACTIVE)
        trip.destination.control.progress.wait(Status.POSTCOPY_ACTIVE, timeout=10)
        trip.source.control.pause()
        wait_paused(trip)
        assert trip.source.error == "Postcopy migration is paused by the user"
        recover(trip)
        trip.source.control.progress.wait(Status.POSTCOPY_ACTIVE, timeout=10)
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    trip.finish()


def test_only_at_the_source_is_refused_before_the_guest_stops(journey):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=NO_LIMIT)
    trip.source.set([Capability.POSTCOPY_PREEMPT])
    begin(trip)
    assert trip.source.control.progress.wait(Status.FAILED, timeout=20)
    assert "is postcopy-preempt switched on there?" in trip.source.error
    assert "STOP" not in trip.source.story()
    trip.verify_source()


def test_only_at_the_destination_is_refused_with_the_reason(journey):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=NO_LIMIT)
    trip.destination.set([Capability.POSTCOPY_PREEMPT], {"x-link-timeout": 500})
    begin(trip)
    trip.source.control.progress.wait(Status.FAILED, timeout=20)
    trip.destination.control.progress.wait(Status.FAILED, timeout=20)
    assert "switch postcopy-preempt on there too, or off here" in trip.destination.error
    trip.verify_source()


@pytest.mark.parametrize("uri", ["exec:cat", "file:/nowhere", "fd:1"])
def test_a_transport_of_one_connection_is_refused(journey, uri):
    trip = journey(hammer(), capabilities=PREEMPT)
    for order in (trip.source.control.migrate, trip.destination.control.incoming):
        with pytest.raises(Refused, match=r"^Migration requires multi-channel URIs"):
            order(uri)
    assert trip.source.status is Status.NONE


@pytest.mark.parametrize("way", ["tcp", "unix"])
@pytest.mark.parametrize("capabilities", [POSTCOPY, PREEMPT], ids=["plain", "preempt"])
def test_a_black_hole_pauses_both_sides(journey, tmp_path, way, capabilities):
    """Every connection stays open, and nothing passes: the kernel sees nothing wrong."""
    listen = f"unix:{tmp_path}/relay" if way == "unix" else "tcp:127.0.0.1:0"
    trip = journey(hammer(vcpus=2), capabilities=capabilities, parameters=TRICKLE)
    for side in (trip.source, trip.destination):
        side.set(parameters={"x-link-timeout": 1000})
    with Relay(listen, "tcp:127.0.0.1:1") as relay:
        relay.target = trip.destination.listen(
            f"unix:{tmp_path}/target" if way == "unix" else "tcp:127.0.0.1:0"
        )
        trip.source.control.migrate(relay.uri)
        trip.source.control.start_postcopy()
        for side in (trip.source, trip.destination):
            side.wait(Status.POSTCOPY_ACTIVE)
        relay.stall()
        wait_paused(trip)
    # Whoever notices first closes, and the other may see that.
    errors = f"{trip.source.error} / {trip.destination.error}"
    assert "no sign of life from the destination" in errors or "nothing came from" in errors
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    recover(trip)
    trip.finish()


def test_a_peer_that_says_nothing_ends_a_recovery(journey):
    trip = journey(hammer(), capabilities=PREEMPT, parameters=TRICKLE)
    trip.source.set(parameters={"x-link-timeout": 500})
    begin(trip)
    trip.destination.wait(Status.POSTCOPY_ACTIVE)
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    trip.source.control.pause()
    wait_paused(trip)
    with Listener(TcpAddress("127.0.0.1", 0)) as silent:
        trip.source.control.migrate(str(silent.addresses[0]), resume=True)
        trip.source.control.progress.wait(Status.POSTCOPY_RECOVER, timeout=10)
        trip.source.control.progress.wait(Status.POSTCOPY_PAUSED, timeout=10)
    trip.source.set(parameters={"max-postcopy-bandwidth": 0, "x-link-timeout": 5000})
    recover(trip)
    trip.finish()


def test_a_slow_guest_is_not_taken_for_a_dead_link(journey):
    """Nothing is asked for and next to nothing pushed for many times the timeout."""
    trip = journey(idle(), capabilities=PREEMPT, parameters=TRICKLE)
    for side in (trip.source, trip.destination):
        side.set(parameters={"x-link-timeout": 500})
    begin(trip)
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    before = trip.source.control.info().total_time_ms
    wait_until(lambda: trip.source.control.info().total_time_ms > before + 2500, 10, "time passes")
    assert trip.source.status is Status.POSTCOPY_ACTIVE
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    trip.finish()
