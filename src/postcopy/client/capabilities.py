"""Migration capabilities of a machine, ours or a real QEMU's, over QMP."""

from collections.abc import Mapping
from typing import Any, Final

from postcopy.client.connection import Connection

_UNDER_WAY: Final = frozenset({"setup", "active", "device", "cancelling", "failing"})


async def set_capabilities(machine: Connection, changes: Mapping[str, bool]) -> None:
    """Switch capabilities by QEMU's names, all of them or none."""
    states = [{"capability": str(name), "state": on} for name, on in changes.items()]
    await machine.execute("migrate-set-capabilities", {"capabilities": states})


async def capabilities_of(machine: Connection) -> dict[str, bool]:
    """Which are on, of those that the machine knows."""
    listed = await machine.execute("query-migrate-capabilities")
    return {each["capability"]: bool(each["state"]) for each in listed}


async def is_busy(machine: Connection) -> bool:
    """Whether a migration or snapshot goes on there that ends by itself."""
    info: Mapping[str, Any] = await machine.execute("query-migrate")
    return info.get("status") in _UNDER_WAY
