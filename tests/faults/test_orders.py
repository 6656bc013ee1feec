"""Orders of a user in the midst of a journey: a sample of :mod:`faults.orders`; ``make soak`` has the rest.

``POSTCOPY_ORDERS`` says how many cases, ``POSTCOPY_SEED`` which.
"""

import os

import pytest

from faults import orders, storm

SEED = int(os.environ.get("POSTCOPY_SEED", "1"))
COUNT = int(os.environ.get("POSTCOPY_ORDERS", "40"))


@pytest.mark.parametrize("case", orders.sample(COUNT, SEED), ids=str)
def test_one_owner(huge_pages, journey, tmp_path, case):
    if case.journey == "huge":
        huge_pages(storm.HUGE_PAGES)
    print(f"POSTCOPY_SEED={SEED} POSTCOPY_ORDERS={COUNT}")  # noqa: T201 - how to repeat it
    orders.run(case, journey, tmp_path)
