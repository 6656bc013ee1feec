"""Engines die while a guest has a reset point: the guest runs on, and goes back to the last word."""

import os
import random
import signal
import threading

import numpy as np
import pytest

from fakes.awakening import FORMS, put_to_sleep, wake, woken
from fakes.pair import DEADLINE_S, hammer, tiny
from fakes.waiting import wait_until
from faults import trace_hooks
from faults.conftest import subscribe, unsubscribe
from machine.machines import wait_for_progress
from postcopy import trace
from postcopy.errors import EngineDied, GuestError, WrongState
from postcopy.machine.run_control import RunState

SEED = 20261122


@pytest.fixture
def kill_at(monkeypatch, tmp_path):
    """``arm = kill_at(point)``: from now on engines die there, one for each call of ``arm``."""

    def prepare(point):
        marker = tmp_path / "armed"
        subscribe(monkeypatch, trace_hooks.kill_at(point, marker))

        def arm():
            marker.touch()
            return marker.exists

        return arm

    return prepare


def set_point(side, path=None):
    side.machine.stop()
    memory = side.ram()
    side.control.resetting.set_point(path)
    side.machine.cont()
    return memory


def back(side):
    side.machine.stop()
    result = side.control.resetting.reset()
    memory = side.ram()
    side.machine.cont()
    return memory, result


def kill_engine(side):
    """The engine of the point dies, and somebody notices."""
    engine = side.reset_engine
    os.kill(engine.process_id, signal.SIGKILL)
    wait_until(lambda: side.reset_engine is None, DEADLINE_S, "the end of an engine")


@pytest.mark.parametrize("accelerator", ["kvm", "unicorn"])
def test_while_the_guest_runs_nothing_is_lost(journey, accelerator):
    trip = journey(tiny(accelerator), (accelerator, accelerator))
    side = trip.source
    then = set_point(side)
    for _ in range(3):
        wait_for_progress(side.machine, trip.workload)
        kill_engine(side)
        wait_for_progress(side.machine, trip.workload)
        side.machine.stop()
        written = np.count_nonzero((side.ram() != then).any(axis=1))
        now, result = back(side)
        assert (now == then).all()
        assert not result["whole"]  # the kernel has gone on tracking
        assert result["pages"] >= written
    trip.verify_source()


@pytest.mark.parametrize("form", FORMS)
def test_the_successor_reads_the_image(journey, tmp_path, form):
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image", form)
    then = trip.source.ram()
    wake(trip.destination, path)
    side = woken(trip)
    side.control.resetting.set_point(str(path))
    for whole in (True, False):
        kill_engine(side)
        now, result = back(side)
        assert (now == then).all()
        assert result["whole"] == whole
        wait_for_progress(side.machine, trip.workload)
    trip.verify(side)


@pytest.mark.parametrize("point", trace.RESET)
def test_in_the_midst_of_a_reset(journey, kill_at, point):
    arm = kill_at(point)
    trip = journey(hammer(vcpus=2))
    side = trip.source
    then = set_point(side)
    wait_for_progress(side.machine, trip.workload)
    waits = arm()
    now, result = back(side)
    assert not waits()
    assert (now == then).all()
    assert result["whole"]  # what the dead one had done, nobody knows
    wait_for_progress(side.machine, trip.workload)
    now, result = back(side)
    assert (now == then).all()
    assert not result["whole"]
    trip.verify_source()


@pytest.mark.parametrize("point", trace.RESET_POINT)
def test_while_the_point_is_set(journey, kill_at, point):
    arm = kill_at(point)
    trip = journey(hammer(vcpus=2))
    side = trip.source
    arm()
    with pytest.raises(EngineDied, match="set it again"):
        side.control.resetting.set_point()
    assert side.keeper._writes is None
    with pytest.raises(WrongState, match="there is no reset point"):
        side.control.resetting.reset()
    then = set_point(side)
    wait_for_progress(side.machine, trip.workload)
    assert (back(side)[0] == then).all()
    trip.verify_source()


def test_when_they_die_one_after_the_other(journey, monkeypatch):
    subscribe(monkeypatch, trace_hooks.kill_at("reset.scanned"))
    trip = journey(hammer())
    side = trip.source
    resetting = side.control.resetting
    then = set_point(side)
    wait_for_progress(side.machine, trip.workload)
    with pytest.raises(GuestError, match=r"stays stopped.*one after the other.*tries again"):
        resetting.reset()
    assert side.machine.run_state is RunState.FINISH_MIGRATE
    for order in (side.machine.cont, resetting.end, resetting.set_point):
        with pytest.raises(WrongState, match=r"not finali[sz]ed|not finished"):
            order()
    unsubscribe(monkeypatch)
    resetting.reset()
    wait_for_progress(side.machine, trip.workload)
    assert (back(side)[0] == then).all()
    trip.verify_source()


def kill(engine):
    """None: the last one was killed after its reset, and the next reset begins by starting one."""
    if engine is not None:
        engine.kill()


def test_at_any_moment(journey):
    trip = journey(hammer(vcpus=2))
    side = trip.source
    then = set_point(side)
    rng = random.Random(SEED)
    for _ in range(15):
        wait_for_progress(side.machine, trip.workload)
        timer = threading.Timer(rng.uniform(0, 0.004), kill, (side.reset_engine,))
        timer.start()
        assert (back(side)[0] == then).all()
        timer.join()
    trip.verify_source()
