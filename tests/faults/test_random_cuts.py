"""The link is cut at random, many times; more with ``POSTCOPY_FAULTS=100``."""

import pytest

from faults import storm


@pytest.mark.parametrize("seed", storm.seeds())
def test_random_cuts(journey, tmp_path, seed):
    storm.say_how_to_repeat(seed)
    storm.cuts(journey, tmp_path, seed)
