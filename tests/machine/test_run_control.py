"""Who may stop and start the guest, and what becomes of it: no accelerator, no guest."""

import threading

import pytest

from postcopy.errors import GuestError, WrongState
from postcopy.machine.cpu import Exit, ExitReason
from postcopy.machine.cpu_state import CpuState
from postcopy.machine.run_control import RunControl
from postcopy.machine.run_control import RunState as R
from postcopy.machine.vcpu import Vcpu


class Spinner:
    """A CPU that runs until it is kicked, or until the test lets it exit."""

    def __init__(self):
        self.wake = threading.Event()
        self.kicked = False
        self.exit = None

    def enter(self):
        self.wake.wait()
        if self.kicked:
            return Exit(ExitReason.INTERRUPTED)
        self.wake.clear()
        return self.exit

    def kick(self):
        self.kicked = True
        self.wake.set()

    def unkick(self):
        self.kicked = False
        self.wake.clear()

    def get_state(self):
        return CpuState()

    def set_state(self, state):
        pass

    def close(self):
        pass


def nothing():
    pass


class Stuck(Spinner):
    """One that cannot be kicked for a while: the processor waits for a page of the page tables."""

    def __init__(self):
        super().__init__()
        self.page_came = threading.Event()
        self.inside = threading.Event()

    def enter(self):
        self.inside.set()
        self.page_came.wait()
        return super().enter()


class Bench:
    def __init__(self, cpu=None, **more):
        self.events = []
        self.ended = threading.Event()
        self.cpu = cpu or Spinner()
        vcpus = []
        self.control = RunControl(vcpus, self.note, **more)
        self.vcpu = Vcpu(0, self.cpu, self.control.vcpu_ended)
        vcpus.append(self.vcpu)

    def note(self, name, _data):
        self.events.append(name)
        if name == "STOP":
            self.ended.set()

    def leave(self, reason):
        self.cpu.exit = Exit(reason, "told so")
        self.cpu.wake.set()
        assert self.ended.wait(10)


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.control.close()
    made.vcpu.close()


def test_the_user_stops_and_continues(bench):
    control = bench.control
    control.start(nothing, paused=True, incoming=False)
    assert control.state is R.PRELAUNCH
    control.cont()
    control.cont()
    control.stop()
    control.stop()
    assert control.state is R.PAUSED
    assert bench.events == ["RESUME", "STOP"]


def test_an_engine_stops_on_top_of_the_user(bench):
    control = bench.control
    control.start(nothing, paused=False, incoming=False)
    control.stop()
    control.pause()
    assert control.state is R.FINISH_MIGRATE
    assert control.state_to_move is R.PAUSED
    control.resume()
    assert control.state is R.PAUSED


def test_the_user_stops_while_an_engine_has_stopped(bench):
    control = bench.control
    control.start(nothing, paused=False, incoming=False)
    control.pause()
    control.pause()
    with pytest.raises(WrongState, match="Migration is not finalized yet"):
        control.cont()
    control.stop()
    control.resume()
    assert control.state is R.PAUSED
    assert bench.events == ["RESUME", "STOP"]


@pytest.mark.parametrize(
    ("paused", "moved", "then"),
    [
        (False, R.RUNNING, R.RUNNING),
        (True, R.RUNNING, R.PAUSED),
        (False, R.PAUSED, R.PAUSED),
        (False, R.SHUTDOWN, R.SHUTDOWN),
    ],
)
def test_arriving(bench, paused, moved, then):
    control = bench.control
    control.start(nothing, paused=paused, incoming=True)
    assert control.state is R.INMIGRATE
    assert not control.ownership.here
    control.arrive(moved)
    control.resume()
    assert control.ownership.here
    assert control.state is then


def test_cont_before_arrival_says_what_shall_be_then(bench):
    control = bench.control
    control.start(nothing, paused=True, incoming=True)
    control.cont()
    assert control.state is R.INMIGRATE
    control.resume()
    assert control.state is R.RUNNING


def test_a_vcpu_that_fails(bench):
    control = bench.control
    control.start(nothing, paused=False, incoming=False)
    bench.leave(ExitReason.FAILED)
    assert control.state is R.INTERNAL_ERROR
    assert bench.events == ["RESUME", "STOP"]
    assert str(control.failure) == "vCPU 0 cannot go on: told so"
    with pytest.raises(GuestError, match="told so"):
        control.resume()
    with pytest.raises(WrongState, match="Resetting"):
        control.cont()


def test_the_guest_ends_while_an_engine_stops_it(bench):
    control = bench.control
    control.start(nothing, paused=False, incoming=False)
    control.pause()
    control.guest_shutdown(0)
    assert control.state is R.FINISH_MIGRATE
    assert control.state_to_move is R.SHUTDOWN
    control.resume()
    assert control.state is R.SHUTDOWN
    assert bench.events == ["RESUME", "STOP", "SHUTDOWN"]


def test_running_is_not_set_by_name(bench):
    with pytest.raises(WrongState, match="by name"):
        bench.control.set_state(R.RUNNING)


def test_a_vcpu_interrupted_for_ever_at_one_place_fails(bench):
    control = bench.control
    bench.cpu.exit = Exit(ExitReason.INTERRUPTED)
    bench.cpu.wake.clear = lambda: None  # it comes out again and again
    control.start(nothing, paused=False, incoming=False)
    bench.cpu.wake.set()
    assert bench.ended.wait(10)
    assert "touches a page that is lost" in str(control.failure)


@pytest.mark.parametrize("order", ["stop", "pause"])
def test_a_stop_that_cannot_be_is_refused_in_time_and_taken_back(order):
    cpu = Stuck()
    bench = Bench(cpu, park_timeout_s=0.01)
    bench.control.start(nothing, paused=False, incoming=False)
    assert cpu.inside.wait(10)
    with pytest.raises(GuestError, match=r"vCPU 0 did not stop .* page tables .*recover .*lost"):
        getattr(bench.control, order)()
    assert bench.control.state is R.RUNNING
    assert not cpu.kicked
    assert bench.events == ["RESUME"]
    cpu.page_came.set()
    bench.control.stop()
    assert bench.control.state is R.PAUSED
    bench.vcpu.close()
