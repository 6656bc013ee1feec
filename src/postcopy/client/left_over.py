"""What a snapshot with disks has changed at a QEMU, and how it is put back, also by the next command."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from postcopy.client.machine_settings import capabilities_of, is_busy
from postcopy.client.qemu_jobs import end_jobs, hangs_on_failure, run_job, until_protected
from postcopy.client.qmp import QmpConnection
from postcopy.errors import Refused
from postcopy.parameters import Capability

_POLL_S: Final = 0.01
_STOPPED: Final = frozenset({"paused", "postmigrate"})


@dataclass(slots=True)
class Overlay:
    """An overlay that has been made, or will be next.

    :ivar node: its name in QEMU; that of its file's node is :attr:`file_node`.
    :ivar below: the node that it comes over.
    :ivar path: its file.
    """

    node: str
    below: str
    path: str

    @property
    def file_node(self) -> str:
        """The name of the node of its file."""
        return f"{self.node}-file"

    async def remove(self, machine: QmpConnection) -> None:
        """Put what has been written to it into the node below, and remove it, as far as it has come.

        :raises Refused: QEMU's own words; it may be used by something else.
        """
        if self.node in await _uppermost(machine):
            # Without a base, all of the chain would be put into its deepest file.
            where = {"device": self.node, "base-node": self.below, "auto-dismiss": False}
            await run_job(machine, "block-commit", **where)
        nodes = await machine.execute("query-named-block-nodes", {"flat": True})
        known = {each["node-name"] for each in nodes}
        for node in (self.node, self.file_node):
            if node in known:
                await machine.execute("blockdev-del", {"node-name": node})
        with contextlib.suppress(FileNotFoundError):
            Path(self.path).unlink()


async def _uppermost(machine: QmpConnection) -> set[str]:
    """The nodes that the guest's devices read and write."""
    devices = await machine.execute("query-block")
    return {each["inserted"]["node-name"] for each in devices if "inserted" in each}


@dataclass(slots=True)
class LeftOver:
    """What has to be put back unless the image is published.

    :ivar image: the path of the image.
    :ivar stopped: the guest has been stopped, and has to go on.
    """

    image: str
    stopped: bool = False
    overlays: list[Overlay] = field(default_factory=list)

    def encode(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self)

    @classmethod
    def decode(cls, told: Mapping[str, Any]) -> Self | None:
        """Read the result of :meth:`encode`; ``None``: it makes no sense."""
        try:
            overlays = [Overlay(**each) for each in told["overlays"]]
            return cls(str(told["image"]), bool(told["stopped"]), overlays)
        except (TypeError, KeyError):
            return None

    async def undo(self, machine: QmpConnection) -> str:
        """Put back what a killed command has left.

        :return: for the user; empty: the image had been published, and its overlays stay.
        :raises Refused: not now, or QEMU refuses; what is left is named.
        """
        if Path(self.image).exists():
            return ""
        try:
            await self._end_saving(machine)
            await self._go_on(machine)
            await end_jobs(machine)
            for overlay in reversed(self.overlays):
                await overlay.remove(machine)
        except Refused as error:
            left = ", ".join(each.path for each in self.overlays if Path(each.path).exists())
            raise Refused(
                f"a killed command has left overlays of the disks at {machine.address} ({left or 'none'}), "
                f"which cannot be put back now: {error}"
            ) from error
        return (
            f"a killed snapshot had left overlays over the disks at {machine.address}; "
            "the guest goes on, and its disks are as before"
        )

    async def _end_saving(self, machine: QmpConnection) -> None:
        if not await is_busy(machine):
            return
        if not (await capabilities_of(machine)).get(Capability.BACKGROUND_SNAPSHOT.value):
            raise Refused("a migration is under way; try again when it has ended")
        await until_protected(machine)
        if await hangs_on_failure(machine):
            await self._go_on(machine)
            raise Refused("the machine still writes the image; try again when it has ended")
        await machine.execute("migrate_cancel")
        while await is_busy(machine):
            await asyncio.sleep(_POLL_S)

    async def _go_on(self, machine: QmpConnection) -> None:
        if self.stopped and (await machine.execute("query-status"))["status"] in _STOPPED:
            await machine.execute("cont")
        self.stopped = False
