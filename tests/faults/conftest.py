"""Journeys with faults: whole migrations that leave no engine behind."""

from journeys.conftest import journey, nothing_left_behind

__all__ = ["journey", "nothing_left_behind"]
