"""A guest of 5 GiB, mostly empty, goes to a real QEMU and comes back: both put its RAM at one place.

The guest works on either side of the address where microvm's hole for devices is.
"""

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.waiting import wait_until
from interop.arrival import check_goes_on, check_memory, iterations, wait_until_beyond
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.errors import Refused
from postcopy.machine import workload as workloads
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu

GIB = 1 << 30
FILL_BYTES = 16 * MIB
TCG = pytest.param("tcg", 1, marks=pytest.mark.proves(Way.FROM, Feature.TCG))


def around_the_hole(vcpus):
    base = 3 * GIB - FILL_BYTES // 2
    return workloads.load("hammer", 5 * GIB, vcpus, fill_bytes=FILL_BYTES, base_address=base)


def send(workload, qemu, *, postcopy=False):
    """Bring our guest into QEMU, where it works on."""
    with OurGuest.running(workload, "kvm", machine_type=qemu.machine) as ours:
        if postcopy:
            qemu.capabilities("postcopy-ram")
            ours.switch_on(Capability.POSTCOPY_RAM)
            # At this pace the guest writes faster than it is sent.
            ours.migration.set_parameters({"downtime-limit": 0, "max-bandwidth": 40 * MIB})
        ours.migration.migrate(qemu.listen("tcp:127.0.0.1:0"))
        if postcopy:
            wait_until(lambda: ours.events.count("MIGRATION_PASS") > 1, 20, "no second round")
            ours.migration.start_postcopy()
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        assert ("postcopy-active" in ours.events) is postcopy
        left_at = iterations(ours.machine.read_memory, workload)
    qemu.wait_migration("completed")
    wait_until_beyond(qemu.read_memory, workload, left_at)


@pytest.mark.parametrize(
    ("machine", "accelerator", "postcopy"),
    [("microvm", "kvm", True), ("microvm", "tcg", True), ("none", "kvm", False)],
)
def test_there(tmp_path, machine, accelerator, postcopy):
    need("kvm")
    workload = around_the_hole(1)
    with QemuGuest(tmp_path, machine, accelerator, workload.memory_bytes) as qemu:
        send(workload, qemu, postcopy=postcopy)
        qemu("stop")
        check_memory(qemu.read_memory, workload)


@pytest.mark.qemu(*ALL)
@pytest.mark.proves(Way.TO, Feature.LARGE)
@pytest.mark.proves(Way.FROM, Feature.LARGE)
@pytest.mark.parametrize(("accelerator", "vcpus"), [("kvm", 2), TCG])
def test_there_and_back(tmp_path, accelerator, vcpus):
    need("kvm")
    workload = around_the_hole(vcpus)
    with (
        QemuGuest(tmp_path, "microvm", accelerator, workload.memory_bytes, vcpus) as qemu,
        OurGuest.waiting(workload, "kvm") as ours,
    ):
        send(workload, qemu)
        qemu.parameters(max_bandwidth=1 << 40)
        qemu("migrate", uri=ours.listen("tcp:127.0.0.1:0"))
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        qemu.wait_migration("completed")
        read = ours.machine.read_memory
        check_goes_on(read, workload, iterations(qemu.read_memory, workload))
        ours.machine.stop()
        check_memory(read, workload)


@pytest.mark.qemu(*ALL)
@pytest.mark.parametrize("machine", ["microvm", "none"])
def test_physical_addresses_are_those_of_qemu(tmp_path, machine):
    config = MachineConfig(5 * GIB, accel="unicorn", machine_type=machine)
    need("unicorn")
    with QemuGuest(tmp_path, machine, "tcg", 5 * GIB) as qemu, Machine(config) as ours:
        # QEMU's firmware ends at 4 GiB.
        asked = [3 * GIB - 1, 3 * GIB, 4 * GIB - MIB, 4 * GIB, 5 * GIB, 6 * GIB - 1, 6 * GIB]
        theirs = [qemu_offset(qemu, address) for address in asked]
        assert theirs == [our_offset(ours, address) for address in asked]
        assert theirs[1] == (None if machine == "microvm" else 3 * GIB)


def qemu_offset(qemu, address):
    """Which byte of the RAM block stands at a physical address; None without one."""
    start, found = (qemu.monitor(f"gpa2hva {a:#x}").split() for a in (0, address))
    return None if found[0] == "No" else int(found[-1], 16) - int(start[-1], 16)


def our_offset(machine, address):
    try:
        return machine.host_address(address) - machine.regions()[0].host_address
    except Refused:
        return None
