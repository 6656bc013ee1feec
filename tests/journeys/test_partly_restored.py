"""A guest that is still being restored is sent on or photographed: that begins when it is whole.

The order is taken at once all the same, can be watched and can be cancelled.  An engine that is held
(``SIGSTOP``) makes the time between as long as a test needs it.
"""

import contextlib
import os
import signal

import pytest

from fakes.awakening import AT_ONCE, half_awake, wake, woken
from fakes.pair import DEADLINE_S, POSTCOPY, Journey, Side, hammer
from fakes.waiting import wait_until
from machine.machines import wait_for_progress
from postcopy.errors import WrongState
from postcopy.parameters import Capability
from postcopy.status import Status


@contextlib.contextmanager
def held(side: Side):
    """Its engine stands still, and so does the restore."""
    engine = side.engine
    side.stop_engine()
    try:
        yield engine
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine.process_id, signal.SIGCONT)


def statuses(side: Side) -> list[str]:
    """What it has told since the restore gave the guest its memory's first pages."""
    told = side.story()
    told = told[told.index("postcopy-active") + 1 :]
    return [word for word in told if word == word.lower()]


def begin(trip: Journey, side: Side, way: str, path) -> None:
    """Order it: to another machine, or into a file."""
    trip.turn_round(side)
    if way == "snapshot":
        side.set([Capability.BACKGROUND_SNAPSHOT])
        side.control.migrate(f"file:{path}")
        return
    if way == "postcopy":
        side.set(POSTCOPY, AT_ONCE)
        trip.destination.set(POSTCOPY)
    side.control.migrate(trip.destination.listen())
    if way == "postcopy":
        side.control.start_postcopy()


def check_whole(trip: Journey, side: Side, way: str, path) -> None:
    """It ends well, and not a word of memory is wrong."""
    if way != "snapshot":
        trip.finish()
        return
    side.wait(Status.COMPLETED)
    trip.verify(side)
    trip.destination.set([Capability.BACKGROUND_SNAPSHOT])
    wake(trip.destination, path)
    woken(trip)


@pytest.mark.parametrize("form", ["mapped-ram", "stream"])
@pytest.mark.parametrize("way", ["precopy", "postcopy", "snapshot"])
def test_the_order_is_taken_at_once(journey, tmp_path, way, form):
    trip = journey(hammer(vcpus=2))
    side = half_awake(trip, tmp_path / "image", form)
    restored = side.control.progress
    with held(side):
        begin(trip, side, way, tmp_path / "again")
        assert side.status is Status.SETUP
        assert restored.status is Status.POSTCOPY_ACTIVE
        assert side.control.info().to_qapi()["status"] == "setup"
        with pytest.raises(WrongState, match="migration process in progress"):
            side.control.migrate(f"file:{tmp_path}/third")
        with pytest.raises(WrongState, match="migration process in progress"):
            side.set([Capability.XBZRLE])
    check_whole(trip, side, way, tmp_path / "again")
    assert restored.status is Status.COMPLETED
    assert statuses(side)[:2] == ["setup", "active"]
    if way == "postcopy":
        assert "postcopy-active" in statuses(side)


def test_it_can_be_cancelled_while_it_waits(journey, tmp_path):
    trip = journey(hammer(vcpus=2))
    side = half_awake(trip, tmp_path / "image")
    restored = side.control.progress
    with held(side):
        begin(trip, side, "precopy", None)
        side.control.cancel()
        assert side.status is Status.CANCELLED
        assert statuses(side) == ["setup", "cancelling", "cancelled"]
    side.control.cancel()  # as harmless as ever
    wait_for_progress(side.machine, trip.workload)
    assert restored.status is Status.POSTCOPY_ACTIVE, "as slowly as before"
    trip.new_destination()
    begin(trip, side, "precopy", None)
    check_whole(trip, side, "precopy", None)
    assert statuses(side)[:5] == ["setup", "cancelling", "cancelled", "setup", "active"]


def test_the_restore_ends_unseen_behind_a_cancelled_migration(journey, tmp_path):
    trip = journey(hammer())
    side = half_awake(trip, tmp_path / "image")
    restored = side.control.progress
    with held(side):
        begin(trip, side, "precopy", None)
        side.control.cancel()
    side.set(parameters=AT_ONCE)
    restored.wait(Status.COMPLETED, timeout=DEADLINE_S)
    assert side.status is Status.CANCELLED
    assert statuses(side) == ["setup", "cancelling", "cancelled"]
    trip.verify(side)


def test_an_engine_that_dies_meanwhile_has_a_successor_that_hurries_too(journey, tmp_path):
    trip = journey(hammer())
    side = half_awake(trip, tmp_path / "image")
    with held(side) as engine:
        begin(trip, side, "precopy", None)
        engine.kill()
    check_whole(trip, side, "precopy", None)


def test_it_fails_when_the_image_has_gone_and_the_restore_is_recovered(journey, tmp_path):
    trip = journey(hammer())
    side = half_awake(trip, tmp_path / "image")
    restored = side.control.progress
    with held(side) as engine:
        begin(trip, side, "precopy", None)
        (tmp_path / "image").rename(tmp_path / "elsewhere")
        engine.kill()
    restored.wait(Status.POSTCOPY_PAUSED, timeout=DEADLINE_S)
    side.control.progress.wait(Status.FAILED, timeout=DEADLINE_S)
    assert "its restore is paused" in side.error
    assert str(tmp_path / "image") in side.error
    with pytest.raises(WrongState, match="recover it"):
        side.control.migrate(f"file:{tmp_path}/third")
    side.control.recover(f"file:{tmp_path}/elsewhere")
    assert side.control.progress is restored
    restored.wait(Status.POSTCOPY_ACTIVE, timeout=DEADLINE_S)
    trip.new_destination()
    begin(trip, side, "precopy", None)
    check_whole(trip, side, "precopy", None)


def test_it_fails_when_pages_turn_out_to_be_lost(journey, tmp_path):
    trip = journey(hammer())
    side = half_awake(trip, tmp_path / "image")
    with held(side):
        begin(trip, side, "precopy", None)
        os.truncate(tmp_path / "image", 4 << 20)
    wait_until(lambda: side.status is Status.FAILED, DEADLINE_S, "failed")
    assert "pages of this guest are lost" in side.error
    assert side.machine.owned


def test_the_user_may_change_the_bandwidth_and_stop_the_guest(journey, tmp_path):
    trip = journey(hammer())
    side = half_awake(trip, tmp_path / "image")
    with held(side):
        begin(trip, side, "precopy", None)
        side.set(parameters={"max-bandwidth": 1 << 40})
    side.machine.stop()
    side.wait(Status.COMPLETED)
    trip.destination.wait(Status.COMPLETED)
    assert not trip.destination.machine.running
    trip.destination.machine.cont()
    trip.verify(trip.destination)
