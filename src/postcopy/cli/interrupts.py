"""Runs a command's coroutine, and ends the command at Ctrl-C within a bounded time."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Final, TypeVar

from postcopy.cli.failures import FAILED, CommandFailed
from postcopy.cli.process import notice

SILENT_S: Final = 2.0
"""A machine must answer within this time after Ctrl-C."""

_CLEAN_UP_S: Final = 2.0
_INTERRUPTED: Final = "interrupted"

T = TypeVar("T")


class ExitTimer:
    """Exits the process, with a line on stderr, unless the command ends within a time."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def arm(self, words: str, within_s: float = _CLEAN_UP_S) -> None:
        """Start the timer; an earlier one is stopped."""
        self.disarm()
        self._timer = threading.Timer(within_s, _exit, (words,))
        self._timer.daemon = True
        self._timer.start()

    def disarm(self) -> None:
        """Stop the timer; harmless when it is not armed."""
        if self._timer is not None:
            self._timer.cancel()


@contextlib.contextmanager
def on_interrupt(callback: Callable[[], None]) -> Iterator[None]:
    """Make Ctrl-C call ``callback`` in the running event loop while the context lasts.

    If the loop is blocked, as by a terminal that is stopped, the process exits.
    """
    loop = asyncio.get_running_loop()
    exit_timer = ExitTimer()

    def interrupted(_number: int, _frame: FrameType | None) -> None:
        exit_timer.arm(_INTERRUPTED)
        loop.call_soon_threadsafe(called)

    def called() -> None:
        exit_timer.disarm()
        callback()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine.

    Ctrl-C, unless the command handles it itself, cancels the coroutine, whose clean-up has a bounded time.

    :raises CommandFailed: the command was ended by Ctrl-C.
    """
    exit_timer = ExitTimer()
    try:
        return asyncio.run(_until_interrupted(work, exit_timer))
    except asyncio.CancelledError:
        raise CommandFailed(_INTERRUPTED) from None
    finally:
        exit_timer.disarm()


async def _until_interrupted(work: Coroutine[Any, Any, T], exit_timer: ExitTimer) -> T:
    task = asyncio.create_task(work)

    def interrupted() -> None:
        exit_timer.arm(_INTERRUPTED)
        task.cancel()

    with on_interrupt(interrupted):
        try:
            return await task
        except CommandFailed as failure:
            exit_timer.arm(str(failure))  # other tasks may wait for a machine
            raise


def _exit(words: str) -> None:
    notice(words)
    os._exit(FAILED)
