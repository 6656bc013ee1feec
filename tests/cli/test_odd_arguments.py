"""Arguments, names and files that are not what they should be: one line, and never a mistake of ours."""

import contextlib
import os
import subprocess
from pathlib import Path

import click
import hypothesis.strategies as st
import pytest
from hypothesis import given

from fakes.commands import DEADLINE_S, POSTCOPY, Running, need_kvm, one_line, postcopy
from postcopy.cli.command_line import Number, PostcopyTime, Seconds, Size

MANY = "9" * 5000
RUN = ("run", "--workload", "idle", "--memory", "4M", "--accel", "unicorn")
MIGRATE = ("migrate", "tcp:127.0.0.1:1", "--from", "unix:/none")
IMAGE = "/no/such/folder/\udcff\udcfe"


@pytest.mark.parametrize(
    "arguments",
    [
        *[("run", "--workload", "idle", "--memory", size)
          for size in ("1e30", "nan", "inf", "-inf", "-5M", "0", "1e-9", "9e18", MANY, "\udcff", "")],
        *[(*RUN, "--smp", count) for count in ("0", "-1", MANY, "1" + "0" * 30, "\udcff")],
        *[(*RUN, "--load-address", where) for where in ("-1", "0x" + "f" * 40, MANY, "1.5", "")],
        *[(*RUN, "--entry", where) for where in ("-1", "0x" + "f" * 40, MANY)],
        *[(*RUN, "--qmp", where) for where in ("tcp:127.0.0.1:99999", "tcp:\udcff:80", "tcp::" + MANY)],
        *[(*RUN, "--monitor", where) for where in ("tcp:127.0.0.1:99999", "\udcff", "unix:")],
        *[(*RUN, "--serial", where) for where in ("file:", "file:/", "file:/no/such/folder/x", "\udcff")],
        ("run", "--incoming", "tcp:\udcff:1"),
        ("run", "--incoming", "unix:" + "\udcff" * 200),
        ("run", "--incoming", "\udcff"),
        *[(*MIGRATE, "--timeout", time) for time in ("nan", "inf", "-1", "0", MANY, "\udcff")],
        *[(*MIGRATE, "--auto-recover", time) for time in ("nan", "inf", MANY)],
        *[(*MIGRATE, "--postcopy", time) for time in ("nan", "after=inf", "after=-1s", MANY, "\udcff")],
        *[(*MIGRATE, "--bandwidth", size) for size in ("nan", "-1", "1e30", MANY)],
        *[(*MIGRATE, "--downtime-limit", time) for time in ("-1", "nan", MANY)],
        *[("status", "--from", where)
          for where in ("tcp:127.0.0.1:99999", "tcp:\udcff:1", f"tcp:{'x' * 100}:1", "\udcff", "unix:",
                        "unix:" + "x" * 200, "/\udcff")],
        *[(name, path) for name in ("inspect", "verify") for path in (IMAGE, "/", "", "x" * 5000, "/tmp")],
        *[("restore", path) for path in (IMAGE, "/", "x" * 5000, "/tmp")],
        ("diff", IMAGE, "/"), ("extract", "/", "--ram", IMAGE), ("prune", "/\udcff"),
    ],
    ids=lambda arguments: ascii(" ".join(arguments))[:70],
)  # fmt: skip
def test_arguments_that_cannot_be_are_named(arguments):
    outcome = postcopy(*arguments)
    assert outcome.returncode in {1, 2, 3}
    said = one_line(outcome)
    assert "unexpected" not in said
    assert "internal error" not in said


@pytest.mark.parametrize("kind", [Size("M"), Size(), Number(), Seconds(), PostcopyTime()])
@given(text=st.text() | st.floats().map(str) | st.integers().map(str) | st.just(MANY))
def test_what_an_option_takes_is_finite_and_fits_into_a_message(kind, text):
    with contextlib.suppress(click.UsageError):
        taken = kind.convert(text, None, None)
        assert taken in {"now", "first-round"} or 0 <= taken < 1 << 1024


@pytest.mark.kvm
def test_a_name_of_any_bytes(tmp_path):
    need_kvm()
    with Running(tmp_path, "qmp", "--workload", "idle", "--name", "\udcff\udcfe") as guest:
        assert Path(f"/proc/{guest.process.pid}/comm").read_bytes() == b"\xff\xfe\n"


@pytest.mark.kvm
@pytest.mark.parametrize("order", [("snapshot",), ("reset", "--point")])
def test_a_path_that_qmp_cannot_carry_is_named(guest, order, tmp_path):
    (tmp_path / "p").mkdir()
    outcome = postcopy(*order, "--from", guest.qmp, f"{tmp_path}/p/\udcff\udcfe")
    assert outcome.returncode == 3
    assert "not UTF-8" in one_line(outcome)
    assert r"p/\udcff\udcfe" in one_line(outcome)
    assert guest.ask("query-status")["return"]["running"]


@pytest.mark.kvm
def test_a_console_whose_output_is_not_taken_goes_on(tmp_path):
    need_kvm()
    line = [*POSTCOPY, "run", "--memory", "64M", "--workload", "idle", "--monitor", "stdio"]
    order = f'info status\npmemsave 0 4096 "{tmp_path}/memory"\nquit\n'
    with Path("/dev/full").open("wb") as full:
        outcome = subprocess.run(
            line, input=order, stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S,
            check=False,
        )  # fmt: skip
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert (tmp_path / "memory").stat().st_size == 4096


@pytest.mark.kvm
def test_a_console_is_told_bytes_that_are_no_text(tmp_path):
    need_kvm()
    outcome = subprocess.run(
        [*POSTCOPY, "run", "--memory", "64M", "--workload", "idle", "--monitor", "stdio"],
        input=b"\xff\xfe\n\0\ninfo status\n" + b"\xff" * 200000 + b"\nquit\n",
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (outcome.returncode, outcome.stderr) == (0, b"")
    assert b"unknown command" in outcome.stdout
    assert b"VM status: running" in outcome.stdout


def closing(fd):
    """What begins a command without one of its standard streams."""
    return ("/bin/sh", "-c", f'exec "$@" {fd}{"<" if fd == 0 else ">"}&-', "sh")


def without(fd, *arguments, folder):
    """Run a command with a standard stream closed; what it says."""
    return subprocess.run(
        [*closing(fd), *POSTCOPY, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=folder,
        timeout=DEADLINE_S,
        check=False,
        text=True,
    )


@pytest.mark.parametrize("fd", [0, 1, 2])
@pytest.mark.parametrize(
    "arguments", [("doctor", "--json"), ("inspect", "none"), ("--help",), ("zork",)]
)
def test_a_standard_stream_may_be_closed(tmp_path, fd, arguments):
    outcome = without(fd, *arguments, folder=tmp_path)
    said = outcome.stdout + outcome.stderr
    assert "unexpected" not in said
    assert "Traceback" not in said
    assert "Exception ignored" not in said


@pytest.mark.kvm
@pytest.mark.parametrize("fd", [0, 1, 2])
def test_a_machine_runs_with_a_standard_stream_closed(tmp_path, fd):
    need_kvm()

    class Deprived(Running):
        command = (*closing(fd), *POSTCOPY)

    options = ["--serial", "stdio", "--monitor", f"unix:{tmp_path}/hmp"]
    with Deprived(tmp_path, "qmp", "--workload", "hammer", *options) as guest:
        for number in range(3):
            where = str(Path(f"/proc/{guest.process.pid}/fd/{number}").readlink())
            assert where.startswith(("/dev/null", "pipe", str(tmp_path)))
        assert guest.ask("stop") == {"return": {}}
        assert guest.ask("quit") == {"return": {}}
        assert guest.process.wait(DEADLINE_S) == 0
        assert "Traceback" not in guest.stderr


@pytest.mark.parametrize("fd", [0, 1, 2])
def test_a_console_with_a_standard_stream_closed_ends_with_its_input(tmp_path, fd):
    outcome = without(fd, *RUN, "--monitor", "stdio", folder=tmp_path)
    assert outcome.returncode == 0
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("arguments", [("doctor",), ("doctor", "--json"), ("--help",)])
def test_a_full_disk_behind_standard_output_is_one_line(arguments):
    with Path("/dev/full").open("wb") as full:
        outcome = subprocess.run(
            [*POSTCOPY, *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    assert outcome.returncode == 1
    assert one_line(outcome) == "standard output: No space left on device; look at it and try again"


def test_a_reader_that_leaves_ends_a_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    outcome = subprocess.run(
        [*POSTCOPY, "doctor"],
        stdout=writer, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (outcome.returncode, outcome.stderr) == (1, "")
