"""``postcopy status``: whose the guest is, as its machine says it, whichever side it is asked as."""

import json

import pytest

from fakes.commands import Running, pair, postcopy
from fakes.pair import TRICKLE
from fakes.waiting import wait_until

pytestmark = pytest.mark.kvm
SIDES = pytest.mark.parametrize("side", ["--from", "--to"])


def status(*sides):
    outcome = postcopy("status", *sides)
    return outcome.returncode, outcome.stdout


def told(machine, side="--from"):
    code, text = status(side, machine.qmp)
    assert code == 0, text
    return text


def completed(machine):
    wait_until(lambda: machine.migration_status() == "completed", 30, "completed")


@SIDES
def test_before_anything_is_ordered(tmp_path, side):
    with pair(tmp_path) as (source, target):
        assert "nothing has been ordered of the guest" in told(source, side)
        assert "the guest  is here" in told(source, side)
        assert "no guest is expected yet" in told(target, side)
        assert "the guest  is not here" in told(target, side)


@SIDES
def test_after_a_snapshot(tmp_path, side):
    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        assert postcopy("snapshot", "--from", guest.qmp, f"{tmp_path}/image").returncode == 0
        text = told(guest, side)
        assert "a snapshot has been taken, and the guest runs on" in text
        assert f"last order snapshot (outgoing) file:{tmp_path}/image" in text
        assert "the guest  is here" in text
        assert "quit" not in text


@SIDES
def test_after_an_arrival(tmp_path, side):
    with pair(tmp_path) as (source, target):
        sides = ["--from", source.qmp, "--to", target.qmp]
        assert postcopy("migrate", *sides, f"unix:{tmp_path}/way").returncode == 0
        completed(target)
        text = told(target, side)
        assert "the guest has arrived, whole" in text
        assert "last order migrate-incoming (incoming)" in text
        assert "the guest  is here" in text
        assert "quit" not in text
        text = told(source, side)
        assert "the guest has moved away" in text
        assert "the guest  is at the other side" in text
        again = source.ask("migrate", uri=f"unix:{tmp_path}/way")["error"]["desc"]
        assert "the destination runs the guest" in again
        assert "waiting for an incoming" not in again


@SIDES
def test_after_a_restore(tmp_path, side):
    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        assert postcopy("snapshot", "--from", guest.qmp, f"{tmp_path}/image").returncode == 0
    with Running(tmp_path, "other", "--incoming", "defer") as other:
        assert "return" in other.ask("x-restore", path=f"{tmp_path}/image")
        completed(other)
        text = told(other, side)
        assert "the guest has been restored, whole" in text
        assert "the guest  is here" in text


@SIDES
def test_an_outgoing_migration_that_failed(tmp_path, side):
    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        guest.ask("migrate", uri=f"unix:{tmp_path}/nobody")
        wait_until(lambda: guest.migration_status() == "failed", 20, "failed")
        text = told(guest, side)
        assert "the last migration failed, and the guest is here" in text
        assert "lost" not in text


@SIDES
def test_a_guest_in_a_file_and_then_taken_back(tmp_path, side):
    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        guest.ask("migrate", uri=f"file:{tmp_path}/image")
        completed(guest)
        text = told(guest, side)
        assert "written to where nothing answers" in text
        assert "cont" in text
        assert "return" in guest.ask("cont")
        text = told(guest, side)
        assert "'cont' has taken the guest back" in text
        assert "the guest  is here" in text


def test_the_destination_is_gone_in_the_midst_of_postcopy(tmp_path):
    """What the source knows is told all the same, and nobody says that nothing is lost."""
    with (
        Running(tmp_path, "source", "--workload", "hammer") as source,
        Running(tmp_path, "target", "--incoming", "defer") as target,
    ):
        on = [{"capability": "postcopy-ram", "state": True}]
        own = {"x-capabilities": on}
        target.ask("migrate-incoming", uri=f"unix:{tmp_path}/way", **own)
        slow = dict(TRICKLE)
        source.ask("migrate", uri=f"unix:{tmp_path}/way", **own, **{"x-parameters": slow})
        source.ask("migrate-start-postcopy")
        wait_until(lambda: target.migration_status() == "postcopy-active", 30, "there")
        target.process.kill()
        target.process.wait()
        wait_until(lambda: source.migration_status() == "postcopy-paused", 30, "broken")
        code, text = status("--from", source.qmp, "--to", target.qmp)
        assert code == 1
        assert "postcopy is broken" in text
        assert "it cannot be reached" in text
        assert "the guest is lost" in text


def test_for_programs(tmp_path):
    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        outcome = postcopy("status", "--json", "--from", guest.qmp)
        found = json.loads(outcome.stdout)["source"]
        assert found["tells_owner"] is True
        assert found["last_order"] is None
        assert found["standing"]["owner"] == "here"
