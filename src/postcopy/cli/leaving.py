"""How a command ends by Ctrl-C or by its time, whatever the machine and its own clean-up do."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from postcopy.cli.failures import FAILED
from postcopy.cli.notices import notice

SILENT_S: Final = 2.0
"""So long a machine may take to answer somebody who has lost patience."""

_CLEAN_UP_S: Final = 2.0


class LastResort:
    """Leaves the process, with a line on stderr, unless the command has ended within a while."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def arm(self, words: str, within_s: float = _CLEAN_UP_S) -> None:
        """Begin to count; again, and what was armed before is called off."""
        self.call_off()
        self._timer = threading.Timer(within_s, _leave, (words,))
        self._timer.daemon = True
        self._timer.start()

    def call_off(self) -> None:
        """The command has ended by itself; harmless when nothing is armed."""
        if self._timer is not None:
            self._timer.cancel()


@contextlib.contextmanager
def on_interrupt(callback: Callable[[], None]) -> Iterator[None]:
    """Have Ctrl-C call ``callback`` in the running event loop, as long as the context lasts.

    A loop that does not come to it, as it waits for a terminal that is held, is left.
    """
    loop = asyncio.get_running_loop()
    last_resort = LastResort()

    def interrupted(_number: int, _frame: FrameType | None) -> None:
        last_resort.arm("interrupted")
        loop.call_soon_threadsafe(called)

    def called() -> None:
        last_resort.call_off()
        callback()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(words: str) -> None:
    notice(words)
    os._exit(FAILED)
