"""What vCPUs wait for when a link breaks or an engine dies is told by its name."""

import pytest

from fakes.pair import POSTCOPY
from fakes.waiting import wait_until
from faults.recovering import DEADLINE_S, Recovering, broken_journey
from postcopy.parameters import Capability
from postcopy.status import Status

PREEMPT = (*POSTCOPY, Capability.POSTCOPY_PREEMPT)


@pytest.mark.parametrize(
    ("capabilities", "page"), [(POSTCOPY, "page"), (PREEMPT, "preempt")], ids=["plain", "preempt"]
)
def test_each_cause_of_a_wait_is_told(journey, tmp_path, capabilities, page):
    with Recovering(broken_journey(journey, capabilities=capabilities), tmp_path) as broken:
        destination = broken.destination

        def told():
            return destination.control.info().measured.blocktime_causes_us

        def until_longer(cause):
            """The guest goes on writing, so it soon waits, and does until there is a page for it."""
            wait_until(lambda: cause in told(), DEADLINE_S, cause)
            before_us = sum(told()[cause])
            wait_until(lambda: sum(told()[cause]) > before_us, DEADLINE_S, f"more of {cause}")

        channel = broken.start()
        broken.until_postcopy()
        until_longer(page)
        assert set(told()) == {page}
        channel.break_all()
        destination.wait(Status.POSTCOPY_PAUSED)
        until_longer("paused")
        assert set(told()) == {page, "paused"}
        destination.engine.kill()
        # What the dead one knew is gone.
        until_longer("engine")
        assert set(told()) == {"engine"}
        broken.until_settled()
        broken.resume()
        until_longer(page)
        broken.hurry()
        for side in (broken.source, destination):
            side.wait(Status.COMPLETED)
        measured = destination.control.info().measured
        assert {"engine", page} <= set(measured.blocktime_causes_us) <= {"engine", "recovery", page}
        of_all = zip(*measured.blocktime_causes_us.values(), strict=True)
        assert tuple(map(sum, of_all)) == measured.blocktime_us
