"""Shows a migration or a snapshot until it ends, and handles Ctrl-C and the time limit."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, Final

import click

from postcopy.cli import progress_view
from postcopy.cli.failures import CommandFailed
from postcopy.cli.interrupts import SILENT_S, on_interrupt
from postcopy.cli.progress_view import View
from postcopy.client.migration import Migration
from postcopy.client.progress import Phase, name_of
from postcopy.client.result import Result
from postcopy.client.snapshot import SnapshotJob
from postcopy.client.snapshot_result import Snapshot
from postcopy.errors import MigrationFailed, NeedsRecovery, PostcopyError, Refused

_AFTER_SWITCHOVER: Final = frozenset(
    {Phase.POSTCOPY, Phase.PAUSED, Phase.RECOVERY, Phase.COMPLETED}
)
_GOES_ON: Final = "the guest runs at the destination, and its last pages are being sent"

_CANCELLING_S: Final = 10.0
"""A machine that answers must cancel within this time, or the command exits."""


class MigrationWatch:
    """Shows one migration; Ctrl-C cancels it before the switchover."""

    def __init__(self, migration: Migration, view: View) -> None:
        self._migration = migration
        self._view = view
        self._interrupts = 0
        self._why_cancelled: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._left = asyncio.Event()
        self._pending: set[asyncio.Task[None]] = set()

    async def until_end(
        self, timeout_s: float | None = None, left_s: float | None = None
    ) -> Result:
        """Show it until it ends.

        :param timeout_s: cancel the migration after this time, if that is still possible.
        :param left_s: the rest of that time, if some has passed already.
        :raises CommandFailed: the user has ended the command, or the time is over.
        :raises MigrationFailed: as :meth:`Migration.result`.
        """
        if timeout_s is not None:
            left_s = timeout_s if left_s is None else max(0.0, left_s)
            self._call_later(left_s, lambda: self._time_is_over(timeout_s))
        with on_interrupt(self._interrupted):
            shown = asyncio.create_task(self._show())
            left = asyncio.create_task(self._left.wait())
            await asyncio.wait({shown, left}, return_when=asyncio.FIRST_COMPLETED)
            left.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if not shown.done():
            shown.cancel()
            raise CommandFailed(self._why_cancelled or _GOES_ON)
        await shown
        return await self._outcome()

    def _call_later(self, delay_s: float, what: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_s, what)

    async def _outcome(self) -> Result:
        try:
            return await self._migration.result()
        except MigrationFailed as error:
            if self._why_cancelled is None or isinstance(error, NeedsRecovery):
                raise
            raise type(error)(f"{self._why_cancelled}: {error}") from error

    async def _show(self) -> None:
        async for progress in self._migration.events():
            self._view.show(progress)

    def _interrupted(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            self._leave(f"ended by the second Ctrl-C; {self._what_goes_on()}")
        elif self._migration.progress.phase in _AFTER_SWITCHOVER:
            self._view.note(f"too late to cancel: {_GOES_ON}; Ctrl-C again ends this command only")
        else:
            self._cancel("interrupted")

    def _what_goes_on(self) -> str:
        if self._migration.progress.phase in _AFTER_SWITCHOVER:
            return _GOES_ON
        return "the migration goes on; 'migrate_cancel' at the source ends it"

    def _time_is_over(self, timeout_s: float) -> None:
        why = f"not finished within {timeout_s:g} s"
        if self._migration.progress.phase in _AFTER_SWITCHOVER:
            self._leave(f"{why}; {_GOES_ON}")
        else:
            self._cancel(why, or_leave=True)

    def _cancel(self, why: str, *, or_leave: bool = False) -> None:
        self._why_cancelled = why
        self._view.note(f"{why}: cancelling; the guest stays at the source")
        task = asyncio.create_task(self._ask_to_cancel(why, or_leave=or_leave))
        self._pending.add(task)  # the event loop has only weak references
        task.add_done_callback(self._pending.discard)

    async def _ask_to_cancel(self, why: str, *, or_leave: bool) -> None:
        source = self._migration.source_address
        look = f"'postcopy status --from {source}' shows its state"
        try:
            async with asyncio.timeout(SILENT_S):
                await self._migration.cancel()
        except TimeoutError:
            self._leave(f"{why}: {source} does not answer; it cancels when it does; {look}")
        except Refused:
            self._view.note(f"too late: {_GOES_ON}")
            if or_leave:
                self._leave(f"{why}; {_GOES_ON}")
        except PostcopyError as error:
            self._view.note(f"cannot cancel: {error}")
        else:
            words = f"{why}: {source} has not cancelled within {_CANCELLING_S:g} s; {look}"
            self._call_later(_CANCELLING_S, lambda: self._leave(words))

    def _leave(self, words: str) -> None:
        self._why_cancelled = words
        self._left.set()


async def show_to_the_end(
    migration: Migration,
    *,
    as_json: bool,
    timeout_s: float | None = None,
    left_s: float | None = None,
) -> None:
    """Show the progress of a migration, and its figures at the end.

    :raises CommandFailed: see :meth:`MigrationWatch.until_end`, as for all other errors.
    """
    view = progress_view.choose(as_json=as_json)
    try:
        with view:
            for note in migration.notes:
                view.note(note)
            result = await MigrationWatch(migration, view).until_end(timeout_s, left_s)
    except PostcopyError as error:
        view.finish({"status": name_of(migration.status), "error": str(error)})
        raise
    view.finish({"status": "completed"} | result.to_json())
    if not as_json:
        click.echo(progress_view.as_table(list(progress_view.result_rows(result))))


@contextlib.contextmanager
def _on_end(callback: Callable[[], None]) -> Iterator[None]:
    """Make SIGTERM and SIGHUP call ``callback``: the snapshot needs this process to be published."""
    loop = asyncio.get_running_loop()
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
    ]
    for number in numbers:
        loop.add_signal_handler(number, callback)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class SnapshotWatch:
    """Shows one snapshot; Ctrl-C cancels it, and ends the command in any case."""

    def __init__(self, job: SnapshotJob, view: View, source: str) -> None:
        self._job = job
        self._view = view
        self._source = source
        self._shown = asyncio.create_task(self._show())
        self._cancelling: asyncio.Task[None] | None = None
        self._left = asyncio.Event()
        self._words = ""

    async def until_end(self) -> Snapshot:
        """Show it until it ends.

        :raises CommandFailed: the user has ended the command.
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
        for note in self._job.notes:
            self._view.note(note)
        return await self._job.result()

    def _interrupted(self) -> None:
        if self._cancelling is not None:
            self._leave("ended by the second Ctrl-C: the snapshot may go on")
            return
        self._view.note("interrupted: cancelling the snapshot; the guest runs on")
        self._cancelling = asyncio.create_task(self._cancel())

    async def _cancel(self) -> None:
        silent = f"{self._source} does not answer; it cancels the snapshot when it does"
        try:
            async with asyncio.timeout(SILENT_S):
                await self._job.cancel()
        except TimeoutError:
            self._leave(f"interrupted: {silent}")
        except PostcopyError as error:
            self._view.note(f"cannot cancel: {error}")
        else:
            await asyncio.wait({self._shown}, timeout=_CANCELLING_S)
            self._leave("interrupted: the snapshot has not been cancelled yet")

    def _leave(self, words: str) -> None:
        self._words = f"{words}; the guest runs on, and {self._job.written} may remain"
        self._left.set()
