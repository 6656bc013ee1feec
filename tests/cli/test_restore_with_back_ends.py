"""``postcopy restore IMAGE`` with a disk, or a network, in another process: the guest goes on with it."""

import pytest

from fakes.commands import Running, need_kvm, need_userfaultfd, postcopy
from fakes.testpmd import Testpmd
from fakes.vhost_back_end import BackEnd
from fakes.waiting import wait_until
from machine.drives import make_disk


class Restored(Running):
    def _run_line(self):
        return [*self.command, "restore", *self._options, "--qmp", self.qmp]


@pytest.mark.parametrize("device", ["blk", "net"])
def test_the_guest_goes_on(tmp_path, device):
    need_kvm()
    need_userfaultfd()
    image, option = str(tmp_path / "image"), f"--vhost-user-{device}"
    disk = make_disk(tmp_path / "disk")
    workload = {"blk": "disk", "net": "net"}[device]
    with _back_end(tmp_path / "one", device, disk) as one:
        options = ("--workload", workload, option, str(one.path))
        with Running(tmp_path, "run.qmp", *options) as running:
            outcome = postcopy("snapshot", "--from", running.qmp, image)
            assert outcome.returncode == 0, outcome.stderr
    with (
        _back_end(tmp_path / "other", device, disk) as other,
        Restored(tmp_path, "restored.qmp", image, option, str(other.path)) as restored,
    ):
        wait_until(lambda: restored.migration_status() == "completed", 30, "all of it is there")
        assert restored.ask("query-status")["return"]["status"] == "running"
    outcome = postcopy("restore", image)
    assert outcome.returncode == 1
    assert f"this machine none; start it with {option} SOCKET" in outcome.stderr


def _back_end(folder, device, disk):
    if device == "net":
        return Testpmd(folder, "--no-mlockall", "--auto-start")
    return BackEnd(folder, disk)
