"""``postcopy recover`` with a real QEMU as destination."""

import pytest

from fakes.commands import Running, postcopy
from fakes.pair import NEVER_ENDS
from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL
from fakes.waiting import wait_until
from interop.qemu_guest import QemuGuest
from machine.machines import MIB, need

pytestmark = pytest.mark.qemu(*ALL)
TIMEOUT_S = 30


@pytest.mark.proves(Way.TO, Feature.RECOVERED)
def test_one_command_recovers_our_guest_at_qemu(tmp_path):
    need("kvm")
    second = ["-qmp", f"unix:{tmp_path}/qemu,server=on,wait=off"]
    with (
        QemuGuest(tmp_path, "microvm", "kvm", 64 * MIB, more=second) as qemu,
        Running(tmp_path, "source", "--workload", "hammer") as source,
    ):
        qemu.capabilities("postcopy-ram")
        wanted = [{"capability": "postcopy-ram", "state": True}]
        source.ask("migrate-set-capabilities", capabilities=wanted)
        slow = {**NEVER_ENDS, "max-postcopy-bandwidth": 256 << 10}
        source.ask("migrate-set-parameters", **slow)
        source.ask("migrate", uri=qemu.listen(f"unix:{tmp_path}/way"))
        source.ask("migrate-start-postcopy")
        qemu.wait_migration("postcopy-active")
        source.ask("migrate-pause")
        qemu.wait_migration("postcopy-paused")
        wait_until(lambda: source.migration_status() == "postcopy-paused", TIMEOUT_S, "paused")
        source.ask("migrate-set-parameters", **{"max-postcopy-bandwidth": 0})
        sides = ["--from", source.qmp, "--to", f"unix:{tmp_path}/qemu"]
        told = postcopy("status", *sides)
        assert told.stdout.splitlines()[-1] == f"next         postcopy recover {' '.join(sides)}"
        outcome = postcopy("recover", *sides, f"unix:{tmp_path}/again")
        assert (outcome.returncode, outcome.stderr) == (0, "")
        qemu.wait_migration("completed")
        assert source.migration_status() == "completed"
