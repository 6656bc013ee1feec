"""Watches a snapshot to its end, with an eye on Ctrl-C."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, Final

from postcopy.cli.failures import CommandFailed
from postcopy.cli.leaving import SILENT_S, on_interrupt
from postcopy.cli.progress_view import View
from postcopy.client.snapshot import Snapshot, SnapshotJob
from postcopy.errors import PostcopyError

_GIVING_UP_S: Final = 10.0
"""So long a machine that answers may take to give a snapshot up."""


@contextlib.contextmanager
def _on_end(callback: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM and SIGHUP call ``callback``: nobody else would publish what the machine writes."""
    loop = asyncio.get_running_loop()
    heeded = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
    ]
    for number in heeded:
        loop.add_signal_handler(number, callback)
    try:
        yield
    finally:
        for number in heeded:
            loop.remove_signal_handler(number)


class SnapshotWatch:
    """One snapshot under the eyes of a command, which Ctrl-C ends whatever the machine does."""

    def __init__(self, job: SnapshotJob, view: View, source: str) -> None:
        self._job = job
        self._view = view
        self._source = source
        self._shown = asyncio.create_task(self._show())
        self._giving_up: asyncio.Task[None] | None = None
        self._left = asyncio.Event()
        self._words = ""

    async def until_end(self) -> Snapshot:
        """Show it until it ends.

        :raises CommandFailed: the user has left.
        """
        left = asyncio.create_task(self._left.wait())
        ends: set[asyncio.Task[Any]] = {self._shown, left}
        with on_interrupt(self._interrupted), _on_end(self._interrupted):
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not self._shown.done():
            self._shown.cancel()
            raise CommandFailed(self._words)
        return await self._shown

    async def _show(self) -> Snapshot:
        async for look in self._job.events():
            self._view.show(look)
        return await self._job.result()

    def _interrupted(self) -> None:
        if self._giving_up is not None:
            self._leave("left alone by the second Ctrl-C: the snapshot may go on")
            return
        self._view.note("interrupted: giving the snapshot up; the guest goes on")
        self._giving_up = asyncio.create_task(self._give_up())

    async def _give_up(self) -> None:
        silent = f"{self._source} does not answer; it is to give the snapshot up when it does"
        try:
            async with asyncio.timeout(SILENT_S):
                await self._job.cancel()
        except TimeoutError:
            self._leave(f"interrupted: {silent}")
        except PostcopyError as error:
            self._view.note(f"cannot cancel: {error}")
        else:
            await asyncio.wait({self._shown}, timeout=_GIVING_UP_S)
            self._leave("interrupted: the snapshot has not been given up yet")

    def _leave(self, words: str) -> None:
        self._words = f"{words}; the guest goes on, and {self._job.written} may stay"
        self._left.set()
