"""What a command of the monitors is: its form in QMP, and in HMP."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from postcopy.monitor.argument_types import NOTHING, Arguments, Struct
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp_arguments import Argument
from postcopy.monitor.hmp_info import Context, Lines


def _silent(_context: Context, _answer: Any, _arguments: Arguments) -> Lines:
    return ()


@dataclass(frozen=True, slots=True)
class Flag:
    """``-LETTER`` in HMP.

    :ivar members: the QMP arguments that it stands for.
    """

    letter: str
    help: str
    members: Arguments = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Human:
    """A command's form in HMP.

    :ivar name: where it is not QMP's with ``_`` for ``-``, or has aliases (after ``|``).
    :ivar arguments: those of the line; a QMP argument unless ``members`` says otherwise.
    :ivar always: QMP arguments that each line stands for.
    :ivar members: the QMP arguments that a line's arguments stand for.
    :ivar show: the lines it prints, of the command's answer and the line's arguments.
    """

    name: str = ""
    arguments: Sequence[Argument] = ()
    flags: Sequence[Flag] = ()
    always: Arguments = field(default_factory=dict)
    members: Callable[[Arguments], Arguments] | None = None
    show: Callable[[Context, Any, Arguments], Lines] = _silent

    def call(self, line: Arguments) -> Arguments:
        """The QMP arguments for those of a line.

        :raises Refused: a value makes no sense.
        """
        if self.members is not None:
            return self.members(line)
        given = {each.name: line[each.name] for each in self.arguments}
        found = {**self.always, **{n: value for n, value in given.items() if value is not None}}
        for flag in self.flags:
            found |= flag.members if line[flag.letter] else {}
        return found

    @property
    def usage(self) -> str:
        """What stands behind the name: ``[-d] [-r] uri``."""
        flags = (f"[-{flag.letter}]" for flag in self.flags)
        return " ".join([*flags, *(each.shown or each.name for each in self.arguments)])


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    :ivar name: QMP's; empty when only HMP has it.
    :ivar help: one line.
    :ivar run: gets checked arguments and returns what stands after ``"return"``.
    :ivar human: its form in HMP; None when only QMP has it.
    :ivar out_of_band: ``exec-oob`` may run it while another command is being executed, so it must
        not wait for anything.
    :ivar in_background: or it may, for a bounded time: out of band a thread of its own runs it.
    """

    name: str
    help: str
    run: Callable[[Backend, Arguments], object] = lambda _backend, _arguments: None
    arguments: Struct = NOTHING
    human: Human | None = None
    out_of_band: bool = False
    in_background: bool = False

    @property
    def human_name(self) -> str:
        """HMP's name, with its aliases after ``|``; ``info migrate`` for ``query-migrate``."""
        name = (self.human and self.human.name) or self.name.replace("-", "_")
        subject = name.removeprefix("query_")
        return name if subject == name else f"info {subject}"

    @property
    def human_help(self) -> str:
        """As ``help`` prints it."""
        human = self.human or Human()
        flags = "; ".join(f"-{flag.letter}: {flag.help}" for flag in human.flags)
        more = f" ({flags})" if flags else ""
        return f"{self.human_name} {human.usage} -- {self.help}{more}"
