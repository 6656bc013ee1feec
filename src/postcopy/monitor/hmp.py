"""The human monitor: a line in, the text that it prints out.  No transport."""

import logging

from postcopy.errors import PostcopyError
from postcopy.monitor.argument_types import Arguments
from postcopy.monitor.command import Command, Human
from postcopy.monitor.commands import TABLE
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp_arguments import Argument, BadUsage, parse, words
from postcopy.monitor.hmp_info import Context, Lines

MOST_CHARACTERS = 1 << 16
"""A longer line is refused: no command needs one, and what reads them looks at each character often."""

_INFO = "info "
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
        if not name:
            return ""
        if name == "info" and rest.strip():
            subject, rest = _split(rest)
            name = _INFO + subject
        if (command := COMMANDS.get(name)) is None or command.human is None:
            return f"unknown command: '{name}'\n"
        return "".join(f"{text}\n" for text in self._run(command, command.human, rest))

    def _run(self, command: Command, human: Human, rest: str) -> Lines:
        name = command.human_name.removeprefix(_INFO)
        try:
            flags = "".join(flag.letter for flag in human.flags)
            arguments = parse(name, rest, flags, human.arguments)
            answer = command.run(self._context.backend, human.call(arguments))
            yield from human.show(self._context, answer, arguments)
        except BadUsage as error:
            yield str(error)
            if error.hint:
                first = command.human_name.partition("|")[0]
                yield f'Try "help {first}" for more information'
        except PostcopyError as error:
            yield f"Error: {error}"
        except Exception as error:
            _log.exception("internal error in HMP's %s", name)
            yield f"Error: internal error: {type(error).__name__}; see the log"


def completions(text: str) -> list[str]:
    """The commands that begin with ``text``, for a terminal's Tab key."""
    return sorted(name for name in COMMANDS if name.startswith(text))


def _split(line: str) -> tuple[str, str]:
    # A format may follow without a blank: xp/4xb 0.
    line = line.strip()
    end = next((i for i, c in enumerate(line) if c.isspace() or (c == "/" and i)), len(line))
    return line[:end], line[end:]


def _help(_context: Context, _answer: object, arguments: Arguments) -> Lines:
    name = " ".join((arguments["name"] or "").split())
    if name == "info":
        return _explained(info=True)
    if not name:
        return _explained(info=False)
    if name in COMMANDS:
        return [COMMANDS[name].human_help]
    return [f"unknown command: '{name}'"]


def _explained(*, info: bool) -> Lines:
    rows = {command.human_name: command for command in COMMANDS.values()}
    return (rows[name].human_help for name in sorted(rows) if name.startswith(_INFO) is info)


_OWN = (
    Command(
        "", "explain a command",
        human=Human("help|?", (Argument("name", words, "[cmd]"),), show=_help),
    ),
    Command(
        "", "tell about a subject",
        human=Human(
            "info", (Argument("item", words, "[subcommand]"),),
            show=lambda _c, _answer, _a: _explained(info=True),
        ),
    ),
)  # fmt: skip

COMMANDS: dict[str, Command] = {
    alias: command
    for command in (*_OWN, *TABLE)
    if command.human is not None
    for alias in command.human_name.split("|")
}
"""Every command by each of its names; a subject of ``info`` is ``info SUBJECT``."""
