"""Memory of 2 MiB pages at both ends, one of them a real QEMU: by postcopy there and back."""

import pytest

from interop.arrival import check_arrived, check_goes_on, check_memory, iterations
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need
from postcopy.machine import workload as workloads
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.qemu

MEMORY_BYTES = 32 * MIB
HUGE_BYTES = 2 * MIB
BACKEND = f"memory-backend-memfd,id=microvm.ram,size={MEMORY_BYTES},hugetlb=on,hugetlbsize=2M"
PREEMPT = Capability.POSTCOPY_PREEMPT


@pytest.mark.parametrize("more", [[], [PREEMPT]], ids=["plain", "preempt"])
def test_there_and_back(huge_pages, tmp_path, more):
    need("kvm")
    huge_pages(3 * MEMORY_BYTES // HUGE_BYTES)
    fill = MEMORY_BYTES - workloads.BASE_ADDRESS
    workload = workloads.load("hammer", MEMORY_BYTES, 2, hot_bytes=fill)
    capabilities = [Capability.POSTCOPY_RAM, *more]
    memory = ["-object", BACKEND, "-machine", "memory-backend=microvm.ram"]
    with QemuGuest(tmp_path, "microvm", "kvm", MEMORY_BYTES, 2, memory) as qemu:
        qemu.capabilities(*capabilities)
        with OurGuest.running(workload, "kvm", huge_pages=True) as ours:
            ours.switch_on(*capabilities)
            ours.send_by_postcopy(qemu.listen("tcp:127.0.0.1:0"))
            assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
            check_arrived(qemu, workload, ours)
        qemu("cont")
        with OurGuest.waiting(workload, "kvm", huge_pages=True) as ours:
            ours.switch_on(*capabilities)
            qemu.send_by_postcopy(ours.listen("tcp:127.0.0.1:0"))
            assert ours.wait_end() is Status.COMPLETED, (ours.error, qemu.log)
            qemu.wait_migration("completed")
            read = ours.machine.read_memory
            check_goes_on(read, workload, iterations(qemu.read_memory, workload))
            ours.machine.stop()
            check_memory(read, workload)
