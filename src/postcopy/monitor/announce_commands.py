"""The command that tells the network where the guest is; a row of the table of all commands."""

from typing import Any, Final

from postcopy.errors import Refused
from postcopy.monitor.argument_types import Arguments, Struct, array, integer, string
from postcopy.monitor.command import Command, Human
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp_arguments import Argument, words

_TIMES: Final = ("initial", "max", "rounds", "step")


def _announce(backend: Backend, arguments: Arguments) -> None:
    if arguments.get("interfaces"):
        raise Refused("the guest's only network device has no name; leave interfaces out")
    # What is left out is a human's, who means the times that are set.
    changes = {f"announce-{name}": arguments[name] for name in _TIMES if name in arguments}
    times = backend.migration.parameters.with_changes(changes).announcement
    backend.machine.announcer.begin(times, arguments.get("id", ""))


def _of_line(line: Arguments) -> dict[str, Any]:
    interfaces, _, name = (line["interfaces"] or "").partition(" ")
    given = {"interfaces": interfaces.split(",") if interfaces else [], "id": name.strip()}
    return {key: value for key, value in given.items() if value}


ANNOUNCE: Final = (
    Command(
        "announce-self", "tell the guest's network where it is, as it is told of one that has arrived",
        _announce,
        Struct(dict.fromkeys(_TIMES, integer), {"interfaces": array(string), "id": string}),
        Human(
            arguments=(Argument("interfaces", words, "[interfaces] [id]"),),
            members=_of_line,
        ),
    ),
)  # fmt: skip
"""For :data:`postcopy.monitor.commands.TABLE`."""
