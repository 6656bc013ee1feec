"""A snapshot of a guest that goes on, driven over QMP: ours or a real QEMU's."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

from postcopy.client.connection import Connection
from postcopy.client.orders import Borrowed
from postcopy.client.progress import STOPPED, Phase, Progress, ProgressTracker
from postcopy.client.told import status_of
from postcopy.client.writing import writing_to
from postcopy.errors import MigrationCancelled, MigrationFailed, PostcopyError, Refused
from postcopy.image.options import Form, ImageOptions, SnapshotTimings
from postcopy.image.publish import CommitPoint, reserved
from postcopy.status import Status

if TYPE_CHECKING:
    from postcopy.image.finalize import FinalizedImage

_INTERVAL_S: Final = 0.02
_CANCEL_TIMEOUT_S: Final = 30.0
_STATES_OF_QEMU: Final = frozenset({"running", "paused"})


class SnapshotOptions(TypedDict, total=False):
    """How to take a snapshot; see :meth:`postcopy.client.Machine.start_snapshot`."""

    form: Form
    compress: Literal["zstd"] | None
    parent: str | Path | None


def wanted(options: SnapshotOptions) -> ImageOptions:
    """What the options ask for."""
    parent = options.get("parent")
    return ImageOptions(
        options.get("form", "mapped-ram"),
        options.get("compress") is not None,
        None if parent is None else Path(parent).absolute(),
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that has been taken, and what it cost.  Times that nobody measured are ``None``.

    :ivar pause_us: how long the guest stood still.
    :ivar longest_stall_us, stall_p99_us: how long single writes of the guest waited afterwards, of
        which there were ``write_faults``.
    :ivar saving_ms: until the machine had written its memory; ``total_ms``: until all was published.
    :ivar data_bytes, zero_bytes: of the ``ram_bytes``, counted in pages.
    :ivar device_bytes: what the devices' state took.
    :ivar file_bytes: what the file takes on the disk.
    :ivar new_bytes, reused_bytes, stored_bytes: of a store of chunks: memory that was new to it, that
        it had, and what the new one takes.
    :ivar source: the last answer to ``query-migrate``, whole.
    """

    path: Path
    format: str
    identity: str
    pause_us: int | None
    longest_stall_us: int | None
    stall_p99_us: int | None
    write_faults: int | None
    saving_ms: int
    total_ms: int
    ram_bytes: int
    data_bytes: int
    zero_bytes: int
    device_bytes: int | None
    file_bytes: int
    new_bytes: int | None = None
    reused_bytes: int | None = None
    stored_bytes: int | None = None
    parent: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it, without the raw answer."""
        figures = asdict(self) | {"path": str(self.path)}
        del figures["source"]
        return figures


def _finalize() -> Any:
    from postcopy.image import finalize  # imports numpy, which only a snapshot needs

    return finalize


class SnapshotJob:
    """A snapshot that is being taken; :meth:`postcopy.client.Machine.start_snapshot` makes it.

    One task of the running event loop sees it through, whether anybody asks or not.
    """

    def __init__(self, machine: Connection, path: Path, wanted: ImageOptions) -> None:
        self._machine = machine
        self._path = path.absolute()
        self._written = self._path  # until there is a name for what the machine is to write
        self._wanted = wanted
        self._tracker = ProgressTracker()
        self._last = self._tracker.take({})
        self._changed = asyncio.Condition()
        self._started = time.monotonic()
        self._commit_point = CommitPoint()
        self._task = asyncio.create_task(self._run(), name="snapshot")
        # Whoever does not ask for the result does not want to hear that nobody did.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def path(self) -> Path:
        """Of the image to be, from the root on."""
        return self._path

    @property
    def written(self) -> Path:
        """Where the machine writes; the file goes when the snapshot has ended."""
        return self._written

    @property
    def progress(self) -> Progress:
        """The last look at it."""
        return self._last

    async def events(self) -> AsyncGenerator[Progress, None]:
        """Yield looks at the snapshot until it ends, whichever way; :meth:`result` tells which."""
        seen: Progress | None = None
        while seen is None or not self._task.done():
            if self._last is not seen:
                seen = self._last
                yield seen
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 2 * _INTERVAL_S)
        if self._last is not seen:
            yield self._last

    async def result(self) -> Snapshot:
        """Wait for the end.

        :raises MigrationCancelled: somebody cancelled it.
        :raises MigrationFailed: it failed.  In either case the guest runs on, and no file is left.
        :raises Refused: the machine cannot take snapshots so, or not now; nothing has happened.
        :raises ChannelBroken: the machine is gone.
        """
        return await asyncio.shield(self._task)

    async def cancel(self) -> None:
        """Give it up: it will not be published; :meth:`result` says when it has ended.

        :raises Refused: it is being published, or has been.
        """
        if not self._commit_point.cancel():
            raise Refused(
                f"the snapshot is complete; remove {self._path} if it is not wanted any more"
            )
        await self._machine.execute("migrate_cancel")

    async def give_up(self) -> None:
        """Cancel it, and wait until nothing of it goes on; what is not published yet never will be."""
        self._commit_point.cancel()
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> Snapshot:
        with reserved(self._path) as self._written:
            if self._wanted.parent is not None:
                await asyncio.to_thread(lambda: _finalize().check_parent(self._wanted.parent))
            ours = await self._machine.is_ours()
            if not ours:
                await self._check_state()
            # A background snapshot of QEMU 10 never writes the bitmaps of mapped-ram: of such a
            # machine we take a stream, and put the pages at their places ourselves.
            mapped = ours and (self._wanted.chunked or self._wanted.form == "mapped-ram")
            answer = await self._save_ours(mapped=mapped) if ours else await self._save_qemus()
            finished = await self._finish(answer)
        result = self._outcome(answer, finished)
        await self._publish(replace(self._last, phase=Phase.COMPLETED, fraction=1.0))
        return result

    async def _check_state(self) -> None:
        state = (await self._machine.execute("query-status"))["status"]
        if state not in _STATES_OF_QEMU:
            raise Refused(
                f"the machine is {state}, and a QEMU may end itself when it takes a snapshot then; "
                "let it run first ('cont')"
            )

    async def _save_ours(self, *, mapped: bool) -> Mapping[str, Any]:
        return await self._save("x-snapshot", {"mapped-ram": mapped})

    async def _save_qemus(self) -> Mapping[str, Any]:
        borrowed = await Borrowed.take(self._machine, mapped=False)
        try:
            return await self._save("migrate", {}, borrowed)
        finally:
            await borrowed.put_back()

    async def _save(
        self, order: str, more: Mapping[str, Any], borrowed: Borrowed | None = None
    ) -> Mapping[str, Any]:
        loading = asyncio.create_task(asyncio.to_thread(_finalize))  # while the machine writes
        loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            uri = await writing_to(self._machine, self._written)
            await self._machine.execute(order, {"uri": uri, **more})
            if borrowed is not None:
                await self._check(borrowed)
            answer = await self._until_stopped()
        except asyncio.CancelledError:
            await self._abandon()
            raise
        status = status_of(answer)
        if status is Status.COMPLETED:
            return answer
        if status is Status.CANCELLED:
            raise MigrationCancelled("the snapshot was cancelled; the guest runs on")
        why = answer.get("error-desc", "the machine does not say why")
        why = why.replace(str(self._written), str(self._path))  # the name that was asked for
        raise MigrationFailed(f"the snapshot failed: {why}; the guest runs on")

    async def _check(self, borrowed: Borrowed) -> None:
        """Without ``background-snapshot`` it would be a migration, and take the guest away."""
        try:
            await borrowed.check()
        except Refused:
            await self._abandon()
            state = (await self._machine.execute("query-status"))["status"]
            if state == "postmigrate":  # it was quicker; nobody has what it wrote
                await self._machine.execute("cont")
            raise

    async def _until_stopped(self) -> Mapping[str, Any]:
        while True:
            answer: Mapping[str, Any] = await self._machine.execute("query-migrate")
            look = self._tracker.take(answer)
            # The end comes when the image is there, not when the machine has done its part.
            if look.phase is Phase.PRECOPY:
                await self._publish(replace(look, phase=Phase.SAVING))
            if look.phase in STOPPED:
                return answer
            await asyncio.sleep(_INTERVAL_S)

    async def _abandon(self) -> None:
        with contextlib.suppress(PostcopyError, TimeoutError):
            async with asyncio.timeout(_CANCEL_TIMEOUT_S):
                await self.cancel()
                await self._until_stopped()

    async def _finish(self, answer: Mapping[str, Any]) -> "FinalizedImage":
        last = self._tracker.take(answer)
        await self._publish(replace(last, phase=Phase.DIGESTS, fraction=0.95))
        told = _Told.of(answer)
        timings = SnapshotTimings(self._started, told.pause_us, told.longest_stall_us)
        finishing = asyncio.create_task(
            asyncio.to_thread(
                lambda: _finalize().finalize(
                    self._path, self._written, self._wanted, timings, self._commit_point
                )
            )
        )
        try:
            return await asyncio.shield(finishing)
        except asyncio.CancelledError:
            self._commit_point.cancel()  # a thread cannot be cancelled: it ends at its next check
            await asyncio.wait({finishing})
            finishing.exception()
            raise

    async def _publish(self, progress: Progress) -> None:
        elapsed = max(progress.elapsed_ms, self._elapsed_ms())
        self._last = replace(progress, elapsed_ms=elapsed)
        async with self._changed:
            self._changed.notify_all()

    def _elapsed_ms(self) -> int:
        return SnapshotTimings(self._started).total_ms

    def _outcome(self, answer: Mapping[str, Any], finished: "FinalizedImage") -> Snapshot:
        told, manifest, packed = _Told.of(answer), finished.manifest, finished.packed
        return Snapshot(
            path=self._path,
            format=manifest.form,
            identity=manifest.identity,
            pause_us=told.pause_us,
            longest_stall_us=told.longest_stall_us,
            stall_p99_us=told.stall_p99_us,
            write_faults=told.write_faults,
            saving_ms=answer.get("total-time", 0),
            total_ms=self._elapsed_ms(),
            ram_bytes=finished.ram_bytes,
            data_bytes=finished.data_bytes,
            zero_bytes=finished.zero_bytes,
            device_bytes=told.device_bytes,
            file_bytes=finished.file_bytes,
            new_bytes=None if packed is None else packed.new_bytes,
            reused_bytes=None if packed is None else packed.reused_bytes,
            stored_bytes=None if packed is None else packed.stored_bytes,
            parent=None if manifest.parent is None else manifest.parent.path,
            source=answer,
        )


@dataclass(frozen=True, slots=True)
class _Told:
    """What the machine says of the guest's troubles."""

    pause_us: int | None
    longest_stall_us: int | None
    stall_p99_us: int | None
    write_faults: int | None
    device_bytes: int | None

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "_Told":
        measured = answer.get("x-postcopy", {})
        downtime_ms = answer.get("downtime")  # all that a real QEMU tells, in whole milliseconds
        return cls(
            measured.get("pause-us", None if downtime_ms is None else downtime_ms * 1000),
            measured.get("write-stall-max-us"),
            measured.get("write-stall-p99-us"),
            measured.get("write-faults"),
            measured.get("device-bytes"),
        )
