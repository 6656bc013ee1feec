"""``postcopy migrate`` between two processes."""

import json
import signal
import subprocess

import pytest

from fakes.commands import DEADLINE_S, POSTCOPY, Running, one_line, pair, postcopy
from fakes.waiting import wait_until

pytestmark = pytest.mark.kvm


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_one_command_drives_both_and_reports(tmp_path):
    with pair(tmp_path) as (source, target):
        outcome = postcopy(
            "migrate", "--from", source.qmp, "--to", target.qmp, f"unix:{tmp_path}/way",
            "--postcopy", "now", "--bandwidth", "1G",
        )  # fmt: skip
        assert (outcome.returncode, outcome.stderr) == (0, "")
        assert "total time" in outcome.stdout
        assert "blocktime of vCPU 0" in outcome.stdout
        assert source.ask("query-status")["return"]["status"] == "postmigrate"
        assert target.ask("query-status")["return"]["status"] == "running"


def test_over_several_connections_compressed(tmp_path):
    with pair(tmp_path) as (source, target):
        outcome = postcopy(
            "migrate", "--from", source.qmp, "--to", target.qmp, f"unix:{tmp_path}/way",
            "--multifd", "3", "--compress", "zstd",
        )  # fmt: skip
        assert (outcome.returncode, outcome.stderr) == (0, "")
        ram = source.ask("query-migrate")["return"]["ram"]
        assert ram["multifd-bytes"] > 0
        states = source.ask("query-migrate-capabilities")["return"]
        assert {"capability": "multifd", "state": False} in states  # it was of this order


def test_pages_are_compressed_on_such_connections_only(tmp_path):
    with Running(tmp_path, "source", "--workload", "idle") as source:
        outcome = postcopy(
            "migrate", "--from", source.qmp, f"unix:{tmp_path}/way", "--compress", "zlib"
        )
        assert outcome.returncode == 3
        assert "compressed on channels of multifd only; give --multifd N" in one_line(outcome)


def test_json_is_an_object_a_line_and_never_runs_backwards(tmp_path):
    with pair(tmp_path) as (source, target):
        outcome = postcopy(
            "migrate", "--json", "--from", source.qmp, "--to", target.qmp, f"unix:{tmp_path}/way"
        )
    *looks, result = json_lines(outcome.stdout)
    assert outcome.returncode == 0
    assert {look["event"] for look in looks} == {"progress"}
    for name in ("fraction", "transferred_bytes", "round", "elapsed_ms"):
        values = [look[name] for look in looks]
        assert values == sorted(values)
    assert looks[-1]["fraction"] == 1
    assert (result["event"], result["status"]) == ("result", "completed")
    assert result["normal_pages"] > 0


def test_a_destination_that_is_not_there_fails_and_the_guest_runs_on(tmp_path):
    with Running(tmp_path, "source", "--workload", "idle") as source:
        outcome = postcopy("migrate", "--json", "--from", source.qmp, f"unix:{tmp_path}/nobody")
        assert outcome.returncode == 1
        assert "No such file or directory" in one_line(outcome)
        result = json_lines(outcome.stdout)[-1]
        assert (result["event"], result["status"]) == ("result", "failed")
        assert source.ask("query-status")["return"]["running"]


def test_what_the_source_refuses_is_refused_beforehand(tmp_path):
    with Running(tmp_path, "source", "--workload", "idle") as source:
        outcome = postcopy("migrate", "--from", source.qmp, "carrier-pigeon:here")
        assert outcome.returncode == 3
        assert one_line(outcome) == "unknown migration protocol: carrier-pigeon:here"


def test_a_machine_that_waits_for_no_guest_is_no_destination(tmp_path):
    with (
        Running(tmp_path, "source", "--workload", "idle") as source,
        Running(tmp_path, "other", "--workload", "idle") as other,
    ):
        arguments = ["--from", source.qmp, "--to", other.qmp, f"unix:{tmp_path}/way"]
        outcome = postcopy("migrate", *arguments)
        assert outcome.returncode == 3
        assert "'-incoming' was not specified" in one_line(outcome)


def begin_slowly(source, target, tmp_path, *options):
    """A migration that takes for ever, watched by a command that is under way."""
    line = ["migrate", "--json", "--from", source.qmp, "--to", target.qmp, "--bandwidth", "256K"]
    return subprocess.Popen(
        [*POSTCOPY, *line, *options, f"unix:{tmp_path}/way"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_cancels_before_the_switchover(tmp_path):
    with pair(tmp_path, "hammer") as (source, target):
        command = begin_slowly(source, target, tmp_path)
        wait_until(lambda: source.migration_status() == "active", DEADLINE_S, "active")
        command.send_signal(signal.SIGINT)
        told, said = command.communicate(timeout=DEADLINE_S)
        assert command.returncode == 1
        assert said.startswith("postcopy: interrupted: the migration was cancelled")
        notes = [line["text"] for line in json_lines(told) if line["event"] == "note"]
        assert notes == ["interrupted: cancelling; the guest stays at the source"]
        assert source.ask("query-status")["return"]["running"]


def test_a_timeout_cancels_too(tmp_path):
    with pair(tmp_path, "hammer") as (source, target):
        command = begin_slowly(source, target, tmp_path, "--timeout", "0.5")
        _, said = command.communicate(timeout=DEADLINE_S)
        assert command.returncode == 1
        assert said.startswith("postcopy: not finished within 0.5 s: the migration was cancelled")


def test_ctrl_c_after_the_switchover_tells_what_goes_on(tmp_path):
    with pair(tmp_path, "hammer") as (source, target):
        source.ask("migrate-set-parameters", **{"max-postcopy-bandwidth": 256 << 10})
        command = begin_slowly(source, target, tmp_path, "--postcopy", "now")
        with command:
            told = iter(command.stdout.readline, "")
            assert any(json.loads(line).get("phase") == "postcopy" for line in told)
            command.send_signal(signal.SIGINT)
            assert any("too late to cancel" in json.loads(line).get("text", "") for line in told)
            command.send_signal(signal.SIGINT)
            assert command.wait(DEADLINE_S) == 1
            assert "the guest runs at the destination" in command.stderr.read()
        assert source.migration_status() == "postcopy-active"
