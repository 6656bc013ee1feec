"""The link is cut at random, many times; more with ``POSTCOPY_FAULTS=1000``."""

import pytest

from faults import storm


@pytest.mark.parametrize(("seed", "variant"), storm.tests())
def test_random_cuts(journey, tmp_path, seed, variant):
    storm.say_how_to_repeat(seed)
    with storm.host_pages(variant):
        storm.cuts(journey, tmp_path, seed, variant)


@pytest.mark.parametrize(("seed", "variant"), storm.tls_tests())
def test_random_cuts_with_tls(journey, tmp_path, seed, variant):
    storm.say_how_to_repeat(seed)
    storm.cuts(journey, tmp_path, seed, variant)
