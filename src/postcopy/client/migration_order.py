"""Orders a migration at both sides, with its settings."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Literal, TypedDict

from postcopy.client.credentials import Credentials
from postcopy.client.deadline import Deadline
from postcopy.client.machine_settings import capabilities_of
from postcopy.client.memory_check import check_same_memory
from postcopy.client.migration import Postcopy
from postcopy.client.order_settings import BorrowedSettings, OrderSettings, of_a_migration
from postcopy.client.qmp import QmpConnection
from postcopy.client.reconnect import address_of
from postcopy.errors import PostcopyError, Refused
from postcopy.parameters import Capability

_LISTENING: Final = frozenset({"setup", "active"})


class MigrateOptions(TypedDict, total=False):
    """How to migrate; see :meth:`postcopy.client.Machine.migrate`.

    ``auto_recover``: recover a broken postcopy automatically, for so many seconds after each break.
    ``deadline``: when it is to have ended, and what is done otherwise.
    ``tls``: a folder of certificates of both hosts, with which the channels are encrypted.
    ``tls_hostname``: the name in the destination's certificate, where it is not that of the URI.
    ``multifd``: over how many more connections precopy goes; ``compress``: how pages are compressed there.
    ``capabilities``, ``parameters``: by QEMU's names, in addition to those that the migration needs.
    """

    auto_recover: float | None
    postcopy: Postcopy
    deadline: Deadline | None
    bandwidth: int | None
    downtime_limit_ms: int | None
    multifd: int | None
    compress: Literal["zlib", "zstd"] | None
    capabilities: Mapping[str, bool]
    parameters: Mapping[str, Any]
    tls: str | None
    tls_hostname: str | None


async def listens(machine: QmpConnection) -> bool:
    """Whether the machine listens for a guest."""
    info: Mapping[str, Any] = await machine.execute("query-migrate")
    return info.get("status", "none") in _LISTENING


async def listen(machine: QmpConnection, uri: str, **more: Any) -> None:
    """Make the machine listen, and stay alive if the migration fails, so that it can tell why.

    :raises Refused: the machine does not wait for a guest, or cannot listen there.
    """
    try:
        await machine.execute("migrate-incoming", {"uri": uri, "exit-on-error": False, **more})
    except Refused as error:
        if "exit-on-error" not in str(error):
            raise
        await machine.execute("migrate-incoming", {"uri": uri, **more})  # QEMU before 9.1


class MigrationOrder:
    """One order: :meth:`give` it; when the migration has ended, :meth:`put_back` a QEMU's settings.

    :ivar uri: of the destination, once the order has been given.
    :ivar notes: for the user.
    """

    def __init__(
        self,
        source: QmpConnection,
        destination: QmpConnection | None,
        uri: str,
        options: MigrateOptions,
    ) -> None:
        self._source = source
        self._destination = destination
        self._options = options
        self._borrowed: list[BorrowedSettings] = []
        self.credentials = Credentials(options.get("tls"), options.get("tls_hostname"))
        self.uri = uri
        self.notes: list[str] = []

    async def give(self) -> None:
        """Order both sides, the destination first.

        :raises Refused: one of them refuses; the guest has not moved.
        """
        try:
            if self._destination is not None:
                postcopy = self._may_go_over()
                await check_same_memory(self._source, self._destination, postcopy=postcopy)
                await self._expect(self._destination)
            await self._begin()
        except BaseException:
            await self.put_back()
            raise

    async def put_back(self) -> None:
        """Restore the settings of both sides; harmless when done."""
        for borrowed in self._borrowed:
            await borrowed.put_back()
        await self.credentials.take_back()

    def _may_go_over(self) -> bool:
        deadline = self._options.get("deadline")
        by_deadline = deadline is not None and deadline.then == "postcopy"
        return by_deadline or self._options.get("postcopy") is not None

    def _downtime_limit_ms(self) -> int | None:
        deadline = self._options.get("deadline")
        own = self._options.get("downtime_limit_ms")
        return own if deadline is None or own is not None else deadline.downtime_ms

    async def _needs(self, machine: QmpConnection) -> OrderSettings:
        destination = machine is self._destination
        postcopy = self._may_go_over()
        needs = of_a_migration(self.uri, postcopy=postcopy, destination=destination)
        limits: Mapping[str, Any] = {
            "max-bandwidth": self._options.get("bandwidth"),
            "downtime-limit": self._downtime_limit_ms(),
        }
        own = {} if destination else {k: v for k, v in limits.items() if v is not None}
        channels = self._channels()
        needs = replace(
            needs,
            capabilities={
                **needs.capabilities,
                **({Capability.MULTIFD.value: True} if channels else {}),
                **self._options.get("capabilities", {}),
            },
            parameters={
                **own,
                **channels,
                **await self.credentials.give(machine, destination=destination),
                **self._options.get("parameters", {}),
            },
        )
        on = await capabilities_of(machine)
        self.notes += needs.notes(on, machine.address)
        if not await machine.is_ours():
            limits = {} if destination else await machine.execute("query-migrate-parameters")
            self.notes += needs.counting(on, limits, machine.address)
        return needs

    def _channels(self) -> dict[str, Any]:
        """The parameters of ``multifd``; empty: it is left as it is set.

        :raises Refused: pages are to be compressed, and there are no channels for that.
        """
        count, compress = self._options.get("multifd"), self._options.get("compress")
        if count is None:
            if compress is not None:
                raise Refused(
                    f"pages are compressed on channels of multifd only; give --multifd N with {compress}"
                )
            return {}
        return {"multifd-channels": count, "multifd-compression": compress or "none"}

    async def _borrow(self, machine: QmpConnection, needs: OrderSettings) -> BorrowedSettings:
        borrowed = await BorrowedSettings.take(machine, needs)
        self._borrowed.append(borrowed)
        self.notes += borrowed.notes
        return borrowed

    async def _expect(self, destination: QmpConnection) -> None:
        needs = await self._needs(destination)
        listening = await listens(destination)
        ours = await destination.is_ours()
        if (
            listening or not ours
        ):  # ours takes the settings with the order to listen, if that is still to be given
            await self._borrow(destination, needs)
        if not listening:
            await listen(destination, self.uri, **(needs.to_qapi() if ours else {}))
        self.uri = address_of(await destination.execute("query-migrate"), self.uri)

    async def _begin(self) -> None:
        source, uri = self._source, {"uri": self.uri}
        needs = await self._needs(source)
        if await source.is_ours():
            await self._order(uri | needs.to_qapi())
            return
        borrowed = await self._borrow(source, needs)
        await self._order(uri)
        try:
            await borrowed.check()
        except Refused:
            await source.execute("migrate_cancel")
            raise

    async def _order(self, arguments: Mapping[str, Any]) -> None:
        try:
            await self._source.execute("migrate", arguments)
        except asyncio.CancelledError:
            # The machine may have taken the order, and the caller has lost it.
            with contextlib.suppress(PostcopyError):
                await self._source.execute("migrate_cancel")
            raise
