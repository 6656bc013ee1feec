"""Engines are killed at random, many times; more with ``POSTCOPY_FAULTS=100``."""

import pytest

from faults import storm


@pytest.mark.parametrize("seed", storm.seeds())
def test_random_kills(journey, tmp_path, seed):
    storm.say_how_to_repeat(seed)
    storm.kills(journey, tmp_path, seed)
