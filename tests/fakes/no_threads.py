"""A host that has no room for another thread, as Python says it of pthread_create(3)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from postcopy.kernel import patience


class NoThreads:
    """Refuses to start threads of some names."""

    def __init__(self) -> None:
        self._start = threading.Thread.start
        self._left: dict[str, float] = {}

    def refuse(self, name: str, times: float = float("inf")) -> None:
        """So many times from now on."""
        self._left[name] = times

    def allow(self) -> None:
        """From now on there is room."""
        self._left = {}

    def start(self, thread: threading.Thread) -> None:
        """In place of :meth:`threading.Thread.start`."""
        if self._left.get(thread.name, 0) > 0:
            self._left[thread.name] -= 1
            raise RuntimeError("can't start new thread")
        self._start(thread)


@contextmanager
def host_without_threads() -> Iterator[NoThreads]:
    """In this process; what lasts is known soon."""
    with pytest.MonkeyPatch.context() as patch:
        made = NoThreads()

        def start(thread: threading.Thread) -> None:
            made.start(thread)

        patch.setattr(threading.Thread, "start", start)
        patch.setattr(patience, "LASTING_S", 0.5)
        yield made
