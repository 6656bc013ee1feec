"""A machine goes back to an earlier point of its life, whatever it did since."""

import pytest

from fakes.waiting import wait_until
from machine.machines import MIB, Watched, need
from postcopy.machine.config import MachineConfig
from postcopy.machine.run_control import RunState
from postcopy.machine.sections import decode_devices

COUNTER, FLAG = 0x20000, 0x20010
OUT_OF_RAM = bytes.fromhex(
    "48b8e70000e000000000"  # mov rax, 0xe00000e7: a page of 2 MiB where no RAM is
    "4889042520330000"  # mov [0x3320], rax: at 200 MiB, in the machine's own page directory
    "48ff042500000200"  # again: inc qword [COUNTER]
    "833c251000020000"  # cmp dword [FLAG], 0
    "74ee"  # je again
    "488b1c250000800c"  # mov rbx, [200 MiB]
    "f4"  # hlt
)
NOT_MAPPED = OUT_OF_RAM[18:]  # the same without the two instructions that map it


def counted(machine):
    return int.from_bytes(machine.read_memory(COUNTER, 8), "little")


def wait_for_counts(machine):
    before = counted(machine)
    wait_until(lambda: counted(machine) > before + 100, 10, "the guest does not count")


@pytest.mark.parametrize("accelerator", ["kvm", "unicorn"])
@pytest.mark.parametrize("image", [OUT_OF_RAM, NOT_MAPPED], ids=["no RAM there", "triple fault"])
def test_who_has_ended_is_as_alive_as_ever(accelerator, image):
    need(accelerator)
    config = MachineConfig(64 * MIB, accel=accelerator, image=image, privilege=0)
    with Watched(config) as watched:
        machine = watched.machine
        machine.start()
        wait_for_counts(machine)
        machine.pause()
        back = machine.way_back(machine.save_devices())
        back()
        machine.resume()
        for _ in range(3):
            machine.write_memory(FLAG, b"\1")
            wait_until(lambda: machine.failure is not None, 10, "the guest does not end")
            assert machine.run_state is RunState.INTERNAL_ERROR
            machine.pause()
            machine.write_memory(FLAG, b"\0")
            back()
            machine.resume()
            assert machine.running
            assert machine.failure is None
            wait_for_counts(machine)


@pytest.mark.parametrize("accelerator", ["kvm", "unicorn"])
def test_whom_the_user_has_stopped_stays_so(accelerator):
    need(accelerator)
    config = MachineConfig(64 * MIB, accel=accelerator, image=NOT_MAPPED, privilege=0)
    with Watched(config) as watched:
        machine = watched.machine
        machine.start()
        wait_for_counts(machine)
        machine.pause()
        states = machine.save_devices()
        back = machine.way_back(states)
        tsc = machine_state(states).tsc
        machine.resume()
        wait_for_counts(machine)
        machine.stop()
        machine.pause()
        assert machine_state(machine.save_devices()).tsc > tsc
        back()
        again = machine_state(machine.save_devices())
        assert again.rip == machine_state(states).rip
        machine.resume()
        assert machine.run_state is RunState.PAUSED
        machine.cont()
        wait_for_counts(machine)


def machine_state(states):
    return decode_devices(states, 1).cpus[0]
