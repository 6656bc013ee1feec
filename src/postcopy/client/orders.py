"""What one order needs, set for this order alone.

A machine of ours takes it with the order, in one message.  A QEMU has only settings that stay, so of
such a machine they are looked at, changed, checked once the order runs (they cannot be changed then), and
put back.  A lock keeps other commands of this host out meanwhile; what a killed one has left, the next puts
back.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from postcopy.client.capabilities import capabilities_of, is_busy, set_capabilities
from postcopy.client.connection import Connection
from postcopy.client.left_over import Changes, identity
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
_LIMITS: Final = {"max-bandwidth": 128 << 20, "downtime-limit": 300, "max-postcopy-bandwidth": 0}
"""What a QEMU begins with."""


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

    def counting(
        self, on: Mapping[str, bool], parameters: Mapping[str, Any], address: str
    ) -> list[str]:
        """What else is set and counts: by a user, or by a command that was killed; nothing tells which."""
        names = [name for name, is_on in on.items() if is_on and name not in self.capabilities]
        told = [f"{name} is on at {address}" for name in sorted(names)]
        told += [
            f"{name} is {parameters[name]} at {address} (a QEMU begins with {usual})"
            for name, usual in _LIMITS.items()
            if name not in self.parameters and parameters.get(name, usual) != usual
        ]
        return [f"{each}, and counts for this order" for each in told]


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
    """Settings of a machine that have been changed for one order; made by :meth:`take`.

    :ivar notes: what a user should know of what a command before has left.
    """

    def __init__(self, machine: Connection, lock: MachineLock) -> None:
        self._machine = machine
        self._lock = lock
        self._needed: dict[str, bool] = {}
        self._changes = Changes(identity(machine.address))
        self.notes: list[str] = []

    @classmethod
    async def take(cls, machine: Connection, needs: Needs | None = None, **snapshot: bool) -> Self:
        """Look, and change what is not as the order needs it.

        :param needs: None: those of a snapshot (``mapped``).
        :raises Refused: another command has the machine in hand, or it refuses.
        """
        lock = await MachineLock.take(machine.address)
        taken = cls(machine, lock)
        try:
            await taken._mend()
        except BaseException:
            lock.release()  # what was left is still noted
            raise
        try:
            before = await capabilities_of(machine)
            wanted = needs or of_a_snapshot(before, **snapshot)
            await taken._change(before, wanted)
        except BaseException:
            await taken.put_back()
            raise
        return taken

    async def _mend(self) -> None:
        """Undo what a command that was killed has left."""
        self._changes = Changes.decode(self._lock.read(), self._changes.machine)
        names = await self._changes.undo(self._machine)
        self._note()
        if names:
            self.notes.append(
                f"a command that was killed had left {', '.join(sorted(names))} changed at "
                f"{self._machine.address}; it is as it was before"
            )

    async def _change(self, before: Mapping[str, bool], needs: Needs) -> None:
        self._needed = {name: on for name, on in needs.capabilities.items() if on or name in before}
        changes = {name: on for name, on in self._needed.items() if before.get(name) != on}
        capabilities = self._changes.capabilities
        if changes:
            capabilities |= {
                name: (before.get(name, False) and name != SNAPSHOT, on)
                for name, on in changes.items()
            }
        if self._needed.get(SNAPSHOT):
            capabilities[SNAPSHOT] = False, True  # never left on
        # Noted first: a command that ends while the machine obeys has it put back as well.
        self._note()
        if changes:
            try:
                await set_capabilities(self._machine, changes)
            except Refused:
                capabilities.clear()  # all of them or none
                raise
        if needs.parameters:
            found = await self._machine.execute("query-migrate-parameters")
            self._changes.parameters = {
                name: (found[name], value)
                for name, value in needs.parameters.items()
                if name in found
            }
            self._note()
            await self._machine.execute("migrate-set-parameters", needs.parameters)

    def _note(self) -> None:
        self._lock.write(self._changes.encode())

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
        await self._changes.undo(self._machine)
        self._note()
