"""Start ``postcopy run`` in a process of its own, and end it."""

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from postcopy.client.qmp import QmpConnection
from postcopy.errors import CannotConnect, PostcopyError, Refused

_START_TIMEOUT_S: Final = 30.0
_END_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.01
_REFUSED_CODES: Final = frozenset({2, 3})


class MachineProcess:
    """A ``postcopy run``, or ``restore``, that we have started, with a folder of its own for its socket.

    It ends with the process that started it, even if that is killed: its monitor on standard input
    then comes to its end.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path, command: str) -> None:
        self._process = process
        self._command = command
        self.folder = folder

    @classmethod
    async def start(
        cls, options: Mapping[str, object], command: str = "run", *arguments: str
    ) -> tuple["MachineProcess", QmpConnection]:
        """Start one with these options of ``postcopy run`` and wait until its QMP answers.

        :param command: ``restore`` in its place, with its arguments.
        :raises Refused: it refused its options.
        :raises CannotConnect: it could not be started, it ended, or its QMP did not come.
        """
        folder = Path(tempfile.mkdtemp(prefix="postcopy-"))
        qmp = f"unix:{folder / 'qmp'}"
        line = [command, "--monitor", "stdio", "--qmp", qmp, *_command_line(options)]
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            process = _run([*line, "--", *arguments], folder / "stderr")
            cleanup.pop_all()
        started = cls(process, folder, command)
        try:
            return started, await started._connect(qmp)
        except BaseException:
            await started.end()
            raise

    async def _connect(self, qmp: str) -> QmpConnection:
        deadline = asyncio.get_running_loop().time() + _START_TIMEOUT_S
        while self._process.poll() is None:
            if (self.folder / "qmp").exists():
                with contextlib.suppress(CannotConnect):
                    return await QmpConnection.connect(qmp)
            if asyncio.get_running_loop().time() > deadline:
                raise CannotConnect(
                    f"'postcopy {self._command}' did not answer within {_START_TIMEOUT_S:g} s"
                )
            await asyncio.sleep(_POLL_S)
        raise self._why_it_ended(self._process.returncode)

    def _why_it_ended(self, exit_code: int) -> PostcopyError:
        lines = (self.folder / "stderr").read_text(errors="replace").strip().splitlines()
        text = lines[-1].removeprefix("postcopy: ") if lines else f"exit code {exit_code}"
        kind = Refused if exit_code in _REFUSED_CODES else CannotConnect
        return kind(text)

    async def end(self) -> None:
        """End it if it has not, and clean up; harmless when done."""
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, _END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _run(line: list[str], errors: Path) -> "subprocess.Popen[bytes]":
    try:
        with errors.open("wb") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", "postcopy", *line],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # a Ctrl-C of the terminal must not reach it
            )
    except OSError as failure:
        why = failure.strerror or failure
        raise CannotConnect(f"cannot start 'postcopy {line[0]}': {why}") from failure


def _command_line(options: Mapping[str, object]) -> list[str]:
    line: list[str] = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            line.append(option)
        elif isinstance(value, list | tuple):  # an option that may be given several times
            line += [part for each in value for part in (option, str(each))]
        elif value is not None and value is not False:
            line += [option, str(value)]
    return line
