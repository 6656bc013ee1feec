"""vCPUs that are held for a share of the time, and a guest that is held to a dirty rate."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.waiting import wait_until
from machine.machines import MIB, Watched, config_for, need, wait_for_progress, wait_for_work
from machine.test_run_control import Spinner
from postcopy.errors import HostCannot, Refused
from postcopy.guest import Region
from postcopy.machine import oracle, workload
from postcopy.machine.vcpu import Vcpu
from postcopy.machine.vcpu_throttle import (
    LONGEST_HOLD_S,
    SLICE_S,
    DirtyLimit,
    VcpuThrottle,
    next_percent,
    slices,
)


@given(st.integers(1, 99))
def test_the_share_is_kept_and_no_hold_is_long(percent):
    run_s, hold_s = slices(percent)
    assert hold_s / (run_s + hold_s) == pytest.approx(percent / 100)
    assert hold_s <= LONGEST_HOLD_S * 1.001
    assert run_s <= SLICE_S


class Noted:
    """A vCPU that notes what is done with it."""

    def __init__(self, index=0):
        self.index = index
        self.steps = []
        self.was_held = threading.Event()

    def hold(self):
        self.steps.append("hold")
        self.was_held.set()

    def release(self):
        self.steps.append("release")


def test_all_are_held_and_released_until_it_ends():
    vcpus = [Noted(0), Noted(1)]
    throttle = VcpuThrottle(vcpus)
    throttle.set(50)
    for vcpu in vcpus:
        assert vcpu.was_held.wait(30)
    throttle.set(0)
    for vcpu in vcpus:
        wait_until(lambda vcpu=vcpu: vcpu.steps[-1] == "release")
    counts = [len(vcpu.steps) for vcpu in vcpus]
    throttle.set(99)
    for vcpu, count in zip(vcpus, counts, strict=True):
        wait_until(lambda vcpu=vcpu, count=count: len(vcpu.steps) > count)
    throttle.close()
    for vcpu in vcpus:
        wait_until(lambda vcpu=vcpu: vcpu.steps[-1] == "release")
        pairs = list(zip(vcpu.steps[::2], vcpu.steps[1::2], strict=True))
        assert {*pairs} <= {("hold", "release"), ("release", "release")}


def test_of_two_callers_the_larger_share_counts():
    throttle = VcpuThrottle([])
    throttle.set(30)
    throttle.set(50, "another")
    assert throttle.percent == 50
    throttle.set(0, "another")
    assert throttle.percent == 30
    throttle.set(250)
    assert throttle.percent == 99
    throttle.close()
    assert throttle.percent == 0


@pytest.fixture
def spinner():
    cpu = Spinner()
    vcpu = Vcpu(0, cpu, lambda _vcpu, exit_: pytest.fail(str(exit_)))
    yield vcpu, cpu
    vcpu.close()


def test_a_vcpu_that_is_held_leaves_the_guest_and_comes_back(spinner):
    vcpu, cpu = spinner
    vcpu.want()
    vcpu.hold()
    assert vcpu.wait_parked(30)
    vcpu.want()  # the user's 'cont' does not let it in
    assert vcpu.wait_parked(30)
    assert cpu.kicked
    vcpu.release()
    assert not cpu.kicked
    vcpu.unwant()
    assert vcpu.wait_parked(30)
    vcpu.hold()
    vcpu.release()
    assert cpu.kicked  # it is not wanted


def test_a_guest_that_is_held_again_and_again_at_one_instruction_goes_on(spinner):
    vcpu, _ = spinner
    vcpu.want()
    for _ in range(50):  # far more interrupts than a poisoned page would need
        vcpu.hold()
        assert vcpu.wait_parked(30)
        vcpu.release()


@pytest.mark.parametrize("accelerator", ["kvm", "unicorn"])
def test_a_guest_that_is_held_does_its_work(accelerator):
    need(accelerator)
    work = workload.load("hammer", 4 * MIB, fill_bytes=64 << 10, hot_bytes=32 << 10)
    with Watched(config_for(work, accelerator)) as watched:
        machine = watched.machine
        machine.start()
        wait_for_work(machine, work)
        machine.throttle(90)
        for _ in range(3):
            wait_for_progress(machine, work)
            machine.pause()
            assert oracle.verify(machine.read_memory, work).ok
            machine.resume()
        machine.throttle(0)
        wait_for_progress(machine, work)
        assert watched.machine.running


class Written:
    """A guest whose log says how much was written in each period."""

    def __init__(self, *mebibytes):
        self.mebibytes = list(mebibytes)
        self.users = []

    def regions(self):
        return [Region("ram", 64 * MIB, 4096, 0, 0, -1)]

    def start_dirty_log(self, user):
        if not self.mebibytes:
            raise HostCannot("there is no log", "get one")
        self.users.append(user)

    def stop_dirty_log(self, user):
        self.users.remove(user)

    def fetch_dirty_log(self, block, user):
        log = np.zeros(64 * 256, bool)
        log[: self.mebibytes.pop(0) * 256] = True
        return np.packbits(log)


def test_a_rate_is_brought_down_and_the_limit_can_be_taken_off():
    guest, throttle, vcpus = Written(40, 20, 10), VcpuThrottle([]), [Noted(0), Noted(1)]
    periods, ended = iter(range(3)), threading.Event()

    def pause(_seconds):
        if next(periods, None) is None:
            ended.set()
            return stop.wait(30)
        return False

    stop = threading.Event()
    limit = DirtyLimit(guest, throttle, vcpus, pause)
    limit.set(10, period_ms=1000)
    assert ended.wait(30)
    held = 1 - (1 - 0.75) * 0.5  # a quarter of the time, and half of that
    assert throttle.percent == pytest.approx(100 * held)
    assert limit.query() == [
        {"cpu-index": index, "limit-rate": 10, "current-rate": 10} for index in (0, 1)
    ]
    limit.cancel()
    stop.set()
    wait_until(lambda: not guest.users)
    assert (limit.query(), throttle.percent) == ([], 0)


@given(st.floats(0, 99), st.floats(0, 1e9), st.floats(1, 1e9))
def test_what_is_held_stays_in_its_bounds(held, rate, limit):
    percent = next_percent(held, rate, limit)
    assert 0 <= percent <= 99
    assert percent >= held or rate < limit * 1.01


def test_what_is_refused():
    two = DirtyLimit(Written(1), VcpuThrottle([]), [Noted(0), Noted(1)])
    with pytest.raises(Refused, match="the writes of 2 vCPUs apart"):
        two.set(10, 1)
    for index in (2, -1):
        with pytest.raises(Refused, match="incorrect cpu index specified"):
            two.set(10, index)
    two.cancel(5)  # as QEMU: there is nothing to cancel
    two.set(0)
    with pytest.raises(Refused, match=r"^dirty page limit feature requires KVM .*there is no log"):
        DirtyLimit(Written(), VcpuThrottle([]), [Noted()]).set(10)
