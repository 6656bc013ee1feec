"""A guest moves with a network by vhost-user: to a real QEMU and back, a testpmd at each side."""

import contextlib

import pytest

from fakes.testpmd import Testpmd
from fakes.waiting import wait_until
from interop.arrival import check_memory
from interop.our_guest import OurGuest
from interop.test_drive_qemu import from_qemu, to_qemu
from interop.test_vhost_user_disk_qemu import qemu_with
from machine.machines import need
from machine.networks import check_net, frames, net_workload

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.userfaultfd]


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


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_to_qemu_and_back(tmp_path, postcopy):
    need("kvm")
    workload = net_workload()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        theirs, first, last = (
            enter(Testpmd(tmp_path / name, "--no-mlockall", "--auto-start"))
            for name in ("theirs", "first", "last")
        )
        qemu = enter(qemu_with(tmp_path / "qemu", theirs, device=DEVICE))
        back = enter(OurGuest.waiting(workload, "kvm", vhost_user_net=str(last.path)))
        with OurGuest.running(workload, "kvm", vhost_user_net=str(first.path)) as leaving:
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
