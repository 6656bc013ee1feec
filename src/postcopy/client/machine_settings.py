"""Capabilities of a machine, and changes of a QEMU's settings for one command, with their undo.

The changes are written to the file of the machine's lock.  If the command is killed, the next command takes
the lock, reads the changes and undoes them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from postcopy.channel.address import UnixAddress, parse_socket
from postcopy.client.qmp import QmpConnection

_UNDER_WAY: Final = frozenset({"setup", "active", "device", "cancelling", "failing"})


async def set_capabilities(machine: QmpConnection, changes: Mapping[str, bool]) -> None:
    """Switch capabilities by QEMU's names, all of them or none."""
    states = [{"capability": str(name), "state": on} for name, on in changes.items()]
    await machine.execute("migrate-set-capabilities", {"capabilities": states})


async def capabilities_of(machine: QmpConnection) -> dict[str, bool]:
    """Return the states of the capabilities that the machine knows."""
    listed = await machine.execute("query-migrate-capabilities")
    return {each["capability"]: bool(each["state"]) for each in listed}


async def is_busy(machine: QmpConnection) -> bool:
    """Whether a migration or snapshot is under way there that ends by itself."""
    info: Mapping[str, Any] = await machine.execute("query-migrate")
    return info.get("status") in _UNDER_WAY


@dataclass(slots=True)
class SettingsChanges:
    """Changed settings by QEMU's names, each as its old and its new value.

    :ivar machine: the identity of the machine, see :func:`machine_identity`.
    :ivar snapshot: what else a snapshot has changed, see :class:`postcopy.client.left_over.LeftOver`.
    """

    machine: str
    capabilities: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    parameters: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    snapshot: dict[str, Any] | None = None

    async def undo(self, machine: QmpConnection) -> list[str]:
        """Restore the old value of each setting that still has the new one; other changes stay.

        :return: the names of the restored settings.
        :raises Refused: a migration or snapshot is under way there.
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
        """Encode for a file; empty without changes."""
        changed = self.capabilities or self.parameters or self.snapshot
        return json.dumps(asdict(self)).encode() if changed else b""

    @classmethod
    def decode(cls, text: bytes, machine: str) -> "SettingsChanges":
        """Decode the result of :meth:`encode`; no changes if it is of another machine or invalid."""
        try:
            told = json.loads(text)
            changed = _pairs(told["capabilities"]), _pairs(told["parameters"])
            found = cls(told["machine"], *changed, told.get("snapshot"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls(machine)
        return found if found.machine == machine else cls(machine)


def _pairs(told: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {str(name): (before, set_) for name, (before, set_) in told.items()}


def machine_identity(address: str) -> str:
    """Return an identity of the machine: its socket's inode and the time at which that was made.

    Machines at a TCP address cannot be distinguished.
    """
    where = parse_socket(address, "QMP")
    if not isinstance(where, UnixAddress):
        return ""
    try:
        made = Path(where.path).stat()
    except OSError:
        return ""  # the connection works, but the path is gone
    return f"{made.st_dev}:{made.st_ino}:{made.st_mtime_ns}"
