"""Whole migrations: each test gets ``journey``, and leaves no engine behind."""

import contextlib

import pytest

from fakes.pair import Journey, engines
from fakes.waiting import wait_until


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Every engine ends with the migration subsystem that started it."""
    yield
    wait_until(lambda: not engines(), 10, f"engines of this test are left: {engines()}")


@pytest.fixture
def journey():
    """``journey(workload, …)`` makes a :class:`fakes.pair.Journey`, closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **more: stack.enter_context(_begin(*arguments, **more))


def _begin(*arguments, **more):
    made = Journey.__new__(Journey)
    try:
        made.__init__(*arguments, **more)
    except BaseException:
        made.close()
        raise
    return made
