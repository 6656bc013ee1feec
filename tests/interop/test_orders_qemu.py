"""What our commands set in a QEMU, whose settings stay: it is put back, and what was left is seen."""

import asyncio

import pytest

from fakes.commands import one_line, postcopy
from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL, OLDEST
from fakes.real_qemu import MICROVM, QemuProcess, bios
from postcopy import Machine, MigrationFailed, Refused

pytestmark = pytest.mark.qemu(*ALL)


class Qemu(QemuProcess):
    """One QEMU with a QMP socket of its own for our commands."""

    def __init__(self, folder, *more):
        self.qmp = f"unix:{folder}/qmp"
        line = ["-accel", "tcg", "-M", MICROVM, "-m", "64M", *bios(folder)]
        super().__init__(folder, [*line, "-qmp", f"{self.qmp},server=on,wait=off", *more])

    def on(self):
        states = self("query-migrate-capabilities")
        return {each["capability"] for each in states if each["state"]}


@pytest.mark.proves(Way.FROM, Feature.MOVED)
def test_a_snapshot_left_on_by_a_killed_command_is_switched_off_first(tmp_path):
    with Qemu(tmp_path / "a") as source, Qemu(tmp_path / "b", "-incoming", "defer") as target:
        source.capabilities("background-snapshot")
        sides = ["--from", source.qmp, "--to", target.qmp]
        outcome = postcopy("migrate", *sides, f"unix:{tmp_path}/way")
        assert outcome.returncode == 0, outcome.stderr
        assert "background-snapshot is on" in outcome.stdout
        assert source("query-status")["status"] == "postmigrate"
        assert target("query-status")["status"] == "running"
        assert source.on() == target.on() == set()


def test_all_is_put_back_when_it_fails(tmp_path):
    async def move():
        async with Machine.connect(source.qmp) as machine:
            uri = f"unix:{tmp_path}/nobody"
            options = {"bandwidth": 1 << 20, "downtime_limit_ms": 7}
            with pytest.raises((MigrationFailed, Refused)):
                await (await machine.migrate(uri, postcopy=60.0, **options)).result()

    with Qemu(tmp_path / "a") as source:
        source.capabilities("return-path", "pause-before-switchover")
        before = source("query-migrate-parameters")
        asyncio.run(move())
        assert source.on() == {"return-path", "pause-before-switchover"}
        assert source("query-migrate-parameters") == before
        assert source("query-status")["status"] == "running"


def test_snapshots_at_the_same_time_take_turns(tmp_path):
    """Neither becomes a migration."""

    async def take(name):
        async with Machine.connect(f"unix:{tmp_path}/a/{name}") as machine:
            return await machine.snapshot(tmp_path / name)

    async def both():
        found = await asyncio.gather(take("qmp"), take("second"), return_exceptions=True)
        assert not all(isinstance(each, BaseException) for each in found)

    second = ["-qmp", f"unix:{tmp_path}/a/second,server=on,wait=off"]
    with Qemu(tmp_path / "a", *second) as source:
        source.capabilities("return-path")
        asyncio.run(both())
        assert source("query-status")["status"] == "running"
        assert source.on() == {"return-path"}


def test_what_another_changes_in_between_is_seen(tmp_path):
    """The snapshot has become a migration to its file: it is undone, and refused by name."""

    async def take():
        async with Machine.connect(source.qmp) as machine:
            execute = machine._connection.execute

            async def interfered(command, arguments=None):
                if command == "migrate":
                    off = {"capability": "background-snapshot", "state": False}
                    source("migrate-set-capabilities", capabilities=[off])
                return await execute(command, arguments)

            machine._connection.execute = interfered
            with pytest.raises(Refused, match="another client has changed background-snapshot"):
                await machine.snapshot(tmp_path / "image")

    with Qemu(tmp_path / "a") as source:
        asyncio.run(take())
        assert source("query-status")["status"] == "running"
        assert not (tmp_path / "image").exists()


def test_status_says_that_a_qemu_does_not_tell(tmp_path):
    with Qemu(tmp_path / "a") as source, Qemu(tmp_path / "b", "-incoming", "defer") as target:
        assert postcopy("snapshot", "--from", source.qmp, f"{tmp_path}/image").returncode == 0
        after_a_snapshot = postcopy("status", "--from", source.qmp).stdout
        assert "has ended, and the guest is here" in after_a_snapshot
        assert "quit" not in after_a_snapshot
        sides = ["--from", source.qmp, "--to", target.qmp]
        assert postcopy("migrate", *sides, f"unix:{tmp_path}/way").returncode == 0
        told = postcopy("status", *sides).stdout
        assert "moved away, or has been written to a file" in told
        assert "the guest  is here" in told.partition("destination")[2]
        assert told.count("does not tell the owner") == 2


@pytest.mark.qemu(OLDEST)
def test_one_that_cannot_be_given_the_file_is_refused_and_left_alone(tmp_path):
    """Before QEMU 8.2 a snapshot is written to a descriptor, which TCP cannot carry."""
    second = ["-chardev", "socket,id=far,host=127.0.0.1,port=0,server=on,wait=off"]
    with Qemu(tmp_path / "a", *second, "-mon", "chardev=far,mode=control") as source:
        (far,) = (each for each in source("query-chardev") if each["label"] == "far")
        address = far["filename"].partition("tcp:")[2].partition(",")[0]
        outcome = postcopy("snapshot", "--from", f"tcp:{address}", f"{tmp_path}/image")
        assert "use the machine's Unix socket for QMP" in one_line(outcome)
        assert source("query-status")["status"] == "running"
        assert source.on() == set()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
