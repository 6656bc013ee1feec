"""Links, engines and back ends end at random, many times; more with ``POSTCOPY_BACK_END_JOURNEYS=50``."""

import os

import pytest

from faults.back_ends import back_ends

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

JOURNEYS = int(os.environ.get("POSTCOPY_BACK_END_JOURNEYS", "4"))
"""One of each kind of memory."""
FIRST_SEED = int(os.environ.get("POSTCOPY_SEED", "1"))


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + JOURNEYS))
def test_random_back_ends(journey, tmp_path, seed):
    print(f"POSTCOPY_SEED={seed} POSTCOPY_BACK_END_JOURNEYS=1 repeats this one")  # noqa: T201
    back_ends(journey, tmp_path, seed)
