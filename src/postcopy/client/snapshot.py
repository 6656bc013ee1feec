"""A snapshot of a guest that goes on running, driven over QMP: ours or a real QEMU's."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

from postcopy.client.disk_overlays import DiskOverlays
from postcopy.client.order_settings import BorrowedSettings
from postcopy.client.progress import STOPPED, Phase, Progress, ProgressTracker, status_of
from postcopy.client.qemu_command import command_of
from postcopy.client.qemu_jobs import file_uri, hangs_on_failure, until_protected
from postcopy.client.qmp import QmpConnection
from postcopy.client.snapshot_result import Measured, Snapshot
from postcopy.errors import MigrationCancelled, MigrationFailed, PostcopyError, Refused
from postcopy.image.disks import FrozenDisks
from postcopy.image.options import Form, ImageOptions, SnapshotTimings
from postcopy.image.publish import CommitPoint, reserved
from postcopy.status import Status

if TYPE_CHECKING:
    from postcopy.image.finalize import FinalizedImage
    from postcopy.receive.arriving import ArrivingImage

_INTERVAL_S: Final = 0.02
_CANCEL_TIMEOUT_S: Final = 30.0
_STATES_OF_QEMU: Final = frozenset({"running", "paused"})
_DEVICES_BYTES: Final = 64 << 20
"""Of an image, for all but the guest's RAM: video memory, firmware, devices."""


class SnapshotOptions(TypedDict, total=False):
    """How to take a snapshot; see :meth:`postcopy.client.Machine.start_snapshot`."""

    form: Form
    compress: Literal["zstd"] | None
    parent: str | Path | None
    disks: str | Path | None


def _wanted(options: SnapshotOptions) -> ImageOptions:
    """Convert the options."""
    parent = options.get("parent")
    return ImageOptions(
        options.get("form", "mapped-ram"),
        options.get("compress") is not None,
        None if parent is None else Path(parent).absolute(),
    )


def _finalize() -> Any:
    from postcopy.image import finalize  # imports numpy, which only a snapshot needs

    return finalize


class SnapshotJob:
    """A snapshot that is being taken; :meth:`postcopy.client.Machine.start_snapshot` makes it.

    One task of the running event loop carries it out.
    """

    def __init__(self, machine: QmpConnection, path: Path, options: SnapshotOptions) -> None:
        self._machine = machine
        self._path = path.absolute()
        self._written = self._path  # until the name of the partial file is known
        self._wanted = _wanted(options)
        folder = options.get("disks")
        self._arriving: ArrivingImage | None = None
        self._borrowed: BorrowedSettings | None = None  # with disks, until the image is published
        self.notes: tuple[str, ...] = ()
        """For the user: what a killed command had changed at the machine, and has been put back."""
        self._disks = None if folder is None else DiskOverlays(machine, Path(folder), self._path)
        self._tracker = ProgressTracker()
        self._last = self._tracker.take({})
        self._changed = asyncio.Condition()
        self._started = time.monotonic()
        self._commit_point = CommitPoint()
        self._ordering = asyncio.Lock()  # held until the machine has answered the order
        self._ordered = False
        self._task = asyncio.create_task(self._run(), name="snapshot")
        # Without this asyncio logs an exception that no caller has retrieved.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def path(self) -> Path:
        """The absolute path of the new image."""
        return self._path

    @property
    def written(self) -> Path:
        """The partial file that the machine writes; it is removed when the snapshot has ended."""
        return self._written

    @property
    def progress(self) -> Progress:
        """The last progress."""
        return self._last

    async def events(self) -> AsyncGenerator[Progress, None]:
        """Yield the progress until the snapshot ends; :meth:`result` tells how."""
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

        :raises MigrationCancelled: it was cancelled.
        :raises MigrationFailed: it failed.  In either case the guest runs on, and no file is left.
        :raises Refused: not with these options, or not now; nothing has been changed.
        :raises ChannelBroken: the machine is gone.
        """
        return await asyncio.shield(self._task)

    async def cancel(self) -> None:
        """Cancel the snapshot: it is not published; :meth:`result` returns when it has ended.

        :raises Refused: it is being published, or has been.
        """
        if not self._commit_point.cancel():
            raise Refused(f"the snapshot is complete; remove {self._path} if you do not need it")
        async with self._ordering:
            if not self._ordered:
                return  # and it will not be
        if not await self._machine.is_ours():
            if await hangs_on_failure(self._machine):
                return  # it ends by itself, and its file is removed
            await until_protected(self._machine)  # QEMU may do so behind a cancel
        await self._machine.execute("migrate_cancel")

    async def _check_room(self) -> None:
        """Refuse to have such a QEMU write to a disk that may become full."""
        if not await hangs_on_failure(self._machine):
            return
        most = await self._most_bytes()
        free = shutil.disk_usage(self._path.parent).free
        if free < most:
            raise Refused(
                f"{self._path.parent} has {free >> 20} MiB free, and the image may take {most >> 20}: this "
                "QEMU's guest would hang on a full disk; make room, or use QEMU 10"
            )

    async def give_up(self) -> None:
        """Cancel the task, and wait for its end; an image that is not published yet never will be."""
        self._commit_point.cancel()
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> Snapshot:
        with reserved(self._path) as self._written:
            if self._wanted.parent is not None:
                await asyncio.to_thread(lambda: _finalize().check_parent(self._wanted.parent))
            ours = await self._machine.is_ours()
            if ours and self._disks is not None:
                raise Refused(
                    "the machine is postcopy's, whose drives have no overlays; leave --disks out, and copy "
                    "the drive's file while the machine is stopped"
                )
            if not ours:
                await self._check_state()
                await self._check_room()
                process_id = self._machine.process_id
                command = None if process_id is None else command_of(process_id)
                self._wanted = replace(self._wanted, command=command)
            # A background snapshot of QEMU 10 never writes the bitmaps of mapped-ram: such a machine
            # writes a stream, which is converted here.
            mapped = ours and (self._wanted.chunked or self._wanted.form == "mapped-ram")
            async with self._disks_put_back(), self._made_on_the_way(ours=ours):
                answer = await self._save_ours(mapped=mapped) if ours else await self._save_qemus()
                finished = await self._finish(answer)
        result = self._outcome(answer, finished)
        await self._publish(replace(self._last, phase=Phase.COMPLETED, fraction=1.0))
        return result

    @contextlib.asynccontextmanager
    async def _disks_put_back(self) -> AsyncGenerator[None, None]:
        """Take the overlays away if the snapshot fails; if it is killed, the next command does."""
        try:
            yield
            if self._disks is not None:
                self._disks.note(None)  # they belong to the image
        except BaseException as error:
            if self._disks is None or self._disks.untouched:
                raise
            became = await self._disks.put_back()
            if isinstance(error, MigrationFailed | MigrationCancelled | Refused):
                raise type(error)(f"{error}; {became}") from error
            raise
        finally:
            if self._borrowed is not None:
                self._borrowed.release()

    @contextlib.asynccontextmanager
    async def _made_on_the_way(self, *, ours: bool) -> AsyncGenerator[None, None]:
        """Take digests and write the pages anew while a QEMU writes; ours does so itself."""
        if ours or self._wanted.chunked or await self._is_narrow():
            yield
            return
        from postcopy.receive.arriving import ArrivingImage

        arriving = ArrivingImage(self._written, self._path, self._wanted.form)
        with arriving as self._arriving:
            try:
                yield
            finally:
                await asyncio.to_thread(arriving.give_up)

    async def _is_narrow(self) -> bool:
        """Whether two files may fill the disk of a QEMU that would hang then."""
        if self._wanted.form == "stream" or not await hangs_on_failure(self._machine):
            return False
        return shutil.disk_usage(self._path.parent).free < 2 * await self._most_bytes()

    async def _most_bytes(self) -> int:
        """How large the file of a QEMU may become."""
        sizes = await self._machine.execute("query-memory-size-summary")
        most: int = sizes["base-memory"] + sizes.get("plugged-memory", 0) + _DEVICES_BYTES
        return most

    async def _check_state(self) -> None:
        state = (await self._machine.execute("query-status"))["status"]
        if state not in _STATES_OF_QEMU:
            raise Refused(
                f"the machine is {state}, in which a snapshot may end a QEMU's process; "
                "let it run first ('cont')"
            )

    async def _save_ours(self, *, mapped: bool) -> Mapping[str, Any]:
        return await self._save("x-snapshot", {"mapped-ram": mapped})

    async def _save_qemus(self) -> Mapping[str, Any]:
        borrowed = await BorrowedSettings.take(self._machine, mapped=False)
        self.notes = tuple(borrowed.notes)
        try:
            if self._disks is not None:
                self._borrowed = borrowed
                self._disks.note = borrowed.note_snapshot
                await self._disks.make()
            return await self._save("migrate", {}, borrowed)
        finally:
            await borrowed.put_back(release=self._disks is None)

    async def _save(
        self, order: str, more: Mapping[str, Any], borrowed: BorrowedSettings | None = None
    ) -> Mapping[str, Any]:
        try:
            uri = await file_uri(self._machine, self._written)
            if self._disks is not None:
                await self._disks.freeze()
            async with self._ordering:
                self._commit_point.check()
                self._ordered = True
                await self._machine.execute(order, {"uri": uri, **more})
            if self._disks is not None:
                await until_protected(self._machine)
                await self._disks.resume()
            # While the machine writes, and the guest does not wait: to import takes a while.
            loading = asyncio.create_task(asyncio.to_thread(_finalize))
            loading.add_done_callback(lambda task: task.cancelled() or task.exception())
            if self._arriving is not None:
                self._arriving.begin()
            if borrowed is not None:  # now: the guest does not stand still for it
                await self._check(borrowed)
            answer = await self._until_stopped()
        except asyncio.CancelledError:
            await self._cancel_quietly()
            raise
        status = status_of(answer)
        if status is Status.COMPLETED:
            return answer
        if status is Status.CANCELLED:
            raise MigrationCancelled("the snapshot was cancelled; the guest runs on")
        why = answer.get("error-desc", "the machine gives no reason")
        why = why.replace(str(self._written), str(self._path))  # the name of the order
        raise MigrationFailed(f"the snapshot failed: {why}; the guest runs on")

    async def _check(self, borrowed: BorrowedSettings) -> None:
        """Check that it is a snapshot: without ``background-snapshot`` it would be a migration."""
        try:
            await borrowed.check()
        except Refused:
            await self._cancel_quietly()
            state = (await self._machine.execute("query-status"))["status"]
            if state == "postmigrate":  # it has completed already; its file is removed
                await self._machine.execute("cont")
            raise

    async def _until_stopped(self) -> Mapping[str, Any]:
        while True:
            answer: Mapping[str, Any] = await self._machine.execute("query-migrate")
            look = self._tracker.take(answer)
            # The snapshot ends when the image is published, not when the machine has written it.
            if look.phase is Phase.PRECOPY:
                await self._publish(replace(look, phase=Phase.SAVING))
            if look.phase in STOPPED:
                return answer
            await asyncio.sleep(_INTERVAL_S)

    async def _cancel_quietly(self) -> None:
        with contextlib.suppress(PostcopyError, TimeoutError):
            await self.cancel()
            slow = not await self._machine.is_ours() and await hangs_on_failure(self._machine)
            async with asyncio.timeout(None if slow else _CANCEL_TIMEOUT_S):
                await self._until_stopped()

    async def _finish(self, answer: Mapping[str, Any]) -> "FinalizedImage":
        last = self._tracker.take(answer)
        await self._publish(replace(last, phase=Phase.DIGESTS, fraction=0.95))
        measured = self._measured(answer)
        timings = SnapshotTimings(self._started, measured.pause_us, measured.longest_stall_us)
        disks = None if self._disks is None else self._disks.frozen
        finishing = asyncio.create_task(asyncio.to_thread(self._finalize, timings, disks))
        try:
            return await asyncio.shield(finishing)
        except asyncio.CancelledError:
            self._commit_point.cancel()  # a thread cannot be cancelled: it ends at its next check
            await asyncio.wait({finishing})
            finishing.exception()
            raise

    def _finalize(self, timings: SnapshotTimings, disks: FrozenDisks | None) -> "FinalizedImage":
        prepared = None if self._arriving is None else self._arriving.finish()
        found: FinalizedImage = _finalize().finalize(
            self._path, self._written, self._wanted, timings, self._commit_point, disks, prepared
        )
        return found

    async def _publish(self, progress: Progress) -> None:
        elapsed = max(progress.elapsed_ms, self._elapsed_ms())
        self._last = replace(progress, elapsed_ms=elapsed)
        async with self._changed:
            self._changed.notify_all()

    def _elapsed_ms(self) -> int:
        return SnapshotTimings(self._started).total_ms

    def _measured(self, answer: Mapping[str, Any]) -> "Measured":
        measured = Measured.of(answer)
        # The pause for the disks contains the machine's own.
        pause_us = None if self._disks is None else self._disks.pause_us
        return measured if pause_us is None else replace(measured, pause_us=pause_us)

    def _outcome(self, answer: Mapping[str, Any], finished: "FinalizedImage") -> Snapshot:
        measured, manifest, packed = self._measured(answer), finished.manifest, finished.packed
        overlays = {} if self._disks is None else self._disks.paths
        return Snapshot(
            path=self._path,
            format=manifest.form,
            identity=manifest.identity,
            pause_us=measured.pause_us,
            longest_stall_us=measured.longest_stall_us,
            stall_p99_us=measured.stall_p99_us,
            write_faults=measured.write_faults,
            saving_ms=answer.get("total-time", 0),
            total_ms=self._elapsed_ms(),
            ram_bytes=finished.ram_bytes,
            data_bytes=finished.data_bytes,
            zero_bytes=finished.zero_bytes,
            device_bytes=measured.device_bytes,
            file_bytes=finished.file_bytes,
            new_bytes=None if packed is None else packed.new_bytes,
            reused_bytes=None if packed is None else packed.reused_bytes,
            stored_bytes=None if packed is None else packed.stored_bytes,
            parent=None if manifest.parent is None else manifest.parent.path,
            disks=manifest.disks,
            overlays={name: str(path) for name, path in overlays.items()},
            source=answer,
        )
