"""Forks an engine before its guest's process imports modules that the engine does not need.

To start an interpreter takes 10 ms, and to import numpy 50 ms, which would delay the guest of a restore.
So the engine is forked from a process that is a few milliseconds old, has one thread and no open files; it
imports its modules on one processor while the guest's process imports others on another.  Every later
engine is a new interpreter, since the guest's process then has threads and a KVM machine.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from postcopy.trace import FILE_VARIABLE

if TYPE_CHECKING:
    from postcopy.link.guest.engine_slot import EnginePool

_HELP = {"-h", "--help"}
_MODULES: Final = (
    "postcopy.monitor.controls",
    "postcopy.monitor.json_stream",
    "postcopy.monitor.argument_types",
    "postcopy.monitor.hmp_values",
    "postcopy.monitor.hmp",
    "postcopy.monitor.qmp_session",
    "postcopy.monitor.server",
)
"""Modules of the monitors: 20 ms, imported while the engine reads the image."""


def engines_for(arguments: Sequence[str]) -> "EnginePool | None":
    """Return the engines for a command, with one that has been forked.

    :return: None: the command needs no engine at once, or this host cannot fork one now.
    """
    kind = _kind(arguments)
    if not kind or _HELP.intersection(arguments):
        return None
    trace = _value_of("--trace", arguments)
    if trace:  # the engine begins before the options are read
        os.environ[FILE_VARIABLE] = os.path.abspath(trace)  # noqa: PTH100 - pathlib takes long to import
    from postcopy.engine.__main__ import serve
    from postcopy.errors import HostCannot
    from postcopy.link import protocol
    from postcopy.link.guest.engine_process import EngineProcess
    from postcopy.link.guest.engine_slot import EnginePool

    orders = [getattr(protocol, kind)]
    try:
        return EnginePool(EngineProcess.fork(lambda link: serve(link, orders)))
    except HostCannot:
        return None  # the order that needs an engine tries again, and reports the error


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    for number, each in enumerate(arguments):
        name, given, value = each.partition("=")
        if name == option:
            return value if given else next(iter(arguments[number + 1 :]), None)
    return None


def _kind(arguments: Sequence[str]) -> str | None:
    """Return the job for which the engine is to be prepared."""
    match [each for each in arguments if each != "--debug"]:
        case ["restore", *rest] if not any(each.startswith("--qemu") for each in rest):
            return "RestoreCommands"
        case ["run", *rest] if any(each.startswith("--incoming") for each in rest):
            return "IncomingCommands"
    return None


def import_ahead(enough: Callable[[], bool]) -> None:
    """Import modules of later use, one at a time, until ``enough()``."""
    for name in _MODULES:
        if enough():
            return
        importlib.import_module(name)
