"""What the threads of all processes of a test do, for the text of a failure: see :mod:`postcopy.stacks`."""

import faulthandler
import os
import re
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from postcopy.stacks import SIGNAL

_NOISE = re.compile(r"/(pluggy|_pytest|pytest)/|<frozen runpy>| in _bootstrap(_inner)?$")
_MOST_S, _QUIET_S, _LOOK_S = 3.0, 0.1, 0.01


class TellsNothing(Exception):
    """A process whose stacks cannot be had; the sentence says why."""


def stacks() -> str:
    """This process (both guests, in most tests), and each below it that tells when it is asked."""
    told = [f"--- this process, {os.getpid()}\n{_ours()}"]
    told += [
        f"--- process {number}: {_command(number)}\nin the kernel: {_waits(number)}\n{_told(number)}"
        for number in descendants()
        if catches(number)
    ]
    return "\n".join(line for line in "\n".join(told).splitlines() if not _NOISE.search(line))


def _told(number: int) -> str:
    try:
        return ask(number)
    except TellsNothing as why:
        return str(why)


def ask(number: int) -> str:
    """The stacks of a process, where its stderr can be read: in a file, as pytest's capture is one.

    :raises TellsNothing: it has ended, or does not listen, or is held up; or its stderr is no file.
    """
    if not catches(number):
        raise TellsNothing(f"process {number} has ended, or the signal would end it")
    path = Path(f"/proc/{number}/fd/2")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            os.kill(number, SIGNAL)
            raise TellsNothing(f"process {number} tells it on its stderr, which is no file")
        with path.open("rb") as stderr:
            stderr.seek(0, os.SEEK_END)
            os.kill(number, SIGNAL)
            told = _all_that_comes(stderr.fileno()).decode(errors="replace")
    except OSError as gone:
        raise TellsNothing(f"process {number} cannot be asked: {gone}") from gone
    if not told:
        raise TellsNothing(
            f"process {number} said nothing for {_MOST_S:g} s: one of its threads waits with the "
            "interpreter lock"
        )
    return told


def _all_that_comes(fd: int) -> bytes:
    """What is written to a file, until nothing more is; it does not say when it is all."""
    pause = threading.Event()
    told, begun = b"", time.monotonic()
    last = begun
    while True:
        looked = time.monotonic()  # before the look: whoever is held up behind it looks once more
        if more := os.read(fd, 1 << 16):
            told, last = told + more, looked
        elif looked - begun > _MOST_S or (told and looked - last > _QUIET_S):
            return told
        pause.wait(_LOOK_S)


def catches(number: int) -> bool:
    """Whether it would tell; the signal ends every other."""
    for line in _read(number, "status").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (SIGNAL - 1) & 1)
    return False


def descendants() -> list[int]:
    """All processes that this one has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (told := _read(int(entry.name), "stat")):
            parent = int(told.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    return list(_below(os.getpid(), children))


def _below(number: int, children: dict[int, list[int]]) -> Iterator[int]:
    for child in sorted(children.get(number, ())):
        yield child
        yield from _below(child, children)


def _ours() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode()


def _waits(number: int) -> str:
    """Where its threads are in the kernel, which their stacks do not tell."""
    try:
        tasks = [task.name for task in Path(f"/proc/{number}/task").iterdir()]
    except OSError as gone:
        return str(gone)
    found = Counter(_read(number, f"task/{task}/wchan") or "?" for task in tasks)
    return ", ".join(f"{where} x {count}" for where, count in found.most_common())


def _command(number: int) -> str:
    return _read(number, "cmdline").replace("\0", " ").strip()


def _read(number: int, name: str) -> str:
    try:
        return Path(f"/proc/{number}/{name}").read_text()
    except OSError:
        return ""  # it has just ended
