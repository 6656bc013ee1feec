"""A guest moves with a disk by vhost-user: to a real QEMU and back, each with a back end of its own."""

import contextlib

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.vhost_back_end import BackEnd, StorageDaemon
from interop.arrival import check_memory, iterations
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from interop.test_drive_qemu import check_works_on, to_qemu
from machine.drives import MEMORY_BYTES, check_disk, disk_workload, make_disk, writes_and_reads
from machine.machines import MIB, need
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = [pytest.mark.qemu(*ALL), pytest.mark.kvm, pytest.mark.userfaultfd]


def qemu_with(folder, back_end, vcpus=1):
    size = f"{MEMORY_BYTES // MIB}M"
    memory = f"memory-backend-memfd,id=microvm.ram,size={size},share=on"
    more = ["-object", memory, "-machine", "memory-backend=microvm.ram"]
    more += ["-global", "virtio-mmio.force-legacy=off"]
    more += ["-chardev", f"socket,id=c0,path={back_end.path}"]
    more += ["-device", "vhost-user-blk,id=drive,chardev=c0"]
    return QemuGuest(folder, "microvm", "kvm", MEMORY_BYTES, vcpus, more)


@pytest.mark.proves(Way.TO, Feature.VHOST_USER)
@pytest.mark.proves(Way.FROM, Feature.VHOST_USER)
@pytest.mark.parametrize(
    ("postcopy", "qemus", "ours"),
    [
        pytest.param(False, StorageDaemon, StorageDaemon, id="precopy"),
        # With QEMU as front end qemu-storage-daemon cannot do postcopy.
        pytest.param(True, BackEnd, StorageDaemon, id="postcopy"),
    ],
)
def test_to_qemu_and_back(tmp_path, postcopy, qemus, ours):
    need("kvm")
    vcpus = 2
    path = make_disk(tmp_path / "disk")
    workload = disk_workload(vcpus=vcpus, delay_cycles=0)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        theirs = enter(qemus(tmp_path / "theirs", path))
        first, last = (enter(ours(tmp_path / name, path)) for name in ("first", "last"))
        qemu = enter(qemu_with(tmp_path / "qemu", theirs, vcpus))
        back = enter(OurGuest.waiting(workload, "kvm", vhost_user_blk=str(last.path)))
        with OurGuest.running(workload, "kvm", vhost_user_blk=str(first.path)) as leaving:
            to_qemu(leaving, qemu, postcopy=postcopy)
            read = leaving.machine.read_memory
            left_at, requests = iterations(read, workload), writes_and_reads(read, workload)
        check_works_on(qemu.read_memory, workload, left_at, requests)
        qemu("stop")
        check_memory(qemu.read_memory, workload)
        check_disk(qemu.read_memory, workload, path)
        qemu("cont")
        if postcopy:
            qemu.capabilities("postcopy-ram")
            back.switch_on(Capability.POSTCOPY_RAM)
            qemu.parameters(max_bandwidth=40 * MIB, downtime_limit=1)
        else:
            qemu.parameters(max_bandwidth=1 << 40)
        qemu("migrate", uri=back.listen("tcp:127.0.0.1:0"))
        if postcopy:
            qemu("migrate-start-postcopy")
        assert back.wait_end() is Status.COMPLETED, (back.error, qemu.log)
        qemu.wait_migration("completed")
        left_at = iterations(qemu.read_memory, workload)
        requests = writes_and_reads(qemu.read_memory, workload)
        assert ("postcopy-active" in back.events) is postcopy
        check_works_on(back.machine.read_memory, workload, left_at, requests)
        back.machine.stop()
        check_memory(back.machine.read_memory, workload)
        check_disk(back.machine.read_memory, workload, path)
