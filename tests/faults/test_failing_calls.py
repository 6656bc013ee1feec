"""Kernel calls fail in the midst of whole journeys: a sample of the matrix.

``make soak`` draws others all the time.  ``POSTCOPY_SEED`` is the sample's seed, which a failure tells.
"""

import itertools
import os

import pytest

from faults.failing_journeys import JOURNEYS
from faults.failing_matrix import Runner, draw, host_pages
from faults.failing_scene import Case

PER_JOURNEY = int(os.environ.get("POSTCOPY_FAILING_CALLS_CASES", "2"))
SEED = int(os.environ.get("POSTCOPY_SEED", "13"))

pytestmark = pytest.mark.kvm


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    made = Runner(tmp_path_factory.mktemp("runner"))
    yield made
    made.close()


@pytest.mark.parametrize("journey", JOURNEYS)
def test_at_random(runner, journey):
    with host_pages(journey):
        counted = runner.run(Case(journey))
        assert not counted.wrong, counted.wrong
        for case in itertools.islice(draw(journey, counted.seen, SEED), PER_JOURNEY):
            result = runner.run(case)
            assert not result.wrong, f"POSTCOPY_SEED={SEED}: {result}"
