"""A sample of the transports with a real QEMU; ``tests/journeys/test_transports.py`` has them all."""

import pytest

from fakes import carry
from interop.arrival import check_goes_on, check_memory, iterations, send_to_qemu
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu

MEMORY_BYTES = 32 * MIB
PRECOPY = ()
ANSWERED = (Capability.RETURN_PATH,)
POSTCOPY = (Capability.RETURN_PATH, Capability.POSTCOPY_RAM)


def hammer():
    return workloads.load("hammer", MEMORY_BYTES, 1, hot_bytes=4 * MIB)


def a_qemu(tmp_path):
    need("kvm")
    return QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES)


@pytest.mark.parametrize("on", [ANSWERED, POSTCOPY], ids=["answered", "postcopy"])
def test_to_qemu_through_a_command(tmp_path, on):
    workload = hammer()
    with (
        a_qemu(tmp_path) as qemu,
        OurGuest.running(workload, "kvm", machine_type="microvm") as ours,
    ):
        qemu.capabilities(*(name.value for name in on))
        ours.switch_on(*on)
        ours.migration.migrate(carry.command(qemu.listen(f"unix:{tmp_path}/door")))
        if on is POSTCOPY:
            ours.migration.start_postcopy()
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        qemu.wait_migration("completed")
        check_goes_on(qemu.read_memory, workload, iterations(ours.machine.read_memory, workload))
        assert not ours.machine.owned
        qemu("stop")
        check_memory(qemu.read_memory, workload)


@pytest.mark.parametrize(
    ("way", "on"),
    [("exec", ANSWERED), ("exec", POSTCOPY), ("file", PRECOPY), ("tcp6", POSTCOPY)],
    ids=["command, answered", "command, postcopy", "file behind an offset", "IPv6, postcopy"],
)
def test_back_from_qemu(tmp_path, way, on):
    workload = hammer()
    with a_qemu(tmp_path) as qemu, OurGuest.waiting(workload, "kvm") as ours:
        send_to_qemu(workload, qemu)
        qemu.parameters(max_bandwidth=1 << 40)
        qemu.capabilities(*(name.value for name in on))
        ours.switch_on(*on)
        if way == "file":
            uri = f"file:{tmp_path}/saved,offset=0x1000"
            qemu("migrate", uri=uri)
            qemu.wait_migration("completed")
            ours.listen(uri)
        elif way == "exec":
            qemu("migrate", uri=carry.command(ours.listen(f"unix:{tmp_path}/door")))
        else:
            ours.migration.incoming("tcp:[::1]:0")
            qemu("migrate", uri=f"tcp:[::1]:{ours.migration.info().socket_address[0]['port']}")
        if on is POSTCOPY:
            qemu("migrate-start-postcopy")
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        qemu.wait_migration("completed")
        check_goes_on(ours.machine.read_memory, workload, iterations(qemu.read_memory, workload))
        assert ours.machine.owned
        ours.machine.stop()
        check_memory(ours.machine.read_memory, workload)
