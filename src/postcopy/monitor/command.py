"""The entry of a command, from which QMP, HMP, ``help`` and ``docs/monitor.md`` have it.

The types of its arguments are here, too, with QEMU's complaints about a value of another type.  A check
returns the value; ``path`` is the place of the value as QEMU writes it, such as ``channels[0].addr.type``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from postcopy.errors import Refused
from postcopy.monitor.backend import Backend
from postcopy.monitor.hmp_arguments import Argument

Arguments = Mapping[str, Any]
Lines = Iterable[str]


@dataclass(slots=True)
class Context:
    """One user of HMP: what its commands work on, and what ``xp`` remembers from one call to the next."""

    backend: Backend
    interactive: bool
    dump_form: str = "x"
    dump_size_bytes: int = 4


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
class Type:
    """A type of arguments; ``name`` is what the manual calls it."""

    name: str
    accept: Callable[[Any, str], Any]

    def __call__(self, value: Any, path: str) -> Any:
        """``value`` if it is of this type.

        :raises Refused: it is not; in QEMU's words.
        """
        return self.accept(value, path)


def _expected(kind: str, path: str) -> Refused:
    return Refused(f"Invalid parameter type for '{path}', expected: {kind}")


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _expected("string", path)
    return value


def _boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise _expected("boolean", path)
    return value


def _integer(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value >= 2**63:
        raise _expected("integer", path)
    return value


def _size(value: Any, path: str) -> int:
    # As QEMU: a negative one is taken as its two's complement.
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused(f"Parameter '{path}' expects uint64")
    return value % 2**64


string = Type("string", _string)
boolean = Type("boolean", _boolean)
integer = Type("integer", _integer)
"""A signed number of 64 bits."""
size = Type("size", _size)
"""An unsigned number of 64 bits."""
anything = Type("any", lambda value, _path: value)
"""What uses the value checks it."""


def array(item: "Check") -> Type:
    """A list of ``item``."""

    def check(value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise _expected("array", path)
        return [item(one, f"{path}[{index}]") for index, one in enumerate(value)]

    return Type(f"[{item.name}]", check)


def enumeration(*values: str, name: str = "") -> Type:
    """One of ``values``.

    :param name: QAPI's, where there are too many to list.
    """

    def check(value: Any, path: str) -> str:
        text = _string(value, path)
        if text not in values:
            # QEMU names an enum by its last part, and an array's element "null".
            member = "null" if path.endswith("]") else path.rpartition(".")[2]
            raise Refused(f"Parameter '{member}' does not accept value '{text}'")
        return text

    return Type(name or " or ".join(values), check)


@dataclass(frozen=True, slots=True)
class Struct:
    """An object with these members.

    ``branches``: by the value of the member ``tag`` there are more members.
    """

    required: Mapping[str, "Check"] = field(default_factory=dict)
    optional: Mapping[str, "Check"] = field(default_factory=dict)
    name: str = "object"
    tag: str = ""
    branches: Mapping[str, "Struct"] = field(default_factory=dict)

    def __call__(self, value: Any, path: str) -> dict[str, Any]:
        """Check ``value`` and return a copy of it."""
        if not isinstance(value, dict):
            raise _expected("object", path)
        checked = self.members(value, path)
        for name in value:
            if name not in checked:
                raise Refused(f"Parameter '{_join(path, name)}' is unexpected")
        return checked

    def members(self, value: dict[str, Any], path: str) -> dict[str, Any]:
        """Check the members that we know; ``value`` may have others."""
        checked: dict[str, Any] = {}
        for name, check in self.required.items():
            if name not in value:
                raise Refused(f"Parameter '{_join(path, name)}' is missing")
            checked[name] = check(value[name], _join(path, name))
        for name, check in self.optional.items():
            if name in value:
                checked[name] = check(value[name], _join(path, name))
        if self.tag:
            checked |= self.branches[checked[self.tag]].members(value, path)
        return checked


Check = Type | Struct


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def union(tag: str, branches: Mapping[str, Struct]) -> Struct:
    """An object whose member ``tag`` says which further members it has."""
    return Struct({tag: enumeration(*branches)}, tag=tag, branches=branches)


NOTHING = Struct()
"""A command without arguments."""


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
