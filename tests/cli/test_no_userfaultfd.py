"""A host without userfaultfd, as these processes see it: what is refused, and what goes all the same."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import fakes.without_userfaultfd
from fakes.commands import DEADLINE_S, POSTCOPY, Running, need_kvm, one_line, postcopy
from fakes.waiting import wait_until
from faults import trace_hooks
from machine.machines import need
from postcopy import trace
from postcopy.machine import workload_records
from postcopy.machine.workload import load

WITHOUT = [sys.executable, fakes.without_userfaultfd.__file__]


class Woken(Running):
    """The machine of a command line of its own."""

    def __init__(self, folder: Path, line: Sequence[str]) -> None:
        super().__init__(folder, "woken")
        self.line = line


class Deprived(Running):
    """A ``postcopy run`` that can have no userfaultfd."""

    command = (*WITHOUT, *POSTCOPY)


def test_the_doctor_sees_it():
    line = [*WITHOUT, *POSTCOPY, "doctor"]
    shown = subprocess.run(line, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert shown.returncode != 0
    assert "userfaultfd: by device" in shown.stdout
    assert "Traceback" not in shown.stdout + shown.stderr


def test_postcopy_is_refused_beforehand(tmp_path):
    with Deprived(tmp_path, "qmp", "--incoming", "defer", "--accel", "unicorn") as deprived:
        wish = [{"capability": "postcopy-ram", "state": True}]
        error = deprived.ask("migrate-set-capabilities", capabilities=wish)["error"]["desc"]
    assert error.startswith("Postcopy is not supported: ")
    assert "\n" not in error
    assert error.count(error.rpartition("; ")[2]) == 1  # the cure


def memory_of(machine, path):
    order = {"val": 0, "size": 64 << 20, "filename": str(path)}
    assert "error" not in machine.ask("pmemsave", **order)
    return path.read_bytes()


def has_filled_its_memory(machine, path):
    def read(address, size):
        assert "error" not in machine.ask("pmemsave", val=address, size=size, filename=str(path))
        return path.read_bytes()

    return workload_records.is_running(read, load("hammer", 64 << 20))


class Unprivileged(Running):
    """A ``postcopy run`` of a user who may watch the faults of user code alone."""

    command = (*WITHOUT, "--user-mode", *POSTCOPY)


def move_whole(folder, kind, *options):
    """A busy guest moves from one machine of this kind to another; their memory is the same then."""
    door = f"unix:{folder}/door"
    with (
        kind(folder, "source", "--workload", "hammer", *options) as source,
        kind(folder, "destination", "-S", "--incoming", door, *options) as destination,
    ):
        limits = {"max-bandwidth": 0, "downtime-limit": 10_000}
        assert "error" not in source.ask("migrate-set-parameters", **limits)
        assert "error" not in source.ask("migrate", uri=door)
        ended = {"completed", "failed"}
        wait_until(lambda: source.migration_status() in ended, DEADLINE_S, "the end")
        assert source.migration_status() == "completed", source.ask("query-migrate")
        sides = (source, destination)
        saved = [memory_of(side, folder / f"{side.path.name}.memory") for side in sides]
        assert saved[0] == saved[1]
        running = [side.ask("query-status")["return"]["status"] for side in sides]
        assert running == ["postmigrate", "paused"]


@pytest.mark.kvm
def test_precopy_goes_by_kvms_own_log(tmp_path: Path):
    need_kvm()
    move_whole(tmp_path, Deprived)


@pytest.mark.parametrize("accelerator", ["kvm", "unicorn"])
def test_precopy_and_a_reset_point_need_no_privilege(tmp_path, accelerator):
    """The kernel itself answers the faults by which it notes writes."""
    need(accelerator)
    move_whole(tmp_path, Unprivileged, "--accel", accelerator)
    with Unprivileged(tmp_path, "guest", "--workload", "hammer", "--accel", accelerator) as guest:
        refused = postcopy("snapshot", "--from", guest.qmp, str(tmp_path / "image"))
        assert "userfaultfd" in one_line(refused)
        assert postcopy("reset", "--point", "--from", guest.qmp).returncode == 0
        assert postcopy("reset", "--from", guest.qmp).returncode == 0
        assert guest.ask("query-status")["return"]["running"]


@pytest.mark.kvm
@pytest.mark.parametrize("form", ["mapped-ram", "stream"])
def test_a_stopped_guest_is_saved_and_woken_whole(tmp_path, form):
    """Neither needs faults: the guest stands still, or is not there yet."""
    need_kvm()
    image = tmp_path / "image"
    with Deprived(tmp_path, "saved", "--workload", "hammer") as guest:
        running = postcopy("snapshot", "--from", guest.qmp, str(image), "--format", form)
        assert running.returncode == 3
        assert "userfaultfd" in one_line(running)
        assert guest.ask("stop") == {"return": {}}
        taken = postcopy("snapshot", "--from", guest.qmp, str(image), "--format", form)
        assert taken.returncode == 0, taken.stderr
        assert guest.ask("query-status")["return"]["status"] == "paused"
        before = memory_of(guest, tmp_path / "before")
        assert guest.ask("cont") == {"return": {}}
        assert guest.ask("query-status")["return"]["running"]
    assert postcopy("verify", str(image)).returncode == 0
    line = [*WITHOUT, *POSTCOPY, "restore", "-S", "--qmp", f"unix:{tmp_path}/woken", str(image)]
    with Woken(tmp_path, line) as woken:
        wait_until(lambda: woken.migration_status() == "completed", DEADLINE_S, "the guest")
        assert memory_of(woken, tmp_path / "after") == before
        assert woken.ask("cont") == {"return": {}}
        assert woken.ask("query-status")["return"]["running"]


@pytest.mark.kvm
def test_a_damaged_image_is_not_woken(tmp_path):
    need_kvm()
    image = tmp_path / "image"
    with Deprived(tmp_path, "saved", "--workload", "hammer") as guest:
        wait_until(lambda: has_filled_its_memory(guest, tmp_path / "part"), 20, "pages to damage")
        assert guest.ask("stop") == {"return": {}}
        taken = postcopy("snapshot", "--from", guest.qmp, str(image))
        assert taken.returncode == 0, taken.stderr
    with image.open("r+b") as file:
        file.seek(-(4 << 20), 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    line = [*WITHOUT, *POSTCOPY, "restore", str(image)]
    woken = subprocess.run(line, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert woken.returncode == 1
    assert "the guest does not run" in woken.stderr


@pytest.mark.kvm
@pytest.mark.parametrize("point", [p for p in trace.RESTORE_EAGER if "watching" not in p])
def test_an_engine_that_dies_while_it_wakes_a_guest_has_a_successor(tmp_path, monkeypatch, point):
    need_kvm()
    image = tmp_path / "image"
    with Deprived(tmp_path, "saved", "--workload", "hammer") as guest:
        assert guest.ask("stop") == {"return": {}}
        taken = postcopy("snapshot", "--from", guest.qmp, str(image))
        assert taken.returncode == 0, taken.stderr
        before = memory_of(guest, tmp_path / "before")
    alive = tmp_path / "alive"
    alive.touch()
    for name, value in trace_hooks.kill_at(point, alive).items():
        monkeypatch.setenv(name, value)
    line = [*WITHOUT, *POSTCOPY, "restore", "-S", "--qmp", f"unix:{tmp_path}/woken", str(image)]
    with Woken(tmp_path, line) as woken:
        wait_until(lambda: woken.migration_status() == "completed", DEADLINE_S, "the guest")
        assert not alive.exists()
        assert memory_of(woken, tmp_path / "after") == before
        assert woken.ask("cont") == {"return": {}}
