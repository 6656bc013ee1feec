"""The commands of the human monitor, one table of them and one for ``info``.

A command yields the lines it prints.  Names, argument order and output are QEMU's.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postcopy.errors import Refused
from postcopy.monitor import hmp_info, memory_dump, memory_file, version
from postcopy.monitor.backend import Backend
from postcopy.monitor.hmp_arguments import (
    Argument,
    DumpFormat,
    dump_format,
    number,
    rest_of_line,
    switch,
    word,
    words,
)
from postcopy.monitor.hmp_values import parse_value
from postcopy.parameters import Capability, Overrides, rules
from postcopy.status import Status

_POLL_SECONDS = 0.1
_UNDER_WAY = frozenset(
    {Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.POSTCOPY_DEVICE, Status.CANCELLING}
)


@dataclass(slots=True)
class Context:
    """What commands work on, and what ``xp`` remembers from one call to the next."""

    backend: Backend
    interactive: bool
    dump_form: str = "x"
    dump_size_bytes: int = 4


Lines = Iterator[str]
Run = Callable[[Context, Mapping[str, Any]], Lines | None]


@dataclass(frozen=True, slots=True)
class HmpCommand:
    """One row: ``name`` has QEMU's aliases after ``|``; ``flags`` are single letters."""

    name: str
    run: Run
    help: str
    arguments: Sequence[Argument] = ()
    flags: str = ""
    usage: str = ""


def _migrate(context: Context, arguments: Mapping[str, Any]) -> Lines:
    migration = context.backend.migration
    migration.migrate(arguments["uri"], resume=arguments["r"])
    if arguments["d"] or not context.interactive:
        return
    pause = threading.Event()
    while (info := migration.info()).status in _UNDER_WAY:
        pause.wait(_POLL_SECONDS)
    if info.status is Status.FAILED and info.error_desc:
        yield f"Error: {info.error_desc}"


def _snapshot(context: Context, arguments: Mapping[str, Any]) -> None:
    overrides = Overrides.for_snapshot(mapped=arguments["m"])
    context.backend.migration.migrate(arguments["uri"], overrides=overrides)


def _named(names: Mapping[str, Any], name: str) -> Any:
    if name not in names:
        raise Refused(f"invalid parameter value: {name}")
    return names[name]


def _restore(context: Context, arguments: Mapping[str, Any]) -> None:
    context.backend.migration.restore(
        arguments["path"],
        lazy=arguments["l"],
        prefetch="off" if arguments["n"] else "auto",
        record=arguments["r"],
        exit_on_error=False,
    )


def _reset_point(context: Context, arguments: Mapping[str, Any]) -> Lines:
    done = context.backend.migration.resetting.set_point(arguments["path"] or None)
    yield f"copied: {done['copied-bytes'] >> 10} kbytes, paused: {done['pause-us']} us"


def _reset(context: Context, _: Mapping[str, Any]) -> Lines:
    done = context.backend.migration.resetting.reset()
    yield f"pages: {done['pages']}, paused: {done['us']} us"


def _continue(context: Context, arguments: Mapping[str, Any]) -> None:
    states = {status.value: status for status in Status}
    context.backend.migration.continue_(_named(states, arguments["state"]))


def _set_capability(context: Context, arguments: Mapping[str, Any]) -> None:
    capability = _named({c.value: c for c in Capability}, arguments["capability"])
    context.backend.migration.set_capabilities({capability: arguments["state"]})


def _set_parameter(context: Context, arguments: Mapping[str, Any]) -> None:
    name = arguments["parameter"]
    value = parse_value(name, _named(rules(), name), arguments["value"])
    context.backend.migration.set_parameters({name: value})


def _quit(context: Context, _: Mapping[str, Any]) -> None:
    context.backend.events.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
    context.backend.machine.quit()


def _gpa2hva(context: Context, arguments: Mapping[str, Any]) -> Lines:
    address, machine = arguments["addr"], context.backend.machine
    try:
        host_address = machine.host_address(address)
    except Refused:
        yield f"No memory is mapped at address {address:#x}"
        return
    name = machine.ram_name
    yield f"Host virtual address for {address:#x} ({name}) is {host_address:#x}"


def _xp(context: Context, arguments: Mapping[str, Any]) -> Lines:
    asked: DumpFormat = arguments["fmt"]
    if (asked.form or context.dump_form) == "i":
        raise Refused("format 'i' is not implemented: this monitor has no disassembler")
    context.dump_form = asked.form or context.dump_form
    context.dump_size_bytes = asked.size_bytes or context.dump_size_bytes
    return memory_dump.dump(
        context.backend.machine.read_physical,
        arguments["addr"],
        asked.count,
        context.dump_form,
        context.dump_size_bytes,
    )


def _pmemsave(context: Context, arguments: Mapping[str, Any]) -> None:
    machine = context.backend.machine
    memory_file.save(machine, arguments["val"], arguments["size"], arguments["filename"])


def _info_status(context: Context, _: Mapping[str, Any]) -> Lines:
    machine = context.backend.machine
    line = f"VM status: {'running' if machine.running else 'paused'}"
    state = machine.run_state
    yield line if machine.running or state == "paused" else f"{line} ({state})"


def _info_cpus(context: Context, _: Mapping[str, Any]) -> Lines:
    for vcpu in context.backend.machine.vcpus:
        mark = "*" if vcpu.index == 0 else " "
        yield f"{mark} CPU #{vcpu.index}: thread_id={vcpu.thread_id}"


def _info_migrate(context: Context, arguments: Mapping[str, Any]) -> Lines:
    info = context.backend.migration.info().to_qapi()
    return hmp_info.migrate(info, everything=arguments["a"])


def _info_capabilities(context: Context, _: Mapping[str, Any]) -> Lines:
    for row in context.backend.migration.capabilities.to_qapi():
        yield f"{row['capability']}: {hmp_info.on_off(row['state'])}"


def _info_parameters(context: Context, _: Mapping[str, Any]) -> Lines:
    return hmp_info.parameters(context.backend.migration.parameters)


def _info_version(_context: Context, _arguments: Mapping[str, Any]) -> Lines:
    yield version.text()


def _dispatched(_context: Context, _arguments: Mapping[str, Any]) -> Lines:
    """Stand in the table for what the dispatcher does itself: ``help``, and ``info`` with its subjects."""
    raise AssertionError("the dispatcher answers this itself")


_URI = Argument("uri", word)
_ADDRESS = Argument("addr", number)

_TABLE = (
    HmpCommand("cont|c", lambda c, _: c.backend.machine.cont(), "let the guest run"),
    HmpCommand(
        "gpa2hva", _gpa2hva, "tell where this process has a guest physical address",
        (_ADDRESS,), usage="addr",
    ),
    HmpCommand("help|?", _dispatched, "explain a command", (Argument("name", words),), usage="[cmd]"),
    HmpCommand(
        "info", _dispatched, "tell about a subject", (Argument("item", words),), usage="[subcommand]"
    ),
    HmpCommand(
        "migrate", _migrate,
        "send the guest to URI (-d: do not wait for the end; -r: resume a paused postcopy)",
        (_URI,), flags="dr", usage="[-d] [-r] uri",
    ),
    HmpCommand(
        "migrate_cancel", lambda c, _: c.backend.migration.cancel(), "give up the migration"
    ),
    HmpCommand(
        "migrate_continue", _continue, "go on from the status STATE",
        (Argument("state", word),), usage="state",
    ),
    HmpCommand(
        "migrate_incoming",
        lambda c, a: c.backend.migration.incoming(a["uri"], exit_on_error=False),
        "listen for a guest at URI", (_URI,), usage="uri",
    ),
    HmpCommand(
        "migrate_pause", lambda c, _: c.backend.migration.pause(), "pause a postcopy"
    ),
    HmpCommand(
        "migrate_recover", lambda c, a: c.backend.migration.recover(a["uri"]),
        "listen anew at URI for the source of a paused postcopy", (_URI,), usage="uri",
    ),
    HmpCommand(
        "migrate_set_capability", _set_capability, "switch a capability",
        (Argument("capability", word), Argument("state", switch)), usage="capability state",
    ),
    HmpCommand(
        "migrate_set_parameter", _set_parameter, "set a parameter",
        (Argument("parameter", word), Argument("value", rest_of_line)), usage="parameter value",
    ),
    HmpCommand(
        "migrate_start_postcopy", lambda c, _: c.backend.migration.start_postcopy(),
        "switch the migration under way to postcopy",
    ),
    HmpCommand(
        "pmemsave", _pmemsave, "write guest physical memory to a file",
        (Argument("val", number), Argument("size", number), Argument("filename", word)),
        usage="addr size file",
    ),
    HmpCommand("quit|q", _quit, "end this process"),
    HmpCommand("stop|s", lambda c, _: c.backend.machine.stop(), "stop the guest"),
    HmpCommand(
        "x_migrate_arrived", lambda c, _: c.backend.migration.arrived(),
        "the destination has completed and could not say so: nothing is needed here any more",
    ),
    HmpCommand(
        "x_migrate_lost", lambda c, _: c.backend.migration.lost(),
        "the source is gone for good: do what the parameter x-on-loss says",
    ),
    HmpCommand("x_reset", _reset, "take the guest back to its reset point"),
    HmpCommand(
        "x_reset_end", lambda c, _: c.backend.migration.resetting.end(), "give the reset point up"
    ),
    HmpCommand(
        "x_reset_point", _reset_point, "make this moment, or an image, the reset point",
        (Argument("path", words),), usage="[path]",
    ),
    HmpCommand(
        "x_restore", _restore,
        "wake the guest of an image (-l: run it first; -n: leave the working set; -r: record it)",
        (Argument("path", word),), flags="lnr", usage="[-l] [-n] [-r] path",
    ),
    HmpCommand(
        "x_snapshot", _snapshot,
        "write an image of the guest, which goes on, to URI (-m: pages at fixed places in a file)",
        (_URI,), flags="m", usage="[-m] uri",
    ),
    HmpCommand(
        "xp", _xp, "show guest physical memory at ADDR",
        (Argument("fmt", dump_format), _ADDRESS), usage="/fmt addr",
    ),
)  # fmt: skip

_INFO_TABLE = (
    HmpCommand("cpus", _info_cpus, "the vCPUs and their threads"),
    HmpCommand(
        "migrate",
        _info_migrate,
        "how the migration stands (-a: all of it)",
        flags="a",
        usage="[-a]",
    ),
    HmpCommand("migrate_capabilities", _info_capabilities, "the capabilities"),
    HmpCommand("migrate_parameters", _info_parameters, "the parameters"),
    HmpCommand("status", _info_status, "whether the guest runs"),
    HmpCommand("version", _info_version, "what version this is"),
)


def _by_alias(table: Sequence[HmpCommand]) -> dict[str, HmpCommand]:
    return {alias: command for command in table for alias in command.name.split("|")}


COMMANDS = _by_alias(_TABLE)
"""Every command by each of its names."""
INFO = _by_alias(_INFO_TABLE)
"""Every subject of ``info``."""
