"""Precopy: the guest runs while its memory goes over, stands still for a moment, and runs there."""

import os
import signal
from dataclasses import replace

import pytest

from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK, hammer, idle, tiny
from fakes.waiting import wait_until
from machine.machines import MIB
from postcopy.machine.workload import load
from postcopy.parameters import Capability
from postcopy.status import Status


@pytest.mark.parametrize("workload", [idle(), hammer(), hammer(vcpus=4)], ids=["idle", "1", "4"])
def test_moves(journey, workload):
    trip = journey(workload)
    trip.migrate()
    trip.finish()


@pytest.mark.parametrize("tracking", ["kvm", "pagemap"])
def test_a_hammered_guest_loses_no_write_over_many_rounds(journey, tracking):
    trip = journey(hammer(vcpus=2), parameters=NEVER_ENDS | {"x-dirty-tracking": tracking})
    trip.migrate()
    trip.source.wait_rounds(3)
    trip.source.set(parameters=QUICK)
    trip.finish()
    assert trip.source.control.info().ram.dirty_sync_count >= 4


def test_a_guest_that_writes_here_and_there_is_sent_by_the_page(journey):
    """A page in each huge page in each round: with these as a whole, every round would be all of it."""
    workload = load("hammer", 48 * MIB, hot_bytes=40 * MIB, delay_cycles=1_000_000)
    trip = journey(workload, parameters={"max-bandwidth": 48 * MIB, "downtime-limit": 100})
    trip.migrate()
    trip.finish()


@pytest.mark.parametrize(
    "accelerators", [("unicorn", "unicorn"), ("kvm", "unicorn"), ("unicorn", "kvm")], ids="-".join
)
def test_between_accelerators(journey, accelerators):
    trip = journey(tiny("unicorn"), accelerators)
    trip.migrate()
    trip.finish()


def test_kvm_tracking_of_a_guest_that_is_not_on_kvm_is_refused(journey):
    trip = journey(tiny("unicorn"), ("unicorn",), parameters={"x-dirty-tracking": "kvm"})
    trip.migrate()
    trip.source.wait(Status.FAILED)
    assert trip.source.error == "x-dirty-tracking=kvm needs a guest on KVM; use pagemap"
    trip.verify_source()


def test_two_gibibytes_that_are_mostly_empty(journey):
    trip = journey(hammer(2048))
    trip.migrate()
    trip.finish()
    ram = trip.source.control.info().ram
    assert ram.transferred < 256 << 20
    assert ram.duplicate > 2**19 - 2**15


def test_over_a_unix_socket(journey, tmp_path):
    trip = journey(hammer())
    trip.migrate(f"unix:{tmp_path}/socket")
    trip.finish()
    assert not list(tmp_path.iterdir())


def test_pauses_before_switchover_and_goes_on(journey):
    trip = journey(hammer(), capabilities=[Capability.PAUSE_BEFORE_SWITCHOVER])
    trip.migrate()
    trip.source.wait(Status.PRE_SWITCHOVER)
    assert not trip.source.machine.running
    trip.source.control.continue_(Status.PRE_SWITCHOVER)
    trip.finish()


@pytest.mark.parametrize("capabilities", [[], [Capability.POSTCOPY_RAM]], ids=["plain", "advised"])
def test_a_stopped_guest_moves_and_stays_stopped(journey, capabilities):
    trip = journey(hammer(), capabilities=capabilities, paused=True)
    trip.migrate()
    trip.finish()
    assert not trip.destination.machine.running
    # Nobody has written since: all of the memory is the same on both sides, byte by byte.
    assert (trip.destination.ram() == trip.source.ram()).all()
    trip.destination.machine.cont()
    trip.paused = False
    trip.verify(trip.destination)


def test_the_figures_add_up(journey):
    trip = journey(hammer())
    trip.migrate()
    trip.finish()
    info = trip.source.control.info()
    ram = info.ram
    assert ram.total == trip.workload.memory_bytes
    assert ram.remaining == 0
    assert ram.transferred == ram.precopy_bytes + ram.downtime_bytes
    assert ram.normal_bytes == ram.normal * 4096 <= ram.transferred
    assert ram.normal + ram.duplicate >= ram.total // 4096
    assert 0 <= info.downtime_ms <= info.total_time_ms
    assert info.setup_time_ms <= info.total_time_ms


def test_a_guest_whose_wall_clock_kvm_writes_while_its_devices_are_loaded(journey):
    """As a Linux guest has it; with postcopy-ram on its memory has been watched until then."""
    trip = journey(hammer(), capabilities=POSTCOPY)
    machine = trip.source.machine
    machine.stop()
    (vcpu,) = machine._vcpus
    last_page = machine.memory_bytes - 4096
    vcpu.set_state(replace(vcpu.get_state(), wall_clock_msr=last_page))
    machine.cont()
    trip.migrate()
    trip.source.wait(Status.COMPLETED)
    trip.destination.wait(Status.COMPLETED)
    (arrived,) = trip.destination.machine._vcpus
    trip.destination.machine.stop()
    assert arrived.get_state().wall_clock_msr == last_page


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_guest_that_writes_too_fast_is_slowed_down(journey, vcpus):
    steps = {"cpu-throttle-initial": 40, "cpu-throttle-increment": 30, "max-cpu-throttle": 90}
    trip = journey(
        hammer(vcpus=vcpus),
        capabilities=[Capability.AUTO_CONVERGE],
        parameters=NEVER_ENDS | steps,
    )
    trip.migrate()
    seen = []

    def at_its_most():
        seen.append(trip.source.control.info().cpu_throttle_percentage)
        return seen[-1] == 90

    wait_until(at_its_most)
    assert {*seen} <= {None, 40, 70, 90}
    trip.source.set(parameters=QUICK)
    trip.finish()
    assert trip.source.control.info().cpu_throttle_percentage is None


def test_a_guest_that_was_slowed_down_runs_freely_when_its_engine_dies(journey):
    trip = journey(hammer(), capabilities=[Capability.AUTO_CONVERGE], parameters=NEVER_ENDS)
    trip.migrate()
    wait_until(lambda: trip.source.control.info().cpu_throttle_percentage)
    assert trip.source.keeper.slowed
    os.kill(trip.source.engine_process_id(), signal.SIGKILL)
    trip.source.wait(Status.FAILED)
    wait_until(lambda: not trip.source.keeper.slowed)
    trip.verify_source()


def test_a_guest_that_writes_too_fast_is_held_to_a_rate(journey):
    parameters = NEVER_ENDS | {"vcpu-dirty-limit": 1, "x-vcpu-dirty-limit-period": 100}
    trip = journey(hammer(), capabilities=[Capability.DIRTY_LIMIT], parameters=parameters)
    trip.migrate()
    limit = trip.source.machine.dirty_limit
    wait_until(limit.query)
    trip.source.set(parameters=QUICK)
    trip.finish()
    assert limit.query() == []


def deltas(side):
    cache = side.control.info().xbzrle_cache
    return 0 if cache is None else cache.pages


def test_pages_that_are_sent_again_go_as_deltas(journey):
    parameters = NEVER_ENDS | {"xbzrle-cache-size": 16 << 20}
    trip = journey(hammer(vcpus=2), capabilities=[Capability.XBZRLE], parameters=parameters)
    trip.migrate()
    wait_until(lambda: deltas(trip.source) > 100)
    trip.source.set(parameters=QUICK)
    trip.finish()
    told = trip.source.control.info().to_qapi()["xbzrle-cache"]
    assert told["encoding-rate"] > 1
    assert told["cache-size"] == 16 << 20


def test_deltas_before_postcopy(journey):
    both = [Capability.XBZRLE, Capability.POSTCOPY_RAM]
    trip = journey(hammer(), capabilities=both, parameters=NEVER_ENDS)
    trip.migrate()
    wait_until(lambda: deltas(trip.source) > 100)
    trip.source.control.start_postcopy()
    trip.finish()
