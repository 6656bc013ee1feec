"""Journeys with faults: whole migrations that leave no engine behind."""

import contextlib

import pytest

from faults import trace_hooks
from faults.orders import Stall
from journeys.conftest import journey, nothing_left_behind

__all__ = ["journey", "kill_at", "nothing_left_behind", "stalled"]


def subscribe(monkeypatch, environment):
    """Engines that start from now on inherit it."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def unsubscribe(monkeypatch):
    """Engines that start from now on neither die nor wait."""
    for name in trace_hooks.unsubscribed():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kill_at(monkeypatch, tmp_path):
    """``waits = kill_at(point)``: the next engine that comes there dies; ``waits()`` until one has."""

    def arm(point):
        marker = tmp_path / "armed"
        marker.touch()
        subscribe(monkeypatch, trace_hooks.kill_at(point, marker))
        return marker.exists

    return arm


@pytest.fixture
def stalled(tmp_path):
    """``stall = stalled(step)``: the next engine that comes there stands still; see :class:`Stall`."""
    with contextlib.ExitStack() as stack:

        def at(step):
            stall = Stall(step, tmp_path / "step")
            stack.callback(stall.close)
            return stall

        yield at
