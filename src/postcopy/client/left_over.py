"""What an order has changed of the settings of a QEMU, and how that is undone.

It stands in the file of the machine's lock while it is so.  A command that is killed leaves it there, and
its lock to the next one, which undoes it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from postcopy.channel.address import UnixAddress, parse_socket
from postcopy.client.capabilities import capabilities_of, set_capabilities
from postcopy.client.connection import Connection


@dataclass(slots=True)
class Changes:
    """By QEMU's names: what was set before, and what has been set for the order.

    :ivar machine: which machine, as :func:`identity` tells.
    """

    machine: str
    capabilities: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    parameters: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    async def undo(self, machine: Connection) -> list[str]:
        """Have as it was what is still as it has been set; what somebody has set since stays.

        :return: the names.
        :raises Refused: not now: a migration or snapshot goes on there.
        """
        names = []
        if self.capabilities:
            on = await capabilities_of(machine)
            back = {n: old for n, (old, new) in self.capabilities.items() if on.get(n) == new}
            await set_capabilities(machine, back)
            names += [name for name, old in back.items() if on[name] != old]
            self.capabilities = {}
        if self.parameters:
            found = await machine.execute("query-migrate-parameters")
            values = {n: old for n, (old, new) in self.parameters.items() if found.get(n) == new}
            await machine.execute("migrate-set-parameters", values)
            names += [name for name, old in values.items() if found[name] != old]
            self.parameters = {}
        return names

    def encode(self) -> bytes:
        """As it stands in a file; nothing for no changes."""
        return json.dumps(asdict(self)).encode() if self.capabilities or self.parameters else b""

    @classmethod
    def decode(cls, text: bytes, machine: str) -> "Changes":
        """What :meth:`encode` has written; no changes where it is of another machine, or no such text."""
        try:
            told = json.loads(text)
            found = cls(told["machine"], _pairs(told["capabilities"]), _pairs(told["parameters"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls(machine)
        return found if found.machine == machine else cls(machine)


def _pairs(told: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {str(name): (before, set_) for name, (before, set_) in told.items()}


def identity(address: str) -> str:
    """What another machine at the same QMP address does not share: when its socket was made.

    At a TCP address nothing tells them apart.
    """
    where = parse_socket(address, "QMP")
    if not isinstance(where, UnixAddress):
        return ""
    try:
        made = Path(where.path).stat()
    except OSError:
        return ""  # it is connected to, but its path is gone
    return f"{made.st_dev}:{made.st_ino}:{made.st_mtime_ns}"
