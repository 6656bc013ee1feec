"""The commands of both monitors, one table of them: QMP, HMP and ``help`` come from it.

Names, arguments, their order and what HMP prints are QEMU's; ``x-`` are our own.
``docs/monitor.md`` is made from it.
"""

import uuid
from collections.abc import Iterable
from typing import Any

from postcopy.monitor import hmp_info, hmp_values, memory_dump, objects, version
from postcopy.monitor.addresses import CHANNELS, uri_of_call
from postcopy.monitor.announce_commands import ANNOUNCE
from postcopy.monitor.argument_types import (
    Arguments,
    Check,
    Struct,
    anything,
    array,
    boolean,
    enumeration,
    size,
    string,
)
from postcopy.monitor.command import Command, Flag, Human
from postcopy.monitor.controls import Backend
from postcopy.monitor.hmp_arguments import (
    Argument,
    dump_format,
    number,
    rest_of_line,
    switch,
    word,
    words,
)
from postcopy.monitor.rate_commands import RATES
from postcopy.parameters import Capability, Overrides, rules
from postcopy.restore_options import RestoreOptions
from postcopy.status import Status

_STATES = tuple(status.value for status in Status)


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
    options = RestoreOptions(
        arguments["path"],
        lazy=arguments.get("lazy", False),
        prefetch=arguments.get("prefetch", "auto"),
        record=arguments.get("record-working-set", False),
    )
    backend.migration.restore(options, exit_on_error=arguments.get("exit-on-error", True))


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
    memory_dump.save(backend.machine, arguments["val"], arguments["size"], arguments["filename"])


def _query_ramblock(backend: Backend, _: Arguments) -> dict[str, Any]:
    lines = hmp_info.ram_blocks(backend.machine.regions())
    return {"human-readable-text": "".join(f"{line}\n" for line in lines)}


_URI_OR_CHANNELS: dict[str, Check] = {"uri": string, "channels": CHANNELS}
_CAPABILITIES = array(
    Struct(
        {"capability": enumeration(*Capability, name="MigrationCapability"), "state": boolean},
        name="MigrationCapabilityStatus",
    )
)
# Each parameter's own rule checks its value.
_PARAMETERS = Struct(optional=dict.fromkeys(rules(), anything), name="MigrationParameters")
_OVERRIDES: dict[str, Check] = {"x-capabilities": _CAPABILITIES, "x-parameters": _PARAMETERS}
_EXIT_ON_ERROR: dict[str, Check] = {"exit-on-error": boolean}
_GOES_ON = {"exit-on-error": False}  # its user sees the error at the prompt
_URI = Argument("uri", word)
_ADDRESS = Argument("addr", number)

TABLE = (
    Command(
        "query-migrate", "how the migration stands",
        lambda b, _: b.migration.info().to_qapi(),
        human=Human(flags=(Flag("a", "all of it"),), show=hmp_info.migrate),
    ),
    Command(
        "x-query-memory-map", "where the memory is: one letter for a run of pages",
        lambda b, _: b.migration.memory_map().to_qapi(),
    ),
    Command(
        "migrate", "send the guest to URI", _migrate,
        Struct(optional=_URI_OR_CHANNELS | _OVERRIDES | {"resume": boolean}),
        Human(
            arguments=(_URI,),
            flags=(
                Flag("d", "do not wait for the end"),
                Flag("r", "resume a paused postcopy", {"resume": True}),
            ),
            show=hmp_info.wait_for_the_end,
        ),
    ),
    Command(
        "x-snapshot", "write an image of the guest, which goes on, to URI", _snapshot,
        Struct(optional=_URI_OR_CHANNELS | {"mapped-ram": boolean}),
        Human(
            arguments=(_URI,),
            flags=(Flag("m", "pages at fixed places in a file", {"mapped-ram": True}),),
        ),
    ),
    Command(
        "migrate-incoming", "listen for a guest at URI", _migrate_incoming,
        Struct(optional=_URI_OR_CHANNELS | _OVERRIDES | _EXIT_ON_ERROR),
        Human(arguments=(_URI,), always=_GOES_ON),
    ),
    Command(
        "x-restore", "let the guest of an image run here", _restore,
        Struct(
            {"path": string},
            {"lazy": boolean, "prefetch": enumeration("auto", "off"), "record-working-set": boolean}
            | _EXIT_ON_ERROR,
        ),
        Human(
            arguments=(Argument("path", word),),
            flags=(
                Flag("l", "run it first", {"lazy": True}),
                Flag("n", "leave the working set", {"prefetch": "off"}),
                Flag("r", "record it", {"record-working-set": True}),
            ),
            always=_GOES_ON,
        ),
    ),
    Command(
        "x-reset-point", "make this moment, or an image, the reset point",
        lambda b, a: b.migration.resetting.set_point(a.get("path")),
        Struct(optional={"path": string}),
        Human(arguments=(Argument("path", words, "[path]"),), show=hmp_info.reset_point),
    ),
    Command(
        "x-reset", "take the guest back to its reset point",
        lambda b, _: b.migration.resetting.reset(), human=Human(show=hmp_info.reset),
    ),
    Command(
        "x-reset-end", "give the reset point up",
        lambda b, _: b.migration.resetting.end(), human=Human(),
    ),
    Command(
        "migrate-start-postcopy", "switch the migration under way to postcopy",
        lambda b, _: b.migration.start_postcopy(), human=Human(),
    ),
    Command(
        "migrate_cancel", "give up the migration",
        lambda b, _: b.migration.cancel(), human=Human(),
    ),
    Command(
        "migrate-continue", "go on from the status STATE",
        lambda b, a: b.migration.continue_(Status(a["state"])),
        Struct({"state": enumeration(*_STATES, name="MigrationStatus")}),
        Human(arguments=(Argument("state", word),), members=hmp_values.state),
    ),
    Command(
        "migrate-pause", "pause a postcopy",
        lambda b, _: b.migration.pause(), human=Human(), out_of_band=True,
    ),
    Command(
        "migrate-recover", "listen anew at URI for the source of a paused postcopy",
        lambda b, a: b.migration.recover(a["uri"]),
        Struct({"uri": string}), Human(arguments=(_URI,)),
        out_of_band=True, in_background=True,
    ),
    Command(
        "x-migrate-arrived",
        "the destination has completed and could not say so: nothing is needed here any more",
        lambda b, _: b.migration.arrived(), human=Human(),
    ),
    Command(
        "x-migrate-lost", "the source is gone for good: do what the parameter x-on-loss says",
        lambda b, _: b.migration.lost(), human=Human(),
    ),
    Command(
        "migrate-set-capabilities", "switch capabilities, all of them or none", _set_capabilities,
        Struct({"capabilities": _CAPABILITIES}),
        Human(
            "migrate_set_capability",
            (Argument("capability", word), Argument("state", switch)), members=hmp_values.capability,
        ),
    ),
    Command(
        "query-migrate-capabilities", "the capabilities",
        lambda b, _: b.migration.capabilities.to_qapi(), human=Human(show=hmp_info.capabilities),
    ),
    Command(
        "migrate-set-parameters", "set parameters, all of them or none",
        lambda b, a: b.migration.set_parameters(a), _PARAMETERS,
        Human(
            "migrate_set_parameter",
            (Argument("parameter", word), Argument("value", rest_of_line)), members=hmp_values.parameter,
        ),
    ),
    Command(
        "query-migrate-parameters", "the parameters",
        lambda b, _: b.migration.parameters.to_qapi(), human=Human(show=hmp_info.parameters),
    ),
    *RATES,
    *ANNOUNCE,
    *objects.COMMANDS,
    Command("stop", "stop the guest", lambda b, _: b.machine.stop(), human=Human("stop|s")),
    Command("cont", "let the guest run", lambda b, _: b.machine.cont(), human=Human("cont|c")),
    Command(
        "query-status", "whether the guest runs, and whose it is", _query_status,
        human=Human(show=hmp_info.status),
    ),
    Command("quit", "end this process", _quit, human=Human("quit|q")),
    Command(
        "query-version", "what version this is", lambda _b, _a: version.query_version(),
        human=Human(show=hmp_info.version),
    ),
    Command("query-name", "the machine's name: it has none", lambda _b, _a: {}),
    Command(
        "query-uuid", "the machine's UUID: zeros", lambda _b, _a: {"UUID": str(uuid.UUID(int=0))}
    ),
    Command(
        "pmemsave", "write guest physical memory to a file", _pmemsave,
        Struct({"val": size, "size": size, "filename": string}),
        Human(arguments=(
            Argument("val", number), Argument("size", number), Argument("filename", word)
        )),
    ),
    Command(
        "query-cpus-fast", "the vCPUs and their threads", _query_cpus_fast,
        human=Human("info cpus", show=hmp_info.cpus),
    ),
    Command(
        "x-query-ramblock", "the RAM blocks, in the order of their guest addresses", _query_ramblock,
        human=Human(
            "info ramblock",
            show=lambda _context, answer, _line: answer["human-readable-text"].splitlines(),
        ),
    ),
    Command(
        "", "tell where this process has a guest physical address",
        human=Human("gpa2hva", (_ADDRESS,), show=hmp_info.gpa2hva),
    ),
    Command(
        "", "show guest physical memory at ADDR",
        human=Human("xp", (Argument("fmt", dump_format, "/fmt"), _ADDRESS), show=hmp_info.xp),
    ),
)  # fmt: skip
"""All but those about the monitors themselves, which each has of its own."""
