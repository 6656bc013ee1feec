"""Waiting in tests for a condition, never for a time."""

import threading
import time
from collections.abc import Callable

POLL_S = 0.005


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0, what: str = "") -> None:
    """Look again and again until ``condition`` holds.

    :raises AssertionError: it still does not after ``timeout_s`` seconds.
    """
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        pause.wait(POLL_S)
