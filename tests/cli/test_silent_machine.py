"""A machine that has stopped answering: every command that waits for it comes to its end."""

import contextlib
import json
import re
import signal
import socket
import subprocess

import pytest

from fakes.commands import DEADLINE_S, POSTCOPY, Running, one_line, pair, postcopy
from fakes.stopping import stop_process
from fakes.waiting import wait_until

pytestmark = pytest.mark.kvm


@contextlib.contextmanager
def stopped(machine):
    """The process of a machine stands still; the kernel takes its connections all the same."""
    stop_process(machine.process.pid)
    try:
        yield
    finally:
        machine.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def begun(*arguments, **options):
    with subprocess.Popen(
        [*POSTCOPY, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as command:
        try:
            yield command
        finally:
            command.kill()


def end_by_ctrl_c(command):
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=DEADLINE_S)
    assert command.returncode == 1, said
    assert "Traceback" not in said
    return said


def begun_slowly(source, target, folder, *options):
    line = ["--from", source.qmp, "--to", target.qmp, "--bandwidth", "256K", *options]
    return begun("migrate", *line, f"unix:{folder}/way")


def test_the_timeout_of_a_migration_counts_all_the_same(tmp_path):
    with (
        pair(tmp_path, "hammer") as (source, target),
        begun_slowly(source, target, tmp_path, "--timeout", "3") as command,
    ):
        wait_until(lambda: source.migration_status() == "active", DEADLINE_S, "active")
        with stopped(source):
            _, said = command.communicate(timeout=DEADLINE_S)
            assert command.returncode == 1
            assert f"not finished within 3 s: {source.qmp} does not answer" in said
            assert f"'postcopy status --from {source.qmp}'" in said
        wait_until(lambda: source.migration_status() == "cancelled", DEADLINE_S, "cancelled")
        assert source.ask("query-status")["return"]["running"]


def test_the_timeout_counts_from_the_beginning(tmp_path):
    with pair(tmp_path) as (source, target), stopped(target):
        line = ["--from", source.qmp, "--to", target.qmp, "--timeout", "2", f"unix:{tmp_path}/way"]
        outcome = postcopy("migrate", *line)
        assert outcome.returncode == 1
        assert one_line(outcome).startswith("not finished within 2 s: a machine does not answer")


def test_ctrl_c_leaves_a_migration(tmp_path):
    with (
        pair(tmp_path, "hammer") as (source, target),
        begun_slowly(source, target, tmp_path) as command,
    ):
        wait_until(lambda: source.migration_status() == "active", DEADLINE_S, "active")
        with stopped(source):
            said = end_by_ctrl_c(command)
            assert f"interrupted: {source.qmp} does not answer" in said


def test_ctrl_c_leaves_a_snapshot(tmp_path):
    with Running(tmp_path, "machine", "--workload", "hammer") as machine:
        machine.ask("migrate-set-parameters", **{"max-bandwidth": 256 << 10})
        line = ["snapshot", "--json", "--from", machine.qmp, str(tmp_path / "image")]
        with begun(*line) as command:
            wait_until(lambda: '"saving"' in command.stdout.readline(), DEADLINE_S, "saving")
            with stopped(machine):  # which has answered the order
                said = end_by_ctrl_c(command)
                assert f"interrupted: {machine.qmp} does not answer" in said
                assert re.search(r"/image\.[0-9a-f]{16}\.partial may remain", said)
        wait_until(lambda: machine.migration_status() == "cancelled", DEADLINE_S, "cancelled")
        assert not (tmp_path / "image").exists()
        assert machine.ask("query-status")["return"]["running"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "--from"),
        ("reset", "--from"),
        ("snapshot", "image", "--from"),
        ("migrate", "tcp:127.0.0.1:1", "--from"),
        ("recover", "tcp:127.0.0.1:1", "--to", "unix:/none", "--from"),
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("has_greeted", [False, True])
def test_ctrl_c_leaves_what_has_not_begun(tmp_path, arguments, has_greeted):
    with socket.socket(socket.AF_UNIX) as machine:
        machine.settimeout(DEADLINE_S)
        machine.bind(str(tmp_path / "qmp"))
        machine.listen()
        with begun(*arguments, f"unix:{tmp_path}/qmp", cwd=tmp_path) as command:
            connection = machine.accept()[0]
            with connection:
                if has_greeted:
                    greeting = {"QMP": {"version": {}, "capabilities": []}}
                    connection.sendall(json.dumps(greeting).encode() + b"\r\n")
                    assert connection.recv(1)  # the negotiation, which gets no answer
                assert end_by_ctrl_c(command) == "postcopy: interrupted\n"
        assert [each.name for each in tmp_path.iterdir()] == ["qmp"]
