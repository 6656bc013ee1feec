"""Settings of one order, which apply to this order only.

A machine of ours takes them with the order, in one command.  A QEMU has only persistent settings, so they
are read, changed, checked once the order runs (they cannot be changed then), and restored afterwards.  A
lock excludes other commands of this host meanwhile; changes of a killed command are undone by the next.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from postcopy.client.left_over import LeftOver
from postcopy.client.machine_lock import MachineLock
from postcopy.client.machine_settings import (
    SettingsChanges,
    capabilities_of,
    is_busy,
    machine_identity,
    set_capabilities,
)
from postcopy.client.qmp import QmpConnection
from postcopy.errors import PostcopyError, Refused
from postcopy.parameters import Capability

C = Capability
SNAPSHOT: Final = C.BACKGROUND_SNAPSHOT.value
_TRIES: Final = 100
_PAUSE_S: Final = 0.1
_KIND_OF_ORDER: Final = frozenset(
    {C.BACKGROUND_SNAPSHOT, C.POSTCOPY_RAM, C.MAPPED_RAM, C.PAUSE_BEFORE_SWITCHOVER}
)
"""Capabilities that change the kind of an order; all others change how it is carried out."""
_LIMITS: Final = {"max-bandwidth": 128 << 20, "downtime-limit": 300, "max-postcopy-bandwidth": 0}
"""The defaults of a QEMU."""


@dataclass(frozen=True, slots=True)
class OrderSettings:
    """Capabilities and parameters of an order, by QEMU's names; all others stay as they are set."""

    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def to_qapi(self) -> dict[str, Any]:
        """Return them as arguments of a command to a machine of ours."""
        states = [{"capability": name, "state": on} for name, on in self.capabilities.items()]
        return {"x-capabilities": states, "x-parameters": dict(self.parameters)}

    def notes(self, before: Mapping[str, bool], address: str) -> list[str]:
        """Notes on capabilities that are on and do not apply to this order."""
        return [
            f"{name} is on at {address}, and does not apply to this order"
            for name in sorted(_KIND_OF_ORDER)
            if before.get(name) and self.capabilities.get(name) is False
        ]

    def counting(
        self, on: Mapping[str, bool], parameters: Mapping[str, Any], address: str
    ) -> list[str]:
        """Notes on other settings that apply, whether a user or a killed command has set them."""
        names = [name for name, is_on in on.items() if is_on and name not in self.capabilities]
        told = [f"{name} is on at {address}" for name in sorted(names)]
        told += [
            f"{name} is {parameters[name]} at {address} (QEMU's default is {usual})"
            for name, usual in _LIMITS.items()
            if name not in self.parameters and parameters.get(name, usual) != usual
        ]
        return [f"{each}, and applies to this order" for each in told]


def of_a_migration(uri: str, *, postcopy: bool, destination: bool = False) -> OrderSettings:
    """Settings of one side of a migration."""
    wanted = {C.EVENTS: True, C.BACKGROUND_SNAPSHOT: False, C.POSTCOPY_RAM: postcopy}
    if not uri.startswith("file:"):
        wanted[C.MAPPED_RAM] = False
    if not postcopy:
        wanted |= {C.POSTCOPY_PREEMPT: False, C.POSTCOPY_BLOCKTIME: False}
    elif destination:
        wanted[C.POSTCOPY_BLOCKTIME] = True
    if not destination:
        wanted[C.PAUSE_BEFORE_SWITCHOVER] = False
    return OrderSettings({name.value: on for name, on in wanted.items()})


def of_a_snapshot(before: Mapping[str, bool], *, mapped: bool) -> OrderSettings:
    """Settings of a QEMU for a background snapshot: most capabilities exclude it."""
    wanted = dict.fromkeys(before, False)
    wanted.pop(C.EVENTS.value, None)
    return OrderSettings(wanted | {C.BACKGROUND_SNAPSHOT.value: True, C.MAPPED_RAM.value: mapped})


class BorrowedSettings:
    """Settings of a QEMU that have been changed for one order; made by :meth:`take`.

    :ivar notes: for the user: changes of a killed command that have been undone.
    """

    def __init__(self, machine: QmpConnection, lock: MachineLock) -> None:
        self._machine = machine
        self._lock = lock
        self._needed: dict[str, bool] = {}
        self._changes = SettingsChanges(machine_identity(machine.address))
        self.notes: list[str] = []

    @classmethod
    async def take(
        cls, machine: QmpConnection, needs: OrderSettings | None = None, **snapshot: bool
    ) -> Self:
        """Read the settings, and change those that the order needs otherwise.

        :param needs: None: those of a snapshot (``mapped``).
        :raises Refused: another command drives the machine, or the machine refuses.
        """
        lock = await MachineLock.take(machine.address)
        taken = cls(machine, lock)
        try:
            await taken._undo_left_over()
        except BaseException:
            lock.release()  # the changes stay in its file
            raise
        try:
            before = await capabilities_of(machine)
            wanted = needs or of_a_snapshot(before, **snapshot)
            await taken._change(before, wanted)
        except BaseException:
            await taken.put_back()
            raise
        return taken

    async def _undo_left_over(self) -> None:
        """Undo the changes of a command that was killed."""
        self._changes = SettingsChanges.decode(self._lock.read(), self._changes.machine)
        await self._undo_snapshot()
        names = await self._changes.undo(self._machine)
        self._note()
        if names:
            self.notes.append(
                f"a killed command had changed {', '.join(sorted(names))} at {self._machine.address}; the "
                "old values are restored"
            )

    async def _undo_snapshot(self) -> None:
        told = self._changes.snapshot
        left = None if told is None else LeftOver.decode(told)
        if left is None:
            return
        try:
            note = await left.undo(self._machine)
        except PostcopyError:
            self.note_snapshot(left)  # as far as it has come
            raise
        self.notes += [note] if note else []
        self.note_snapshot(None)

    def note_snapshot(self, left: LeftOver | None) -> None:
        """Note what the next command has to put back if this one is killed."""
        self._changes.snapshot = None if left is None else left.encode()
        self._note()

    @classmethod
    async def put_back_snapshot(cls, machine: QmpConnection) -> list[str]:
        """Put back what a killed snapshot has left; nothing while another command drives the machine.

        :return: what has been done, or why it cannot be done now.
        """
        lock = MachineLock.take_at_once(machine.address)
        if lock is None:
            return []
        taken = cls(machine, lock)
        try:
            taken._changes = SettingsChanges.decode(lock.read(), taken._changes.machine)
            await taken._undo_snapshot()
        except Refused as error:
            return [str(error)]
        finally:
            lock.release()
        return taken.notes

    async def _change(self, before: Mapping[str, bool], needs: OrderSettings) -> None:
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
        # Written first, so that a command that is killed in between is undone as well.
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
        """Check that the order runs with its settings; they cannot be changed any more.

        :raises Refused: another client has changed them in between.
        """
        found = await capabilities_of(self._machine)
        wrong = [name for name, on in self._needed.items() if found.get(name, False) != on]
        if wrong:
            raise Refused(
                f"another client has changed {', '.join(wrong)} at {self._machine.address} in the "
                "meantime; the order is cancelled: try again"
            )

    async def put_back(self, *, release: bool = True) -> None:
        """Restore the old values, except where another client has set new ones; harmless when done.

        :param release: let other commands drive the machine; else :meth:`release` does later.

        ``background-snapshot`` stays off: only a killed command leaves it on, and the next migration
        would then leave the guest running at both sides.
        """
        try:
            with contextlib.suppress(
                PostcopyError
            ):  # the machine is gone, or paused: the first error is reported
                await self._put_back_when_idle()
        finally:
            if release:
                self.release()

    def release(self) -> None:
        """Let other commands drive the machine; harmless when done."""
        self._lock.release()

    async def _put_back_when_idle(self) -> None:
        """Retry while an order of another client is under way."""
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
