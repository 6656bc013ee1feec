"""The map that a watcher gets, on the way of a real guest: each page is in one state, at either side."""

import pytest

from fakes.pair import Journey, hammer
from fakes.waiting import wait_until
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]
POSTCOPY = (Capability.POSTCOPY_RAM, Capability.POSTCOPY_BLOCKTIME)
PAGES = (64 << 20) >> 12
SLOW = {"max-bandwidth": 8 << 20, "max-postcopy-bandwidth": 4 << 20}


def taken(side):
    found = side.control.memory_map()
    assert sum(found.pages.values()) == PAGES, found
    assert len(found.cells) == sum(cells for _, cells, _ in found.blocks)
    return found


def test_both_sides_say_where_each_page_is():
    with Journey(hammer(64, fill_kib=16384), capabilities=POSTCOPY, parameters=SLOW) as journey:
        source, destination = journey.source, journey.destination
        assert taken(source).pages == {"at-source": PAGES}
        journey.migrate()
        wait_until(lambda: taken(source).pages.get("in-place", 0) > 0, 20, "pages have left")
        source.control.start_postcopy()
        source.wait(Status.POSTCOPY_ACTIVE)
        missing = int((~destination.received()).sum())
        seen = taken(destination).pages
        left = seen.get("at-source", 0) + seen.get("asked-for", 0)
        assert 0 < left <= missing
        wait_until(
            lambda: destination.control.info().measured.fault_latency_dist, 20, "the first fault"
        )
        source.set(parameters={"max-postcopy-bandwidth": 0})
        journey.finish()
        assert taken(source).pages == {"in-place": PAGES}
        assert taken(destination).pages == {"in-place": PAGES}
        figures = destination.control.info()
        assert figures.measured.fault_latency_dist == figures.postcopy_latency_dist


def test_what_is_lost_is_shown_as_lost():
    with Journey(
        hammer(64, fill_kib=16384),
        capabilities=POSTCOPY,
        parameters=SLOW | {"max-postcopy-bandwidth": 1 << 20},
    ) as journey:
        source, destination = journey.source, journey.destination
        destination.set(parameters={"x-on-loss": "poison"})
        journey.migrate()
        source.control.start_postcopy()
        source.wait(Status.POSTCOPY_ACTIVE)
        source.control.pause()
        destination.wait(Status.POSTCOPY_PAUSED)
        before = taken(destination)
        assert "s" in before.cells
        destination.control.lost()
        after = taken(destination)
        assert after.pages["lost"] == sum(destination.keeper.lost.values()) > 0
        assert "s" not in after.cells
        assert "l" in after.cells
