"""The tutorial, as a reader does it: each command of it, in two terminals."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.waiting import wait_until

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
STEP = re.compile(r"^Terminal (\d):\n\n```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = "(postcopy) "
DEADLINE_S = 60


class Terminal:
    """A shell whose commands are typed one after the other."""

    def __init__(self, folder, number):
        self._log = folder / f"terminal-{number}"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with self._log.open("wb") as log:
            self._shell = subprocess.Popen(
                ["bash", "--norc"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PATH": path},
                cwd=folder,
                start_new_session=True,
            )
        self._ended = self._prompts = 0

    @property
    def text(self):
        return self._log.read_text(errors="replace")

    def command(self, line, *, serves=False):
        """Do it to its end, or with ``serves`` until its console asks."""
        self._ended += 1
        # On the same line: what follows on the shell's input is the command's.
        self._type(line if line.endswith("&") else f"{line}; echo ended {self._ended}: $?")
        if line.endswith("&"):
            self._type(f"echo ended {self._ended}: $?")
        if not serves:
            self.until_ended()

    def until_ended(self):
        found = re.compile(rf"ended {self._ended}: (\d+)$", re.MULTILINE)
        wait_until(lambda: found.search(self.text), DEADLINE_S, lambda: f"the end: {self.text}")
        assert found.search(self.text)[1] == "0", self.text

    def until_asked(self):
        self._prompts += 1
        asked = lambda: self.text.count(PROMPT) >= self._prompts  # noqa: E731
        wait_until(asked, DEADLINE_S, lambda: f"the prompt: {self.text}")

    def at_prompt(self, line):
        self.until_asked()
        self._type(line)
        if line == "quit":
            self.until_ended()

    def _type(self, line):
        self._shell.stdin.write(f"{line}\n".encode())
        self._shell.stdin.flush()

    def close(self):
        self._shell.stdin.close()
        try:
            self._shell.wait(DEADLINE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of it has ended
                os.killpg(self._shell.pid, signal.SIGKILL)
            self._shell.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def do(terminal, lines):
    """The commands of one step; other lines show what it prints, and are checked at its end."""
    expected = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("$ "):
            terminal.command(line[2:], serves=following.startswith(PROMPT))
        elif line.startswith(PROMPT):
            terminal.at_prompt(line.removeprefix(PROMPT))
        else:
            expected.append(line)
    for line in expected:
        wait_until(lambda line=line: line in terminal.text, DEADLINE_S, f"{line}: {terminal.text}")


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_each_command_of_the_tutorial_does_what_it_says(tmp_path):
    folder = tmp_path / "t"
    text = PAGE.read_text().replace("/tmp/tutorial", str(folder)).replace("4444", str(free_port()))
    steps = STEP.findall(text)
    assert text.count("```console") == len(steps) > 8
    terminals = {number: Terminal(tmp_path, number) for number in ("1", "2")}
    try:
        for number, step in steps:
            do(terminals[number], step.splitlines())
    finally:
        for terminal in terminals.values():
            terminal.close()
    assert not folder.exists()
    assert "blocktime of all at once" in terminals["2"].text
