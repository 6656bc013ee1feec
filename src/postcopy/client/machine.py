"""A machine that is driven over QMP: one that runs already, or one that the client starts."""

import asyncio
import contextlib
import tempfile
from collections.abc import Awaitable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, Literal, Protocol, Self, TypedDict, TypeVar, Unpack

from postcopy.client.credentials import Credentials
from postcopy.client.estimate import estimate
from postcopy.client.launch import MachineProcess
from postcopy.client.machine_settings import set_capabilities
from postcopy.client.migration import Migration
from postcopy.client.migration_model import Estimate
from postcopy.client.migration_order import MigrateOptions, MigrationOrder, listen, listens
from postcopy.client.order_settings import BorrowedSettings
from postcopy.client.qmp import QmpConnection
from postcopy.client.reconnect import address_of, bring_together
from postcopy.client.reset_point import Reset, ResetPoint
from postcopy.client.snapshot import SnapshotJob, SnapshotOptions
from postcopy.client.snapshot_result import Snapshot
from postcopy.errors import PostcopyError, Refused


class Closable(Protocol):
    """An object that can be closed."""

    async def close(self) -> None:
        """Release all resources; harmless when done."""


T = TypeVar("T", bound=Closable)


class AwaitableContext(Awaitable[T], Generic[T]):
    """``async with opened as it:``, or ``it = await opened``; only once."""

    def __init__(self, opened: Awaitable[T]) -> None:
        self._opened = opened
        self._it: T | None = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._opened.__await__()

    async def __aenter__(self) -> T:
        self._it = await self._opened
        return self._it

    async def __aexit__(self, *_: object) -> None:
        assert self._it is not None
        await self._it.close()


ANY_PORT: Final = "tcp:127.0.0.1:0"


class RunOptions(TypedDict, total=False):
    """The options of ``postcopy run``; see ``postcopy run --help``."""

    workload: Literal["disk", "hammer", "idle", "net", "sweep"]
    image: str
    load_address: int
    entry: int
    privilege: Literal[0, 3]
    machine: Literal["microvm", "none"]
    memory: str
    smp: int
    accel: Literal["auto", "kvm", "unicorn"]
    huge_pages: bool
    memory_block: Sequence[str]
    mem_path: str
    drive: str
    vhost_user_blk: str
    vhost_user_net: str
    incoming: str
    paused: bool
    name: str
    serial: str
    trace: str


class Machine:
    """One machine with a QMP monitor: ours or a real QEMU.

    Use it in ``async with``: at the end a machine that the client started ends, and one that was only
    connected to goes on.  All methods belong to the event loop that it was made in, and raise
    :class:`~postcopy.errors.ChannelBroken` when the machine is gone.
    """

    def __init__(self, connection: QmpConnection, process: MachineProcess | None = None) -> None:
        self._connection = connection
        self._process = process

    @classmethod
    def connect(cls, address: str) -> AwaitableContext[Self]:
        """Connect to the QMP monitor at ``unix:PATH`` or ``tcp:HOST:PORT``.

        :return: to be awaited, or used in ``async with``.
        :raises Refused: not such an address.
        :raises CannotConnect: no server listens there, or it does not speak QMP.
        """
        return AwaitableContext(cls._connect(address))

    @classmethod
    async def _connect(cls, address: str) -> Self:
        return cls(await QmpConnection.connect(address))

    @classmethod
    def start(cls, **options: Unpack[RunOptions]) -> AwaitableContext[Self]:
        """Start ``postcopy run`` with these options, and connect to it.

        :return: to be awaited, or used in ``async with``.
        :raises Refused: the options cannot work.
        :raises CannotConnect: it ended at once; the text says why.
        """
        return AwaitableContext(cls._start(options))

    @classmethod
    async def _start(cls, options: RunOptions) -> Self:
        process, connection = await MachineProcess.start(options)
        return cls(connection, process)

    @property
    def address(self) -> str:
        """Where its QMP monitor is."""
        return self._connection.address

    async def close(self) -> None:
        """Disconnect, and end the machine if the client started it; harmless when done."""
        await self._connection.close()
        if self._process is not None:
            await self._process.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Execute one QMP command.

        :raises Refused: the machine refuses it; the text is the machine's own.
        """
        return await self._connection.execute(command, arguments)

    async def put_back_snapshot(self) -> list[str]:
        """Put back what a killed snapshot with disks has left at a QEMU: the guest goes on, on its disks.

        Nothing is done while another command of this user drives the machine.

        :return: what has been done, or why it cannot be done now; usually nothing.
        """
        return await BorrowedSettings.put_back_snapshot(self._connection)

    async def run_state(self) -> str:
        """QEMU's ``RunState``, such as ``running``, ``paused`` or ``postmigrate``."""
        state: str = (await self.execute("query-status"))["status"]
        return state

    async def stop(self) -> None:
        """Stop the vCPUs."""
        await self.execute("stop")

    async def cont(self) -> None:
        """Start the vCPUs."""
        await self.execute("cont")

    async def quit(self) -> None:
        """End the machine's process."""
        with contextlib.suppress(PostcopyError):  # it may disconnect before it answers
            await self.execute("quit")
        await self.close()

    async def migration_info(self) -> Mapping[str, Any]:
        """Return the answer to ``query-migrate``."""
        answer: Mapping[str, Any] = await self.execute("query-migrate")
        return answer

    async def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """Switch migration capabilities by QEMU's names, all of them or none."""
        await set_capabilities(self._connection, changes)

    async def set_parameters(self, changes: Mapping[str, Any]) -> None:
        """Set migration parameters by QEMU's names, all of them or none."""
        await self.execute("migrate-set-parameters", changes)

    async def incoming(self, uri: str = ANY_PORT) -> str:
        """Listen for a guest, if the machine does not already; return the URI to migrate to.

        :raises Refused: the machine was not started with ``--incoming``.
        """
        if not await listens(self._connection):
            await listen(self._connection, uri)
        return address_of(await self.migration_info(), uri)

    async def read_memory(self, address: int, length_bytes: int) -> bytes:
        """Read guest memory from a physical address on; the machine must be on this host."""
        with tempfile.TemporaryDirectory(prefix="postcopy-") as folder:
            file = Path(folder) / "memory"
            await self.save_memory(file, address, length_bytes)
            return file.read_bytes()

    async def save_memory(self, file: Path, address: int, length_bytes: int) -> None:
        """Have the machine write its memory to ``file``, a path as the machine's host sees it."""
        arguments = {"val": address, "size": length_bytes, "filename": str(file)}
        await self.execute("pmemsave", arguments)

    async def migrate(
        self,
        uri: str | None = None,
        *,
        to: "Machine | None" = None,
        **options: Unpack[MigrateOptions],
    ) -> Migration:
        """Begin to migrate the guest, and watch the migration.

        :param uri: of the destination; optional with ``to``, which then tells where it listens.
        :param to: the destination machine, if the client is to drive it: capabilities are set there, it
            listens, and the result has its figures.
        :param options: ``postcopy`` is when to switch over (see :data:`Postcopy`), ``bandwidth`` the
            limit in bytes a second before that, ``downtime_limit_ms`` the longest stop to aim at.  They
            With a ``deadline`` (:class:`~postcopy.client.deadline.Deadline`) it is judged after each round
            whether the migration ends in time, and what the deadline says is done if not.  They
            apply to this migration only, as do ``capabilities`` and ``parameters``, on both sides.
        :raises Refused: one of the machines refuses; nothing has moved.
        """
        postcopy, deadline = options.get("postcopy"), options.get("deadline")
        if uri is None and to is None:
            raise Refused("no destination: give a URI, or the machine to go to")
        theirs = None if to is None else to._connection  # noqa: SLF001 - one of our own class
        order = MigrationOrder(self._connection, theirs, uri or ANY_PORT, options)
        await order.give()
        migration = Migration(
            self._connection,
            theirs,
            "manual" if postcopy is None and deadline and deadline.then == "postcopy" else postcopy,
            uri=order.uri,
            auto_recover=options.get("auto_recover"),
            notes=order.notes,
            at_the_end=order.put_back,
            credentials=order.credentials,
            deadline=deadline,
        )
        if postcopy == "now":
            await self.execute("migrate-start-postcopy")
        return migration

    async def estimate(
        self,
        *,
        bandwidth: int | None = None,
        max_downtime_ms: int = 300,
        within_s: float | None = None,
    ) -> Estimate:
        """Estimate what a migration of the guest would take; nothing is changed.

        :param bandwidth: bytes a second; None: what the machine's parameters say.
        :raises Refused: a migration is under way, or the machine does not tell what is needed.
        """
        return await estimate(
            self._connection,
            bandwidth=bandwidth,
            max_downtime_ms=max_downtime_ms,
            within_s=within_s,
        )

    async def start_snapshot(
        self, path: str | Path, **options: Unpack[SnapshotOptions]
    ) -> SnapshotJob:
        """Begin to take a snapshot of the guest, which goes on running, and watch it.

        :param path: of the new image; a path of this host, on which the machine must run too.
        :param options: ``form`` is ``mapped-ram`` (pages at fixed offsets: for restores) or ``stream``
            (which a QEMU of any version reads).  With ``compress`` = ``zstd`` or a ``parent`` the memory
            goes into a store of chunks beside the image, or into the parent's.  With ``disks``, a folder,
            the disks of a real QEMU's guest are taken at the same moment: it goes on with overlays there.
        """
        return SnapshotJob(self._connection, Path(path), options)

    async def snapshot(self, path: str | Path, **options: Unpack[SnapshotOptions]) -> Snapshot:
        """Take a snapshot of the guest, which goes on running; see :meth:`start_snapshot`.

        :raises Refused: not with these options, or not now; nothing has been changed.
        :raises MigrationFailed: it failed; the guest runs on, and there is no image.
        """
        job = await self.start_snapshot(path, **options)
        try:
            return await job.result()
        except asyncio.CancelledError:
            await job.give_up()  # the caller has lost the job
            raise

    def reset_point(self, path: str | Path | None = None) -> AwaitableContext[ResetPoint]:
        """Make this moment, or an image, the point to which the guest is reset.

        The guest runs on.  While there is a point, it can be neither migrated nor saved.

        :param path: of an image, as the machine's host sees it; None: now.
        :return: to be awaited, or used in ``async with``, whose end gives the point up.
        :raises Refused: not possible, or not now; the text says why.
        """
        arguments = {} if path is None else {"path": str(Path(path).absolute())}
        return AwaitableContext(ResetPoint.set(self._connection, arguments))

    async def reset(self) -> Reset:
        """Reset the guest to its point, which any client may have set.

        :raises Refused: there is no point, or an engine cannot finish it; the text says which.
        """
        return Reset.of(await self.execute("x-reset"))

    async def reset_end(self) -> None:
        """Remove the point, which any client may have set; the guest runs on as it is.

        :raises Refused: there is none.
        """
        await self.execute("x-reset-end")

    async def recover(
        self,
        uri: str | None = None,
        *,
        to: "Machine",
        auto_recover: float | None = None,
        tls: str | None = None,
        tls_hostname: str | None = None,
    ) -> Migration:
        """Recover a broken postcopy from this machine, which any client may have begun, and watch it.

        :param uri: where the destination listens; None: at a free TCP port of its host.
        :param to: the destination, where the guest runs.
        :param auto_recover: see :class:`MigrateOptions`; ``tls`` and ``tls_hostname`` as well.
        :raises Refused: there is nothing to recover, or one side refuses; nothing has changed.
        """
        theirs = to._connection  # noqa: SLF001 - one of our own class
        credentials = Credentials(tls, tls_hostname)
        await credentials.use(self._connection, theirs)
        try:
            await bring_together(self._connection, theirs, uri)
        except BaseException:
            await credentials.take_back()
            raise
        return Migration(
            self._connection,
            theirs,
            "manual",
            uri=uri,
            auto_recover=auto_recover,
            credentials=credentials,
        )
