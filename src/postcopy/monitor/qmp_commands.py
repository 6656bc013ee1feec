"""The commands of QMP: those of the table, and those about QMP itself."""

from postcopy.errors import Refused
from postcopy.monitor.backend import Backend
from postcopy.monitor.command import Arguments, Command
from postcopy.monitor.commands import TABLE
from postcopy.monitor.hmp import Hmp
from postcopy.monitor.schema import Struct, array, enumeration, integer, string


def _human_monitor_command(backend: Backend, arguments: Arguments) -> str:
    if arguments.get("cpu-index", 0) not in range(max(1, len(backend.machine.vcpus))):
        raise Refused("Parameter 'cpu-index' expects a CPU number")
    return Hmp(backend, interactive=False).run(arguments["command-line"]).replace("\n", "\r\n")


_OWN = (
    # The session itself does it, but clients expect to see it listed.
    Command(
        "qmp_capabilities",
        "begin the session; with `oob`, commands may be executed out of band",
        arguments=Struct(optional={"enable": array(enumeration("oob"))}),
    ),
    Command(
        "human-monitor-command",
        "what HMP prints for a line",
        _human_monitor_command,
        Struct({"command-line": string}, {"cpu-index": integer}),
    ),
    Command(
        "query-commands", "the QMP commands", lambda _b, _a: [{"name": name} for name in COMMANDS]
    ),
)

COMMANDS: dict[str, Command] = {
    command.name: command for command in (*_OWN, *TABLE) if command.name
}
"""Every QMP command by its name."""
