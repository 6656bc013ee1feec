"""An order that carries its own options: they count for it, and nothing of them stays."""

import socket

import pytest

from fakes.pair import NEVER_ENDS, QUICK, hammer, idle
from fakes.snapshots import Portrait
from fakes.waiting import wait_until
from postcopy.errors import Refused, WrongState
from postcopy.parameters import Capability, Overrides
from postcopy.status import Status

SLOW = Overrides(parameters=NEVER_ENDS)
SNAPSHOT = Overrides.for_snapshot(mapped=False)
POSTCOPY = Overrides({Capability.POSTCOPY_RAM: True})


def test_nothing_of_it_stays(journey):
    trip = journey(hammer(), parameters={})
    control = trip.source.control
    before = control.capabilities, control.parameters
    own = Overrides({Capability.RETURN_PATH: True}, NEVER_ENDS)
    control.migrate(trip.destination.listen(), overrides=own)
    trip.source.wait_rounds(1)
    assert (control.capabilities, control.parameters) == before
    control.cancel()
    trip.source.wait(Status.CANCELLED)
    trip.new_destination()
    trip.source.set(parameters=QUICK)
    trip.migrate()
    trip.finish()


def test_what_is_set_meanwhile_reaches_the_job(journey):
    """At the bandwidth that its order says it would take minutes."""
    trip = journey(idle(), parameters={})
    own = Overrides(parameters={"max-bandwidth": 64 << 10})
    trip.source.control.migrate(trip.destination.listen(), overrides=own)
    trip.source.wait(Status.ACTIVE)
    trip.source.set(parameters=QUICK)
    trip.finish()


def test_postcopy_on_both_sides_by_the_orders_alone(journey):
    trip = journey(hammer(), parameters={})
    trip.destination.control.incoming("tcp:127.0.0.1:0", exit_on_error=False, overrides=POSTCOPY)
    port = trip.destination.control.info().socket_address[0]["port"]
    slow = Overrides(POSTCOPY.capabilities, NEVER_ENDS)
    trip.source.control.migrate(f"tcp:127.0.0.1:{port}", overrides=slow)
    trip.source.control.start_postcopy()
    trip.finish()
    for side in (trip.source, trip.destination):
        assert not side.control.capabilities.enabled(Capability.POSTCOPY_RAM)
    assert "postcopy-active" in trip.source.story()


def test_an_order_without_postcopy_cannot_be_switched_to_it(journey):
    trip = journey(hammer(), parameters={}, capabilities=(Capability.POSTCOPY_RAM,))
    own = Overrides({Capability.POSTCOPY_RAM: False}, NEVER_ENDS)
    trip.source.control.migrate(trip.destination.listen(), overrides=own)
    trip.source.wait_rounds(1)
    with pytest.raises(WrongState, match="Enable postcopy"):
        trip.source.control.start_postcopy()


def test_all_of_it_or_nothing(journey):
    trip = journey(idle(), parameters={})
    for own, why in (
        (Overrides({Capability.POSTCOPY_PREEMPT: True}), "preempt requires postcopy-ram"),
        (Overrides(parameters={"downtime-limit": -1}), "downtime-limit"),
        (Overrides({Capability.MAPPED_RAM: True}), "seekable"),
    ):
        with pytest.raises(Refused, match=why):
            trip.source.control.migrate("tcp:127.0.0.1:1", overrides=own)
    assert trip.source.status is Status.NONE


def test_a_recovery_takes_no_options(journey):
    trip = journey(idle())
    with pytest.raises(Refused, match="leave x-capabilities"):
        trip.source.control.migrate("tcp:127.0.0.1:1", resume=True, overrides=SLOW)


def test_a_snapshot_whatever_is_set_and_then_a_migration(journey, tmp_path):
    trip = journey(hammer(), capabilities=(Capability.RETURN_PATH,))
    trip.source.control.migrate(f"file:{tmp_path}/image", overrides=SNAPSHOT)
    trip.source.wait(Status.COMPLETED)
    assert trip.source.machine.running
    trip.migrate()
    trip.finish()


class TestSnapshotLeftOn:
    """``background-snapshot`` is on from before: a migration must not leave two guests that run."""

    @pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "unix:{}/socket"], ids=["tcp", "unix"])
    def test_a_migration_is_refused(self, journey, tmp_path, uri):
        trip = journey(hammer())
        trip.source.set((Capability.BACKGROUND_SNAPSHOT,))
        with pytest.raises(Refused, match="background-snapshot is on, so the guest would go on"):
            trip.migrate(uri.format(tmp_path))
        assert trip.source.status is Status.NONE

    def test_to_a_descriptor_of_a_connection(self, journey, tmp_path):
        trip = journey(hammer())
        trip.source.set((Capability.BACKGROUND_SNAPSHOT,))
        trip.destination.listen(f"unix:{tmp_path}/socket")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{tmp_path}/socket")
            with pytest.raises(Refused, match="background-snapshot is on"):
                trip.source.control.migrate(f"fd:{connection.fileno()}")

    def test_to_a_descriptor_that_is_a_sink(self, tmp_path):
        with Portrait(idle()) as portrait:
            ours, theirs = socket.socketpair()
            with (tmp_path / "image").open("wb") as file, ours, theirs:
                portrait.side.control.migrate(f"fd:{file.fileno()}")
                portrait.side.wait(Status.COMPLETED)
                portrait.side.control.migrate(f"fd:{ours.fileno()}")
                wait_until(lambda: theirs.recv(1 << 20), 10, "a first byte")
                portrait.side.control.cancel()
                portrait.side.wait(Status.CANCELLED)

    def test_a_destination_does_not_run_what_goes_on_elsewhere(self, journey):
        """As a source that does not refuse it sends it, such as QEMU."""
        trip = journey(hammer())
        as_qemu = Overrides({Capability.BACKGROUND_SNAPSHOT: True})
        trip.source.control.migrate(trip.destination.listen(), overrides=as_qemu)
        trip.destination.wait(Status.FAILED)
        assert "background snapshot, whose guest goes on at its source" in trip.destination.error
        assert not trip.destination.machine.running
        trip.source.until(Status.COMPLETED, Status.FAILED)
        trip.verify_source()

    def test_a_command_may_bring_it_to_a_destination(self, tmp_path):
        with Portrait(hammer()) as portrait:
            portrait.take(f"file:{tmp_path}/image")
            portrait.check_image(f"exec:cat {tmp_path}/image")


def test_qmp_takes_it_in_one_message(tmp_path):
    from fakes.commands import Running

    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        own = {
            "x-capabilities": [{"capability": "background-snapshot", "state": True}],
            "x-parameters": {"x-link-timeout": 0},
        }
        assert "return" in guest.ask("migrate", uri=f"file:{tmp_path}/a", **own)
        wait_until(lambda: guest.migration_status() == "completed", 20, "the first")
        assert "return" in guest.ask("x-snapshot", uri=f"file:{tmp_path}/b", **{"mapped-ram": True})
        wait_until(lambda: guest.migration_status() == "completed", 20, "the second")
        capabilities = guest.ask("query-migrate-capabilities")["return"]
        assert not any(each["state"] for each in capabilities)
        assert guest.ask("query-status")["return"]["running"] is True
        assert (tmp_path / "a").stat().st_size > 0
        wrong = {"x-parameters": {"no-such": 1}}
        refusal = guest.ask("migrate", uri=f"file:{tmp_path}/c", **wrong)
        assert "unexpected" in refusal["error"]["desc"]
