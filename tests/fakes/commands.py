"""The command line as a user has it: real processes, on folders of their own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fakes.waiting import wait_until
from postcopy.errors import HostCannot
from postcopy.kernel.userfaultfd import Userfaultfd

DEADLINE_S = 30
END_S = 10
POSTCOPY = [sys.executable, "-m", "postcopy"]


def need_kvm() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm: run as root or join group kvm")


def need_userfaultfd() -> None:
    try:
        Userfaultfd.open().close()
    except HostCannot as error:
        pytest.skip(f"needs userfaultfd: {error}")


def postcopy(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    return subprocess.run(
        [*POSTCOPY, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        stdin=subprocess.DEVNULL,
        **options,
    )


def one_line(outcome: subprocess.CompletedProcess) -> str:
    """What stderr says, which is one line for an error."""
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith("postcopy: ")
    return lines[0].removeprefix("postcopy: ")


class Running:
    """A ``postcopy run`` with a QMP socket, until the end of the context."""

    command: Sequence[str] = POSTCOPY
    line: Sequence[str] = ()
    """All of the command, if it is another than ``run``."""

    def __init__(self, folder: Path, name: str, *options: str, stderr: int | None = None) -> None:
        self.path = folder / name
        self.qmp = f"unix:{self.path}"
        self._options = options
        self._stderr = folder / f"{name}.stderr"
        self._stderr_fd = stderr

    def __enter__(self) -> "Running":
        line = self.line or self._run_line()
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr if self._stderr_fd is None else self._stderr_fd,
                env=os.environ | {"PYTHONFAULTHANDLER": "1"},
            )
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._end)
            wait_until(self._answers, DEADLINE_S, "QMP")
            cleanup.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def _run_line(self) -> Sequence[str]:
        return [*self.command, "run", "--memory", "64M", "--qmp", self.qmp, *self._options]

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def ask(self, command: str, **arguments):
        """Do one QMP command."""
        with self._connected() as connection, connection.makefile("rw") as stream:
            stream.readline()
            for request in ({"execute": "qmp_capabilities"},
                            {"execute": command, "arguments": arguments}):  # fmt: skip
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                while "event" in (answer := json.loads(stream.readline())):
                    pass
            return answer

    def migration_status(self) -> str | None:
        return self.ask("query-migrate")["return"].get("status")

    def _connected(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(DEADLINE_S)
            connection.connect(str(self.path))
        except BaseException:
            connection.close()
            raise
        return connection

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.stderr
        try:
            self._connected().close()
        except OSError:
            return False
        return True

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # says where each thread is
            self.process.communicate(timeout=DEADLINE_S)
            raise AssertionError(f"did not end when told to: {self.stderr}") from None


@contextlib.contextmanager
def pair(folder: Path, workload: str = "idle", options=lambda name: ()):
    """A source with a guest that runs, and a destination that waits to be told.

    :param options: more of them for the machine of a name.
    """
    with (
        Running(folder, "source", "--workload", workload, *options("source")) as source,
        Running(folder, "target", "--incoming", "defer", *options("target")) as target,
    ):
        yield source, target
