"""The migration subsystem of a guest's process: what it says between two migrations, what it leaves."""

import os
import signal
import threading

import pytest

from fakes.engine import FakePool
from fakes.pair import NEVER_ENDS, Journey, Side, idle
from fakes.stacks import stacks
from fakes.waiting import wait_until
from postcopy.errors import EngineDied, HostCannot, PostcopyError, WrongState
from postcopy.events import EventBus
from postcopy.link.guest.control import MigrationControl
from postcopy.link.protocol import JobCommands, OutgoingCommands
from postcopy.machine.config import MachineConfig
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.kvm


def test_a_migration_that_begins_does_not_show_the_last_ones_figures():
    with Journey(idle(16), parameters=NEVER_ENDS | {"max-bandwidth": 1 << 20}) as trip:
        trip.migrate()
        wait_until(lambda: (ram := trip.source.control.info().ram) and ram.transferred, 20, "sent")
        trip.source.control.cancel()
        trip.source.wait(Status.CANCELLED)
        assert trip.source.control.info().ram is not None
        told = []

        def look(event):
            if event.name == "MIGRATION" and event.data["status"] == "setup":
                told.append(trip.source.control.info())

        trip.source.bus.subscribe(look)
        trip.new_destination()
        trip.migrate()
        trip.source.wait(Status.ACTIVE)
    assert told
    assert [info.ram for info in told] == [None] * len(told)
    assert {info.total_time_ms for info in told} <= {None, 0}


def test_an_order_that_means_nothing_to_the_engine_at_work_harms_nobody():
    with Journey(idle(16)) as trip:
        trip.destination.listen()
        trip.destination.control.continue_(Status.SETUP)
        trip.destination.control._engines.tell(OutgoingCommands.start_postcopy)
        trip.destination.control._engines.tell(OutgoingCommands.cancel)
        assert trip.destination.control._engines.link.call(JobCommands.info) is not None
        assert trip.destination.status is Status.SETUP


def test_a_cancel_may_come_before_the_engine_knows_what_it_is_to_do(tmp_path):
    with Journey(idle(16)) as trip:
        engine = trip.source.control._engines
        start = engine.start

        def start_and_cancel():
            link = start()
            link.note(OutgoingCommands.cancel)
            return link

        engine.start = start_and_cancel
        trip.source.control.migrate(f"file:{tmp_path}/image")
        trip.source.wait(Status.CANCELLED)
        assert trip.source.machine.running


def test_a_destination_that_is_left_takes_its_socket_with_it(tmp_path):
    path = tmp_path / "socket"
    side = Side(MachineConfig(8 << 20, accel="kvm"), incoming=True)
    try:
        side.listen(f"unix:{path}")
        assert path.is_socket()
    finally:
        side.close()
    wait_until(lambda: not path.exists(), 10, "the socket's file is gone")


def test_a_prepared_engine_that_dies_is_not_asked_to_listen():
    side = Side(MachineConfig(8 << 20, accel="kvm"), incoming=True)
    try:
        side.engine.kill()
        wait_until(lambda: side.engine is None, 10, "its end is noticed")
        assert side.listen().startswith("tcp:")
        assert side.status is Status.SETUP
    finally:
        side.close()


def test_an_order_that_its_engine_cannot_begin_has_failed():
    """The guest stays where it is, and the next order finds nothing in its way."""
    with Journey(idle(16)) as trip:
        control = MigrationControl(trip.source.machine, EventBus(), engines=FakePool())
        try:
            for _ in range(2):
                with pytest.raises(PostcopyError, match="internal error in start_source"):
                    control.migrate("tcp:127.0.0.1:1")
                assert control.progress.status is Status.FAILED
                assert "internal error in start_source" in control.info().error_desc
                assert trip.source.machine.owned
                assert trip.source.machine.running
        finally:
            control.close()
        trip.migrate()
        trip.finish()


def test_an_order_for_which_there_is_no_engine_has_failed():
    def none():
        raise HostCannot("no engine process can be started", "free some of the host's memory")

    with Journey(idle(16)) as trip:
        control = MigrationControl(trip.source.machine, EventBus(), engines=FakePool(none))
        try:
            with pytest.raises(HostCannot):
                control.migrate("tcp:127.0.0.1:1")
            assert control.progress.status is Status.FAILED
            assert "no engine process can be started" in control.info().error_desc
        finally:
            control.close()
        assert trip.source.machine.running


def test_an_engine_that_takes_its_time_to_listen_holds_up_nothing():
    """It may look a name up; here it stands still."""
    side = Side(MachineConfig(8 << 20, accel="kvm"), incoming=True)
    engine = side.stop_engine()
    listening = threading.Thread(target=side.listen, daemon=True)
    try:
        listening.start()
        wait_until(lambda: side.machine.ownership.last_order, 10, "the order")
        refused = []

        def meanwhile():
            assert side.control.info().status is Status.NONE
            side.control.cancel()
            for order in (
                lambda: side.control.incoming("tcp:127.0.0.1:0"),
                lambda: side.control.set_parameters({"max-bandwidth": 1 << 20}),
                lambda: side.control.set_capabilities({Capability.POSTCOPY_RAM: True}),
            ):
                with pytest.raises(WrongState) as caught:
                    order()
                refused.append(str(caught.value))

        others = threading.Thread(target=meanwhile, daemon=True)
        others.start()
        others.join(10)
        assert len(refused) == 3, stacks()
        os.kill(engine, signal.SIGCONT)
        listening.join(20)
        assert side.status is Status.SETUP
    finally:
        os.kill(engine, signal.SIGCONT)
        side.close()


def test_an_engine_that_dies_while_it_is_told_to_listen_leaves_room_for_another():
    side = Side(MachineConfig(8 << 20, accel="kvm"), incoming=True)
    try:
        engine = side.stop_engine()
        refused = []

        def listen():
            with pytest.raises(EngineDied) as caught:
                side.listen()
            refused.append(str(caught.value))

        listening = threading.Thread(target=listen, daemon=True)
        listening.start()
        wait_until(lambda: side.machine.ownership.last_order, 10, "the order")
        os.kill(engine, signal.SIGKILL)
        listening.join(20)
        assert len(refused) == 1
        assert side.listen().startswith("tcp:")
        assert side.status is Status.SETUP
    finally:
        side.close()
