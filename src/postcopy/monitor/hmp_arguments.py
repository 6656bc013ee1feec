"""The arguments of an HMP command: flags, words, numbers, a dump format."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postcopy.errors import Refused
from postcopy.monitor.hmp_expression import Expression

_QUOTED = re.compile(r'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_FORMATS, _SIZES = "oduxci", {"b": 1, "h": 2, "w": 4, "g": 8, "L": 8}


class BadUsage(Exception):
    """The line does not fit the command; the text is QEMU's.

    :param hint: whether QEMU points to ``help`` behind it.
    """

    def __init__(self, text: str, *, hint: bool = True) -> None:
        super().__init__(text)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument; ``take`` cuts it off the line and returns it with the rest.

    :ivar shown: as ``help`` shows it, where that is not its name.
    """

    name: str
    take: Callable[[str, str], tuple[Any, str]]
    shown: str = ""


@dataclass(frozen=True, slots=True)
class DumpFormat:
    """``/COUNTfs``: how many, in which format, of how many bytes; ``None`` means as last time."""

    count: int = 1
    form: str | None = None
    size_bytes: int | None = None


def word(line: str, command: str) -> tuple[str, str]:
    """A word, or anything in double quotes."""
    line = line.lstrip()
    quoted = _QUOTED.match(line)
    if quoted is not None:
        return _ESCAPE.sub(_plain, quoted[1]), line[quoted.end() :]
    if not line or line.startswith('"'):
        raise BadUsage(f"{command}: string expected")
    text, _, rest = line.partition(" ")
    return text, rest


def _plain(escape: re.Match[str]) -> str:
    if escape[1] not in _ESCAPES:
        raise BadUsage(f"unsupported escape code: '{escape[0]}'")
    return _ESCAPES[escape[1]]


def words(line: str, command: str) -> tuple[str | None, str]:  # noqa: ARG001  the signature of all
    """The rest of the line, or None when there is none."""
    return line.strip() or None, ""


def rest_of_line(line: str, command: str) -> tuple[str, str]:
    """The rest of the line, quotes and all; there must be some."""
    if not (line := line.strip()):
        raise BadUsage(f"{command}: string expected")
    return line, ""


def switch(line: str, command: str) -> tuple[bool, str]:  # noqa: ARG001  the signature of all
    """``on`` or ``off``."""
    text, _, rest = line.strip().partition(" ")
    if text not in {"on", "off"}:
        raise BadUsage("Expected 'on' or 'off'")
    return text == "on", rest


def number(line: str, command: str) -> tuple[int, str]:  # noqa: ARG001  the signature of all
    """An expression of 64 bits."""
    try:
        expression = Expression(line)
    except Refused as error:
        raise BadUsage(str(error)) from error
    return expression.value, expression.rest


def optional_number(line: str, command: str) -> tuple[int | None, str]:
    """An expression of 64 bits, or None when there is none."""
    return number(line, command) if line.strip() else (None, "")


def dump_format(line: str, command: str) -> tuple[DumpFormat, str]:  # noqa: ARG001
    """``/4xb`` and the like, or nothing."""
    line = line.lstrip()
    if not line.startswith("/"):
        return DumpFormat(), line
    text, _, rest = line[1:].partition(" ")
    letters = text.lstrip("0123456789")
    digits = text[: len(text) - len(letters)]
    form: str | None = None
    size_bytes: int | None = None
    for letter in letters:
        if letter in _FORMATS:
            form = letter
        elif letter in _SIZES:
            size_bytes = _SIZES[letter]
        else:
            raise BadUsage(f"invalid char in format: '{letter}'")
    return DumpFormat(int(digits[:9] or "1"), form, size_bytes), rest


def parse(command: str, line: str, flags: str, arguments: Sequence[Argument]) -> Mapping[str, Any]:
    """The arguments in ``line``, flags by their letter.

    :raises BadUsage: the line does not fit.
    """
    found: dict[str, Any] = dict.fromkeys(flags, False)
    line = line.strip()
    while flags and line.startswith("-"):
        flag, _, line = line.partition(" ")
        if len(flag) != 2 or flag[1] not in flags:
            raise BadUsage(f"{command}: unsupported option {flag[:2]}")
        found[flag[1]] = True
        line = line.lstrip()
    for argument in arguments:
        found[argument.name], line = argument.take(line, command)
    if line.strip():
        raise BadUsage(f"{command}: extraneous characters at the end of line")
    return found
