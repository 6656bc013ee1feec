"""Waiting in tests for a condition, never for a time."""

import sys
import threading
import time
from collections.abc import Callable

from fakes.stacks import stacks

POLL_S = 0.005


def holds_within(timeout_s: float, condition: Callable[[], object]) -> bool:
    """Look again and again until ``condition`` holds; return whether it does."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(POLL_S)
    return True


def wait_until(
    condition: Callable[[], object], timeout_s: float = 10.0, what: str | Callable[[], str] = ""
) -> None:
    """Wait until ``condition`` holds.

    :param what: what was waited for; called for its words if it has to be said.
    :raises AssertionError: it still does not after ``timeout_s`` seconds; what all threads of all
        processes do then, those that this one has started included, is in its text.
    """
    if not holds_within(timeout_s, condition):
        told = what() if callable(what) else what
        raise AssertionError(f"not within {timeout_s} s: {told or condition}\n{stacks()}")


def is_inside(thread: threading.Thread, function: str) -> bool:
    """Whether a thread is in a call of the function of this name."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None
