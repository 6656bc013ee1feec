"""``postcopy restore --qemu``: the command starts a stock QEMU, wakes the guest in it, and ends with it."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from fakes.commands import POSTCOPY, postcopy
from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL, BINARY, NEWEST, OLDEST, USUAL
from fakes.real_qemu import MICROVM, bios
from fakes.waiting import wait_until
from interop.arrival import check_memory
from interop.saved_in_qemu import MEMORY_BYTES, WORKLOAD, SavedInQemu, flip
from postcopy.image.formats import open_image
from postcopy.machine import workload_records

TIMEOUT_S = 30.0


class Restoring:
    """The command with QEMU's, and a client of that QEMU's QMP.

    :param line: QEMU's, if it is not that of the usual microvm.
    """

    def __init__(
        self,
        folder: Path,
        image: Path,
        *options: str,
        memory_bytes: int = MEMORY_BYTES,
        qmp: str = "user.qmp",
        saved: bool = False,
        line: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self.qmp = folder / qmp
        if not line:
            line = ["-M", MICROVM, "-accel", "kvm", "-m", f"{memory_bytes >> 20}M", *bios(folder)]
        line = [BINARY, "-display", "none", "-nodefaults", *line]
        command = [
            "restore",
            str(image),
            "--qemu",
            "saved" if saved else shlex.join(line),
            "--qmp",
            f"unix:{self.qmp}",
        ]
        self.process = subprocess.Popen(
            [*POSTCOPY, *command, *options], stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []

    def __enter__(self) -> "Restoring":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate(timeout=TIMEOUT_S)

    def wait_line(self, text: str) -> str:
        """Wait until it has said that."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"it has not said {text!r}: {self.lines}")

    def pid(self) -> int:
        """QEMU's, once it has the guest."""
        return int(self.wait_line("has the guest").split()[2])

    def ask(self, *commands: tuple[str, dict]) -> list:
        """Do QMP commands; give what they return."""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(self.qmp))
            stream = connection.makefile("rw")
            stream.readline()
            found = []
            for name, arguments in (("qmp_capabilities", {}), *commands):
                stream.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                stream.flush()
                while "event" in (answer := json.loads(stream.readline())):
                    pass
                found.append(answer["return"])
            return found[1:]

    def memory(self):
        """Stop the guest, and give what reads its memory."""
        dump = self._folder / "dump"
        what = {"val": 0, "size": MEMORY_BYTES, "filename": str(dump)}
        self.ask(("stop", {}), ("pmemsave", what))
        data = dump.read_bytes()
        return lambda address, length: data[address : address + length]

    def check_guest(self, saved: SavedInQemu) -> None:
        """It has counted on, and every page of it is right."""
        self.ask(("cont", {}))
        reached = []

        def further() -> bool:
            reached[:] = [workload_records.read_records(self.memory(), WORKLOAD)[0].iterations]
            self.ask(("cont", {}))
            return reached[0] > saved.left_at[0]

        wait_until(further, TIMEOUT_S, "the guest does not go on counting")
        check_memory(self.memory(), WORKLOAD)


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.qemu(*ALL)
@pytest.mark.proves(Way.TO, Feature.RESTORED)
def test_a_command_wakes_the_guest_and_ends_with_it(saved, tmp_path, qemu_version):
    """By each way with another QEMU; the exit code is QEMU's own."""
    ways = {OLDEST: ["--lazy"], USUAL: [], NEWEST: ["--lazy", "--preempt", "-S"]}
    options = ways[qemu_version]
    with Restoring(tmp_path, saved.path, *options) as restoring:
        pid = restoring.pid()
        restoring.wait_line("has all memory")
        paused = "-S" in options
        (status,) = restoring.ask(("query-status", {}))
        assert status["status"] == ("paused" if paused else "running")
        if paused:
            with open_image(saved.path) as image:
                rows = image.read("microvm.ram", 0, MEMORY_BYTES // 4096)
            assert restoring.memory()(0, MEMORY_BYTES) == rows.tobytes()
        restoring.check_guest(saved)
        if paused:
            os.kill(pid, signal.SIGKILL)
        else:
            restoring.ask(("quit", {}))
        assert restoring.process.wait(TIMEOUT_S) == (137 if paused else 0)
        assert is_gone(pid)


@pytest.mark.qemu
def test_a_break_is_mended_by_itself(saved, tmp_path):
    with Restoring(tmp_path, saved.path, "--lazy", "--bandwidth", "8M") as restoring:
        restoring.pid()
        for _ in range(2):
            restoring.ask(("migrate-pause", {}))
            wait_until(
                lambda: restoring.ask(("query-migrate", {}))[0]["status"] == "postcopy-active",
                TIMEOUT_S,
                "the recovery",
            )
        restoring.wait_line("has all memory")
        restoring.check_guest(saved)


@pytest.mark.qemu(OLDEST, NEWEST)
def test_a_guest_outlives_a_command_that_is_killed(saved, tmp_path):
    """It waits for the pages that it has not, and another server brings them."""
    again = f"unix:{tmp_path}/again"
    with Restoring(tmp_path, saved.path, "--lazy", "--bandwidth", "1M") as restoring:
        pid = restoring.pid()
        try:
            restoring.process.kill()
            wait_until(
                lambda: restoring.ask(("query-migrate", {}))[0]["status"] == "postcopy-paused",
                TIMEOUT_S,
                "QEMU does not notice the end of its server",
            )
            restoring.ask(("migrate-recover", {"uri": again}))
            assert postcopy("serve", str(saved.path), again, "--resume").returncode == 0
            restoring.check_guest(saved)
        finally:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.qemu
def test_each_failure_ends_the_qemu(saved, tmp_path):
    with Restoring(tmp_path, saved.path, "--lazy", memory_bytes=2 * MEMORY_BYTES) as restoring:
        with pytest.raises(AssertionError):
            restoring.pid()
        assert restoring.process.wait(TIMEOUT_S) == 1
        assert restoring.lines[-1] == (
            "postcopy: QEMU has ended with exit code 1: Size mismatch: microvm.ram: 0x2000000 != "
            "0x4000000: Invalid argument\n"
        )
    with Restoring(tmp_path, saved.path, "--lazy", "--bandwidth", "1M") as restoring:
        pid = restoring.pid()
        restoring.process.terminate()
        assert restoring.process.wait(TIMEOUT_S) == 1
        assert is_gone(pid)
    flip(path := saved.copy(tmp_path))
    with Restoring(tmp_path, path, "--lazy", "--bandwidth", "64M") as restoring:
        pid = restoring.pid()
        assert restoring.process.wait(TIMEOUT_S) == 1
        assert "do not agree with their digest" in restoring.wait_line("postcopy:")
        assert is_gone(pid)


@pytest.mark.qemu
def test_clones_wake_side_by_side(saved, tmp_path):
    """Of three the second fails in its hook, and the others are not ended for that."""
    hook = f"echo $POSTCOPY_QMP >{tmp_path}/hook.$POSTCOPY_CLONE; [ $POSTCOPY_CLONE != 1 ]"
    more = ["--lazy", "--count", "3", "--on-running", hook]
    with Restoring(tmp_path, saved.path, *more, qmp="user{n}.qmp") as restoring:
        for _ in range(2):
            restoring.wait_line("has all memory")
        for number in (2, 0):
            restoring.qmp = tmp_path / f"user{number}.qmp"
            assert (tmp_path / f"hook.{number}").read_text() == f"unix:{restoring.qmp}\n"
            restoring.check_guest(saved)
            restoring.ask(("quit", {}))
        assert restoring.process.wait(TIMEOUT_S) == 1
        failed = [line for line in restoring.lines if line.startswith("postcopy: clone 1: --on-")]
        assert len(failed) == 1


@pytest.mark.qemu
def test_the_qemu_that_was_saved_is_started_again(saved, tmp_path):
    """Its monitors and its ``-incoming`` are not: they were another process's."""
    command = json.loads(postcopy("inspect", "--json", str(saved.path)).stdout)["manifest"][
        "command"
    ]
    assert "-qmp" not in command
    assert "incoming" not in command
    with Restoring(tmp_path, saved.path, "--lazy", saved=True) as restoring:
        assert restoring.wait_line("starting: ") == f"postcopy: starting: {command}\n"
        restoring.wait_line("has all memory")
        restoring.check_guest(saved)
