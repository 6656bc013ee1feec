"""A large guest that writes all the time moves to a real QEMU: our pings bound what is under way."""

import pytest

from fakes.qemu_versions import ALL
from interop.arrival import check_arrived
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu(*ALL)

MEMORY_BYTES = 256 * MIB


def test_postcopy_of_a_hammered_guest(tmp_path):
    """More than the window many times over goes through it, and requested pages beside it."""
    need("kvm")
    workload = workloads.load("hammer", MEMORY_BYTES, 2)
    with (
        QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES, 2) as qemu,
        OurGuest.running(workload, "kvm") as ours,
    ):
        qemu.capabilities("postcopy-ram", "postcopy-blocktime")
        ours.switch_on(Capability.POSTCOPY_RAM)
        ours.send_by_postcopy(qemu.listen("tcp:127.0.0.1:0"))
        assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
        check_arrived(qemu, workload, ours)
        ram = ours.migration.info().ram
        assert ram.postcopy_requests
        assert ram.postcopy_bytes > MEMORY_BYTES // 2
