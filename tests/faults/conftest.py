"""Journeys with faults: whole migrations that leave no engine behind."""

import pytest

from journeys.conftest import journey, nothing_left_behind
from postcopy import kill_points

__all__ = ["journey", "kill_at", "nothing_left_behind"]


@pytest.fixture
def kill_at(monkeypatch, tmp_path):
    """``waits = kill_at(point)``: the next engine that comes there dies; ``waits()`` until one has."""

    def arm(point):
        marker = tmp_path / "armed"
        marker.touch()
        monkeypatch.setenv(kill_points.VARIABLE, f"{point}@{marker}")
        return marker.exists

    return arm
