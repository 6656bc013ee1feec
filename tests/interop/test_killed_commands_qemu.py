"""A command that is killed in between, and the next one: what it had set at a QEMU is undone."""

import signal
import subprocess
import sys

import pytest

from fakes.commands import DEADLINE_S, postcopy
from fakes.real_qemu import MICROVM, QemuProcess, bios

pytestmark = pytest.mark.qemu("10.0", "11.1")

KILLED = """
import asyncio, os, signal, sys
from postcopy import Machine

async def main(what, steps, source, target, place):
    async with Machine.connect(source) as ours, Machine.connect(target) as theirs:
        left = int(steps)

        def killing(execute):
            async def executes(command, arguments=None):
                nonlocal left
                answer = await execute(command, arguments)
                left -= command.startswith("migrate")
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer
            return executes

        for machine in (ours, theirs):
            machine._connection.execute = killing(machine._connection.execute)
        if what == "snapshot":
            await ours.snapshot(place)
            return
        options = {"postcopy": 60.0, "bandwidth": 4 << 10, "downtime_limit_ms": 7}
        more = {"xbzrle": True, "pause-before-switchover": True}
        await (await ours.migrate(f"unix:{place}", to=theirs, capabilities=more, **options)).result()

asyncio.run(main(*sys.argv[1:]))
"""
"""Dies of the n-th answer to a command that changes something."""
LIMITS = ("max-bandwidth", "downtime-limit", "max-postcopy-bandwidth")
MIGRATION = {1: "it is set there", 2: "listens", 3: "it is set here", 4: "limits", 5: "ordered"}


class Qemu(QemuProcess):
    """One QEMU with a QMP socket of its own for our commands."""

    def __init__(self, folder, *more):
        self.qmp = f"unix:{folder}/qmp"
        line = ["-accel", "tcg", "-M", MICROVM, "-m", "64M", *bios(folder)]
        super().__init__(folder, [*line, "-qmp", f"{self.qmp},server=on,wait=off", *more])

    def settings(self):
        states = self("query-migrate-capabilities")
        found = self("query-migrate-parameters")
        on = {each["capability"] for each in states if each["state"]}
        return on, {name: found[name] for name in LIMITS}


@pytest.fixture
def source(tmp_path):
    """A machine whose user has wishes of their own."""
    with Qemu(tmp_path / "a") as machine:
        machine.capabilities("return-path")
        machine("migrate-set-parameters", **{"max-bandwidth": 1 << 32})
        yield machine


@pytest.fixture
def target(tmp_path):
    with Qemu(tmp_path / "b", "-incoming", "defer") as machine:
        yield machine


def killed(what, step, source, target, place):
    line = [sys.executable, "-c", KILLED, what, str(step), source.qmp, target.qmp, str(place)]
    outcome = subprocess.run(line, timeout=DEADLINE_S, capture_output=True, text=True, check=False)
    assert outcome.returncode == -signal.SIGKILL, outcome.stderr


def migrate(source, target, place):
    return postcopy("migrate", "--from", source.qmp, "--to", target.qmp, f"unix:{place}")


@pytest.mark.parametrize("step", MIGRATION, ids=MIGRATION.values())
def test_a_migration_after_a_migration(tmp_path, source, target, step):
    before = source.settings()
    killed("migration", step, source, target, tmp_path / "way")
    if MIGRATION[step] == "ordered":
        after_it_goes_on(tmp_path, source, before)
        return
    outcome = arrives(tmp_path / "way", source, target, before)
    for machine in (source, target):
        was_set = machine is target or step >= 3
        told = "a killed command had changed" in outcome.stdout and machine.qmp in outcome.stdout
        assert told or not was_set, outcome.stdout


def after_it_goes_on(folder, source, before):
    """The migration that was ordered goes on: at this bandwidth it may never come to its end."""
    assert source("query-migrate")["status"] in {"setup", "active", "pre-switchover"}
    with Qemu(folder / "c", "-incoming", "defer") as other:
        refused = migrate(source, other, folder / "another-way")
        assert refused.returncode
        assert "There's a migration process in progress" in refused.stderr
        source("migrate_cancel")
        source.wait_migration("cancelled")
        arrives(folder / "another-way", source, other, before)


def arrives(place, source, target, before):
    """Another command does what it is told, and nothing is left."""
    outcome = migrate(source, target, place)
    assert outcome.returncode == 0, outcome.stderr
    assert source("query-status")["status"] == "postmigrate"
    assert target("query-status")["status"] == "running"
    assert source.settings() == before
    assert target.settings()[0] == set()
    return outcome


@pytest.mark.parametrize("step", [1, 2], ids=["set", "ordered"])
def test_a_migration_after_a_snapshot(tmp_path, source, target, step):
    """In place of the migration there was a second snapshot once, and the guest ran twice."""
    before = source.settings()
    killed("snapshot", step, source, target, tmp_path / "image")
    if source("query-migrate").get("status") not in {None, "none", "completed"}:
        source.wait_migration("completed")
    outcome = arrives(tmp_path / "way", source, target, before)
    assert "had changed background-snapshot, return-path at" in outcome.stdout


def test_what_was_set_since_stays(tmp_path, source, target):
    killed("migration", 4, source, target, tmp_path / "way")
    source("migrate-set-parameters", **{"downtime-limit": 8})
    outcome = migrate(source, target, tmp_path / "way")
    assert outcome.returncode == 0, outcome.stderr
    assert "downtime-limit is 8" in outcome.stdout
    assert source.settings()[1]["downtime-limit"] == 8


def test_another_machine_at_the_same_address(tmp_path, source, target):
    """What was noted of the one before means nothing to it."""
    killed("snapshot", 1, source, target, tmp_path / "image")
    source.close()
    with Qemu(tmp_path / "a") as other:
        outcome = arrives(tmp_path / "way", other, target, other.settings())
        assert "was killed" not in outcome.stdout


def test_what_nothing_tells_is_named(tmp_path, source, target):
    """It may be a user's wish, or have been left by a command on another host."""
    source.capabilities("xbzrle")
    outcome = migrate(source, target, tmp_path / "way")
    assert outcome.returncode == 0, outcome.stderr
    assert f"xbzrle is on at {source.qmp}, and applies to this order" in outcome.stdout
    assert f"max-bandwidth is {1 << 32} at {source.qmp}" in outcome.stdout
