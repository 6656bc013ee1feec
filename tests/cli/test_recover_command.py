"""``postcopy recover`` and ``postcopy status``: what a user types when the cable has been pulled."""

import json
import subprocess

import pytest

from fakes.commands import DEADLINE_S, POSTCOPY, one_line, pair, postcopy
from fakes.pair import NEVER_ENDS
from fakes.waiting import wait_until
from faults.fault_channel import NOTHING_MISSING, FaultChannel

pytestmark = pytest.mark.kvm
PAUSED = "postcopy-paused"


@pytest.fixture
def broken(tmp_path):
    """Both sides of a postcopy, paused."""
    with pair(tmp_path, "hammer") as (source, target):
        for side in (source, target):
            wanted = [{"capability": "postcopy-ram", "state": True}]
            side.ask("migrate-set-capabilities", capabilities=wanted)
        source.ask("migrate-set-parameters", **NEVER_ENDS, **{"max-postcopy-bandwidth": 256 << 10})
        target.ask("migrate-incoming", uri=f"unix:{tmp_path}/way")
        source.ask("migrate", uri=f"unix:{tmp_path}/way")
        source.ask("migrate-start-postcopy")
        for side in (source, target):
            wait_until(
                lambda side=side: side.migration_status() == "postcopy-active",
                DEADLINE_S,
                "postcopy",
            )
        source.ask("migrate-pause")
        for side in (source, target):
            wait_until(lambda side=side: side.migration_status() == PAUSED, DEADLINE_S, PAUSED)
        yield source, target


def test_recover_brings_both_together_and_reports(broken):
    source, target = broken
    sides = ["--from", source.qmp, "--to", target.qmp]
    said = postcopy("status", *sides)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines()[-1] == f"next         postcopy recover {' '.join(sides)}"
    assert "because    Postcopy migration is paused by the user" in said.stdout
    source.ask("migrate-set-parameters", **{"max-postcopy-bandwidth": 0})
    outcome = postcopy("recover", *sides)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "total time" in outcome.stdout
    told = json.loads(postcopy("status", "--json", *sides).stdout)
    assert told["source"]["standing"]["meaning"] == "the guest has moved away"
    assert told["destination"]["standing"] | {"waits_for": ""} == {
        "meaning": "the guest has arrived, whole", "owner": "here", "waits_for": "", "next": "",
    }  # fmt: skip
    again = postcopy("recover", *sides)
    assert again.returncode == 3
    assert "there is no broken postcopy to recover; the source is completed" in one_line(again)


def test_a_source_that_cannot_know_is_told_that_all_has_arrived(tmp_path):
    """The link breaks with the destination's word that nothing is missing."""
    with pair(tmp_path, "hammer") as (source, target):
        for side in (source, target):
            wanted = [{"capability": "postcopy-ram", "state": True}]
            side.ask("migrate-set-capabilities", capabilities=wanted)
        source.ask("migrate-set-parameters", **NEVER_ENDS)
        target.ask("migrate-incoming", uri=f"unix:{tmp_path}/way")
        with FaultChannel(f"unix:{tmp_path}/relay", f"unix:{tmp_path}/way") as channel:
            fault = channel.cut(NOTHING_MISSING, at=0)
            source.ask("migrate", uri=channel.uri)
            source.ask("migrate-start-postcopy")
            fault.wait()
            for side, status in ((source, PAUSED), (target, "completed")):
                wait_until(
                    lambda side=side, status=status: side.migration_status() == status,
                    DEADLINE_S,
                    status,
                )
        sides = ["--from", source.qmp, "--to", target.qmp]
        assert "next         x_migrate_arrived" in postcopy("status", *sides).stdout
        outcome = postcopy("recover", *sides)
        assert (outcome.returncode, outcome.stderr) == (0, "")
        assert source.migration_status() == "completed"


def test_what_does_not_come_to_recovery_needs_it_still(broken, tmp_path):
    source, target = broken
    sides = ["--from", source.qmp, "--to", target.qmp]
    refused = postcopy("recover", *sides, f"unix:{tmp_path}/no/such")
    assert refused.returncode == 3
    assert "No such file" in one_line(refused)
    line = [*POSTCOPY, "recover", "--json", *sides, f"unix:{tmp_path}/again"]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        looks = (json.loads(text) for text in iter(command.stdout.readline, ""))
        assert any(look.get("phase") == "postcopy" for look in looks)
        source.ask("migrate-pause")
        assert command.wait(DEADLINE_S) == 4
        assert (
            f"nothing is lost: type 'postcopy recover {' '.join(sides)}'" in command.stderr.read()
        )


def test_a_pull_of_the_cable_is_mended_unasked(tmp_path):
    with pair(tmp_path, "hammer") as (source, target):
        source.ask("migrate-set-parameters", **NEVER_ENDS, **{"max-postcopy-bandwidth": 256 << 10})
        line = ["migrate", "--json", "--from", source.qmp, "--to", target.qmp, "--postcopy", "now",
                "--auto-recover", "20", f"unix:{tmp_path}/way"]  # fmt: skip
        with subprocess.Popen([*POSTCOPY, *line], stdout=subprocess.PIPE, text=True) as command:
            looks = (json.loads(text) for text in iter(command.stdout.readline, ""))
            assert any(look.get("phase") == "postcopy" for look in looks)
            source.ask("migrate-pause")
            assert any(look.get("phase") == "paused" for look in looks)
            source.ask("migrate-set-parameters", **{"max-postcopy-bandwidth": 0})
            assert list(looks)[-1]["status"] == "completed"
            assert command.wait(DEADLINE_S) == 0


def test_auto_recovery_needs_the_destination():
    outcome = postcopy("migrate", "--from", "unix:/none", "--auto-recover", "5", "tcp:a:1")
    assert outcome.returncode == 3
    assert "give --to" in one_line(outcome)


def test_status_needs_a_side():
    outcome = postcopy("status")
    assert outcome.returncode == 2
    assert one_line(outcome) == "give --from or --to, or both; see 'postcopy status --help'"


def test_the_source_is_gone_for_good(broken):
    source, target = broken
    assert "x-on-loss is 'hold'" in target.ask("x-migrate-lost")["error"]["desc"]
    source.process.kill()
    target.ask("migrate-set-parameters", **{"x-on-loss": "quit"})
    assert target.ask("x-migrate-lost") == {"return": {}}
    assert target.process.wait(DEADLINE_S) == 1
    assert target.stderr.splitlines() == [
        "postcopy: the incoming migration failed: the source is gone for good, and the guest cannot "
        "go on without its pages"
    ]


def test_a_guest_that_touches_a_lost_page_stops_and_says_which(broken):
    _, target = broken
    target.ask("migrate-set-parameters", **{"x-on-loss": "poison"})
    assert target.ask("x-migrate-lost") == {"return": {}}

    def state():
        return target.ask("query-status")["return"]["status"]

    wait_until(lambda: state() == "internal-error", DEADLINE_S, "the guest's failure")
    said = postcopy("status", "--to", target.qmp)
    assert "the guest runs here without the pages that were lost with its source" in said.stdout
    assert "pages of block 'microvm.ram' are lost" in said.stdout
