"""``info migrate`` of what a real QEMU tells is what that QEMU prints of it, in every status at rest."""

import re

import pytest

from fakes.qemu_versions import NEWEST
from fakes.real_qemu import MACHINES, QemuProcess, bios
from postcopy.monitor.hmp import COMMANDS
from postcopy.statistics import MigrationInfo, RamStatistics
from postcopy.status import Status

pytestmark = pytest.mark.qemu(NEWEST)

# Zero pages take 9 bytes each, 288 KiB in all; QEMU sends 32 KiB at once whatever the limit.
SLOW = 20_000


class Qemu(QemuProcess):
    def __init__(self, folder, *more):
        machine = MACHINES["microvm"][0]
        # We do not send it either: older ones do not know it.
        set_up = ["-global", "migration.send-switchover-start=off", *bios(folder), *more]
        super().__init__(folder, ["-M", machine, "-m", "128M", "-smp", "2", *set_up])

    def listen(self):
        self("migrate-incoming", uri="tcp:127.0.0.1:0", **{"exit-on-error": False})
        return self.heard_at()

    def heard_at(self):
        address = self("query-migrate")["socket-address"][-1]
        return f"tcp:{address['host']}:{address['port']}"

    def bandwidth(self, name, bytes_per_second):
        self("migrate-set-parameters", **{name: bytes_per_second})

    def prints(self, line):
        return self("human-monitor-command", **{"command-line": line})

    def check(self, status):
        """When it has got there, what it prints is what we would print."""
        self.wait_migration(status)
        self.check_printed()

    def check_printed(self):
        for line in ("info migrate", "info migrate -a"):
            printed = self.prints(line)
            info = self("query-migrate")
            if total := re.search(r"total=(\d+)", printed):  # it goes on while nothing else does
                info["total-time"] = int(total[1])
            ours = list(
                COMMANDS[line.removesuffix(" -a")].human.show(
                    None, info, {"a": line.endswith("-a")}
                )
            )
            assert ours == printed.splitlines(), line

    def check_members(self):
        """A source of ours in the same status tells the same members."""
        info = self("query-migrate")
        ours = MigrationInfo(
            Status(info["status"]),
            ram=RamStatistics(),
            total_time_ms=1,
            setup_time_ms=1,
            downtime_ms=info.get("downtime"),
            expected_downtime_ms=1,
            error_desc=info.get("error-desc"),
        ).to_qapi()
        assert ours.keys() == info.keys()
        assert ours.get("ram", {}).keys() == info.get("ram", {}).keys()


@pytest.fixture
def pair(tmp_path):
    """A source, and a destination that does not listen yet."""
    with (
        Qemu(tmp_path / "source") as source,
        Qemu(tmp_path / "destination", "-incoming", "defer") as destination,
    ):
        yield source, destination


def test_precopy(pair):
    source, destination = pair
    source.check_printed()
    source.capabilities("pause-before-switchover")
    uri = destination.listen()
    destination.check("setup")
    source("migrate", uri=uri)
    source.check("pre-switchover")
    source.check_members()
    destination.check("active")
    source("migrate-continue", state="pre-switchover")
    source.check("completed")
    source.check_members()
    destination.check("completed")


def test_no_migration_comes_of_it(pair):
    source, destination = pair
    source("migrate", uri="tcp:127.0.0.1:1")
    source.check("failed")
    source.check_members()
    source.bandwidth("max-bandwidth", SLOW)
    source("migrate", uri=destination.listen())
    source.wait_migration("active")
    source.check_members()
    source("migrate_cancel")
    source.check("cancelled")
    source.check_members()
    destination.check("failed")


def test_postcopy(pair):
    source, destination = pair
    for each in pair:
        each.capabilities("postcopy-ram", "postcopy-blocktime")
    source.bandwidth("max-bandwidth", SLOW)
    source.bandwidth("max-postcopy-bandwidth", SLOW)
    source("migrate", uri=destination.listen())
    source.wait_migration("active")
    source("migrate-start-postcopy")
    source.wait_migration("postcopy-active")
    source.check_members()
    source("migrate-pause")
    source.check("postcopy-paused")
    source.check_members()
    destination.check("postcopy-paused")
    destination("migrate-recover", uri="tcp:127.0.0.1:0")
    source.bandwidth("max-postcopy-bandwidth", 0)
    source("migrate", uri=destination.heard_at(), resume=True)
    source.check("completed")
    source.check_members()
    destination.check("completed")
    assert "Postcopy Latency Distribution:" in destination.prints("info migrate -a")


@pytest.mark.kvm
def test_what_cannot_move_says_why(tmp_path):
    with Qemu(tmp_path, "-accel", "kvm", "-cpu", "host,+invtsc") as qemu:
        assert "blocked-reasons" in qemu("query-migrate")
        qemu.check_printed()
