"""An engine that hangs without being dead is ended, and its end is dealt with like every other."""

import os
import signal

import pytest

from fakes.awakening import AT_ONCE, half_awake, woken
from fakes.pair import NEVER_ENDS, POSTCOPY, hammer
from fakes.waiting import wait_until
from faults.recovering import LASTS, Recovering, broken_journey
from machine.machines import wait_for_progress
from postcopy.errors import WrongState
from postcopy.link.guest import job
from postcopy.link.guest.background_order import BackgroundOrder
from postcopy.status import Status

LOOKS = 4


@pytest.mark.parametrize("which", ["source", "destination"])
def test_in_precopy(journey, which):
    trip = journey(hammer(), parameters=NEVER_ENDS, hang_looks=LOOKS)
    trip.migrate()
    trip.source.wait(Status.ACTIVE)
    trip.destination.wait(Status.ACTIVE)
    side = getattr(trip, which)
    side.stop_engine()
    trip.source.wait(Status.FAILED)
    trip.destination.wait(Status.FAILED)
    assert "the engine process hung for 4 s, and was killed; start the migration" in side.error
    trip.verify_source()


@pytest.mark.parametrize("which", ["source", "destination"])
def test_in_postcopy(journey, tmp_path, which):
    trip = broken_journey(journey, capabilities=POSTCOPY, parameters=LASTS, hang_looks=LOOKS)
    with Recovering(trip, tmp_path) as moving:
        moving.start()
        moving.until_postcopy()
        side = getattr(trip, which)
        side.stop_engine()
        side.wait(Status.POSTCOPY_PAUSED)
        assert "the engine process hung for 4 s, and was killed; no page is lost" in side.error
        moving.hurry()
        moving.recover()
        trip.finish()


def test_a_recovery_that_is_ordered_of_one_is_not_waited_for(journey, tmp_path, monkeypatch):
    """The order is taken, and carried out when the engine goes on."""
    monkeypatch.setattr(job, "_INFO_TIMEOUT_S", 0.2)
    trip = broken_journey(journey)
    trip.destination.control._state.background = BackgroundOrder(at_once_s=0.2)
    with Recovering(trip, tmp_path) as moving:
        moving.start()
        moving.until_postcopy()
        moving.source.control.pause()
        moving.until_settled()
        side = moving.destination
        side.stop_engine()
        side.control.recover(uri := f"unix:{tmp_path}/again")
        assert side.status is Status.POSTCOPY_PAUSED
        assert side.control.info().socket_address == ()
        with pytest.raises(WrongState, match="still being carried out"):
            side.control.recover(uri)
        os.kill(side.engine_process_id(), signal.SIGCONT)
        wait_until(lambda: side.control.info().socket_address, 20, "it listens")
        moving.source.control.migrate(uri, resume=True)
        moving.hurry()
        trip.finish()


def test_in_a_restore(journey, tmp_path):
    trip = journey(hammer(), hang_looks=LOOKS)
    side = half_awake(trip, tmp_path / "image")
    before = side.engine_process_id()
    side.stop_engine()
    wait_until(
        lambda: (engine := side.engine) is not None and engine.process_id != before,
        20,
        "a successor",
    )
    wait_for_progress(side.machine, trip.workload)
    side.set(parameters=AT_ONCE)
    woken(trip)
