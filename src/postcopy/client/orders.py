"""What one order needs, set for this order alone.

A machine of ours takes it with the order, in one message.  A QEMU has only settings that stay, so of
such a machine they are looked at, changed, checked once the order runs (they cannot be changed then), and
put back.  A lock keeps other commands of this host out meanwhile.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from postcopy.client.capabilities import capabilities_of, is_busy, set_capabilities
from postcopy.client.connection import Connection
from postcopy.client.machine_lock import MachineLock
from postcopy.errors import PostcopyError, Refused
from postcopy.parameters import Capability

C = Capability
SNAPSHOT: Final = C.BACKGROUND_SNAPSHOT.value
_TRIES: Final = 100
_PAUSE_S: Final = 0.1
_WHAT_IT_IS: Final = frozenset(
    {C.BACKGROUND_SNAPSHOT, C.POSTCOPY_RAM, C.MAPPED_RAM, C.PAUSE_BEFORE_SWITCHOVER}
)
"""Capabilities that make another order of an order; the others say how it is done."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What an order needs to be on, off and set, by QEMU's names; all else stays as it is set."""

    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def to_qapi(self) -> dict[str, Any]:
        """As members of an order to a machine of ours."""
        states = [{"capability": name, "state": on} for name, on in self.capabilities.items()]
        return {"x-capabilities": states, "x-parameters": dict(self.parameters)}

    def notes(self, before: Mapping[str, bool], address: str) -> list[str]:
        """What a user should know who has switched something on that does not count now."""
        return [
            f"{name} is on at {address}, and does not count for this order"
            for name in sorted(_WHAT_IT_IS)
            if before.get(name) and self.capabilities.get(name) is False
        ]


def of_a_migration(uri: str, *, postcopy: bool, destination: bool = False) -> Needs:
    """What each side of a migration must have on and off."""
    wanted = {C.EVENTS: True, C.BACKGROUND_SNAPSHOT: False, C.POSTCOPY_RAM: postcopy}
    if not uri.startswith("file:"):
        wanted[C.MAPPED_RAM] = False
    if not postcopy:
        wanted |= {C.POSTCOPY_PREEMPT: False, C.POSTCOPY_BLOCKTIME: False}
    elif destination:
        wanted[C.POSTCOPY_BLOCKTIME] = True
    if not destination:
        wanted[C.PAUSE_BEFORE_SWITCHOVER] = False
    return Needs({name.value: on for name, on in wanted.items()})


def of_a_snapshot(before: Mapping[str, bool], *, mapped: bool) -> Needs:
    """What a QEMU must have on and off for a background snapshot: most capabilities exclude it."""
    wanted = dict.fromkeys(before, False)
    wanted.pop(C.EVENTS.value, None)
    return Needs(wanted | {C.BACKGROUND_SNAPSHOT.value: True, C.MAPPED_RAM.value: mapped})


class Borrowed:
    """Settings of a machine that have been changed for one order; made by :meth:`take`."""

    def __init__(self, machine: Connection, lock: MachineLock) -> None:
        self._machine = machine
        self._lock = lock
        self._needed: dict[str, bool] = {}
        self._before: dict[str, bool] = {}
        self._set: dict[str, bool] = {}
        self._parameters_before: dict[str, Any] = {}
        self._parameters_set: dict[str, Any] = {}

    @classmethod
    async def take(cls, machine: Connection, needs: Needs | None = None, **snapshot: bool) -> Self:
        """Look, and change what is not as the order needs it.

        :param needs: None: those of a snapshot (``mapped``).
        :raises Refused: another command has the machine in hand, or it refuses.
        """
        lock = await MachineLock.take(machine.address)
        taken = cls(machine, lock)
        try:
            before = await capabilities_of(machine)
            wanted = needs or of_a_snapshot(before, **snapshot)
            await taken._change(before, wanted)
        except BaseException:
            await taken.put_back()
            raise
        return taken

    async def _change(self, before: Mapping[str, bool], needs: Needs) -> None:
        self._needed = {name: on for name, on in needs.capabilities.items() if on or name in before}
        changes = {name: on for name, on in self._needed.items() if before.get(name) != on}
        if self._needed.get(SNAPSHOT):
            self._before[SNAPSHOT], self._set[SNAPSHOT] = False, True  # never left on
        if changes:
            # Noted first: a command that is interrupted while the machine obeys puts it back as well.
            self._before |= {name: before.get(name, False) for name in changes}
            self._set |= changes
            try:
                await set_capabilities(self._machine, changes)
            except Refused:
                self._set = {}  # all of them or none
                raise
        if needs.parameters:
            found = await self._machine.execute("query-migrate-parameters")
            self._parameters_before = {
                name: found[name] for name in needs.parameters if name in found
            }
            self._parameters_set = dict(needs.parameters)
            await self._machine.execute("migrate-set-parameters", needs.parameters)

    async def check(self) -> None:
        """Find out whether the order runs with what was set for it; nothing can change it any more.

        :raises Refused: somebody has changed it in between.
        """
        found = await capabilities_of(self._machine)
        wrong = [name for name, on in self._needed.items() if found.get(name, False) != on]
        if wrong:
            raise Refused(
                f"somebody else has changed {', '.join(wrong)} at {self._machine.address} while this "
                "was being ordered; it has been given up: try again"
            )

    async def put_back(self) -> None:
        """Have everything as it was, but for what somebody has set since; harmless when done.

        ``background-snapshot`` stays off: nothing but a command that was killed leaves it on, and with
        it the next migration would leave two guests that run.
        """
        try:
            with contextlib.suppress(
                PostcopyError
            ):  # gone, or paused: what went wrong matters more
                await self._put_back_when_idle()
        finally:
            self._lock.release()

    async def _put_back_when_idle(self) -> None:
        """Another monitor of the machine may have ordered something in the very moment."""
        for _ in range(_TRIES):
            try:
                await self._put_back()
            except Refused:
                if not await is_busy(self._machine):
                    raise
            else:
                return
            await asyncio.sleep(_PAUSE_S)

    async def _put_back(self) -> None:
        if self._set:
            found = await capabilities_of(self._machine)
            back = {
                name: self._before[name] and name != SNAPSHOT
                for name, on in self._set.items()
                if found.get(name) == on
            }
            await set_capabilities(self._machine, back)
            self._set = {}
        if self._parameters_set:
            found = await self._machine.execute("query-migrate-parameters")
            parameters = {
                name: before
                for name, before in self._parameters_before.items()
                if found.get(name) == self._parameters_set[name]
            }
            await self._machine.execute("migrate-set-parameters", parameters)
            self._parameters_set = {}
