"""Waiting in tests for a condition, never for a time."""

import threading
import time
from collections.abc import Callable

POLL_S = 0.005


def wait_until(
    condition: Callable[[], object], timeout_s: float = 10.0, what: str | Callable[[], str] = ""
) -> None:
    """Look again and again until ``condition`` holds.

    :param what: what was waited for; called for its words if it has to be said.
    :raises AssertionError: it still does not after ``timeout_s`` seconds.
    """
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            told = what() if callable(what) else what
            raise AssertionError(f"not within {timeout_s} s: {told or condition}")
        pause.wait(POLL_S)
