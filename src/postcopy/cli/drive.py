"""Watches a migration to its end, with an eye on Ctrl-C and the clock."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from typing import Any, Final, TypeVar

import click

from postcopy.cli import progress_view, report
from postcopy.cli.failures import CommandFailed
from postcopy.cli.progress_view import View
from postcopy.client.migration import Migration
from postcopy.client.progress import Phase
from postcopy.client.result import Result
from postcopy.client.told import name_of
from postcopy.errors import MigrationFailed, NeedsRecovery, PostcopyError, Refused

_AFTER_SWITCHOVER: Final = frozenset(
    {Phase.POSTCOPY, Phase.PAUSED, Phase.RECOVERY, Phase.COMPLETED}
)
_GOES_ON: Final = (
    "the guest has moved and runs at the destination; its last pages follow by themselves"
)

T = TypeVar("T")


class Watch:
    """One migration under the eyes of a command."""

    def __init__(self, migration: Migration, view: View) -> None:
        self._migration = migration
        self._view = view
        self._interrupts = 0
        self._why_cancelled: str | None = None
        self._left = asyncio.Event()
        self._pending: set[asyncio.Task[None]] = set()

    async def until_end(self, timeout_s: float | None = None) -> Result:
        """Show it until it ends.

        :param timeout_s: cancel it then, if that is still possible.
        :raises CommandFailed: the user has left, or the time is over.
        :raises MigrationFailed: as :meth:`Migration.result`.
        """
        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout_s, self._time_is_over, timeout_s) if timeout_s else None
        with self._on_interrupt(loop):
            shown = asyncio.create_task(self._show())
            left = asyncio.create_task(self._left.wait())
            await asyncio.wait({shown, left}, return_when=asyncio.FIRST_COMPLETED)
            left.cancel()
        if timer is not None:
            timer.cancel()
        if not shown.done():
            shown.cancel()
            raise CommandFailed(self._why_cancelled or _GOES_ON)
        await shown
        return await self._outcome()

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

    @contextlib.contextmanager
    def _on_interrupt(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        loop.add_signal_handler(signal.SIGINT, self._interrupted)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    def _interrupted(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            self._why_cancelled = f"left alone by the second Ctrl-C; {self._what_goes_on()}"
            self._left.set()
        elif self._migration.progress.phase in _AFTER_SWITCHOVER:
            self._view.note(f"no way back: {_GOES_ON}; Ctrl-C again leaves them to it")
        else:
            self._cancel("interrupted")

    def _what_goes_on(self) -> str:
        if self._migration.progress.phase in _AFTER_SWITCHOVER:
            return _GOES_ON
        return "the migration goes on; 'migrate_cancel' at the source ends it"

    def _time_is_over(self, timeout_s: float) -> None:
        if self._migration.progress.phase in _AFTER_SWITCHOVER:
            self._why_cancelled = f"not finished within {timeout_s:g} s; {_GOES_ON}"
            self._left.set()
        else:
            self._cancel(f"not finished within {timeout_s:g} s")

    def _cancel(self, why: str) -> None:
        self._why_cancelled = why
        self._view.note(f"{why}: cancelling; the guest stays at the source")
        task = asyncio.create_task(self._ask_to_cancel())
        self._pending.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._pending.discard)

    async def _ask_to_cancel(self) -> None:
        try:
            await self._migration.cancel()
        except Refused:
            self._view.note(f"too late: {_GOES_ON}")
        except PostcopyError as error:
            self._view.note(f"cannot cancel: {error}")


async def show_to_the_end(
    migration: Migration, *, as_json: bool, timeout_s: float | None = None
) -> None:
    """Show a migration as it goes, and its figures in the end.

    :raises CommandFailed: see :meth:`Watch.until_end`, as for all the rest.
    """
    view = progress_view.choose(as_json=as_json)
    try:
        with view:
            result = await Watch(migration, view).until_end(timeout_s)
    except PostcopyError as error:
        view.finish({"status": name_of(migration.status), "error": str(error)})
        raise
    view.finish({"status": "completed"} | result.to_json())
    if not as_json:
        click.echo(report.text(list(report.lines(result))))


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; Ctrl-C outside a migration ends it."""
    return asyncio.run(work)
