"""The human monitor: a line in, the text that it prints out.  No transport."""

import logging
from collections.abc import Iterator

from postcopy.errors import PostcopyError
from postcopy.monitor.backend import Backend
from postcopy.monitor.hmp_arguments import BadUsage, parse
from postcopy.monitor.hmp_commands import COMMANDS, INFO, Context, HmpCommand

MOST_CHARACTERS = 1 << 16
"""A longer line is refused: no command needs one, and what reads them looks at each character often."""

_log = logging.getLogger(__name__)


class Hmp:
    """One user of the human monitor.  One thread at a time calls it.

    :param interactive: ``migrate`` without ``-d`` may wait for the end.
    """

    def __init__(self, backend: Backend, *, interactive: bool) -> None:
        self._context = Context(backend, interactive)

    def run(self, line: str) -> str:
        """What the command in ``line`` prints; each line of it ends with a newline."""
        if len(line) > MOST_CHARACTERS:
            return f"a line of {len(line)} characters is too long; {MOST_CHARACTERS} do\n"
        name, rest = _split(line)
        command, display, prefix = COMMANDS.get(name), name, ""
        if not name:
            return ""
        if command is not None and command.name == "info" and rest.strip():
            name, rest = _split(rest)
            command, display, prefix = INFO.get(name), f"info {name}", "info "
        if command is None:
            return f"unknown command: '{display}'\n"
        if command.name in {"info", "help|?"}:
            return "".join(f"{text}\n" for text in _help(command, rest))
        return "".join(f"{text}\n" for text in self._run(command, rest, prefix))

    def _run(self, command: HmpCommand, rest: str, prefix: str) -> Iterator[str]:
        try:
            arguments = parse(command.name, rest, command.flags, command.arguments)
            yield from command.run(self._context, arguments) or ()
        except BadUsage as error:
            yield str(error)
            yield f'Try "help {prefix}{command.name.partition("|")[0]}" for more information'
        except PostcopyError as error:
            yield f"Error: {error}"
        except Exception as error:
            _log.exception("internal error in HMP's %s", command.name)
            yield f"Error: internal error: {type(error).__name__}; see the log"


def completions(text: str) -> list[str]:
    """The commands that begin with ``text``, for a terminal's Tab key."""
    names = [*COMMANDS, *(f"info {name}" for name in INFO)]
    return sorted(name for name in names if name.startswith(text))


def _split(line: str) -> tuple[str, str]:
    # A format may follow without a blank: xp/4xb 0.
    line = line.strip()
    end = next((i for i, c in enumerate(line) if c.isspace() or (c == "/" and i)), len(line))
    return line[:end], line[end:]


def _help(command: HmpCommand, rest: str) -> Iterator[str]:
    name, _, subject = rest.strip().partition(" ")
    if command.name == "info" or (name == "info" and not subject):
        yield from (_explained(row, "info ") for row in _rows(INFO))
    elif not name:
        yield from (_explained(row, "") for row in _rows(COMMANDS))
    elif name == "info" and subject in INFO:
        yield _explained(INFO[subject], "info ")
    elif name in COMMANDS and not subject:
        yield _explained(COMMANDS[name], "")
    else:
        yield f"unknown command: '{rest.strip()}'"


def _rows(table: dict[str, HmpCommand]) -> list[HmpCommand]:
    return list(dict.fromkeys(table.values()))


def _explained(row: HmpCommand, prefix: str) -> str:
    return f"{prefix}{row.name} {row.usage} -- {row.help}"
