"""Migration capabilities of a machine, ours or a real QEMU's, set over QMP."""

import contextlib
from collections.abc import AsyncIterator, Mapping

from postcopy.client.connection import Connection
from postcopy.errors import PostcopyError
from postcopy.parameters import Capability


async def set_capabilities(machine: Connection, changes: Mapping[str, bool]) -> None:
    """Switch capabilities by QEMU's names, all of them or none."""
    states = [{"capability": str(name), "state": on} for name, on in changes.items()]
    await machine.execute("migrate-set-capabilities", {"capabilities": states})


@contextlib.asynccontextmanager
async def for_a_snapshot(machine: Connection, *, mapped: bool) -> AsyncIterator[None]:
    """Have the machine's capabilities as a snapshot needs them, and then as they were."""
    listed = await machine.execute("query-migrate-capabilities")
    before = {each["capability"]: bool(each["state"]) for each in listed}
    wanted = dict.fromkeys(before, False)  # most of them exclude a background snapshot
    wanted[Capability.EVENTS.value] = before.get(Capability.EVENTS.value, False)
    wanted |= {Capability.BACKGROUND_SNAPSHOT.value: True}
    if mapped:
        wanted[Capability.MAPPED_RAM.value] = True
    changes = {name: on for name, on in wanted.items() if before.get(name) != on}
    await set_capabilities(machine, changes)
    try:
        yield
    finally:
        with contextlib.suppress(PostcopyError):  # gone, or busy: what went wrong matters more
            await set_capabilities(machine, {name: before.get(name, False) for name in changes})
