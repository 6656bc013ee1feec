"""``postcopy reset`` of a machine that runs."""

import json

import pytest

from fakes.commands import one_line, postcopy

pytestmark = pytest.mark.kvm


def reset(guest, *options):
    return postcopy("reset", "--from", guest.qmp, *options)


def test_a_moment_and_back(guest):
    outcome = reset(guest, "--point")
    assert outcome.returncode == 0
    assert "MiB copied" in outcome.stdout
    outcome = reset(guest)
    assert outcome.returncode == 0
    assert "back at the point" in outcome.stdout
    outcome = reset(guest, "--json")
    found = json.loads(outcome.stdout)
    assert (found["event"], found["whole"]) == ("reset", False)
    assert found["us"] > 0
    outcome = reset(guest, "--end")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    outcome = reset(guest)
    assert outcome.returncode != 0
    assert "there is no reset point" in one_line(outcome)
    assert guest.ask("query-status")["return"]["status"] == "running"


def test_a_snapshot_and_back(guest, tmp_path):
    path = str(tmp_path / "image")
    assert postcopy("snapshot", "--from", guest.qmp, path).returncode == 0
    wholes = [json.loads(reset(guest, path, "--json").stdout)["whole"] for _ in range(3)]
    assert wholes == [True, False, False]


def test_options_that_make_no_sense(guest):
    outcome = reset(guest, "--end", "--point")
    assert outcome.returncode == 2
    assert "--end excludes" in outcome.stderr
