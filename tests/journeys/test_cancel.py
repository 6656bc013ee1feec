"""Cancel, at each status: the guest stays and runs, and the next migration succeeds."""

import contextlib
import socket
import threading

import pytest

from fakes.pair import NEVER_ENDS, QUICK, hammer
from faults.relay import Relay
from postcopy.parameters import Capability
from postcopy.status import Status

PAUSING = (Capability.PAUSE_BEFORE_SWITCHOVER,)


def slow(journey, capabilities=()):
    return journey(hammer(), parameters=NEVER_ENDS, capabilities=capabilities)


def cancelled(trip, *, called=True):
    """The source has given up and its guest goes on; the destination has noticed if it was called."""
    trip.source.wait(Status.CANCELLED)
    assert trip.source.error is None
    trip.verify_source()
    if called:
        trip.destination.wait(Status.FAILED)
        assert trip.destination.error
        assert trip.destination.failures == []  # as it was told: exit_on_error=False
        assert not trip.destination.machine.running


def moves_now(trip):
    """A new migration, to a new destination."""
    trip.new_destination()
    trip.source.set(parameters=QUICK)
    trip.migrate()
    if trip.source.control.capabilities.enabled(Capability.PAUSE_BEFORE_SWITCHOVER):
        trip.source.wait(Status.PRE_SWITCHOVER)
        trip.source.control.continue_(Status.PRE_SWITCHOVER)
    trip.finish()


def test_none(journey):
    trip = journey(hammer())
    trip.source.control.cancel()
    assert trip.source.status is Status.NONE
    moves_now(trip)


def test_right_after_migrate(journey):
    trip = slow(journey)
    trip.migrate()
    trip.source.control.cancel()
    cancelled(trip, called=False)
    moves_now(trip)


def test_setup(journey, tmp_path):
    """Nobody accepts the connection, so that setup does not end."""
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(socket.socket(socket.AF_UNIX))
        door.bind(f"{tmp_path}/door")
        door.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(f"{tmp_path}/door")  # as many as may wait
        trip = journey(hammer())
        trip.source.control.migrate(f"unix:{tmp_path}/door")
        assert trip.source.status is Status.SETUP
        trip.source.control.cancel()
        cancelled(trip, called=False)
        moves_now(trip)


@pytest.mark.parametrize("rounds", [0, 2])
def test_active(journey, rounds):
    trip = slow(journey)
    trip.migrate()
    trip.source.wait(Status.ACTIVE)
    trip.source.wait_rounds(rounds)
    trip.source.control.cancel()
    cancelled(trip)
    assert "STOP" not in trip.source.story()[1:-2]
    moves_now(trip)


def test_pre_switchover(journey):
    trip = journey(hammer(), capabilities=PAUSING)
    trip.migrate()
    trip.source.wait(Status.PRE_SWITCHOVER)
    assert not trip.source.machine.running
    trip.source.control.cancel()
    cancelled(trip)
    moves_now(trip)


def test_device(journey, tmp_path):
    """The destination's answer does not come, so that the switchover does not end."""
    trip = journey(hammer(), capabilities=PAUSING)
    with Relay(f"unix:{tmp_path}/relay", trip.destination.listen()) as relay:
        trip.source.control.migrate(relay.uri)
        trip.source.wait(Status.PRE_SWITCHOVER)
        relay.stall()
        trip.source.control.continue_(Status.PRE_SWITCHOVER)
        trip.source.wait(Status.DEVICE)
        trip.source.control.cancel()
        trip.source.wait(Status.CANCELLED)
        relay.flow()
        cancelled(trip)
    moves_now(trip)


def test_cancelling_and_cancelled(journey):
    trip = slow(journey)
    trip.migrate()
    trip.source.wait(Status.ACTIVE)
    trip.source.control.cancel()
    trip.source.control.cancel()
    cancelled(trip)
    trip.source.control.cancel()
    assert trip.source.status is Status.CANCELLED
    moves_now(trip)


def test_completed(journey):
    trip = journey(hammer())
    trip.migrate()
    trip.source.wait(Status.COMPLETED)
    trip.source.control.cancel()
    trip.finish()
    trip.turn()
    trip.migrate()
    trip.finish()


def test_failed(journey, tmp_path):
    trip = journey(hammer())
    trip.source.control.migrate(f"unix:{tmp_path}/nobody")
    trip.source.wait(Status.FAILED)
    trip.source.control.cancel()
    assert trip.source.status is Status.FAILED
    trip.verify_source()
    moves_now(trip)


def test_the_destination_cannot_cancel(journey):
    trip = journey(hammer())
    trip.destination.listen()
    trip.destination.control.cancel()
    assert trip.destination.status is Status.SETUP


def test_cancel_while_the_peer_reads_nothing(journey, tmp_path):
    """A send that waits for a peer who does not read must not hold up the user."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{tmp_path}/door")
        door.listen(1)
        trip = journey(hammer())
        trip.source.control.migrate(f"unix:{tmp_path}/door")
        with door.accept()[0]:
            trip.source.wait(Status.ACTIVE)
            trip.source.control.cancel()
            cancelled(trip, called=False)
    moves_now(trip)


def test_while_the_devices_are_being_saved(journey, monkeypatch):
    """A call that stops the guest to save them comes after the cancel: it does not stop it again."""
    trip = journey(hammer(), parameters=QUICK, capabilities=PAUSING)
    machine = trip.source.machine
    pause, save = machine.pause, machine.save_devices
    may_stop, saved = threading.Event(), []

    def late(*, to_move):
        if threading.current_thread().name == "pause_and_save":
            assert may_stop.wait(20)
        pause(to_move=to_move)

    def noted():
        saved.append(threading.current_thread().name)
        return save()

    monkeypatch.setattr(machine, "pause", late)
    monkeypatch.setattr(machine, "save_devices", noted)
    trip.migrate()
    trip.source.wait(Status.PRE_SWITCHOVER)
    trip.source.control.cancel()
    with pytest.raises(TimeoutError):
        trip.source.control.progress.wait(Status.CANCELLED, timeout=0.3)
    may_stop.set()
    cancelled(trip)
    assert saved == []
