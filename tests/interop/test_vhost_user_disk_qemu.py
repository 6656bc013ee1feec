"""A guest moves with a disk by vhost-user: to a real QEMU and back, each with a back end of its own."""

import contextlib

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.vhost_back_end import BackEnd, StorageDaemon
from interop.arrival import iterations
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from interop.test_drive_qemu import back_from_qemu, check_works_on, to_qemu
from machine.drives import MEMORY_BYTES, disk_workload, make_disk, writes_and_reads
from machine.machines import MIB, need

pytestmark = [pytest.mark.qemu(*ALL), pytest.mark.kvm, pytest.mark.userfaultfd]


DISK = ("-device", "vhost-user-blk,id=drive,chardev=c0")
HUGE_PAGES = 3 * MEMORY_BYTES // (2 * MIB)
"""Those of two machines, and some that are given back late."""


def qemu_with(folder, back_end, vcpus=1, device=DISK, *, huge_pages=False):
    size = f"{MEMORY_BYTES // MIB}M"
    memory = f"memory-backend-memfd,id=microvm.ram,size={size},share=on"
    if huge_pages:
        memory += ",hugetlb=on,hugetlbsize=2M"
    more = ["-object", memory, "-machine", "memory-backend=microvm.ram"]
    more += ["-global", "virtio-mmio.force-legacy=off"]
    more += ["-chardev", f"socket,id=c0,path={back_end.path}"]
    return QemuGuest(folder, "microvm", "kvm", MEMORY_BYTES, vcpus, [*more, *device])


@pytest.mark.proves(Way.TO, Feature.VHOST_USER)
@pytest.mark.proves(Way.FROM, Feature.VHOST_USER)
@pytest.mark.parametrize(
    ("postcopy", "huge", "qemus", "ours"),
    [
        pytest.param(False, True, StorageDaemon, StorageDaemon, id="precopy-hugetlb"),
        # With QEMU as front end qemu-storage-daemon cannot do postcopy.
        pytest.param(True, False, BackEnd, StorageDaemon, id="postcopy"),
    ],
)
def test_to_qemu_and_back(tmp_path, huge_pages, postcopy, huge, qemus, ours):
    need("kvm")
    huge_pages(HUGE_PAGES * huge)
    vcpus = 2
    path = make_disk(tmp_path / "disk")
    workload = disk_workload(vcpus=vcpus, delay_cycles=0)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        theirs = enter(qemus(tmp_path / "theirs", path))
        first, last = (enter(ours(tmp_path / name, path)) for name in ("first", "last"))
        qemu = enter(qemu_with(tmp_path / "qemu", theirs, vcpus, huge_pages=huge))
        first, last = ({"vhost_user_blk": str(x.path), "huge_pages": huge} for x in (first, last))
        back = enter(OurGuest.waiting(workload, "kvm", **last))
        with OurGuest.running(workload, "kvm", **first) as leaving:
            to_qemu(leaving, qemu, postcopy=postcopy)
            read = leaving.machine.read_memory
            left_at, requests = iterations(read, workload), writes_and_reads(read, workload)
        check_works_on(qemu.read_memory, workload, left_at, requests)
        back_from_qemu(qemu, back, workload, path, postcopy=postcopy)
