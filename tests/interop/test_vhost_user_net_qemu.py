"""A guest moves with a network by vhost-user: to a real QEMU and back, a testpmd at each side."""

import contextlib

import pytest

from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.testpmd import Testpmd
from fakes.waiting import wait_until
from interop.arrival import check_memory
from interop.our_guest import OurGuest
from interop.test_drive_qemu import from_qemu, to_qemu
from interop.test_vhost_user_disk_qemu import HUGE_PAGES, qemu_with
from machine.machines import need
from machine.networks import check_net, frames, net_workload

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

DEVICE = (
    "-netdev",
    "vhost-user,id=n0,chardev=c0",
    "-device",
    "virtio-net-device,netdev=n0,ctrl_vq=off,mac=52:54:00:12:34:56",
)


def wait_for_frames(read, workload):
    """Until some more have come back."""
    before = frames(read, workload)
    wait_until(lambda: frames(read, workload) > before + 9, 20, "frames come back")


@pytest.mark.proves(Way.TO, Feature.VHOST_USER_NET)
@pytest.mark.proves(Way.FROM, Feature.VHOST_USER_NET)
@pytest.mark.qemu(*ALL)
def test_by_postcopy_with_huge_pages(tmp_path, huge_pages):
    huge_pages(HUGE_PAGES)
    to_qemu_and_back(tmp_path, postcopy=True, huge=True)


@pytest.mark.qemu
def test_by_precopy(tmp_path):
    to_qemu_and_back(tmp_path, postcopy=False, huge=False)


def to_qemu_and_back(tmp_path, *, postcopy, huge):
    need("kvm")
    workload = net_workload()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        theirs, first, last = (
            enter(Testpmd(tmp_path / name, "--no-mlockall", "--auto-start"))
            for name in ("theirs", "first", "last")
        )
        qemu = enter(qemu_with(tmp_path / "qemu", theirs, device=DEVICE, huge_pages=huge))
        first, last = ({"vhost_user_net": str(x.path), "huge_pages": huge} for x in (first, last))
        back = enter(OurGuest.waiting(workload, "kvm", **last))
        with OurGuest.running(workload, "kvm", **first) as leaving:
            to_qemu(leaving, qemu, postcopy=postcopy)
        wait_for_frames(qemu.read_memory, workload)
        qemu("stop")
        check_memory(qemu.read_memory, workload)
        check_net(qemu.read_memory, workload)
        qemu("cont")
        from_qemu(qemu, back, postcopy=postcopy)
        wait_for_frames(back.machine.read_memory, workload)
        back.machine.stop()
        check_memory(back.machine.read_memory, workload)
        check_net(back.machine.read_memory, workload)
