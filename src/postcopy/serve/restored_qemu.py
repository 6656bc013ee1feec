"""Starts a stock QEMU and brings a saved guest up in it, before its memory is there or behind it."""

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from postcopy.client.qemu_command import split_command
from postcopy.client.qmp import QmpConnection
from postcopy.errors import GuestError, ImageError, NeedsRecovery, PostcopyError, Refused
from postcopy.lazy_restore.restore_image import RestoreImage
from postcopy.serve.server import ImageServer, ServeOptions
from postcopy.statistics import MigrationInfo
from postcopy.status import Status

_GREETING_S: Final = 120.0
"""A QEMU may first allocate all of its memory."""
_END_S: Final = 1.0
_NOTICES_S: Final = 10.0
"""QEMU has noticed a break by then."""
_POLL_S: Final = 0.02
_MOST_BREAKS: Final = 5
_OURS: Final = frozenset({"incoming", "daemonize", "preconfig", "loadvm"})
_MONITOR: Final = "postcopy"
_NO_REASONS: Final = (
    "load of migration failed",
    "loadvm failed",
    "error while loading state",
    "warning:",
)
"""Lines of QEMU that follow upon one with the reason, or tell of no failure."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """What to start, and how.

    :ivar command: QEMU's command line as a shell would split it, without ``-incoming``.
    :ivar paused: it waits for ``cont`` (``-S``), as one that was saved while it was paused does.
    :ivar qmps: addresses at which QEMU is to listen for QMP; none: one in a folder of our own.
    """

    command: str
    paused: bool = False
    qmps: tuple[str, ...] = ()
    serve: ServeOptions = field(default_factory=ServeOptions)


class RestoredQemu:
    """A QEMU that we have started, and the server of its memory.  For one event loop.

    As a context it ends QEMU when it is left, unless :meth:`wait` has seen its end.

    :param opened: the image; it may be that of several, and is the caller's to close.
    :raises Refused: the command cannot be used; nothing was started.
    """

    def __init__(self, opened: RestoreImage, options: QemuOptions) -> None:
        self._words = words_of(options.command)
        self._loop = asyncio.get_running_loop()
        self._runs = asyncio.Event()
        self._ending = False
        self._server = ImageServer(opened, options.serve, self._on_status)
        self._options = options
        self._began = time.monotonic()
        self._folder = Path(tempfile.mkdtemp(prefix="postcopy-qemu-"))
        self._uris = (
            f"unix:{self._folder / f'way-{number}'}" for number in range(_MOST_BREAKS + 1)
        )
        self._process: asyncio.subprocess.Process | None = None
        self._errors: asyncio.Task[None] | None = None
        self._serving: asyncio.Task[None] | None = None
        self._monitor: QmpConnection | None = None
        self._reason = ""
        self.qmps = options.qmps or (f"unix:{self._folder / 'qmp'}",)
        self.running_s = 0.0

    @property
    def pid(self) -> int:
        """QEMU's process, once it has been started."""
        assert self._process is not None
        return self._process.pid

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.end()

    async def start(self) -> None:
        """Start QEMU and the guest; return when the guest runs, or with ``-S`` when it could.

        :raises Refused: QEMU cannot be started so, or refuses the migration.
        :raises GuestError: QEMU has ended; the text has its last line.
        :raises PostcopyError: it could not take the guest, or the image is damaged.
        """
        await self._launch()
        monitor = await self._explaining(self._prepare())
        uri = next(self._uris)
        await self._explaining(monitor.execute("migrate-incoming", {"uri": uri}))
        self._serving = asyncio.create_task(self._serve(monitor, uri), name="serve")
        runs = asyncio.create_task(self._runs.wait(), name="runs")
        await asyncio.wait({runs, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        runs.cancel()
        if not self._server.runs_there:
            await self.complete()
        if self._server.ran and not self._options.paused:
            # One that was stopped for its disks is paused in its image.
            await self._explaining(monitor.execute("cont"))
        self.running_s = time.monotonic() - self._began

    async def complete(self) -> MigrationInfo:
        """Wait until QEMU has all of the memory; return the figures.

        :raises PostcopyError: as :meth:`start`; QEMU is to be ended.
        """
        assert self._serving is not None
        await self._explaining(self._serving)
        found = self._server.info()
        assert found is not None
        return found

    async def wait(self) -> int:
        """Wait until QEMU has ended; return its exit code, 128 + n after signal n."""
        assert self._process is not None
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    async def end(self) -> None:
        """End QEMU if it has not, and let go of everything.  Harmless when done."""
        self._ending = True
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _END_S)
        if process is not None and process.returncode is None:
            process.kill()  # its main loop may wait for a page
            await process.wait()
        self._server.stop()
        if self._monitor is not None:
            await self._monitor.close()
        for task in (self._serving, self._errors):
            if task is not None:
                await asyncio.wait({task})
                task.cancelled() or task.exception()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _launch(self) -> None:
        self._ours, theirs = socket.socketpair()
        line = [*self._words, "-incoming", "defer"]
        line += ["-chardev", f"socket,id={_MONITOR},fd={theirs.fileno()}"]
        line += ["-mon", f"chardev={_MONITOR},mode=control"]
        for qmp in self.qmps:
            line += ["-qmp", f"{qmp},server=on,wait=off"]
        if self._options.paused or not self._server.ran:
            line += ["-S"]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *line, stderr=asyncio.subprocess.PIPE, pass_fds=[theirs.fileno()]
            )
        except OSError as error:
            self._ours.close()
            raise Refused(
                f"cannot start '{self._words[0]}': {error.strerror}; look at --qemu"
            ) from error
        finally:
            theirs.close()
        self._errors = asyncio.create_task(self._pass_errors_on(), name="stderr")

    async def _prepare(self) -> QmpConnection:
        self._monitor = monitor = await QmpConnection.over(
            self._ours, self._words[0], timeout_s=_GREETING_S
        )
        wanted = self._server.capabilities
        states = [{"capability": each.value, "state": True} for each in wanted]
        await monitor.execute("migrate-set-capabilities", {"capabilities": states})
        return monitor

    async def _serve(self, monitor: QmpConnection, uri: str) -> None:
        """Serve, and after each break again."""
        serve = self._server.serve
        while True:
            try:
                return await asyncio.to_thread(serve, uri)
            except NeedsRecovery:
                again = next(self._uris, None)
                if again is None or self._ending:
                    raise
                uri, serve = again, self._server.resume
                await self._listen_again(monitor, uri)

    async def _listen_again(self, monitor: QmpConnection, uri: str) -> None:
        """Have QEMU listen once more; its main loop may wait for a page meanwhile (``oob``)."""
        until = time.monotonic() + _NOTICES_S
        while True:
            try:
                await monitor.execute("migrate-recover", {"uri": uri}, oob=True)
            except Refused:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(_POLL_S)  # it has not noticed the break yet
            else:
                return

    async def _explaining(self, work: Awaitable[T]) -> T:
        """Wait for something that fails if QEMU ends; then the error has QEMU's own last line."""
        try:
            return await work
        except (ImageError, Refused):
            raise
        except PostcopyError as error:
            assert self._process is not None
            assert self._errors is not None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _END_S)
            if self._process.returncode is None:
                raise
            await self._errors
            raise GuestError(
                f"QEMU has ended with exit code {await self.wait()}: {self._reason or error}"
            ) from error

    def _on_status(self, status: Status) -> None:
        if status in {Status.POSTCOPY_ACTIVE, Status.COMPLETED}:
            self._loop.call_soon_threadsafe(self._runs.set)

    async def _pass_errors_on(self) -> None:
        """Copy QEMU's error output to ours, and keep the last line that tells a reason."""
        assert self._process is not None
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            os.write(2, line)
            text = line.decode(errors="replace").strip().removeprefix(f"{self._words[0]}: ")
            if text and not any(each in text for each in _NO_REASONS):
                self._reason = text


def words_of(command: str) -> list[str]:
    """Split QEMU's command line.

    :raises Refused: it cannot be, or has an option that a restore gives itself.
    """
    words = split_command(command)
    for word in words[1:]:
        if word.startswith("-") and word.lstrip("-") in _OURS:
            raise Refused(f"--qemu has '{word}': leave it out, the restore has its own way in")
    return words
