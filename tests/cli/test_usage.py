"""What the command line says when it cannot do what it is told, and how it ends."""

import json
import socket
import subprocess
import sys

import pytest

from fakes.commands import DEADLINE_S, POSTCOPY, Running, need_kvm, one_line, postcopy
from postcopy.cli import COMMANDS, failures
from postcopy.cli.command_line import Size
from postcopy.errors import ChannelBroken, HostCannot, NeedsRecovery, Refused


def test_help_lists_every_subcommand():
    outcome = postcopy("--help")
    assert outcome.returncode == 0
    assert all(f"  {name} " in outcome.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommand_has_help(name):
    assert "Usage: postcopy " + name in postcopy(name, "--help").stdout


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv[1:] = ['run', '--help']; from postcopy.cli import main\n"
    code += "try: main()\n"
    code += "finally: assert not {'numpy', 'rich', 'qemu'} & set(sys.modules)"
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nothing"], 2, "No such command 'nothing'; see 'postcopy --help'"),
        (["run", "--image", "no-such-file"], 2, "File 'no-such-file' does not exist"),
        (["run", "--memory", "much", "--workload", "idle"], 2, "'much' is no size"),
        (["run"], 3, "just one of --image, --workload and --incoming"),
        (["run", "--workload", "idle", "--memory", "63M"], 3, "not a multiple of 2 MiB"),
        (["run", "--workload", "idle", "--memory", "65G"], 3, "is too much for a machine; 65536"),
        (
            ["run", "--workload", "idle", "--machine", "pc"],
            2,
            "'pc' is not one of 'microvm', 'none'",
        ),
        (["run", "--workload", "idle", "--serial", "here"], 3, "no serial port at 'here'"),
        (["migrate", "tcp:127.0.0.1:1"], 2, "Missing option '--from'"),
        (["migrate", "--from", "somewhere", "tcp:127.0.0.1:1"], 3, "is no QMP address"),
        (["migrate", "--from", "unix:none", "--postcopy", "soon", "tcp:x:1"], 2, "is no time"),
        (
            ["migrate", "--from", "unix:/none", "tcp:x:1"],
            1,
            "cannot reach QMP at unix:/none: No such",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, code, says):
    outcome = postcopy(*arguments)
    assert (outcome.returncode, says in one_line(outcome)) == (code, True), outcome.stderr


def test_a_qmp_port_nobody_listens_on_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp:127.0.0.1:{server.getsockname()[1]}"
    outcome = postcopy("migrate", "--from", address, "tcp:127.0.0.1:1")
    assert outcome.returncode == 1
    assert f"cannot reach QMP at {address}: Connection refused" in one_line(outcome)


@pytest.mark.kvm
def test_an_address_in_use_is_named(tmp_path):
    need_kvm()
    with Running(tmp_path, "first", "--workload", "idle") as first:
        outcome = postcopy("run", "--workload", "idle", "--memory", "64M", "--qmp", first.qmp)
    assert outcome.returncode == 1
    assert one_line(outcome) == f"cannot listen at {first.qmp}: Address already in use"


@pytest.mark.kvm
def test_an_incoming_port_in_use_ends_the_destination():
    need_kvm()
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        outcome = postcopy("run", "--incoming", uri, "--memory", "64M")
    assert outcome.returncode == 1
    assert "Address already in use" in one_line(outcome)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refused("no"), 3),
        (HostCannot("lacking", "a cure"), 3),
        (NeedsRecovery("broken"), 4),
        (ChannelBroken("gone"), 1),
        (KeyboardInterrupt(), 1),
        (ZeroDivisionError("of ours"), 1),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(error, code, capfd):
    assert failures.report(error) == code
    said = capfd.readouterr().err
    assert said.startswith("postcopy: ")
    assert said.count("\n") == 1


def test_the_last_resort_says_how_to_see_the_traceback(capfd):
    error = ZeroDivisionError("of ours")
    failures.report(error)
    assert "'postcopy --debug ...' shows the traceback" in capfd.readouterr().err
    failures.report(error, debug=True)
    assert "ZeroDivisionError: of ours\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512M", 512 << 20),
        ("1G", 1 << 30),
        ("1.5g", 3 << 29),
        ("64", 64 << 20),
        ("2MiB", 2 << 20),
        ("2MB", 2 << 20),
        ("4096B", 4096),
    ],
)
def test_sizes_have_qemu_suffixes(text, expected):
    assert Size("M").convert(text, None, None) == expected


def test_doctor_tells_people_and_programs_the_same():
    told = postcopy("doctor", "--json")
    answer = json.loads(told.stdout)
    assert told.returncode == (0 if answer["can_migrate"] else 3)
    shown = postcopy("doctor")
    assert shown.returncode == told.returncode
    assert all(finding["name"] in shown.stdout for finding in answer["findings"])
    missing = [f for f in answer["findings"] if not f["available"] and f["cure"]]
    assert all(f["cure"] in shown.stdout for f in missing)


def test_the_module_is_the_command():
    assert postcopy("--version").stdout.startswith("postcopy, version ")
    assert POSTCOPY[1:] == ["-m", "postcopy"]


INTERRUPTED_AT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

import postcopy.cli
sys.meta_path.insert(0, Finder())
postcopy.cli.main()
"""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("postcopy.cli.prefork", ["doctor"]),
        ("postcopy.link.guest.engine_process", ["restore", "x"]),
        ("postcopy.cli.failures", ["doctor"]),
        ("click", ["doctor"]),
        ("postcopy.cli.command_line", ["doctor"]),
        ("postcopy.cli.doctor", ["doctor"]),
        ("postcopy.cli.interrupts", ["status", "--from", "unix:/none"]),
        ("postcopy.client", ["status", "--from", "unix:/none"]),
    ],
)
def test_ctrl_c_while_it_begins_is_one_line(module, arguments):
    code = INTERRUPTED_AT.replace("MODULE", repr(module))
    outcome = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert (outcome.returncode, outcome.stderr.strip()) == (1, "postcopy: interrupted")
