"""The command line of a running QEMU, so that another can be started for its image."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from postcopy.errors import Refused

_QEMU: Final = ("qemu-system-", "qemu-kvm", "kvm")
_LOADER: Final = "ld-linux"
"""The dynamic linker, by which a QEMU may be started."""
_WITH_VALUE: Final = frozenset(
    {"incoming", "qmp", "qmp-pretty", "monitor", "mon", "pidfile", "loadvm"}
)
_ALONE: Final = frozenset({"S", "daemonize", "preconfig"})
_ID: Final = re.compile(r"(?:^|,)(?:id|chardev)=([^,]+)")
_MOST_BYTES: Final = 1 << 20


def command_of(process_id: int) -> str | None:
    """Give the command line of a QEMU on this host, without what belongs to that one process.

    That is its monitors, where it came from, and how it began: the options ``-qmp``, ``-mon``,
    ``-incoming``, ``-loadvm``, ``-S``, ``-daemonize`` and the like.

    :return: as a shell would split it; None if the process is no QEMU, or not to be looked at.
    """
    try:
        with Path(f"/proc/{process_id}/cmdline").open("rb") as file:
            raw = file.read(_MOST_BYTES)
        words = raw.decode().split("\0")[:-1]
    except (OSError, UnicodeDecodeError):
        return None
    begin = program_of(words)
    return shlex.join(words[:begin] + without_monitors(words[begin:])) if begin >= 0 else None


def split_command(command: str) -> list[str]:
    """Split a command line as a shell would.

    :raises Refused: it cannot be, or is empty.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Refused(f"--qemu {command!r} is no command: {error}") from error
    if not words:
        raise Refused("--qemu is empty; give QEMU's command, such as 'qemu-system-x86_64 -M pc'")
    return words


def program_of(words: Sequence[str]) -> int:
    """Which word of a command line is the QEMU, since the dynamic linker may start it; -1: none is."""
    names = [Path(word).name for word in words]
    if not names or not names[0].startswith((*_QEMU, _LOADER)):
        return -1
    return next((at for at, name in enumerate(names) if name.startswith(_QEMU)), -1)


def without_monitors(words: Sequence[str]) -> list[str]:
    """Leave out what :func:`command_of` does."""
    options = list(_options(words[1:]))
    monitors = {_id_of(value) for name, value in options if name == "mon" and value is not None}
    kept = [words[0]]
    for name, value in options:
        is_dropped = name in _WITH_VALUE or name in _ALONE
        is_dropped |= name == "chardev" and value is not None and _id_of(value) in monitors
        if not is_dropped:
            kept += [word for word in (name and f"-{name}", value) if word]
    return kept


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each option with its value; a disk without an option has an empty name."""
    at = 0
    while at < len(words):
        word, at = words[at], at + 1
        if not word.startswith("-") or word == "-":
            yield "", word
            continue
        name = word[1:].removeprefix("-")
        follows = at < len(words) and name not in _ALONE
        if follows and (name in _WITH_VALUE or not words[at].startswith("-")):
            yield name, words[at]
            at += 1
        else:
            yield name, None


def _id_of(value: str) -> str:
    """The chardev that ``-mon`` uses, or that ``-chardev`` defines."""
    found = _ID.search(value)
    return found[1] if found else value.partition(",")[0]
