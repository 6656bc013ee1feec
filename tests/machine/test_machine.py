"""The machine runs, stops exactly, and its guest goes on in another."""

import numpy as np
import pytest

from fakes.waiting import wait_until
from machine.machines import MIB, Watched, config_for, need, wait_for_progress, wait_for_work
from postcopy.errors import Refused, WrongState
from postcopy.machine import oracle, workload
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.machine.run_control import RunState
from postcopy.ownership import Move

# mov dx,0x3f8; mov al,'H'; out dx,al; mov al,'i'; out dx,al; mov al,5; out 0xf4,al; jmp $
SAYS_HI = bytes.fromhex("66baf803 b048 ee b069 ee b005 e6f4 ebfe")
# mov dx,0x3fd; in al,dx; mov dl,0xf8; out dx,al; jmp $
SAYS_ITS_LINE_STATUS = bytes.fromhex("66bafd03 ec b2f8 ee ebfe")
HALTS = bytes.fromhex("f4 ebfd")


@pytest.fixture(params=["kvm", "unicorn"])
def accelerator(request):
    need(request.param)
    return request.param


def run_image(image, accelerator, **more):
    return Watched(MachineConfig(2 * MIB, accel=accelerator, image=image, **more))


def test_serial_output_and_switching_off(accelerator):
    with run_image(SAYS_HI, accelerator) as watched:
        machine = watched.machine
        machine.start()
        wait_until(lambda: machine.run_state is RunState.SHUTDOWN)
        assert bytes(watched.serial) == b"Hi"
        assert watched.events == ["RESUME", "SHUTDOWN", "STOP"]
        assert machine.exit_code == 5
        with pytest.raises(WrongState, match="Resetting the Virtual Machine is required"):
            machine.cont()


def test_the_transmitter_is_always_empty(accelerator):
    with run_image(SAYS_ITS_LINE_STATUS, accelerator) as watched:
        watched.machine.start()
        wait_until(lambda: watched.serial)
        assert bytes(watched.serial) == b"\x60"


def test_a_halted_vcpu_idles_and_can_be_stopped(accelerator):
    with run_image(HALTS, accelerator, privilege=0) as watched:
        machine = watched.machine
        machine.start()

        def halted():
            assert machine.run_state is RunState.RUNNING
            machine.pause()
            states = machine.save_devices()
            machine.resume()
            common = next(state for state in states if state.name == "cpu_common")
            return common.payload[:4] == b"\0\0\0\1"

        wait_until(halted)
        machine.pause()
        machine.resume()
        machine.stop()
        assert machine.run_state is RunState.PAUSED


def test_a_triple_fault_ends_the_guest(accelerator):
    with run_image(HALTS, accelerator) as watched:  # HLT is forbidden at privilege 3
        machine = watched.machine
        machine.start()
        wait_until(lambda: machine.run_state is RunState.INTERNAL_ERROR)
        assert watched.events == ["RESUME", "GUEST_PANICKED", "STOP"]
        assert "vCPU 0 cannot go on" in str(machine.failure)


@pytest.mark.parametrize("vcpus", [1, 4])
def test_counters_are_exact_across_50_pauses(accelerator, vcpus):
    work = workload.load("hammer", 8 * MIB, vcpus)
    with Watched(config_for(work, accelerator)) as watched:
        machine = watched.machine
        machine.start()
        wait_for_work(machine, work)
        for _ in range(50):
            wait_for_progress(machine, work)
            machine.pause()
            found = oracle.verify(machine.read_memory, work)
            assert found.ok, found
            machine.resume()
        assert watched.events[:3] == ["RESUME", "STOP", "RESUME"]


@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("name", ["hammer", "sweep", "idle"])
def test_the_guest_goes_on_in_another_machine(accelerator, name, vcpus):
    work = workload.load(name, 8 * MIB, vcpus, delay_cycles=0)
    config = config_for(work, accelerator)
    with Watched(config) as old, Watched(config) as new:
        source, destination = old.machine, new.machine
        source.start()
        wait_for_work(source, work)
        wait_for_progress(source, work)
        move(source, destination)
        found = oracle.verify(destination.read_memory, work)
        destination.resume()
        assert found.ok, found
        wait_for_progress(destination, work)
        destination.pause()
        later = oracle.verify(destination.read_memory, work)
        assert later.ok, later
        if name != "idle":
            assert later.writes > found.writes


def move(source: Machine, destination: Machine) -> None:
    destination.start(incoming=True)
    source.ownership.move(Move.ORDER)
    source.pause(to_move=True)
    destination.write_memory(0, source.read_memory(0, source.config.memory_bytes))
    destination.load_devices(source.save_devices())
    source.ownership.move(Move.GIVE_UP)


def test_between_the_accelerators():
    need("kvm")
    need("unicorn")
    work = workload.load("hammer", 8 * MIB, 2)
    with (
        Watched(config_for(work, "kvm")) as old,
        Watched(config_for(work, "unicorn")) as new,
    ):
        old.machine.start()
        wait_for_work(old.machine, work)
        move(old.machine, new.machine)
        new.machine.resume()
        wait_for_progress(new.machine, work)
        new.machine.pause()
        assert oracle.verify(new.machine.read_memory, work).ok


def test_a_guest_given_up_never_runs_here_again(accelerator):
    work = workload.load("idle", 8 * MIB)
    with Watched(config_for(work, accelerator)) as watched:
        machine = watched.machine
        machine.start()
        machine.ownership.move(Move.ORDER)
        with pytest.raises(WrongState, match="'give-up' is not possible"):
            machine.ownership.move(Move.GIVE_UP)  # it runs: it has to be stopped for the move first
        machine.pause(to_move=True)
        machine.ownership.move(Move.GIVE_UP)
        assert not machine.owned
        machine.set_run_state(RunState.POSTMIGRATE)
        for attempt in (machine.cont, machine.resume):
            with pytest.raises(
                WrongState, match="must not run here: the guest has been handed over"
            ):
                attempt()
        machine.ownership.move(Move.TAKE_BACK)
        machine.cont()
        assert machine.run_state is RunState.RUNNING


def test_a_cancelled_guest_is_not_stopped_for_the_move(accelerator):
    work = workload.load("idle", 8 * MIB)
    with Watched(config_for(work, accelerator)) as watched:
        machine = watched.machine
        machine.start()
        machine.ownership.move(Move.ORDER)
        machine.ownership.move(Move.CANCEL)
        with pytest.raises(WrongState, match="'stop' is not possible: the guest is here"):
            machine.pause(to_move=True)
        machine.resume()
        assert machine.run_state is RunState.RUNNING


def test_privilege_0_runs_the_same_guest(accelerator):
    work = workload.load("hammer", 4 * MIB, fill_bytes=64 << 10, hot_bytes=32 << 10)
    with Watched(config_for(work, accelerator, privilege=0)) as watched:
        watched.machine.start()
        wait_for_work(watched.machine, work)
        wait_for_progress(watched.machine, work)
        watched.machine.pause()
        assert oracle.verify(watched.machine.read_memory, work).ok


def test_dirty_log():
    need("kvm")
    work = workload.load("hammer", 8 * MIB, hot_bytes=MIB)
    with Watched(config_for(work, "kvm")) as watched:
        machine = watched.machine
        machine.start()
        wait_for_work(machine, work)
        machine.start_dirty_log()
        machine.fetch_dirty_log(machine.config.ram_name)
        wait_for_progress(machine, work)
        machine.pause()
        dirty = np.flatnonzero(
            np.unpackbits(machine.fetch_dirty_log(machine.config.ram_name), bitorder="little")
        )
        assert 0x20 in dirty  # the record
        hot = range(0x200, 0x200 + MIB // 4096)
        assert {*dirty} <= {0x20, 0x21, *hot}
        assert len(dirty) > 2
        assert not machine.fetch_dirty_log(machine.config.ram_name).any()
        machine.stop_dirty_log()


def test_regions_and_threads(accelerator):
    work = workload.load("idle", 8 * MIB, 2)
    with Watched(config_for(work, accelerator)) as watched:
        (region,) = watched.machine.regions()
        assert (region.name, region.size_bytes) == ("microvm.ram", 8 * MIB)
        assert region.host_address + 4096 == watched.machine.host_address(4096)
        threads = watched.machine.vcpu_threads()
        assert [thread.index for thread in threads] == [0, 1]
        assert all(thread.thread_id for thread in threads)


def test_nothing_to_boot(accelerator):
    with Watched(MachineConfig(2 * MIB, accel=accelerator)) as watched:
        with pytest.raises(Refused, match="give an image"):
            watched.machine.start()
        watched.machine.start(incoming=True)
        assert watched.machine.run_state is RunState.INMIGRATE
        with pytest.raises(WrongState, match="has been started"):
            watched.machine.start(incoming=True)


def test_state_of_a_running_guest_is_not_given(accelerator):
    work = workload.load("idle", 8 * MIB)
    with Watched(config_for(work, accelerator)) as watched:
        watched.machine.start()
        with pytest.raises(WrongState, match="pause it first"):
            watched.machine.save_devices()
        with pytest.raises(WrongState, match="stop it first"):
            watched.machine.load_devices([])


def test_huge_pages(huge_pages):
    need("kvm")
    work = workload.load("hammer", 8 * MIB)
    huge_pages(4)
    with Watched(config_for(work, "kvm", huge_pages=True)) as watched:
        machine = watched.machine
        assert machine.regions()[0].page_size_bytes == 2 * MIB
        machine.start()
        wait_for_work(machine, work)
        wait_for_progress(machine, work)
        machine.pause()
        assert oracle.verify(machine.read_memory, work).ok


def test_addresses_outside_the_ram():
    need("kvm")
    with Watched(MachineConfig(2 * MIB, accel="kvm")) as watched:
        machine = watched.machine
        for attempt in (
            lambda: machine.read_memory(2 * MIB - 1, 2),
            lambda: machine.write_memory(-1, b"x"),
            lambda: machine.read_physical(2 * MIB - 1, 2),
            lambda: machine.host_address(2 * MIB),
        ):
            with pytest.raises(Refused, match=r"it is at \[0x0, 0x200000\)"):
                attempt()
