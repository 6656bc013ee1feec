"""Trace points: each is declared and taken, and ``--trace`` writes them for users."""

import json
import re
import subprocess

import pytest

from fakes.commands import DEADLINE_S, need_kvm, postcopy
from fakes.waiting import wait_until
from house.project import ROOT
from postcopy import sync, trace
from scripts import draw_tracing

DECLARED = {point for name in draw_tracing.GROUPS for point in getattr(trace, name)}
SOURCES = [path for path in (ROOT / "src").rglob("*.py") if path.name != "trace.py"]
TAKEN = re.compile(r'\btrace\(\s*("[a-z.-]+"(?: if \w+ else "[a-z.-]+")?)')


def test_what_is_declared_is_taken_and_the_other_way_round():
    found = {
        point
        for path in SOURCES
        for places in TAKEN.findall(path.read_text())
        for point in re.findall(r'"([^"]+)"', places)
    }
    assert found == DECLARED


def test_each_table_stands_on_the_page():
    tables = {
        name for name, value in vars(trace).items() if name.isupper() and isinstance(value, dict)
    }
    assert tables == set(draw_tracing.GROUPS)


def test_nothing_is_written_without_a_subscriber(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(trace.FILE_VARIABLE, raising=False)
    trace.trace("source.active")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_harms_nothing(monkeypatch):
    monkeypatch.setenv(trace.FILE_VARIABLE, "/dev/full")
    trace.trace("source.active")
    monkeypatch.setenv(trace.FILE_VARIABLE, "/no/such/folder/file")
    trace.trace("source.active")


@pytest.mark.kvm
def test_both_processes_of_both_sides_write_one_file(tmp_path):
    need_kvm()
    file = tmp_path / "steps"
    with (
        sync.Machine.start(workload="hammer", memory="64M", trace=str(file)) as source,
        sync.Machine.start(incoming="defer", memory="64M", trace=str(file)) as destination,
    ):
        source.migrate(to=destination, postcopy="now").result()
        wait_until(lambda: "destination.postcopy-shut-sent" in points(file), DEADLINE_S, "the end")
    taken = points(file)
    known = {point for point in DECLARED if point.startswith(("guest", "source", "destination"))}
    assert set(taken) <= known
    assert set(trace.SOURCE_POSTCOPY) <= set(taken)
    assert set(trace.DESTINATION_POSTCOPY) <= set(taken)
    assert taken.index("guest.order") < taken.index("source.active")
    assert taken.index("source.before-package") < taken.index("destination.running")
    assert len({line["pid"] for line in lines(file)}) == 4
    assert next(line for line in lines(file) if line["point"] == "source.package-sent")["bytes"] > 0


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def points(file):
    return [line["point"] for line in lines(file)]


@pytest.mark.kvm
def test_the_first_engine_of_a_restore_writes_too(tmp_path):
    need_kvm()
    image, file = tmp_path / "image", tmp_path / "steps"
    with sync.Machine.start(workload="hammer", memory="64M") as guest:
        guest.snapshot(image)
    with sync.restore(image, lazy=True, trace=str(file)) as guest:
        guest.restored()
        wait_until(lambda: "restore.unwatched" in points(file), DEADLINE_S, "the end")
    assert set(trace.RESTORE_LAZY) - {"restore.working-set-in"} <= set(points(file))


@pytest.mark.parametrize("file", ["", "/", "/no/such/folder/file"])
def test_a_file_that_cannot_be_is_refused(file):
    outcome: subprocess.CompletedProcess[str] = postcopy(
        "run", "--workload", "idle", "--trace", file
    )
    assert outcome.returncode == 3
    assert re.fullmatch(
        r"postcopy: --trace '.*': .*; give a file that can be written\n", outcome.stderr
    )
