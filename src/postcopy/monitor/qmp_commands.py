"""The QMP commands, one table of them: name, arguments, what to do.

A command gets checked arguments and returns what stands after ``"return"``.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from postcopy.errors import Refused
from postcopy.monitor import memory_file, version
from postcopy.monitor.addresses import CHANNELS, uri_of_call
from postcopy.monitor.backend import Backend
from postcopy.monitor.hmp import Hmp
from postcopy.monitor.schema import (
    NOTHING,
    Check,
    Struct,
    anything,
    array,
    boolean,
    enumeration,
    integer,
    size,
    string,
)
from postcopy.parameters import Capability, Overrides, rules
from postcopy.status import Status

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table.

    :ivar out_of_band: ``exec-oob`` may run it while another command is being executed, so it must
        not wait for anything.
    :ivar in_background: or it may, for a bounded time: out of band a thread of its own runs it.
    """

    name: str
    run: Callable[[Backend, Arguments], object]
    arguments: Struct = NOTHING
    out_of_band: bool = False
    in_background: bool = False


def _migrate(backend: Backend, arguments: Arguments) -> None:
    backend.migration.migrate(
        uri_of_call(arguments),
        resume=arguments.get("resume", False),
        overrides=_overrides(arguments),
    )


def _overrides(arguments: Arguments) -> Overrides:
    return Overrides(
        _switched(arguments.get("x-capabilities", ())), arguments.get("x-parameters", {})
    )


def _switched(capabilities: Iterable[Arguments]) -> dict[Capability, bool]:
    return {Capability(each["capability"]): each["state"] for each in capabilities}


def _snapshot(backend: Backend, arguments: Arguments) -> None:
    overrides = Overrides.for_snapshot(mapped=arguments.get("mapped-ram", False))
    backend.migration.migrate(uri_of_call(arguments), overrides=overrides)


def _migrate_incoming(backend: Backend, arguments: Arguments) -> None:
    backend.migration.incoming(
        uri_of_call(arguments),
        exit_on_error=arguments.get("exit-on-error", True),
        overrides=_overrides(arguments),
    )


def _restore(backend: Backend, arguments: Arguments) -> None:
    backend.migration.restore(
        arguments["path"],
        lazy=arguments.get("lazy", False),
        prefetch=arguments.get("prefetch", "auto"),
        record=arguments.get("record-working-set", False),
        exit_on_error=arguments.get("exit-on-error", True),
    )


def _set_capabilities(backend: Backend, arguments: Arguments) -> None:
    backend.migration.set_capabilities(_switched(arguments["capabilities"]))


def _query_status(backend: Backend, _: Arguments) -> dict[str, Any]:
    machine = backend.machine
    return {
        "status": machine.run_state,
        "running": machine.running,
        **machine.ownership.to_qapi(),
    }


def _query_cpus_fast(backend: Backend, _: Arguments) -> list[dict[str, Any]]:
    return [
        {
            "cpu-index": vcpu.index,
            "thread-id": vcpu.thread_id,
            "qom-path": f"/machine/unattached/device[{vcpu.index}]",
            "target": "x86_64",
        }
        for vcpu in backend.machine.vcpus
    ]


def _quit(backend: Backend, _: Arguments) -> None:
    backend.events.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
    backend.machine.quit()


def _pmemsave(backend: Backend, arguments: Arguments) -> None:
    memory_file.save(backend.machine, arguments["val"], arguments["size"], arguments["filename"])


def _human_monitor_command(backend: Backend, arguments: Arguments) -> str:
    if arguments.get("cpu-index", 0) not in range(max(1, len(backend.machine.vcpus))):
        raise Refused("Parameter 'cpu-index' expects a CPU number")
    return Hmp(backend, interactive=False).run(arguments["command-line"]).replace("\n", "\r\n")


_URI_OR_CHANNELS: dict[str, Check] = {"uri": string, "channels": CHANNELS}
_CAPABILITIES = array(Struct({"capability": enumeration(*Capability), "state": boolean}))
# Each parameter's own rule checks its value.
_PARAMETERS = Struct(optional=dict.fromkeys(rules(), anything))
_OVERRIDES: dict[str, Check] = {"x-capabilities": _CAPABILITIES, "x-parameters": _PARAMETERS}

_TABLE = (
    Command("query-migrate", lambda b, _: b.migration.info().to_qapi()),
    Command(
        "migrate",
        _migrate,
        Struct(optional=_URI_OR_CHANNELS | _OVERRIDES | {"resume": boolean}),
    ),
    Command("x-snapshot", _snapshot, Struct(optional=_URI_OR_CHANNELS | {"mapped-ram": boolean})),
    Command(
        "migrate-incoming",
        _migrate_incoming,
        Struct(optional=_URI_OR_CHANNELS | _OVERRIDES | {"exit-on-error": boolean}),
    ),
    Command(
        "x-restore",
        _restore,
        Struct(
            {"path": string},
            {
                "lazy": boolean,
                "prefetch": enumeration("auto", "off"),
                "record-working-set": boolean,
                "exit-on-error": boolean,
            },
        ),
    ),
    Command(
        "x-reset-point",
        lambda b, a: b.migration.resetting.set_point(a.get("path")),
        Struct(optional={"path": string}),
    ),
    Command("x-reset", lambda b, _: b.migration.resetting.reset()),
    Command("x-reset-end", lambda b, _: b.migration.resetting.end()),
    Command("migrate-start-postcopy", lambda b, _: b.migration.start_postcopy()),
    Command("migrate_cancel", lambda b, _: b.migration.cancel()),
    Command(
        "migrate-continue",
        lambda b, a: b.migration.continue_(Status(a["state"])),
        Struct({"state": enumeration(*(status.value for status in Status))}),
    ),
    Command("migrate-pause", lambda b, _: b.migration.pause(), out_of_band=True),
    Command(
        "migrate-recover",
        lambda b, a: b.migration.recover(a["uri"]),
        Struct({"uri": string}),
        out_of_band=True,
        in_background=True,
    ),
    Command("x-migrate-arrived", lambda b, _: b.migration.arrived()),
    Command("x-migrate-lost", lambda b, _: b.migration.lost()),
    Command(
        "migrate-set-capabilities",
        _set_capabilities,
        Struct({"capabilities": _CAPABILITIES}),
    ),
    Command("query-migrate-capabilities", lambda b, _: b.migration.capabilities.to_qapi()),
    Command(
        "migrate-set-parameters",
        lambda b, a: b.migration.set_parameters(a),
        _PARAMETERS,
    ),
    Command("query-migrate-parameters", lambda b, _: b.migration.parameters.to_qapi()),
    Command("stop", lambda b, _: b.machine.stop()),
    Command("cont", lambda b, _: b.machine.cont()),
    Command("query-status", _query_status),
    Command("quit", _quit),
    Command(
        "human-monitor-command",
        _human_monitor_command,
        Struct({"command-line": string}, {"cpu-index": integer}),
    ),
    Command("query-commands", lambda _b, _a: [{"name": name} for name in COMMANDS]),
    Command("query-version", lambda _b, _a: version.query_version()),
    Command("query-name", lambda _b, _a: {}),
    Command("query-uuid", lambda _b, _a: {"UUID": str(uuid.UUID(int=0))}),
    Command("pmemsave", _pmemsave, Struct({"val": size, "size": size, "filename": string})),
    Command("query-cpus-fast", _query_cpus_fast),
)

COMMANDS: dict[str, Command] = {
    command.name: command
    # Negotiation is the session's own business, but clients expect to see it listed.
    for command in (Command("qmp_capabilities", lambda _b, _a: {}), *_TABLE)
}
"""Every QMP command by its name."""
