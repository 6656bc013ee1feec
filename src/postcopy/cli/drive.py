"""Watches a migration to its end, with an eye on Ctrl-C and the clock."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import click

from postcopy.cli import progress_view, report
from postcopy.cli.failures import CommandFailed
from postcopy.cli.leaving import SILENT_S, LastResort, on_interrupt
from postcopy.cli.progress_view import View
from postcopy.client.migration import Migration
from postcopy.client.progress import Phase, name_of
from postcopy.client.result import Result
from postcopy.errors import MigrationFailed, NeedsRecovery, PostcopyError, Refused

_AFTER_SWITCHOVER: Final = frozenset(
    {Phase.POSTCOPY, Phase.PAUSED, Phase.RECOVERY, Phase.COMPLETED}
)
_GOES_ON: Final = (
    "the guest has moved and runs at the destination; its last pages follow by themselves"
)

_INTERRUPTED: Final = "interrupted"
_CANCELLING_S: Final = 10.0
"""So long a machine that answers may take to cancel, after which it is left to do so alone."""

T = TypeVar("T")


class Watch:
    """One migration under the eyes of a command."""

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

        :param timeout_s: cancel it then, if that is still possible.
        :param left_s: what is left of that time, where some has passed already.
        :raises CommandFailed: the user has left, or the time is over.
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
            self._leave(f"left alone by the second Ctrl-C; {self._what_goes_on()}")
        elif self._migration.progress.phase in _AFTER_SWITCHOVER:
            self._view.note(f"no way back: {_GOES_ON}; Ctrl-C again leaves them to it")
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
        self._pending.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._pending.discard)

    async def _ask_to_cancel(self, why: str, *, or_leave: bool) -> None:
        source = self._migration.source_address
        look = f"'postcopy status --from {source}' tells what has become of it"
        try:
            async with asyncio.timeout(SILENT_S):
                await self._migration.cancel()
        except TimeoutError:
            self._leave(f"{why}: {source} does not answer; it is to cancel when it does; {look}")
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
    """Show a migration as it goes, and its figures in the end.

    :raises CommandFailed: see :meth:`Watch.until_end`, as for all the rest.
    """
    view = progress_view.choose(as_json=as_json)
    try:
        with view:
            for note in migration.notes:
                view.note(note)
            result = await Watch(migration, view).until_end(timeout_s, left_s)
    except PostcopyError as error:
        view.finish({"status": name_of(migration.status), "error": str(error)})
        raise
    view.finish({"status": "completed"} | result.to_json())
    if not as_json:
        click.echo(report.text(list(report.lines(result))))


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine.

    Ctrl-C, where the command does not handle it itself, ends it; what is still to be tidied up gets a
    moment for that, and no more.

    :raises CommandFailed: it was ended by Ctrl-C.
    """
    last_resort = LastResort()
    try:
        return asyncio.run(_until_interrupted(work, last_resort))
    except asyncio.CancelledError:
        raise CommandFailed(_INTERRUPTED) from None
    finally:
        last_resort.call_off()


async def _until_interrupted(work: Coroutine[Any, Any, T], last_resort: LastResort) -> T:
    task = asyncio.create_task(work)

    def interrupted() -> None:
        last_resort.arm(_INTERRUPTED)
        task.cancel()

    with on_interrupt(interrupted):
        try:
            return await task
        except CommandFailed as failure:
            last_resort.arm(str(failure))  # tasks that are left may wait for a machine
            raise
