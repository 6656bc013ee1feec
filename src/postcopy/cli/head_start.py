"""An engine that begins before its guest's process has imported anything that it does not need too.

Starting an interpreter takes 10 ms and importing numpy 50, for which a guest that is to wake would
wait.  So the engine branches off (``fork``) from a process that is a few milliseconds old, has one thread,
and has opened nothing; and imports on one processor what it needs, while the guest's process does on
another.  Every later engine is a new interpreter: then there are threads and a KVM machine.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from postcopy.trace import FILE_VARIABLE

if TYPE_CHECKING:
    from postcopy.link.guest.engine_process import EnginePool

_HELP = {"-h", "--help"}


def engines_for(arguments: Sequence[str]) -> "EnginePool | None":
    """The engines for a command, one of which is on its way.

    :return: None: it needs none, or not at once, or this host has no room for one now.
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
    from postcopy.link.guest.engine_process import EnginePool, EngineProcess

    orders = [getattr(protocol, kind)]
    try:
        return EnginePool(EngineProcess.fork(lambda link: serve(link, orders)))
    except HostCannot:
        return None  # the order that needs one tries again, and says so


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    for number, each in enumerate(arguments):
        name, given, value = each.partition("=")
        if name == option:
            return value if given else next(iter(arguments[number + 1 :]), None)
    return None


def _kind(arguments: Sequence[str]) -> str | None:
    """What the engine is to be ready for."""
    match [each for each in arguments if each != "--debug"]:
        case ["restore", *_]:
            return "RestoreCommands"
        case ["run", *rest] if any(each.startswith("--incoming") for each in rest):
            return "IncomingCommands"
    return None
