"""``postcopy run``: its monitors, its ends, and what it leaves behind."""

import signal
import subprocess
from pathlib import Path

import pytest

from fakes.commands import DEADLINE_S, POSTCOPY, Running
from fakes.testpmd import Testpmd
from fakes.vhost_back_end import BackEnd
from fakes.waiting import wait_until

pytestmark = pytest.mark.kvm


def ask_console(text, *options):
    return subprocess.run(
        [*POSTCOPY, "run", "--memory", "64M", "--monitor", "stdio", *options],
        input=text,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize("last", ["quit\n", ""], ids=["quit", "end of input"])
def test_a_console_answers_and_ends(last):
    outcome = ask_console("info status\n" + last, "--workload", "idle")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "VM status: running" in outcome.stdout


def test_paused_means_prelaunch():
    assert "paused (prelaunch)" in ask_console("info status\n", "--workload", "idle", "-S").stdout


def test_a_destination_waits():
    assert "paused (inmigrate)" in ask_console("info status\n", "--incoming", "defer").stdout


@pytest.mark.parametrize(
    ("machine", "at_3_gib", "at_4_gib"),
    [("microvm", "No memory is mapped", "(microvm.ram) is 0x"), ("none", "(ram) is", "(ram) is")],
)
def test_the_machine_says_where_memory_is(machine, at_3_gib, at_4_gib):
    options = ["--machine", machine, "--memory", "5G", "--incoming", "defer"]
    shown = ask_console("gpa2hva 0xc0000000\ngpa2hva 0x100000000\n", *options).stdout
    below, above = (line for line in shown.splitlines() if "0x" in line and "gpa2hva" not in line)
    assert at_3_gib in below
    assert at_4_gib in above


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_takes_its_sockets_away(tmp_path, number):
    monitor = tmp_path / "hmp"
    with Running(tmp_path, "qmp", "--workload", "idle", "--monitor", f"unix:{monitor}") as guest:
        wait_until(monitor.is_socket, DEADLINE_S, "the other monitor")
        guest.process.send_signal(number)
        assert guest.process.wait(DEADLINE_S) == 0
        assert f"terminating on signal {number:d}" in guest.stderr
        assert not guest.path.exists()
        assert not monitor.exists()


def test_quit_is_answered_before_the_end(tmp_path):
    with Running(tmp_path, "qmp", "--workload", "idle") as guest:
        assert guest.ask("quit") == {"return": {}}
        assert guest.process.wait(DEADLINE_S) == 0


def test_its_engine_ends_with_it(tmp_path):
    with Running(tmp_path, "qmp", "--workload", "idle") as guest:
        wait_until(lambda: children(guest.process.pid), DEADLINE_S, "an engine")
        (engine,) = children(guest.process.pid)
        guest.process.kill()
        guest.process.wait(DEADLINE_S)
        wait_until(lambda: ended(engine), DEADLINE_S, "the engine's end")


def test_a_destination_that_gets_rubbish_ends_with_one_line(tmp_path):
    uri = f"unix:{tmp_path}/incoming"
    with Running(tmp_path, "qmp", "--incoming", uri) as guest:
        wait_until((tmp_path / "incoming").is_socket, DEADLINE_S, "listening")
        subprocess.run(
            [*POSTCOPY[:1], "-c", SEND_RUBBISH, str(tmp_path / "incoming")], check=True, timeout=20
        )
        assert guest.process.wait(DEADLINE_S) == 1
        said = guest.stderr.splitlines()
        assert len(said) == 1
        assert said[0].startswith("postcopy: the incoming migration failed: ")


SEND_RUBBISH = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(b"GET / HTTP/1.0" * 100)
connection.close()
"""


def children(process_id):
    """The processes that this one has started."""
    return [
        stat.parent
        for stat in Path("/proc").glob("[0-9]*/stat")
        if fields(stat)[1:2] == [str(process_id)]
    ]


def ended(process):
    """Whether a process, named by its folder in /proc, is gone or waits to be buried."""
    return fields(process / "stat")[:1] in ([], ["Z"])


def fields(stat):
    """State, parent and so on; none if the process is gone."""
    try:
        return stat.read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_a_guest_with_a_drive(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    outcome = ask_console("info status\n", "--workload", "disk", "--drive", str(disk))
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "VM status: running" in outcome.stdout


def test_a_guest_with_a_drive_in_another_process(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with BackEnd(tmp_path / "back_end", disk) as back_end:
        socket = str(back_end.path)
        outcome = ask_console("info status\n", "--workload", "disk", "--vhost-user-blk", socket)
        assert (outcome.returncode, outcome.stderr) == (0, "")
        assert "VM status: running" in outcome.stdout
    outcome = ask_console("", "--workload", "disk", "--vhost-user-blk", socket)
    assert outcome.returncode == 3
    assert f"no vhost-user back end at {socket}" in outcome.stderr


def test_a_workload_that_needs_a_drive():
    outcome = ask_console("", "--workload", "disk")
    assert outcome.returncode == 3
    assert "the workload disk needs a drive" in outcome.stderr
    assert "give --drive FILE" in outcome.stderr


def test_a_workload_that_needs_a_network():
    outcome = ask_console("", "--workload", "net")
    assert outcome.returncode == 3
    assert "the workload net needs a network that sends back" in outcome.stderr
    assert "give --vhost-user-net SOCKET" in outcome.stderr


def test_a_guest_with_a_network(tmp_path):
    with Testpmd(tmp_path, "--no-mlockall", "--auto-start") as back_end:
        socket = str(back_end.path)
        outcome = ask_console("info status\n", "--workload", "net", "--vhost-user-net", socket)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "VM status: running" in outcome.stdout


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none", None, "No such file"),
        ("empty", b"", "holds no sector"),
        ("image.manifest.json", b"{}", "remove it, or give another path"),
    ],
)
def test_what_is_no_drive_is_refused(tmp_path, name, content, why):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    outcome = ask_console("", "--workload", "idle", "--drive", str(path))
    assert outcome.returncode == 3
    assert why in outcome.stderr
    assert path.exists() is (content is not None)
